"""Wrong calls: one line that names the flag, exit code 2, and no trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import VIT, VIT_KWARGS, VitFiles, assert_refused, seeded, small_transformer

from logart.results import NAMES
from logart_vit.main import main


class Wrong:
    """Files with something wrong in them, and configs."""

    def __init__(self, folder: Path, files: VitFiles, make: Callable[..., Path]) -> None:
        self.folder, self.images, self.digits, self.small = folder, files.images, files.digits, files.small
        self.weights(folder)
        self.pictures(folder, make)
        self.header = folder / "header.csv"
        self.header.write_text("time,arch\n1,2\n")
        self.cut = folder / "cut.csv"
        self.cut.write_text(",".join(NAMES) + "\n2026,vit\n")
        self.text = folder / "config.txt"
        self.text.write_text("class Config:\n    w_bit = 4\n")
        for name, line in CONFIGS.items():
            path = folder / f"{name}.py"
            path.write_text(f"class Config:\n    {line}\n")
            setattr(self, name, path)
        self.classless, self.failing = folder / "classless.py", folder / "failing.py"
        self.classless.write_text("w_bit = 4\n")
        self.failing.write_text("import no_such_module\n")

    def weights(self, folder: Path) -> None:
        state = load_file(self.small)
        self.nan, self.seven = folder / "nan.pth", folder / "seven.pth"
        torch.save(state | {"pos_embed": state["pos_embed"] * torch.nan}, self.nan)
        torch.save(state | {"head.weight": torch.ones(7, 12), "head.bias": torch.ones(7)}, self.seven)
        self.garbage, self.numbers, self.module = folder / "garbage.pth", folder / "numbers.pth", folder / "module.pth"
        self.garbage.write_bytes(b"no checkpoint")
        torch.save({"epoch": 3}, self.numbers)
        torch.save(torch.nn.Linear(2, 2), self.module)
        self.deep = seeded(lambda: small_transformer(words=VIT_KWARGS.replace("=2 ", "=3 ")), folder / "deep.pth")

    def pictures(self, folder: Path, make: Callable[..., Path]) -> None:
        self.three = make(folder / "three", classes=3)
        self.unsplit = make(folder / "unsplit") / "train"
        self.bare = make(folder / "bare")
        shutil.rmtree(self.bare / "val" / "class2")
        (self.bare / "val" / "class2").mkdir()
        self.broken, self.broken_val = make(folder / "broken"), make(folder / "broken_val")
        for path in (*self.broken.glob("train/*/*.png"), self.broken_val / "val" / "class3" / "1.png"):
            path.write_bytes(path.read_bytes()[:200])


CONFIGS = {
    "misspelt": "optim_sise = 3",
    "alien": "xyz = 3",
    "activations": "a_bit = 8",
    "textual": "w_bit = '4'",
    "metric": "optim_metric = 'hessian'",
    "one_bit": "w_bit = 1",
    "nan_lr": "lr = float('nan')",
    "no_batch": "val_batch_size = 0",
    "base_2": "scale_method = 'log_2'",
    "plain": "optim_metric, optim_mode = 'mse', 'qinp'",
    "unlearned": "iters_w = 0",
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, files: VitFiles, make_image_folder: Callable[..., Path]) -> Wrong:
    return Wrong(tmp_path_factory.mktemp("wrong"), files, make_image_folder)


ON_DIGITS = "--checkpoint {digits} --num_workers 0 "
ON_IMAGES = (
    f"--model timm:{VIT} --checkpoint {{small}} --model_kwargs {VIT_KWARGS} --num_classes 4 --num_workers 0 "
    "--optimize --iters_w 1 --optim_size 4 --optim_batch_size 2 "
)
LOST = f"{VIT_KWARGS} pretrained_cfg_overlay={{{{'file':'lost.pth','custom_load':False}}}}"  # nothing is downloaded
BAD_FLAGS = [
    ("--cache tape", "--cache: invalid choice: 'tape'"),
    ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
    ("digits", "unrecognized arguments: digits"),
    ("--optim 3", "unrecognized arguments: --optim 3"),  # no abbreviations
    ("--optimize=yes", "--optimize: ignored explicit argument 'yes'"),
    ("--w_bit", "--w_bit/--w-bit: expected one argument"),
    ("--w_bit four", "--w_bit/--w-bit: invalid int value: 'four'"),
    ("--w_bit 1", "--w_bit must be 2 to 8, got 1"),
    ("--w-bit 9", "--w_bit must be 2 to 8, got 9"),
    ("--first_last_bits 1", "--first_last_bits must be 2 to 8, got 1"),
    ("--first_last_bits all", "--first_last_bits: 'all' is neither a number of bits nor 'same'"),
    ("--scale_method cubic", "--scale_method/--scale-method: unknown grid 'cubic'; expected one of linear_mse"),
    ("--search_method tensor", "--search_method/--search-method: invalid choice: 'tensor'"),
    ("--optim_metric hessian", "--optim_metric/--optim-metric: invalid choice: 'hessian'"),
    ("--optim_mode drop", "--optim_mode/--optim-mode: invalid choice: 'drop'"),
    ("--interpolation cubic", "--interpolation: invalid choice: 'cubic'"),
    ("--rounding round", "--rounding: invalid choice: 'round'"),
    ("--scale_search full", "--scale_search/--scale-search: invalid choice: 'full'"),
    ("--preset slow", "--preset: invalid choice: 'slow'"),
    ("--hardware_approx_terms 5", "--hardware_approx_terms/--hardware-approx-terms: invalid choice: 5"),
    ("--hardware_approx_terms two", "--hardware_approx_terms/--hardware-approx-terms: invalid int value: 'two'"),
    ("--asymmetric=yes", "--asymmetric/--no-asymmetric: ignored explicit argument 'yes'"),
    ("--calib_size 0", "--calib_size must be at least 1, got 0"),
    ("--calib_batch_size 0", "--calib_batch_size must be at least 1, got 0"),
    ("--optimize --optim_size 0", "--optim_size must be at least 1, got 0"),
    ("--optimize --optim_batch_size -1", "--optim_batch_size must be at least 1, got -1"),
    ("--optimize --iters_w -1", "--iters_w must be at least 0, got -1"),
    ("--iters_w 1e3", "--iters_w/--iters-w: invalid int value: '1e3'"),
    ("--optimize --lr 0", "--lr must be positive and --rrweight at least 0, got 0.0"),
    ("--lr nan", "--lr: 'nan' is not a finite number"),
    ("--optimize --rrweight -1", "--lr must be positive and --rrweight at least 0, got 0.1 and -1.0"),
    ("--rrweight inf", "--rrweight/--weight: 'inf' is not a finite number"),
    ("--optimize --b_start 2 --b_end 20", "--b_start ≥ --b_end > 1 is needed, got 2.0 and 20.0"),
    ("--optimize --warmup 1.5", "--warmup must be 0 to 1, got 1.5"),
    ("--optimize --drop_prob 1.5", "--drop_prob must be 0 to 1, got 1.5"),
    ("--optimize --drop_prob -0.5", "--drop_prob must be 0 to 1, got -0.5"),
    ("--drop_prob nan", "--drop_prob/--drop-prob: 'nan' is not a finite number"),
    ("--optimize --temperature 0", "--temperature must be positive, got 0.0"),
    ("--temperature inf", "--temperature: 'inf' is not a finite number"),
    ("--mean nan", "--mean: 'nan' is not a finite number"),
    ("--seed -1", "--seed: expected 0 to 4294967295, got -1"),
    ("--seed 4294967296", "--seed: expected 0 to 4294967295, got 4294967296"),
    ("--val_batch_size 0", "--val_batch_size: expected 1 or more, got 0"),
    ("--num_workers -1", "--num_workers: expected 0 or more, got -1"),
    ("--device gpu", "--device: no device 'gpu'; expected auto, cpu, cuda or cuda:N"),
    ("--device cuda:99", "--device: cuda:99 asked for, but torch sees"),
]
UNOPTIMIZED = "without --optimize nothing is learned"
IDLE_FLAGS = [
    ("--cache cpu", "--cache has no effect here: no stage of this run captures anything"),
    *((f"--{flag}", f"--{flag.split()[0]} has no effect here: {UNOPTIMIZED}") for flag in (
        "iters_w 5", "iters_w 0", "optim_size 8", "optim_batch_size 8", "optim_metric mse", "temperature 2",
        "optim_mode qdrop", "drop_prob 0.5", "lr 0.1", "rrweight 1", "b_start 9", "b_end 3", "warmup 0.1",
        "test_before_calibration")),
    ("--optimize --iters_w 0 --lr 0.1", "--lr has no effect here: --iters_w 0 learns nothing"),
    ("--optimize --config {unlearned} --lr 0.1", "--lr has no effect here: --iters_w 0 learns nothing"),
    *((f"--scale_method {grid} --{flag}", f"--{flag.split()[0]} has no effect here: --scale_method {grid} is not log")
      for grid in ("linear_mse", "linear_minmax") for flag in ("scale_search", "asymmetric", "zero_code")),
    *((f"--rounding {how} --{flag}", f"--{flag.split()[0]} has no effect here: --rounding {how} searches in the metric")
      for how in ("compensated", "both")
      for flag in ("search_method layer_wise", "calib_size 4", "test_before_calibration")),
    *((f"--rounding {how} --{flag}", f"--{flag.split()[0]} has no effect here: --rounding {how} learns nothing")
      for how in ("nearest", "compensated")
      for flag in ("iters_w 5", "lr 0.1", "rrweight 1", "b_start 9", "b_end 3", "warmup 0.1",
                   "optim_mode qinp")),
    *((f"--rounding nearest --{flag}", f"--{flag.split()[0]} has no effect here: --rounding nearest learns nothing")
      for flag in ("optim_size 8", "optim_batch_size 8", "test_before_calibration")),
    ("--preset fast --search_method tensor_wise", "--search_method has no effect here: --rounding compensated search"),
    ("--preset best --test_before_calibration", "--test_before_calibration has no effect here: --rounding compensated"),
    ("--hardware_approx_terms 2", "--hardware_approx_terms has no effect here: neither --hardware_approx nor --test_"),
    ("--hardware_approx --hardware_approx_terms 2 --scale_method log_2", "--hardware_approx has no effect here"),
    *((f"--optimize --rounding {how}", f"--optimize has no effect here: --rounding {how} learns nothing")
      for how in ("nearest", "compensated")),
    *((f"--preset fast --{flag}", f"--{flag.split()[0]} has no effect here: {UNOPTIMIZED}")
      for flag in ("iters_w 5", "lr 0.1", "optim_metric mse")),
    ("--rounding compensated --calib_batch_size 4", "--calib_batch_size has no effect here: --rounding compensated"),
    *((f"--config {{base_2}} --preset {preset}", f"--preset: {preset} and --config {{base_2}} both set the defaults")
      for preset in ("fast", "paper", "best")),
    *((f"--optimize --optim_mode {mode} --drop_prob 0.5",
       "--drop_prob has no effect here: only --optim_mode qdrop mixes inputs") for mode in ("qinp", "rinp")),
    *((f"--optimize --optim_metric {metric} --temperature 2",
       "--temperature has no effect here: only --optim_metric hessian_perturb has one") for metric in ("mse", "mae")),
    ("--optimize --config {plain} --drop_prob 0.5", "--drop_prob has no effect here: only --optim_mode qdrop"),
    ("--optimize --config {plain} --temperature 2", "--temperature has no effect here: only --optim_metric hessian"),
    *((f"--scale_method log_2 --{flag}", f"--{flag.split()[0]} has no effect here: --scale_method log_2 searches")
      for flag in ("search_method layer_wise", "calib_size 8", "calib_batch_size 8")),
    ("--config {base_2} --search_method tensor_wise", "--search_method has no effect here: --scale_method log_2"),
    ("--hardware_approx --config {base_2}", "--hardware_approx has no effect here: --scale_method log_2 has no √2"),
    ("--test_with_hardware_approx --scale_method linear_mse", "--test_with_hardware_approx has no effect here"),
    ("--hardware_approx --test_with_hardware_approx", "--test_with_hardware_approx has no effect here"),
]  # fmt: skip
BAD_CONFIGS = [
    ("--config {folder}/lost.py", "--config: {folder}/lost.py does not exist; expected a .py file that defines"),
    ("--config {folder}", "--config: {folder} is a folder; expected a .py file"),
    ("--config=", "--config: . is a folder"),
    ("--config {text}", "--config: {text} is no .py file"),
    ("--config {classless}", "--config: {classless} defines no class Config"),
    ("--config {failing}", "--config: {failing} cannot be loaded (ModuleNotFoundError: No module named"),
    ("--config {misspelt}", "--config: {misspelt} sets an unknown field optim_sise; did you mean optim_size?"),
    ("--config {alien}", "--config: {alien} sets an unknown field xyz; expected some of w_bit, a_bit"),
    ("--config {activations}", "--config: {activations}: a_bit must be 32, because activations stay in float; got 8"),
    ("--config {textual}", "--config: {textual}: w_bit must be an integer; got '4'"),
    ("--config {metric} --optim_metric mse", "--config: {metric}: optim_metric must be one of hessian_perturb, mse"),
    ("--config {one_bit}", "--w_bit must be 2 to 8, got 1"),
    ("--config {nan_lr}", "--lr must be positive and --rrweight at least 0, got nan"),
    ("--config {no_batch}", "--val_batch_size: expected 1 or more, got 0"),
]
BAD_NETWORKS = [
    ("--model vit_bsae", "--model: no network 'vit_bsae'; perhaps vit_base"),
    ("--model vit_tiny_patch16_224", "--model: no network 'vit_tiny_patch16_224'; perhaps timm:vit_tiny_patch16_224"),
    ("--model=", "--model: no network ''"),
    ("--model timm:vit_tiny_patch16_244", "--model: timm has no model 'vit_tiny_patch16_244'; perhaps vit_"),
    ("--model timm:resnet10t", "--model: timm:resnet10t: no transformer blocks found; expected a vision transformer"),
    (f"--model vit_tiny --model_kwargs {LOST}", "--model: no pretrained weights for vit_tiny ("),
    ("--checkpoint {folder}/lost.pth", "--checkpoint: {folder}/lost.pth does not exist"),
    ("--checkpoint {folder}", "--checkpoint: {folder} is a folder; expected a checkpoint file"),
    ("--checkpoint=", "--checkpoint: . is a folder; expected a checkpoint file"),
    ("--checkpoint {garbage}", "--checkpoint: {garbage} is not a checkpoint, or is damaged"),
    ("--checkpoint {numbers}", "--checkpoint: {numbers} holds entries that are no tensors: epoch"),
    ("--checkpoint {module}", "--checkpoint: {module} holds a torch.nn.modules.linear.Linear; only tensors are"),
    ("--checkpoint {small}", "--checkpoint: the keys of small.safetensors do not fit the network: missing blocks.2"),
    (ON_IMAGES + "--checkpoint {deep}", "--checkpoint: the keys of deep.pth do not fit the network: unexpected"),
    (ON_IMAGES + "--checkpoint {seven}", "--checkpoint: seven.pth has 7 classes (head.weight), but the network was"),
    (ON_IMAGES + "--dataset {images} --checkpoint {nan}", "--model, --checkpoint: the float network's logits are not"),
    (ON_DIGITS + "--num_classes 0", "--num-classes: 0; expected at least 1"),
    (ON_IMAGES + "--num_classes 5 --model_kwargs num_classes=4", "--num-classes: 5, but --model-kwargs has num_class"),
    (ON_IMAGES + "--model_kwargs stem", "--model_kwargs: 'stem' is not of the form KEY=VALUE"),
    (ON_IMAGES + "--model_kwargs bogus=1", f"--model-kwargs: timm cannot build {VIT}"),
    (ON_IMAGES + "--model_kwargs depth=1 depth=2", "--model_kwargs: depth is given twice"),
    (ON_IMAGES + "--input_size 24", "--input-size: 24, but --model-kwargs has img_size=16"),
    (ON_DIGITS + "--input_size 0", "--input-size: 0; expected at least 1"),
    (ON_DIGITS + "--crop_pct 2", "--crop-pct: 2.0; expected more than 0 and at most 1"),
    (ON_DIGITS + "--mean 1 2 3", "--mean: 3 values; expected 1 or 1, one per input channel"),
    (ON_DIGITS + "--std 0", "--std: 0.0; expected positive values"),
]
BAD_DATA = [
    (ON_IMAGES + "--dataset {folder}/lost", "--dataset: no folder {folder}/lost; expected ImageNet layout"),
    (ON_IMAGES + "--dataset {unsplit}", "--dataset: no folder 'train' under {unsplit}; expected ImageNet layout"),
    (ON_IMAGES + "--dataset {bare}", "--dataset: no images under {bare}/val (Found no valid file for the classes"),
    (ON_IMAGES + "--dataset {three}", "--dataset: {three} has 3 classes, but the network has 4"),
    (ON_IMAGES, "--dataset: 'digits' has 1 channel, the network 3"),
    (ON_DIGITS + "--dataset {images}", "--dataset: {images} has 4 classes, but the network has 10"),
    (ON_IMAGES + "--dataset {broken}", "--dataset: cannot read the image {broken}/train/class"),
    (ON_IMAGES + "--dataset {broken_val}", "--dataset: cannot read the image {broken_val}/val/class3/1.png"),
    (ON_IMAGES + "--dataset {images} --optim_size 9", "--optim_size: 9 images asked for; expected 1 to 8"),
    (ON_DIGITS + "--rounding compensated --optim_size 1298", "--optim_size: 1298 images asked for; expected 1 to 1297"),
    (ON_DIGITS + "--search_method layer_wise --calib_size 1298", "--calib_size: 1298 images asked for; expected 1 to"),
    (ON_IMAGES + "--dataset {images} --search_method block_wise --calib_size 9", "--calib_size: 9 images asked for"),
]
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
]


@pytest.mark.parametrize(
    ("flags", "message"), BAD_FLAGS + IDLE_FLAGS + BAD_CONFIGS + BAD_NETWORKS + BAD_DATA + BAD_PLACES
)
def test_a_wrong_call_takes_one_line_and_leaves_no_trace(
    flags: str,
    message: str,
    wrong: Wrong,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = {path: path.stat().st_size for path in wrong.folder.iterdir()}
    argv = [word.format_map(vars(wrong)) for word in flags.split()]
    assert_refused(main, argv, f"logart-vit: {message.format_map(vars(wrong))}", capfd)
    assert list(here.iterdir()) == []
    assert before == {path: path.stat().st_size for path in wrong.folder.iterdir()}
