"""Every flag acts: what giving it changes in the codes, the row, the output or the files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    SURROUNDINGS,
    VIT_KWARGS,
    Effect,
    Outcome,
    VitFiles,
    check_cache,
    check_once,
    check_run_folder,
    rows,
)

import logart.runs.job
import logart.runs.run
from logart import load_packed
from logart.packed.file import PackedFile
from logart_vit.command import build_parser, main

BASE = f"{VIT_KWARGS} num_classes=4"
UNSIZED = VIT_KWARGS.removeprefix("img_size=16 ")
LAYER_WISE = "--search_method layer_wise --calib_size 4"
BLOCK_WISE = "--search_method block_wise --calib_size 4"
EFFECTS = {
    "dataset": Effect("--dataset {others}", {"data": "others"}),
    "model": Effect("--model deit_tiny", {"arch": "deit_tiny"}),  # other pixel statistics
    "checkpoint": Effect("--checkpoint {again}", {"checkpoint": "again.bin", "checkpoint_sha256": "{again_sha256}"}),
    "config": Effect("--config {config}",
                     {"config": "{config}", "bits": "3", "recon_metric": "mae+kl", "temperature": ""}),
    "model_kwargs": Effect(f"--model_kwargs {VIT_KWARGS.replace('heads=2', 'heads=3')}",
                           {"network_options": f"{BASE.replace('heads=2', 'heads=3')}"}),
    "input_size": Effect("--input_size 24", {"network_options": f"{UNSIZED} num_classes=4 input_size=24"},
                         given=f"--model_kwargs {UNSIZED} --input_size 16"),
    "crop_pct": Effect("--crop_pct 0.5", {"network_options": f"{BASE} crop_pct=0.5"}),
    "interpolation": Effect("--interpolation nearest", {"network_options": f"{BASE} interpolation=nearest"}),
    "mean": Effect("--mean 0.1", {"network_options": f"{BASE} mean=0.1"}),
    "std": Effect("--std 0.1 0.2 0.3", {"network_options": f"{BASE} std=0.1,0.2,0.3"}),
    "checkpoint_key": Effect("--checkpoint_key model_ema",
                             {"checkpoint": "both.pth:model_ema"}, given="--checkpoint {both}"),
    "class_map": Effect("--class_map {classes}", {"class_order": "{classes_digest}"}, codes=False),
    "class_order": Effect("--class_order text", {"class_order": "text"}, codes=False,
                          given="--dataset {numbered} --class_order number"),
    "calib_path": Effect("--calib_path {others}", {"calib_from": "path:others"}),
    "calib_from_val": Effect("--calib_from_val 6", {"calib_from": "val:6", "val_images": "2"}),
    "val_limit": Effect("--val_limit 3", {"val_limit": "3", "val_images": "3"}, codes=False),
    "w_bit": Effect("--w_bit 3", {"bits": "3"}),
    "channel_wise": Effect("--no-channel_wise", {"channel_wise": "False"}),
    "scale_method": Effect("--scale_method log_sqrt2", {"scale_method": "log_sqrt2", "search_method": ""}),
    "search_method": Effect(
        "--search_method layer_wise",
        {"search_method": "layer_wise", "search_samples": "4", "search_batch_size": "32"}, given="--calib_size 4"),
    "calib_size": Effect("--calib_size 3", {"search_samples": "3"}, given=LAYER_WISE),
    "calib_batch_size": Effect("--calib_batch_size 2", {"search_batch_size": "2"}, given=BLOCK_WISE),  # other probes
    "optim_size": Effect("--optim_size 5", {"calib_samples": "5"}),
    "damping": Effect("--damping 0.5", {"damping": "0.5"}, given="--rounding compensated --optim_size 6",
                      unlearned=True),
    "mirror": Effect("--mirror", {"mirror": "True"}),
    "crops": Effect("--crops 1", {"crops": "1"}, given="--crop_pct 0.8"),
    "optim_batch_size": Effect("--optim_batch_size 3", {"batch_size": "3"}),
    "optim_metric": Effect("--optim_metric mse", {"recon_metric": "mse+kl", "temperature": ""}),
    "temperature": Effect("--temperature 1", {"temperature": "1.0"}),
    "optim_mode": Effect("--optim_mode qinp", {"recon_input": "quantized", "drop_prob": ""}),
    "drop_prob": Effect("--drop_prob 0.25", {"drop_prob": "0.25"}),
    "iters_w": Effect("--iters_w 9", {"iters_w": "9"}),
    "lr": Effect("--lr 0.2", {"lr": "0.2"}),
    "rrweight": Effect("--rrweight 100", {"rrweight": "100.0"}),
    "b_start": Effect("--b_start 5", {"b_start": "5.0"}, given="--rrweight 100"),
    "b_end": Effect("--b_end 10", {"b_end": "10.0"}, given="--rrweight 100"),
    "warmup": Effect("--warmup 0.9", {"warmup": "0.9"}, given="--rrweight 100"),
    "a_bit": Effect("--a_bit 4", {"bits_a": "4", "input_bits_a": "4", "head_bits_a": "4", "act_scale": "float",
                        "softmax_grid": "uniform", "calibrate_with_act": "False", "iters_a": "0"}, codes=False),
    "qconv_a_bit": Effect("--qconv_a_bit 8", {"input_bits_a": "8"}, given="--a_bit 4", codes=False),
    "qhead_a_bit": Effect("--qhead_a_bit 8", {"head_bits_a": "8"}, given="--a_bit 4", codes=False),
    "act_scale": Effect("--act_scale pow2", {"act_scale": "pow2"}, given="--a_bit 4", codes=False),
    "softmax_grid": Effect("--softmax_grid log_2", {"softmax_grid": "log_2"}, given="--a_bit 4", codes=False),
    "calibrate_with_act": Effect("--calibrate_with_act", {"calibrate_with_act": "True"}, given="--a_bit 4"),
    "iters_a": Effect("--iters_a 3", {"iters_a": "3"}, given="--a_bit 4", codes=False),
    "hardware_approx": Effect("--hardware_approx", {"hardware_approx": "True", "hardware_approx_terms": "2"}),
    "hardware_approx_terms": Effect("--hardware_approx_terms 3", {"hardware_approx_terms": "3"},
                                    given="--hardware_approx"),
    "scale_search": Effect("--scale_search", {"scale_search": "grid"}),
    "asymmetric": Effect("--asymmetric", {"asymmetric": "True"}),
    "zero_code": Effect("--zero_code", {"zero_code": "True"}),
    "wide_gap": Effect("--wide_gap", {"wide_gap": "True"}),
    "rounding": Effect("--rounding both", {"rounding": "both", "search_method": "", "damping": "0.01"}),
    "preset": Effect("--preset paper", {"preset": "paper", "rrweight": "10000.0"}),
    "first_last_bits": Effect("--first_last_bits 8", {"first_last_bits": "8"}),
    "layer_bits": Effect("--layer_bits *.fc1=2 head=6", {"layer_bits": "*.fc1=2 head=6"}),
    "bits_budget": Effect("--bits_budget 2.5", {"bits_budget": "2.5", "bits": "3"}),
    "size_budget": Effect("--size_budget 2500", {"size_budget": "2500"}),
    "skip": Effect("--skip *.fc1", {"skip": "*.fc1"}),
    "seed": Effect("--seed 1", {"seed": "1"}),
    "test_before_calibration": Effect("--test_before_calibration", codes=False),
    "test_with_hardware_approx": Effect("--test_with_hardware_approx", {"hardware_approx_terms": "2"}, codes=False),
}  # fmt: skip
CLOSED = "--rounding compensated --optim_size 6"
OTHER_VALUES = {
    "rounding compensated": Effect(
        CLOSED, {"rounding": "compensated", "search_method": "", "calib_samples": "6", "batch_size": "32",
                 "damping": "0.01"}, unlearned=True),
    "damping auto": Effect("--damping auto", {"damping": "auto"}, given=CLOSED, unlearned=True),
    "optim_size compensated": Effect("--optim_size 5", {"calib_samples": "5"}, given=CLOSED, unlearned=True),
    "hardware_approx_terms 4": Effect("--hardware_approx_terms 4", {"hardware_approx_terms": "4"},
                                      given="--hardware_approx"),
    "hardware_approx_terms 2": Effect("--hardware_approx_terms 2", codes=False, given="--hardware_approx"),
    "hardware_approx_terms at test": Effect("--hardware_approx_terms 4", {"hardware_approx_terms": "4"}, codes=False,
                                            given="--test_with_hardware_approx"),
    "scale_search half_step": Effect("--scale_search half_step", {"scale_search": "half_step"}),
    "scale_search none": Effect("--scale_search none", codes=False),
    "preset best": Effect("--preset best",
                          {"preset": "best", "scale_search": "grid", "mirror": "True", "damping": "auto"},
                          given=CLOSED, unlearned=True),
    "preset fast": Effect("--preset fast", {"preset": "fast", "damping": "auto"}, given=CLOSED, unlearned=True),
    "scale_search compensated": Effect("--scale_search", {"scale_search": "grid"}, given=CLOSED, unlearned=True),
    "asymmetric compensated": Effect("--asymmetric", {"asymmetric": "True"}, given=CLOSED, unlearned=True),
    "zero_code compensated": Effect("--zero_code", {"zero_code": "True"}, given=CLOSED, unlearned=True),
    "hardware_approx compensated": Effect(
        "--hardware_approx", {"hardware_approx": "True", "hardware_approx_terms": "2"}, given=CLOSED, unlearned=True),
    "optim_metric mae": Effect("--optim_metric mae", {"recon_metric": "mae+kl", "temperature": ""}),
    "optim_mode rinp": Effect("--optim_mode rinp", {"recon_input": "float", "drop_prob": ""}),
    "search_method block_wise": Effect("--search_method block_wise", {"search_method": "block_wise"}, given=LAYER_WISE),
    **{f"scale_method {grid}": Effect(f"--scale_method {grid}", {"scale_method": grid, "search_method": ""})
       for grid in ("log_2", "linear_minmax", "linear_mse")},
}  # fmt: skip


@pytest.mark.parametrize("name", EFFECTS | OTHER_VALUES)
def test_a_flag_changes_what_it_says_and_nothing_else(
    name: str, files: VitFiles, outcome: Callable[..., Outcome]
) -> None:
    (EFFECTS | OTHER_VALUES)[name].check(files, outcome)


def test_optimize_learns(files: VitFiles, outcome: Callable[..., Outcome]) -> None:
    argv = files.on_images()
    searched = outcome(*argv[: argv.index("--optimize")])
    learned = outcome(*argv)
    assert searched.losses == [] and len(learned.losses) == 4
    assert searched.codes != learned.codes and (searched.row["iters_w"], learned.row["iters_w"]) == ("0", "8")


def test_a_second_evaluation_fills_its_columns(files: VitFiles, outcome: Callable[..., Outcome]) -> None:
    plain = outcome(*files.on_images()).row
    for flag, prefix in (("--test_before_calibration", "search_"), ("--test_with_hardware_approx", "approx_")):
        row = outcome(*files.on_images(), flag).row
        filled = {name for name in row if "Acc@" in name and row[name] and not plain[name]}
        assert filled == {f"{prefix}Acc@1", f"{prefix}Acc@5"}


def test_num_classes(files: VitFiles, outcome: Callable[..., Outcome], tmp_path: Path) -> None:
    """What the checkpoint and the folder have, and the network has not by default."""
    argv = files.on_images()
    at = argv.index("--num_classes")
    with pytest.raises(SystemExit):
        main([*argv[:at], *argv[at + 2 :], "--results", str(tmp_path / "results.csv")])
    assert outcome(*argv).row["val_images"] == "8"


def test_loaders_are_made_as_asked_and_give_the_same_images(
    files: VitFiles, outcome: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    original = logart.runs.run.validation_batches

    def watched(source: Any, batch_size: int, workers: int) -> Any:
        asked.append((batch_size, workers))
        return original(source, batch_size, workers)

    plain = outcome(*files.on_images())
    monkeypatch.setattr(logart.runs.run, "validation_batches", watched)
    for flags in ("--num_workers 2", "--val_batch_size 3", ""):
        row = outcome(*files.on_images(), *flags.split(), again=True).row
        assert {k: v for k, v in row.items() if k not in SURROUNDINGS} == {
            k: v for k, v in plain.row.items() if k not in SURROUNDINGS
        }
    assert asked == [(128, 2), (128, 2), (3, 0), (3, 0), (128, 0), (128, 0)]


def test_device_decides_where(
    files: VitFiles, outcome: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen: list[torch.device] = []
    monkeypatch.setattr(logart.runs.job, "run", lambda *args, **_: seen.append(args[4].device))
    argv = files.on_images()
    for device in ("auto", "cuda:0", "cpu"):
        assert main([*argv, "--device", device]) == 0
    assert seen == [torch.device("cuda"), torch.device("cuda:0"), torch.device("cpu")]
    assert outcome(*argv).row["device"] == "cpu"


def test_results_says_where_the_row_goes(files: VitFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [*files.on_images(), "--iters_w", "1"]
    assert main(argv) == 0 and main([*argv, "--results", "other.csv"]) == 0 and main(argv) == 0
    assert len(rows(Path("results.csv"))) == 2 and len(rows(Path("other.csv"))) == 1


def test_save_writes_the_network_with_the_options_it_was_built_with(files: VitFiles, tmp_path: Path) -> None:
    """On a network of timm's with arguments of its own; the built-in ones are in tests/test_save_flag.py."""
    path = tmp_path / "small.safetensors"
    argv = [*files.on_images(), "--iters_w", "1", "--quiet", "--results", str(tmp_path / "results.csv")]
    assert main(argv) == 0 and not path.exists()
    assert main([*argv, "--save", str(path)]) == 0
    model = load_packed(path)
    info = PackedFile.read(path).info
    assert info["network"]["model_kwargs"] and info["network"]["num_classes"] == 4
    assert model(torch.zeros(1, *info["preprocessing"]["input_size"])).shape == (1, 4)


