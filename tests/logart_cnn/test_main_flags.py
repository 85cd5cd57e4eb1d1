"""Every flag acts: what giving it changes in the codes, the row, the output or the files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    SMALL,
    SMALL_DEEP,
    SMALL_KWARGS,
    SURROUNDINGS,
    Effect,
    Files,
    Outcome,
    check_cache,
    check_once,
    check_run_folder,
    rows,
)

import logart.runs.job
import logart.runs.run
from logart import load_packed
from logart.networks.calibration import names_digest
from logart.packed.file import PackedFile
from logart_cnn.command import build_parser, main

LAYER_WISE = "--search_method layer_wise --search_samples 4"
BASE = f"{SMALL_KWARGS} num_classes=4 input_size=32"
EFFECTS = {
    "data_path": Effect("--data_path {others}", {"data": "others"}),
    "arch": Effect(f"--arch timm:{SMALL_DEEP} --checkpoint {{deep}}",
                   {"arch": f"timm:{SMALL_DEEP}", "checkpoint": "deep.pth", "checkpoint_sha256": "{deep_sha256}"}),
    "checkpoint": Effect("--checkpoint {again}", {"checkpoint": "again.pth", "checkpoint_sha256": "{again_sha256}"}),
    "model_kwargs": Effect(f"--model_kwargs {SMALL_KWARGS} global_pool=max",
                           {"network_options": f"{SMALL_KWARGS} global_pool=max num_classes=4 input_size=64"},
                           given="--input_size 64"),
    "input_size": Effect("--input_size 40", {"network_options": f"{SMALL_KWARGS} num_classes=4 input_size=40"}),
    "crop_pct": Effect("--crop_pct 0.5", {"network_options": f"{BASE} crop_pct=0.5"}),
    "interpolation": Effect("--interpolation nearest",
                            {"network_options": f"{BASE} crop_pct=0.5 interpolation=nearest"}, given="--crop_pct 0.5"),
    "mean": Effect("--mean 0.1", {"network_options": f"{BASE} mean=0.1"}),
    "std": Effect("--std 0.1 0.2 0.3", {"network_options": f"{BASE} std=0.1,0.2,0.3"}),
    "checkpoint_key": Effect("--checkpoint_key model_ema",
                             {"checkpoint": "both.pth:model_ema"}, given="--checkpoint {both}"),
    "class_map": Effect("--class_map {classes}", {"class_order": "{classes_digest}"}, codes=False),
    "class_order": Effect("--class_order text", {"class_order": "text"}, codes=False,
                          given="--data_path {numbered} --class_order number"),
    "calib_path": Effect("--calib_path {others}", {"calib_from": "path:others"}),
    "calib_from_val": Effect("--calib_from_val 6", {"calib_from": "val:6", "val_images": "2"}),
    "val_limit": Effect("--val_limit 3", {"val_limit": "3", "val_images": "3"}, codes=False),
    "n_bits_w": Effect("--n_bits_w 3", {"bits": "3"}),
    "channel_wise": Effect("--no-channel_wise", {"channel_wise": "False"}),
    "scale_method": Effect("--scale_method log_sqrt2", {"scale_method": "log_sqrt2", "search_method": ""}),
    "search_method": Effect("--search_method layer_wise",
                            {"search_method": "layer_wise", "search_samples": "4", "search_batch_size": "32"},
                            given="--search_samples 4"),
    "search_samples": Effect("--search_samples 3", {"search_samples": "3"}, given=LAYER_WISE),
    "search_batch_size": Effect("--search_batch_size 3", {"search_batch_size": "3"}, given=LAYER_WISE, codes=False),
    "calib_samples": Effect("--calib_samples 5", {"calib_samples": "5"}),
    "damping": Effect("--damping 0.5", {"damping": "0.5"}, given="--rounding compensated --calib_samples 6",
                      unlearned=True),
    "mirror": Effect("--mirror", {"mirror": "True"}),
    "crops": Effect("--crops 1", {"crops": "1"}, given="--crop_pct 0.8"),
    "batch_size": Effect("--batch_size 3", {"batch_size": "3"}),
    "iters_w": Effect("--iters_w 9", {"iters_w": "9"}),
    "rrweight": Effect("--rrweight 100", {"rrweight": "100.0"}),
    "calib_lr": Effect("--calib_lr 0.2", {"lr": "0.2"}),
    "b_start": Effect("--b_start 5", {"b_start": "5.0"}, given="--rrweight 100"),
    "b_end": Effect("--b_end 10", {"b_end": "10.0"}, given="--rrweight 100"),
    "warmup": Effect("--warmup 0.9", {"warmup": "0.9"}, given="--rrweight 100"),
    "recon_input": Effect("--recon_input float", {"recon_input": "float"}),
    "n_bits_a": Effect("--n_bits_a 4", {"bits_a": "4", "input_bits_a": "4", "head_bits_a": "4", "act_scale": "float",
                        "softmax_grid": "uniform", "calibrate_with_act": "False", "iters_a": "0"}, codes=False),
    "input_bits_a": Effect("--input_bits_a 8", {"input_bits_a": "8"}, given="--n_bits_a 4", codes=False),
    "head_bits_a": Effect("--head_bits_a 8", {"head_bits_a": "8"}, given="--n_bits_a 4", codes=False),
    "act_scale": Effect("--act_scale pow2", {"act_scale": "pow2"}, given="--n_bits_a 4", codes=False),
    "calibrate_with_act": Effect("--calibrate_with_act", {"calibrate_with_act": "True"}, given="--n_bits_a 4"),
    "iters_a": Effect("--iters_a 3", {"iters_a": "3"}, given="--n_bits_a 4", codes=False),
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
    "layer_bits": Effect("--layer_bits *.conv2=2 head*=6", {"layer_bits": "*.conv2=2 head*=6"}),
    "bits_budget": Effect("--bits_budget 2.5", {"bits_budget": "2.5", "bits": "3"}),
    "size_budget": Effect("--size_budget 1200", {"size_budget": "1200"}),
    "skip": Effect("--skip *.conv2 stem*", {"skip": "*.conv2 stem*"}),
    "seed": Effect("--seed 1", {"seed": "1"}),
    "calib_augment": Effect("--calib_augment", {"calib_augment": "True"}),
    "test_before_calibration": Effect("--test_before_calibration", codes=False),
    "test_with_hardware_approx": Effect("--test_with_hardware_approx", {"hardware_approx_terms": "2"}, codes=False),
}  # fmt: skip
CLOSED = "--rounding compensated --calib_samples 6"
OTHER_VALUES = {
    "rounding compensated": Effect(
        CLOSED, {"rounding": "compensated", "search_method": "", "calib_samples": "6", "batch_size": "32",
                 "damping": "0.01", "calib_augment": "False"},
        given="--rounding nearest", unlearned=True),
    "damping auto": Effect("--damping auto", {"damping": "auto"}, given=CLOSED, unlearned=True),
    "calib_samples compensated": Effect("--calib_samples 5", {"calib_samples": "5"}, given=CLOSED, unlearned=True),
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
}  # fmt: skip


@pytest.mark.parametrize("name", EFFECTS | OTHER_VALUES)
def test_a_flag_changes_what_it_says_and_nothing_else(name: str, files: Files, outcome: Callable[..., Outcome]) -> None:
    (EFFECTS | OTHER_VALUES)[name].check(files, outcome)


def test_a_second_evaluation_fills_its_columns(files: Files, outcome: Callable[..., Outcome]) -> None:
    plain = outcome(*files.on_images()).row
    for flag, prefix in (("--test_before_calibration", "search_"), ("--test_with_hardware_approx", "approx_")):
        row = outcome(*files.on_images(), flag).row
        filled = {name for name in row if "Acc@" in name and row[name] and not plain[name]}
        assert filled == {f"{prefix}Acc@1", f"{prefix}Acc@5"}


def test_num_classes(files: Files, outcome: Callable[..., Outcome], tmp_path: Path) -> None:
    """What the checkpoint and the folder have, and the network has not by default."""
    argv = files.on_images()
    at = argv.index("--num_classes")
    with pytest.raises(SystemExit):
        main([*argv[:at], *argv[at + 2 :], "--results", str(tmp_path / "results.csv")])
    assert outcome(*argv).row["val_images"] == "8"


def test_loaders_are_made_as_asked_and_give_the_same_images(
    files: Files, outcome: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    original = logart.runs.run.validation_batches

    def watched(source: Any, batch_size: int, workers: int) -> Any:
        asked.append((batch_size, workers))
        return original(source, batch_size, workers)

    monkeypatch.setattr(logart.runs.run, "validation_batches", watched)
    alone = outcome(*files.on_images())
    helped = outcome(*files.on_images(), "--workers", "2", "--val-batch-size", "3", again=True)
    assert asked == [(3, 2), (3, 2)]
    assert {k: v for k, v in alone.row.items() if k not in SURROUNDINGS} == {
        k: v for k, v in helped.row.items() if k not in SURROUNDINGS
    }


def test_device_decides_where(files: Files, outcome: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen: list[torch.device] = []
    monkeypatch.setattr(logart.runs.job, "run", lambda *args, **_: seen.append(args[4].device))
    argv = files.on_images()
    for device in ("auto", "cuda:0", "cpu"):
        assert main([*argv, "--device", device]) == 0
    assert seen == [torch.device("cuda"), torch.device("cuda:0"), torch.device("cpu")]
    assert outcome(*argv).row["device"] == "cpu"


def test_results_says_where_the_row_goes(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [*files.on_images(), "--iters_w", "1"]
    assert main(argv) == 0 and main([*argv, "--results", "other.csv"]) == 0 and main(argv) == 0
    assert len(rows(Path("results.csv"))) == 2 and len(rows(Path("other.csv"))) == 1


def test_save_writes_the_network_with_the_options_it_was_built_with(files: Files, tmp_path: Path) -> None:
    """On a network of timm's with arguments of its own; the built-in ones are in tests/test_save_flag.py."""
    path = tmp_path / "small.safetensors"
    argv = [*files.on_images(), "--iters_w", "1", "--quiet", "--results", str(tmp_path / "results.csv")]
    assert main(argv) == 0 and not path.exists()
    assert main([*argv, "--save", str(path)]) == 0
    model = load_packed(path)
    info = PackedFile.read(path).info
    assert info["network"]["model_kwargs"] and info["network"]["num_classes"] == 4
    assert model(torch.zeros(1, *info["preprocessing"]["input_size"])).shape == (1, 4)


