"""Wrong calls: one line that names the flag, exit code 2, and no trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from small_runs import SMALL, SMALL_KWARGS, Files, assert_refused, seeded

from logart.results import NAMES
from logart_cnn.main import main
from logart_cnn.networks import DigitsResNet


class Wrong:
    """Files with something wrong in them."""

    def __init__(self, folder: Path, files: Files, make: Callable[..., Path]) -> None:
        self.folder, self.images, self.digits, self.small = folder, files.images, files.digits, files.small
        self.weights(folder)
        self.pictures(folder, make)
        self.lists(folder)
        self.header = folder / "header.csv"
        self.header.write_text("time,arch\n1,2\n")
        self.cut = folder / "cut.csv"
        self.cut.write_text(",".join(NAMES) + "\n2026,cnn\n")

    def weights(self, folder: Path) -> None:
        state = load_file(self.digits)
        self.nan, self.seven = folder / "nan.pth", seeded(lambda: DigitsResNet(num_classes=7), folder / "seven.pth")
        torch.save(state | {"conv1.weight": state["conv1.weight"] * torch.nan}, self.nan)
        self.garbage, self.empty, self.numbers = folder / "garbage.pth", folder / "empty.pth", folder / "numbers.pth"
        self.garbage.write_bytes(b"no checkpoint")
        torch.save({}, self.empty)
        torch.save({"epoch": 3}, self.numbers)
        self.module = folder / "module.pth"
        torch.save(DigitsResNet(), self.module)
        squeezenet = torchvision.models.squeezenet1_1
        self.squeezenet = seeded(lambda: squeezenet(num_classes=4), folder / "squeezenet.pth")

    def pictures(self, folder: Path, make: Callable[..., Path]) -> None:
        self.three = make(folder / "three", classes=3)
        self.lone = make(folder / "lone")
        (self.lone / "val" / "class3").rename(self.lone / "val" / "class9")
        self.unsplit = make(folder / "unsplit") / "train"
        self.bare = make(folder / "bare")
        shutil.rmtree(self.bare / "val" / "class2")
        (self.bare / "val" / "class2").mkdir()
        self.broken, self.broken_val = make(folder / "broken"), make(folder / "broken_val")
        for path in (*self.broken.glob("train/*/*.png"), self.broken_val / "val" / "class3" / "1.png"):
            path.write_bytes(path.read_bytes()[:200])

    def lists(self, folder: Path) -> None:
        self.strangers, self.twice = folder / "strangers.txt", folder / "twice.txt"
        self.strangers.write_text("train/class0/0.png\ntrain/class0/7.png\n")
        self.twice.write_text("train/class0/0.png\n" * 4)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, files: Files, make_image_folder: Callable[..., Path]) -> Wrong:
    return Wrong(tmp_path_factory.mktemp("wrong"), files, make_image_folder)


ON_DIGITS = "--checkpoint {digits} --workers 0 "
ON_IMAGES = (
    f"--arch timm:{SMALL} --checkpoint {{small}} --model_kwargs {SMALL_KWARGS} --num_classes 4 "
    "--input_size 32 --workers 0 --iters_w 1 --calib_samples 4 --batch_size 2 "
)
BAD_FLAGS = [
    ("--cache tape", "--cache: invalid choice: 'tape'"),
    ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
    ("digits", "unrecognized arguments: digits"),
    ("--iters 3", "unrecognized arguments: --iters 3"),  # no abbreviations
    ("--quiet=yes", "--quiet: ignored explicit argument 'yes'"),
    ("--n_bits_w", "--n_bits_w/--n-bits-w: expected one argument"),
    ("--n_bits_w four", "--n_bits_w/--n-bits-w: invalid int value: 'four'"),
    ("--n_bits_w 1", "--n_bits_w must be 2 to 8, got 1"),
    ("--n-bits-w 9", "--n_bits_w must be 2 to 8, got 9"),
    ("--first_last_bits 9", "--first_last_bits must be 2 to 8, got 9"),
    ("--first_last_bits all", "--first_last_bits: 'all' is neither a number of bits nor 'same'"),
    ("--scale_method cubic", "--scale_method/--scale-method: unknown grid 'cubic'; expected one of linear_mse"),
    ("--search_method tensor", "--search_method/--search-method: invalid choice: 'tensor'"),
    ("--recon_input both", "--recon_input/--recon-input: invalid choice: 'both'"),
    ("--interpolation cubic", "--interpolation: invalid choice: 'cubic'"),
    ("--rounding round", "--rounding: invalid choice: 'round'"),
    ("--scale_search full", "--scale_search/--scale-search: invalid choice: 'full'"),
    ("--preset slow", "--preset: invalid choice: 'slow'"),
    ("--hardware_approx_terms 5", "--hardware_approx_terms/--hardware-approx-terms: invalid choice: 5"),
    ("--hardware_approx_terms two", "--hardware_approx_terms/--hardware-approx-terms: invalid int value: 'two'"),
    ("--asymmetric=yes", "--asymmetric/--no-asymmetric: ignored explicit argument 'yes'"),
    ("--calib_samples 0", "--calib_samples must be at least 1, got 0"),
    ("--search_samples 0", "--search_samples must be at least 1, got 0"),
    ("--batch_size 0", "--batch_size must be at least 1, got 0"),
    ("--iters_w -1", "--iters_w must be at least 0, got -1"),
    ("--iters_w 1e3", "--iters_w/--iters-w: invalid int value: '1e3'"),
    ("--calib_lr 0", "--calib_lr must be positive and --rrweight at least 0, got 0.0"),
    ("--calib_lr nan", "--calib_lr/--calib-lr: 'nan' is not a finite number"),
    ("--rrweight -1", "--calib_lr must be positive and --rrweight at least 0"),
    ("--weight inf", "--rrweight/--weight: 'inf' is not a finite number"),
    ("--b_start 2 --b_end 20", "--b_start ≥ --b_end > 1 is needed, got 2.0 and 20.0"),
    ("--b_end 1", "--b_start ≥ --b_end > 1 is needed"),
    ("--b_start nan", "--b_start/--b-start: 'nan' is not a finite number"),
    ("--warmup 1.5", "--warmup must be 0 to 1, got 1.5"),
    ("--warmup nan", "--warmup: 'nan' is not a finite number"),
    ("--mean nan", "--mean: 'nan' is not a finite number"),
    ("--std inf", "--std: 'inf' is not a finite number"),
    ("--crop_pct nan", "--crop_pct/--crop-pct: 'nan' is not a finite number"),
    ("--seed -1", "--seed: expected 0 to 4294967295, got -1"),
    ("--seed 4294967296", "--seed: expected 0 to 4294967295, got 4294967296"),
    ("--seed 1.5", "--seed: invalid int value: '1.5'"),
    ("--workers -1", "--workers: expected 0 or more, got -1"),
    ("--device gpu", "--device: no device 'gpu'; expected auto, cpu, cuda or cuda:N"),
    ("--device cuda:99", "--device: cuda:99 asked for, but torch sees"),
    ("--device=", "--device: no device ''"),
]
IDLE_FLAGS = [
    ("--cache cpu --iters_w 0", "--cache has no effect here: no stage of this run captures anything"),
    ("--search_method layer_wise --scale_method log_2", "--search_method has no effect here: --scale_method log_2"),
    ("--search_samples 32 --scale_method linear_mse", "--search_samples has no effect here: --scale_method linear_mse"),
    *((f"--{flag} --iters_w 0", f"--{flag.split()[0]} has no effect here: --iters_w 0 learns nothing") for flag in (
        "calib_samples 8", "batch_size 8", "rrweight 1", "calib_lr 0.1", "b_start 9", "b_end 3", "warmup 0.1",
        "recon_input float", "test_before_calibration")),
    ("--hardware_approx --scale_method log_2", "--hardware_approx has no effect here: --scale_method log_2 has no √2"),
    ("--hardware_approx --scale_method linear_minmax", "--hardware_approx has no effect here: --scale_method linear"),
    ("--test_with_hardware_approx --scale_method log_2", "--test_with_hardware_approx has no effect here"),
    ("--hardware_approx --test_with_hardware_approx", "--test_with_hardware_approx has no effect here"),
    *((f"--scale_method {grid} --{flag}", f"--{flag.split()[0]} has no effect here: --scale_method {grid} is not log")
      for grid in ("linear_mse", "linear_minmax") for flag in ("scale_search", "asymmetric", "zero_code")),
    *((f"--rounding {how} --{flag}", f"--{flag.split()[0]} has no effect here: --rounding {how} searches in the metric")
      for how in ("compensated", "both")
      for flag in ("search_method layer_wise", "search_samples 4", "test_before_calibration")),
    *((f"--rounding {how} --{flag}", f"--{flag.split()[0]} has no effect here: --rounding {how} learns nothing")
      for how in ("nearest", "compensated")
      for flag in ("iters_w 5", "calib_lr 0.1", "rrweight 1", "b_start 9", "b_end 3", "warmup 0.1",
                   "recon_input float")),
    *((f"--rounding nearest --{flag}", f"--{flag.split()[0]} has no effect here: --rounding nearest learns nothing")
      for flag in ("calib_samples 8", "batch_size 8", "test_before_calibration")),
    ("--preset fast --search_method tensor_wise", "--search_method has no effect here: --rounding compensated search"),
    ("--preset best --test_before_calibration", "--test_before_calibration has no effect here: --rounding compensated"),
    ("--hardware_approx_terms 2", "--hardware_approx_terms has no effect here: neither --hardware_approx nor --test_"),
    ("--hardware_approx --hardware_approx_terms 2 --scale_method log_2", "--hardware_approx has no effect here"),
    ("--preset fast --iters_w 5", "--iters_w has no effect here: --rounding compensated learns nothing"),
    ("--preset fast --calib_lr 0.1", "--calib_lr has no effect here: --rounding compensated learns nothing"),
    ("--rounding nearest --calib_augment", "--calib_augment has no effect here: no stage of this run looks"),
    ("--calib_augment --iters_w 0", "--calib_augment has no effect here: no stage of this run looks at calibration"),
    ("--calib_list {twice} --iters_w 0", "--calib_list has no effect here: no stage of this run looks"),
    ("--save_calib_list new.txt --iters_w 0", "--save_calib_list has no effect here: no stage of this run looks"),
    ("--calib_list {twice} --save_calib_list new.txt", "--save_calib_list has no effect here: --calib_list has"),
]  # fmt: skip
BAD_NETWORKS = [
    ("--arch resnet19", "--arch: no network 'resnet19'; perhaps resnet18"),
    ("--arch=", "--arch: no network ''"),
    ("--arch timm:resnt50", "--arch: timm has no model 'resnt50'; perhaps resnet50"),
    ("--arch resnet18", "--checkpoint: could not download http://127.0.0.1:9/resnet18_imagenet.pth.tar"),
    ("--arch cifar_resnet20", "--checkpoint: cifar_resnet20 comes without weights; expected a file of them"),
    ("--checkpoint {folder}/lost.pth", "--checkpoint: {folder}/lost.pth does not exist"),
    ("--checkpoint {folder}", "--checkpoint: {folder} is a folder; expected a checkpoint file"),
    ("--checkpoint {garbage}", "--checkpoint: {garbage} is not a checkpoint, or is damaged"),
    ("--checkpoint {header}", "--checkpoint: {header} is not a checkpoint, or is damaged"),
    ("--checkpoint {empty}", "--checkpoint: {empty} holds an empty dict"),
    ("--checkpoint {numbers}", "--checkpoint: {numbers} holds entries that are no tensors: epoch"),
    ("--checkpoint {module}", "--checkpoint: {module} holds a logart_cnn.networks.DigitsResNet; only tensors are"),
    ("--checkpoint {small}", "--checkpoint: the keys of small.safetensors do not fit the network: missing"),
    ("--checkpoint {seven}", "--checkpoint: seven.pth has 7 classes (linear.weight), but the network was built for 10"),
    ("--checkpoint {nan}", "--arch, --checkpoint: the float network's logits are not all finite"),
    (ON_DIGITS + "--num_classes 0", "--num-classes: 0; expected at least 1"),
    (ON_DIGITS + "--model_kwargs drop_rate=0", "--model-kwargs: only for --arch timm:NAME, not for digits_resnet"),
    (ON_IMAGES + "--model_kwargs stem", "--model_kwargs: 'stem' is not of the form KEY=VALUE"),
    (ON_IMAGES + "--model_kwargs bogus=1", f"--model-kwargs: timm cannot build {SMALL}"),
    (ON_IMAGES + "--model_kwargs a=1 a=2", "--model_kwargs: a is given twice"),
    (ON_DIGITS + "--input_size 0", "--input-size: 0; expected at least 1"),
    (ON_DIGITS + "--crop_pct 2", "--crop-pct: 2.0; expected more than 0 and at most 1"),
    (ON_DIGITS + "--mean 1 2 3", "--mean: 3 values; expected 1 or 1, one per input channel"),
    (ON_DIGITS + "--std 0", "--std: 0.0; expected positive values"),
]
BAD_DATA = [
    (ON_IMAGES + "--data_path {folder}/lost", "--data_path: no folder {folder}/lost; expected ImageNet layout"),
    (ON_IMAGES + "--data_path {garbage}", "--data_path: no folder {garbage}; expected ImageNet layout"),
    (ON_IMAGES + "--data_path {unsplit}", "--data_path: no folder 'train' under {unsplit}; expected ImageNet layout"),
    (ON_IMAGES + "--data_path {bare}", "--data_path: no images under {bare}/val (Found no valid file for the classes"),
    (ON_IMAGES + "--data_path {lone}", "--data_path: under {lone}, only 'train' has the class 'class3'"),
    (ON_IMAGES + "--data_path {three}", "--data_path: {three} has 3 classes, but the network has 4"),
    (ON_IMAGES, "--data_path: 'digits' has 1 channel, the network 3"),
    (ON_DIGITS + "--data_path {images}", "--data_path: {images} has 4 classes, but the network has 10"),
    (ON_IMAGES + "--data_path {broken}", "--data_path: cannot read the image {broken}/train/class"),
    (ON_IMAGES + "--data_path {broken_val}", "--data_path: cannot read the image {broken_val}/val/class3/1.png"),
    (ON_IMAGES + "--data_path {images} --calib_samples 9", "--calib_samples: 9 images asked for; expected 1 to 8"),
    (ON_DIGITS + "--rounding compensated --calib_samples 1298", "--calib_samples: 1298 images asked for; expected 1"),
    (ON_DIGITS + "--calib_samples 1298", "--calib_samples: 1298 images asked for; expected 1 to 1297"),
    (ON_DIGITS + "--iters_w 0 --search_method block_wise --search_samples 2000",
     "--search_samples: 2000 images asked for; expected 1 to 1297"),
    (ON_DIGITS + "--search_method block_wise --search_samples 2000", "--search_samples: 2000 images asked for"),
    (ON_DIGITS + "--iters_w 0 --search_method layer_wise --search_samples 1024 --calib_list {twice}",
     "--search_samples: 1024 images asked for; expected 1 to 4, the size of the saved list"),
    (ON_DIGITS + "--calib_list {folder}/lost.txt", "--calib_list: cannot read {folder}/lost.txt"),
    (ON_IMAGES + "--data_path {images} --calib_list {strangers} --calib_samples 2",
     "--calib_list: 'train/class0/7.png' is not a training image of pictures"),
    (ON_IMAGES + "--data_path {images} --calib_list {twice}", "--calib_list: 'train/class0/0.png' is listed twice"),
    (ON_IMAGES + "--data_path {images} --calib_list {strangers}", "--calib_samples: 4 images asked for; expected 1"),
    ("--data_path {images} --arch squeezenet1_1 --checkpoint {squeezenet} --num_classes 4 --input_size 8 --iters_w 0",
     "--arch, --checkpoint: the network cannot run on images of 3×8×8 ("),
]  # fmt: skip
BAD_PLACES = [
    ("--run_dir {folder}", "--run_dir: the folder {folder} is not empty; pass a new or empty one"),
    ("--run_dir {header}", "--run_dir: {header} is a file; expected a folder"),
    ("--run_dir {folder}/lost/run", "--run_dir: no folder {folder}/lost; make it or pass another path"),
    ("--run_dir new --resume {folder}", "--run_dir: new and --resume {folder} were both given; expected one of them"),
    ("--resume {folder}", "--resume: {folder} holds no run (run.json is missing); expected a --run_dir"),
    ("--resume {folder}/lost", "--resume: {folder}/lost holds no run (run.json is missing)"),
    ("--resume {header}", "--resume: cannot read {header}/run.json ("),
    ("--results {folder}/lost/results.csv", "--results: no folder '{folder}/lost'"),
    ("--results {folder}", "--results: '{folder}' is a folder"),
    ("--results=", "--results: '.' is a folder"),
    ("--results {header}", "--results: '{header}' has another header: column 1 is 'time'"),
    ("--results {cut}", "--results: '{cut}' has a cut row at line 2"),
    ("--save_calib_list {folder}/lost/images.txt", "--save_calib_list: cannot write {folder}/lost/images.txt"),
    ("--save_calib_list {folder}", "--save_calib_list: cannot write {folder}; expected the path of a file"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS + IDLE_FLAGS + BAD_NETWORKS + BAD_DATA + BAD_PLACES)
def test_a_wrong_call_takes_one_line_and_leaves_no_trace(
    flags: str,
    message: str,
    wrong: Wrong,
    hub: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    argv = [word.format_map(vars(wrong)) for word in flags.split()]
    before = {path: path.read_bytes() for path in wrong.folder.glob("*.csv")}
    assert_refused(main, argv, f"logart-cnn: {message.format_map(vars(wrong))}", capfd)
    assert list(here.iterdir()) == []
    assert before == {path: path.read_bytes() for path in wrong.folder.glob("*.csv")}
