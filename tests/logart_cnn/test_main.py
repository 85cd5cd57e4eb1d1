"""The command line: spellings, defaults, and runs from flags to a results row."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from small_runs import SURROUNDINGS, Files, Outcome, printed, seeded
from torch import Tensor, nn

import logart.quantization.rounding_methods
import logart.runs.job
import logart.runs.run
import logart_cnn.command
from logart.grids.activations import ActScale, SoftmaxGrid
from logart.grids.grid import ScaleSearch
from logart.networks.weights import file_sha256
from logart.quantization.config import QuantConfig, ReconInput, ReconMetric, SearchMethod
from logart.runs.run import RunOptions
from logart_cnn import models
from logart_cnn.command import build_config, build_parser, main
from logart_cnn.models import Plan, plan_network

PAPER = (
    "--data_path DATA --arch resnet18 --n_bits_w 4 --channel_wise --scale_method dynamic "
    "--search_method tensor_wise --search_samples 32 --test_before_calibration --iters_w 20000 "
    "--weight 10000 --hardware_approx"
).split()


def config(*argv: str) -> QuantConfig:
    return build_config(build_parser().parse_args(argv))


ISSUE_FLAGS = """data_path arch checkpoint n_bits_w channel_wise scale_method search_method search_samples
    test_before_calibration calib_samples batch_size iters_w rrweight weight calib_lr b_start b_end warmup recon_input
    hardware_approx test_with_hardware_approx first_last_bits layer_bits skip bits_budget size_budget seed device
    workers results quiet
    calib_augment
    model-kwargs input-size crop-pct mean std interpolation num-classes no-channel_wise
    rounding damping mirror scale_search asymmetric zero_code hardware_approx_terms preset save once run_dir resume
    wide_gap crops cache
    search_batch_size val_batch_size checkpoint_key class_map class_order calib_path calib_from_val val_limit
    n_bits_a input_bits_a head_bits_a act_scale calibrate_with_act iters_a""".split()


def test_the_flags_are_those_of_the_issues_and_two_for_lists() -> None:
    dests = {action.dest for action in build_parser()._actions} - {"help", "calib_list", "save_calib_list"}
    assert dests == {flag.replace("-", "_") for flag in ISSUE_FLAGS} - {"weight", "no_channel_wise"}


def test_defaults(monkeypatch: pytest.MonkeyPatch, files: Files, tmp_path: Path) -> None:
    called: dict[str, Any] = {}

    def load(arch: str, checkpoint: Any, **kwargs: Any) -> Plan:
        called.update(arch=arch, checkpoint=checkpoint, kwargs=kwargs)
        return plan_network(arch, files.digits)

    def run(*args: Any, **_: Any) -> None:
        called["run"] = args

    monkeypatch.setattr(logart_cnn.command, "plan_network", load)
    monkeypatch.setattr(logart.runs.job, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # auto takes it
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert (called["arch"], called["checkpoint"]) == ("digits_resnet", None)
    assert called["kwargs"] == dict.fromkeys(called["kwargs"]) and len(called["kwargs"]) == 8
    network, source, images, settings, options, columns, started = called["run"]
    assert source.name == "digits" and len(images) == 1024
    assert settings == QuantConfig()
    assert asdict(settings) | {"iters": 0, "lr": 0, "rrweight": 0} == {
        "n_bits": 4, "first_last_bits": None, "channel_wise": True, "scale_method": "dynamic",
        "search_method": SearchMethod.TENSOR_WISE, "search_samples": 32, "calib_samples": 1024, "batch_size": 32,
        "b_start": 20.0, "b_end": 2.0, "warmup": 0.2, "recon_input": ReconInput.QUANTIZED, "hardware_terms": 0,
        "seed": 0, "iters": 0, "lr": 0, "rrweight": 0, "search_batch_size": 32, "recon_metric": ReconMetric.MSE,
        "drop_prob": 0.5, "temperature": 20.0, "head_kl": False, "rounding": "learned",
        "scale_search": ScaleSearch.NONE, "asymmetric": False, "zero_code": False, "wide_gap": False,
        "layer_bits": {}, "skip": (), "bits_budget": None, "size_budget": None, "damping": 0.01,
        "mirror": False, "crops": 0, "n_bits_a": 32, "input_bits_a": None, "head_bits_a": None,
        "act_scale": ActScale.AUTO,
        "softmax_grid": SoftmaxGrid.UNIFORM, "calibrate_with_act": False, "iters_a": 0,
    }  # fmt: skip
    expected = RunOptions(torch.device("cuda"), "results.csv", 128, 2, test_before_calibration=True)
    assert options == expected and not options.quiet
    assert columns["checkpoint_sha256"] == file_sha256(files.digits) and columns["calib_augment"] == "False"
    assert columns["preset"] is None
    assert list(tmp_path.iterdir()) == []


def test_log_dynamic_is_dynamic() -> None:
    assert config("--scale_method", "log_dynamic", "--n_bits_w", "3") == QuantConfig(n_bits=3)


def test_the_paper_s_command_is_understood_as_it_stands() -> None:
    args = build_parser().parse_args(PAPER)
    expected = QuantConfig(
        n_bits=4,
        channel_wise=True,
        scale_method="dynamic",
        search_method=SearchMethod.TENSOR_WISE,
        search_samples=32,
        iters=20000,
        rrweight=10000.0,
        hardware_terms=2,
    )
    assert build_config(args) == expected
    assert (args.data_path, args.arch, args.test_before_calibration) == ("DATA", "resnet18", True)


def test_alias_weight_is_rrweight() -> None:
    assert config("--weight", "7") == config("--rrweight", "7") == QuantConfig(rrweight=7.0)


# Presets

FAST = QuantConfig(rounding="compensated", damping="auto", calib_samples=256)
MOST = {  # of preset best
    "rounding": "compensated", "damping": "auto", "mirror": True, "calib_samples": 1024,
    "scale_search": ScaleSearch.GRID, "iters": 300, "lr": 0.01,
}  # fmt: skip
PLAIN = {"scale_search": ScaleSearch.NONE}  # from 6 bits on
WIDE = {"wide_gap": True}  # up to 3 bits
LEARNED = WIDE | {"rounding": "both"}  # up to 3 bits
FEW = WIDE | {"n_bits": 3, "scale_search": ScaleSearch.HALF_STEP}  # of preset fast
RESOLVED = {
    "fast": (FAST, "rounding=compensated calib_samples=256 "),
    "paper": (QuantConfig(iters=20000, rrweight=10000.0), "iters_w=20000 rrweight=10000.0 "),
    "best": (QuantConfig(**MOST), "rounding=compensated calib_samples=1024 "),
    "best --n_bits_w 6": (QuantConfig(**MOST | PLAIN, n_bits=6), "wide_gap=False rounding=compensated "),
    "best --n_bits_w 5": (QuantConfig(**MOST, n_bits=5), "scale_search=grid asymmetric=False "),
    "best --n_bits_w 8 --zero_code": (QuantConfig(**MOST | PLAIN | {"zero_code": True}, n_bits=8), "zero_code=True "),
    "best --rounding both": (QuantConfig(**MOST | {"rounding": "both"}), "iters_w=300 rrweight=0.1 calib_lr=0.01 "),
    "fast --n_bits_w 3": (replace(FAST, **FEW), "scale_search=half_step "),
    "best --n_bits_w 3": (QuantConfig(**MOST | LEARNED, n_bits=3), "wide_gap=True rounding=both "),
    "best --bits_budget 3": (QuantConfig(**MOST | LEARNED, bits_budget=3), "wide_gap=True rounding=both "),
    "best --bits_budget 3.5": (QuantConfig(**MOST, bits_budget=3.5), "wide_gap=False rounding=compensated "),
    "best --n_bits_w 2 --rounding compensated": (QuantConfig(**MOST | WIDE, n_bits=2), "rounding=compensated "),
    "fast --n_bits_w 2 --scale_search grid --asymmetric --zero_code --calib_samples 32": (
        replace(FAST, n_bits=2, scale_search=ScaleSearch.GRID, asymmetric=True, zero_code=True, wide_gap=True,
                calib_samples=32),
        "scale_search=grid asymmetric=True zero_code=True wide_gap=True rounding=compensated calib_samples=32 ",
    ),
    "fast --rounding both --iters_w 7": (replace(FAST, rounding="both", iters=7), "iters_w=7 "),
    "paper --rounding compensated": (
        QuantConfig(rounding="compensated", iters=20000, rrweight=10000.0), "rounding=compensated "
    ),
    "best --scale_search none": (QuantConfig(**MOST | {"scale_search": ScaleSearch.NONE}), "scale_search=none "),
    "best --rounding learned --calib_lr 0.5": (
        QuantConfig(**MOST | {"rounding": "learned", "lr": 0.5}),
        "rounding=learned calib_samples=1024 ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", RESOLVED)
def test_a_preset_s_settings_are_printed_and_any_flag_wins(
    flags: str, files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(logart.runs.job, "run", lambda *args, **_: called.extend(args))
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", str(files.digits), "--preset", *flags.split()]) == 0
    _, _, images, settings, _, columns, _ = called
    expected, printed = RESOLVED[flags]
    assert settings == expected and len(images) == expected.calib_samples
    assert columns["preset"] == flags.split()[0]
    assert printed in capsys.readouterr().out.splitlines()[1]


# From flags to a row


def test_the_digits_are_the_default_data_and_tell_the_whole_story(
    files: Files, outcome: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", str(files.digits), *"--iters_w 4 --calib_samples 16 --workers 0".split()]
    row = outcome(*argv).row
    lines = printed(capsys)
    assert lines[0] == (
        "digits_resnet (untrained.safetensors) on digits: 4 bits, dynamic (tensor_wise DBS), a codebook per channel, "
        "LLR 4 steps a block (mse, quantized input, lr 0.01, λ 0.1), seed 0, on cpu"
    )
    assert lines[1] == (
        "n_bits_w=4 channel_wise=True scale_method=dynamic search_method=tensor_wise search_samples=32 "
        "search_batch_size=32 scale_search=none asymmetric=False zero_code=False wide_gap=False rounding=learned "
        "calib_samples=16 batch_size=32 damping=0.01 mirror=False crops=0 iters_w=4 "
        "rrweight=0.1 calib_lr=0.01 b_start=20.0 b_end=2.0 warmup=0.2 recon_input=quantized n_bits_a=32 "
        "input_bits_a=32 head_bits_a=32 act_scale=float calibrate_with_act=False iters_a=0 seed=0 "
        "first_last_bits=same hardware_approx_terms=0"
    )
    assert [line.split(" Acc")[0].rstrip() for line in lines[2:5]] == ["float", "after DBS", "after LLR"]
    assert (row["track"], row["arch"], row["data"], row["val_images"]) == ("cnn", "digits_resnet", "digits", "500")
    assert (row["checkpoint"], row["checkpoint_sha256"]) == (files.digits.name, file_sha256(files.digits))
    for prefix in ("float_", "search_", ""):
        assert 0 < float(row[f"{prefix}Acc@1"]) < float(row[f"{prefix}Acc@5"]) < 100
    assert row["approx_Acc@1"] == "" and float(row["total_seconds"]) >= float(row["reconstruction_seconds"]) > 0


@pytest.mark.parametrize(
    "flags", ["--search_method layer_wise --search_samples 8", "--calib_augment --seed 3", "--rounding both"]
)
def test_the_same_command_gives_the_same_codes_and_the_same_row(
    flags: str, files: Files, outcome: Callable[..., Outcome]
) -> None:
    argv = [*files.on_images(), "--iters_w", "20", *flags.split()]
    first = outcome(*argv)
    torch.rand(3)  # what ran before does not matter
    second = outcome(*argv, again=True)
    assert (second.codes, second.losses) == (first.codes, first.losses)
    assert {k for k in first.row if first.row[k] != second.row[k]} <= SURROUNDINGS


def test_rounding_alone_needs_no_calibration_images(files: Files, outcome: Callable[..., Outcome]) -> None:
    row = outcome(*files.unlearned(), "--iters_w", "0").row
    empty = {"search_samples", "calib_samples", "batch_size", "lr", "recon_input", "calib_augment"}
    assert {row[name] for name in empty} == {""} and row["Acc@1"] == row["search_Acc@1"]


def test_compensated_rounding_from_flags_to_a_row(
    files: Files, outcome: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*files.unlearned(), *"--rounding compensated --calib_samples 6".split()]
    first = outcome(*argv)
    lines = printed(capsys)
    assert [line.split(" Acc")[0].rstrip() for line in lines[2:4]] == ["float", "after compensated rounding"]
    assert "compensated rounding, 6 images" in lines[0] and "DBS" not in lines[0] and "LLR" not in lines[0]
    empty = {"search_method", "search_samples", "lr", "rrweight", "recon_input", "search_Acc@1", "search_Acc@5"}
    assert {first.row[name] for name in empty} == {""} and first.losses == []
    assert (first.row["rounding"], first.row["iters_w"]) == ("compensated", "0")
    assert first.row["Acc@1"] and float(first.row["reconstruction_seconds"]) > 0 == float(first.row["search_seconds"])
    torch.rand(3)  # what ran before does not matter
    second = outcome(*argv, again=True)
    assert second.codes == first.codes != outcome(*files.unlearned(), "--iters_w", "0").codes
    assert {k for k in first.row if first.row[k] != second.row[k]} <= SURROUNDINGS


def test_nearest_is_no_steps(files: Files, outcome: Callable[..., Outcome]) -> None:
    named, stepless = (outcome(*files.unlearned(), *flags) for flags in (("--rounding", "nearest"), ("--iters_w", "0")))
    assert named.codes == stepless.codes and named.settings() == stepless.settings()
    assert named.row["rounding"] == "nearest"


def test_resnet18_from_a_file_in_the_hub_s_folder(hub: Path, files: Files, outcome: Callable[..., Outcome]) -> None:
    path = seeded(lambda: torchvision.models.resnet18(num_classes=4), hub / "resnet18_imagenet.pth.tar")
    flags = "--arch resnet18 --num_classes 4 --input_size 32 --scale_method log_2 --iters_w 0 --workers 0"
    ran = outcome("--data_path", str(files.images), *flags.split())
    assert ran.row["checkpoint"] == models.ENTRIES["resnet18"].weights
    assert ran.row["checkpoint_sha256"] == file_sha256(path)
    assert len(ran.codes) == 21 and ran.codes[0][0] == "conv1" and ran.codes[-1][0] == "fc"


# What ends a run early


class FailsLate(nn.Module):
    """A network that is not finite for four images at once, which are all that it is calibrated with."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x * torch.nan if len(x) == 4 else x)  # type: ignore[no-any-return]