def test_quiet_leaves_only_accuracies(files: Files, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*files.on_images(), "--results", str(tmp_path / "results.csv")]
    assert main(argv) == 0
    out, err = capfd.readouterr()
    assert f"timm:{SMALL} (small.safetensors) on pictures: 4 bits, dynamic (tensor_wise DBS)" in out
    assert len(re.findall(r"Acc@1 +\d", out)) == 2 and "layer " in out and str(tmp_path / "results.csv") in out
    assert "DBS" in err and "LLR" in err and "\r" not in err and "\x1b" not in err
    assert main([*argv, "--quiet"]) == 0
    quiet_out, quiet_err = capfd.readouterr()
    assert quiet_err == ""
    assert quiet_out.splitlines() == [line for line in out.splitlines() if re.search(r"Acc@1 +\d|% of the", line)]


def test_a_saved_list_brings_the_same_images_back(
    files: Files, outcome: Callable[..., Outcome], tmp_path: Path
) -> None:
    chosen = tmp_path / "images.txt"
    first = outcome(*files.on_images(), "--seed", "5", "--save_calib_list", str(chosen))
    names = chosen.read_text().splitlines()
    assert len(set(names)) == 6 and all((files.images / name).is_file() for name in names)
    assert all(name.startswith("train/") for name in names)
    other = outcome(*files.on_images(), "--seed", "6")
    again = outcome(*files.on_images(), "--seed", "6", "--calib_list", str(chosen))
    assert again.losses != other.losses  # other images
    assert again.losses != first.losses  # in another order
    same = outcome(*files.on_images(), "--seed", "5", "--calib_list", str(chosen))
    assert same[1:] == first[1:]
    assert same.settings() == first.settings() | {"calib_list": names_digest(names)}
    assert names_digest(names) != names_digest(names[::-1])


