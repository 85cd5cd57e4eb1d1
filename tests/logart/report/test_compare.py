"""Comparisons of networks on the same images, against numpy and plain counting."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import assert_refused

from logart import QuantConfig, quantize_model, save_packed
from logart.report.compare import Answers, Compared, compare_answers, main, verdict
from logart_cnn.main import main as run
from logart_cnn.models import load_network


def answers_of(logits: torch.Tensor, labels: torch.Tensor) -> Answers:
    return Answers(logits.log_softmax(1), logits.argmax(1) == labels, 1.0)


def test_a_pair_is_what_numpy_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, 60, 3, generator=generator)
    labels = torch.randint(0, 3, (60,), generator=generator)
    second = first + 0.7 * noise
    pair = compare_answers(answers_of(first, labels), answers_of(second, labels))
    a, b = (np.exp(x.double().numpy()) for x in (first, second))
    a, b = (x / x.sum(1, keepdims=True) for x in (a, b))
    right = [x.argmax(1) == labels.numpy() for x in (a, b)]
    gain = right[1].astype(float) - right[0].astype(float)
    assert (pair.lost, pair.won) == ((gain < 0).sum(), (gain > 0).sum()) and min(pair.lost, pair.won) > 0
    assert pair.agreement == pytest.approx(100 * (a.argmax(1) == b.argmax(1)).mean())
    assert pair.kl == pytest.approx((a * np.log(a / b)).sum(1).mean(), rel=1e-5)
    assert pair.difference == pytest.approx(100 * gain.mean())
    assert pair.standard_error == pytest.approx(100 * gain.std() / math.sqrt(60))
    n, least = pair.lost + pair.won, min(pair.lost, pair.won)
    assert pair.p == pytest.approx(min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n))


@pytest.mark.parametrize("lost, won, said", [(0, 0, "right on the same images"), (3, 1, "not told apart"),
                                             (12, 0, "less accurate"), (0, 12, "more accurate")])  # fmt: skip
def test_a_difference_that_chance_explains_is_no_progress(lost: int, won: int, said: str) -> None:
    labels = torch.zeros(40, dtype=torch.long)
    wrong, right = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    first = torch.stack([wrong] * won + [right] * (40 - won))
    second = torch.stack([right] * won + [wrong] * lost + [right] * (40 - won - lost))
    pair = compare_answers(answers_of(first, labels), answers_of(second, labels))
    assert said in verdict(Compared("B", 4, 1, 0.0, 0.0, 0.0, pair), "A")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the digits network, and a file that a run has not written."""
    out = tmp_path_factory.mktemp("compare")
    for bits in ("2", "4"):
        argv = ["--rounding", "nearest", "--n_bits_w", bits, "--run_dir", str(out / f"run{bits}"), "--workers", "0"]
        assert run([*argv, "--device", "cpu", "--quiet", "--results", str(out / "results.csv")]) == 0
    model = load_network("digits_resnet").model
    config = QuantConfig(n_bits=4, rounding="nearest")  # type: ignore[arg-type]
    save_packed(quantize_model(model, config, torch.zeros(4, 1, 8, 8))[0], out / "bare.safetensors")
    return out


def test_the_command_compares_runs_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two, four, file = folder / "run2", folder / "run4", folder / "run4" / "packed.safetensors"
    words = ["--workers", "0", "--device", "cpu"]
    capsys.readouterr()
    assert main([str(four), str(two), str(file), *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["data"], said["images"]) == ("digits", 500)
    first, second, same = said["networks"]
    reports = [json.loads((run / "report.json").read_text())["row"]["Acc@1"] for run in (four, two)]
    assert [first["accuracy"], second["accuracy"]] == pytest.approx(reports)
    pair = second["against_first"]
    assert pair["difference"] == pytest.approx(reports[1] - reports[0]) and pair["p"] < 1e-9
    assert same["against_first"] | {"kl": 0.0} == {
        "agreement": 100.0, "kl": 0.0, "difference": 0.0, "standard_error": 0.0, "lost": 0, "won": 0, "p": 1.0,
    }  # fmt: skip
    assert (first["bits"], second["bits"], first["bytes"]) == (4, 2, file.stat().st_size)
    assert main([str(four), str(two), *words, "--images", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("100 test images of digits") and "by more than chance explains" in lines[-1]
    assert len({len(line) for line in lines[1:4]}) == 1  # aligned


def test_wrong_calls_take_one_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run4 = str(folder / "run4")
    for argv, line in (
        ([run4], f"PATH: only '{run4}'; expected two or more"),
        ([run4, str(tmp_path / "no")], f"{tmp_path / 'no'}: does not exist"),
        ([run4, str(tmp_path)], f"{tmp_path / 'packed.safetensors'}: does not exist"),
        ([run4, str(folder / "bare.safetensors")], f"{folder / 'bare.safetensors'}: does not say which images"),
        ([run4, run4, "--images", "0"], "--images: 0; expected 1 or more"),
        ([run4, run4, "--data_path", str(tmp_path / "no")], f"--data_path: no folder {tmp_path / 'no'}"),
    ):
        assert_refused(main, [*argv, "--device", "cpu"], f"logart-compare: {line}", capfd)
