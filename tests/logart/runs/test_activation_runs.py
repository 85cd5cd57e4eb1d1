"""Runs of both commands with quantized activations: their rows, resuming, what inspect and the report show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_runs import rows

import logart.inspect
import logart_cnn.main
import logart_vit.main
from logart.packed.file import PackedFile
from logart.report.page import Table
from logart.report.run_page import run_blocks
from logart.report.runs import read_run
from logart.runs.methods import method_name

CNN = "--preset fast --calib_samples 32 --n_bits_a 3 --input_bits_a 8 --workers 0 --device cpu".split()
VIT = ("--preset fast --optim_size 32 --a_bit 4 --act_scale pow2 --softmax_grid log_2 --calibrate_with_act --iters_a 2 "
       "--num_workers 0 --device cpu").split()  # fmt: skip
RUNS = {"cnn": (logart_cnn.main.main, CNN), "vit": (logart_vit.main.main, VIT)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for track, (main, argv) in RUNS.items():
        out = ["--results", str(folder / f"{track}.csv"), "--run_dir", str(folder / track), "--quiet"]
        assert main([*argv, *out]) == 0
    return folder


def test_rows_have_the_settings_and_both_accuracies(whole: Path) -> None:
    (cnn,), (vit,) = rows(whole / "cnn.csv"), rows(whole / "vit.csv")
    said = {name: cnn[name] for name in ("bits_a", "input_bits_a", "head_bits_a", "act_scale", "softmax_grid")}
    assert said == {"bits_a": "3", "input_bits_a": "8", "head_bits_a": "3", "act_scale": "float",
                    "softmax_grid": "uniform"}  # fmt: skip
    assert (vit["act_scale"], vit["softmax_grid"], vit["iters_a"]) == ("pow2", "log_2", "2")
    assert (cnn["calibrate_with_act"], vit["calibrate_with_act"]) == ("False", "True")
    accuracies = json.loads((whole / "cnn" / "accuracies.json").read_text())["accuracies"]
    assert list(accuracies) == ["float", "rounded", "activations"]
    assert float(cnn["weights_Acc@1"]) == pytest.approx(accuracies["rounded"]["top1"], abs=1e-3)
    assert float(cnn["Acc@1"]) == pytest.approx(accuracies["activations"]["top1"], abs=1e-3)
    assert vit["weights_Acc@1"] == "" and float(vit["Acc@1"]) > 50
    log = (whole / "cnn" / "log.txt").read_text()
    assert "3-bit activations, input 8 bits" in method_name(cnn)
    assert "with 3-bit activations" in log and "activations: 13 tensors are quantized; most saturates" in log


@pytest.mark.parametrize("track", RUNS)
@pytest.mark.parametrize("kept", [0, 2])
def test_a_run_resumed_among_the_activations_comes_to_the_same(
    track: str, kept: int, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole / track, folder)
    stage = {"cnn": "activations", "vit": "activation steps"}[track]
    late = sorted(folder.glob(f"blocks/{stage}-*"))[kept:]
    assert late
    for path in [folder / "report.json", folder / "packed.safetensors", *late]:
        path.unlink()
    assert RUNS[track][0](["--resume", str(folder), "--results", str(tmp_path / "r.csv"), "--quiet"]) == 0
    before, after = (PackedFile.read(path / "packed.safetensors") for path in (whole / track, folder))
    assert {n: t.tolist() for n, t in before.rest.items()} == {n: t.tolist() for n, t in after.rest.items()}
    assert before.info["activations"] == after.info["activations"]
    assert [layer.codes.tolist() for layer in before.layers.values()] == [
        layer.codes.tolist() for layer in after.layers.values()
    ]


def test_inspect_and_report_show_every_quantized_tensor(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = whole / "vit" / "packed.safetensors"
    told = PackedFile.read(file).info["activations"]
    assert {"patch_embed.proj", "blocks.0.attn.q", "blocks.0.attn.attn", "head"} <= told.keys()
    assert logart.inspect.main([str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("activations read by"))
    assert [line.split()[0] for line in lines[start + 1 : start + 1 + len(told)]] == list(told)
    (table,) = (
        b for b in run_blocks(read_run(str(whole / "vit")), "r") if isinstance(b, Table) and "saturated" in b.caption
    )
    shown = {row[0].text: [cell.text for cell in row] for row in table.rows}
    assert list(shown) == list(told)
    assert shown["blocks.0.attn.attn"][1:3] == ["4", "unsigned, log"] and "step" in shown["head"][2]