def test_once_runs_no_row_twice(files: Files, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_once(main, files.unlearned(), "--zero_code", tmp_path / "results.csv", capfd)
    check_once(main, files.unlearned(), "--test_with_hardware_approx", tmp_path / "others.csv", capfd)


def test_a_run_folder_of_a_network_with_options(files: Files, tmp_path: Path) -> None:
    """The built-in networks are in tests/test_run_folder.py."""
    check_run_folder(main, files.on_images(), tmp_path)


def test_a_cache_in_half_precision_gives_other_losses(files: Files, outcome: Callable[..., Outcome]) -> None:
    check_cache(files.on_images(), outcome)


TESTED_ALONE = {
    "run_dir": test_a_run_folder_of_a_network_with_options,
    "resume": test_a_run_folder_of_a_network_with_options,
    "cache": test_a_cache_in_half_precision_gives_other_losses,
    "save": test_save_writes_the_network_with_the_options_it_was_built_with,
    "num_classes": test_num_classes,
    "workers": test_loaders_are_made_as_asked_and_give_the_same_images,
    "val_batch_size": test_loaders_are_made_as_asked_and_give_the_same_images,
    "device": test_device_decides_where,
    "results": test_results_says_where_the_row_goes,
    "once": test_once_runs_no_row_twice,
    "quiet": test_quiet_leaves_only_accuracies,
    "calib_list": test_a_saved_list_brings_the_same_images_back,
    "save_calib_list": test_a_saved_list_brings_the_same_images_back,
}


def test_no_flag_is_without_a_test() -> None:
    dests = {action.dest for action in build_parser()._actions} - {"help"}
    assert dests == EFFECTS.keys() | TESTED_ALONE.keys()