def test_a_network_that_fails_late_takes_one_line_and_gets_no_row(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> Plan:
        plan = plan_network("digits_resnet", files.digits)
        strange = replace(plan.load(), model=FailsLate().eval())
        return replace(plan, load=lambda: strange)

    monkeypatch.setattr(logart_cnn.command, "plan_network", load)
    flags = f"--quiet --workers 0 --results {tmp_path}/results.csv --save_calib_list {tmp_path}/images.txt"
    with pytest.raises(SystemExit) as stopped:
        main([*flags.split(), *"--iters_w 2 --calib_samples 4".split()])
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("logart-cnn: --arch, --checkpoint: block head: the activations of calibration image")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.csv")) and not list(tmp_path.glob("*.txt"))


@pytest.mark.parametrize("error", [RuntimeError, ValueError, MemoryError, KeyError])
def test_our_own_mistakes_keep_their_traceback_and_get_no_row(
    error: type[Exception], files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("ours")

    monkeypatch.setattr(logart.runs.run, "quantize_model", fail)
    with pytest.raises(error, match="ours"):
        main([*files.on_images(), "--results", str(tmp_path / "results.csv")])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_with_130_and_no_row(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(logart.quantization.rounding_methods, "learn_rounding", interrupt)
    argv = [*files.on_images(), "--quiet", "--results", str(tmp_path / "results.csv")]
    assert main(argv) == 130
    out, err = capfd.readouterr()
    assert err == "logart-cnn: interrupted; nothing was recorded\n" and "float" in out
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_as_a_command_with_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "logart_cnn.main", "--arch", "resnet19"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("logart-cnn: --arch: no network 'resnet19'") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