def test_quiet_leaves_only_accuracies(files: VitFiles, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*files.on_images(), "--results", str(tmp_path / "results.csv")]
    assert main(argv) == 0
    out, err = capfd.readouterr()
    assert "timm:vit_tiny_patch16_224 (small.safetensors) on pictures: 4 bits, dynamic (tensor_wise DBS)" in out
    assert len(re.findall(r"Acc@1 +\d", out)) == 2 and "\nw_bit=4 first_last_bits=same " in out and "layer " in out
    assert str(tmp_path / "results.csv") in out
    assert "DBS" in err and "LLR" in err and "\r" not in err and "\x1b" not in err
    assert main([*argv, "--quiet"]) == 0
    quiet_out, quiet_err = capfd.readouterr()
    assert quiet_err == ""
    assert quiet_out.splitlines() == [line for line in out.splitlines() if re.search(r"Acc@1 +\d|% of the", line)]


def test_once_runs_no_row_twice(files: VitFiles, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_once(main, files.unlearned(), "--zero_code", tmp_path / "results.csv", capfd)
    check_once(main, files.unlearned(), "--test_with_hardware_approx", tmp_path / "others.csv", capfd)


def test_a_run_folder_of_a_network_with_options(files: VitFiles, tmp_path: Path) -> None:
    """The built-in networks are in tests/test_run_folder.py."""
    check_run_folder(main, files.on_images(), tmp_path)


def test_a_cache_in_half_precision_gives_other_losses(files: VitFiles, outcome: Callable[..., Outcome]) -> None:
    check_cache(files.on_images(), outcome)


TESTED_ALONE = {
    "run_dir": test_a_run_folder_of_a_network_with_options,
    "resume": test_a_run_folder_of_a_network_with_options,
    "cache": test_a_cache_in_half_precision_gives_other_losses,
    "save": test_save_writes_the_network_with_the_options_it_was_built_with,
    "optimize": test_optimize_learns,
    "num_classes": test_num_classes,
    "num_workers": test_loaders_are_made_as_asked_and_give_the_same_images,
    "val_batch_size": test_loaders_are_made_as_asked_and_give_the_same_images,
    "device": test_device_decides_where,
    "results": test_results_says_where_the_row_goes,
    "once": test_once_runs_no_row_twice,
    "quiet": test_quiet_leaves_only_accuracies,
}


def test_no_flag_is_without_a_test() -> None:
    dests = {action.dest for action in build_parser()._actions} - {"help"}
    assert dests == EFFECTS.keys() | TESTED_ALONE.keys()
