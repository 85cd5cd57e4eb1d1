"""The table of wrong calls of both commands, and the files with something wrong in them.

Words in braces stand for a flag's name, which the commands spell differently, or for a file of `Wrong`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from small_runs import SMALL, SMALL_KWARGS, VIT, VIT_KWARGS, Files, VitFiles, seeded, small_transformer

from logart.runs.columns import NAMES
from logart_cnn.networks import DigitsResNet

WORDS = {
    "cnn": {
        "bits": "n_bits_w", "data": "data_path", "net": "arch", "search_images": "search_samples",
        "images_flag": "calib_samples", "batch": "batch_size", "rate": "calib_lr", "workers": "workers", "learn": "",
        "inputs": "recon_input", "prefix": "float", "timm": SMALL,
        "on_digits": "--checkpoint {digits} --workers 0",
        "on_images": f"--arch timm:{SMALL} --checkpoint {{small}} --model_kwargs {SMALL_KWARGS} --num_classes 4 "
                     "--input_size 32 --workers 0 --iters_w 1 --calib_samples 4 --batch_size 2",
    },
    "vit": {
        "bits": "w_bit", "data": "dataset", "net": "model", "search_images": "calib_size",
        "images_flag": "optim_size", "batch": "optim_batch_size", "rate": "lr", "workers": "num_workers",
        "learn": "--optimize", "inputs": "optim_mode", "prefix": "qinp", "timm": VIT,
        "on_digits": "--checkpoint {digits} --num_workers 0",
        "on_images": f"--model timm:{VIT} --checkpoint {{small}} --model_kwargs {VIT_KWARGS} --num_classes 4 "
                     "--num_workers 0 --optimize --iters_w 1 --optim_size 4 --optim_batch_size 2",
    },
}  # fmt: skip


class Call(NamedTuple):
    """Flags, how the line that they get begins, and the commands that it is for."""

    flags: str
    message: str
    tracks: tuple[str, ...] = ("cnn", "vit")

    def of(self, track: str, wrong: Wrong) -> tuple[list[str], str]:
        """The words to call the command with, and the line."""
        texts = (self.flags, f"logart-{track}: {self.message}")
        flags, line = (text.format_map(WORDS[track] | vars(wrong)).format_map(vars(wrong)) for text in texts)
        return flags.split(), line


def cnn(flags: str, message: str) -> Call:
    return Call(flags, message, ("cnn",))


def vit(flags: str, message: str) -> Call:
    return Call(flags, message, ("vit",))


def idle(flags: str, why: str, given: str = "", make: Callable[..., Call] = Call) -> list[Call]:
    """A flag each (comma-separated) that has no effect beside the `given` ones."""
    each = [flag.strip() for flag in flags.split(",")]
    return [make(f"{given} --{flag}", f"--{flag.split()[0]} has no effect here: {why}") for flag in each]


FLAGS = [
    Call("--no_such_flag", "unrecognized arguments: --no_such_flag"),
    Call("digits", "unrecognized arguments: digits"),
    cnn("--iters 3", "unrecognized arguments: --iters 3; did you mean --iters_w?"),  # no abbreviations
    vit("--optim 3", "unrecognized arguments: --optim 3; did you mean --optimize?"),
    cnn("--optimize", "unrecognized arguments: --optimize; did you mean --rounding learned?"),
    cnn("--optim-metric mse", "unrecognized arguments: --optim-metric mse; only logart-vit has it"),
    cnn("--config a.py", "unrecognized arguments: --config a.py; only logart-vit reads config files"),
    vit("--calib-list a", "unrecognized arguments: --calib-list a; only logart-cnn has it"),
    cnn("-arch resnet18", "unrecognized arguments: -arch resnet18; did you mean --arch?"),
    vit("--batch_sizes=2", "unrecognized arguments: --batch_sizes=2; did you mean --optim_batch_size?"),
    cnn("--dataste digits", "unrecognized arguments: --dataste digits; did you mean --data_path?"),
    cnn("--w-bit four", "--n_bits_w: invalid int value: 'four'"),
    vit("--n-bits-w=four", "--w_bit: invalid int value: 'four'"),
    vit("--data_path {folder}/lost {on_digits}", "--dataset: no folder {folder}/lost; expected ImageNet layout"),
    cnn("--dataset {folder}/lost {on_digits}", "--data_path: no folder {folder}/lost; expected ImageNet layout"),
    cnn("--optim_mode qdrop", "--recon_input: invalid choice: 'qdrop'; expected one of quantized, float"),
    vit("--recon_input both", "--optim_mode: invalid choice: 'both'; expected one of qinp, rinp, qdrop"),
    Call("--input-size 3 32", "--input_size: 3 32; expected one number, or channels, height and width"),
    Call("--input-size 32 48", "--input_size: 32 48; expected one number, or channels, height and width"),
    Call("--img-size 1 3 32 32", "--input_size: 1 3 32 32; expected one number, or channels, height and width"),
    Call("--quiet=yes", "--quiet: ignored explicit argument 'yes'"),
    Call("--asymmetric=yes", "--asymmetric/--no-asymmetric: ignored explicit argument 'yes'"),
    vit("--optimize=yes", "--optimize: ignored explicit argument 'yes'"),
    cnn("--n_bits_w", "--n_bits_w: expected one argument"),
    cnn("--n_bits_w four", "--n_bits_w: invalid int value: 'four'"),
    vit("--w_bit", "--w_bit: expected one argument"),
    vit("--w_bit four", "--w_bit: invalid int value: 'four'"),
    Call("--{bits} 1", "--{bits} must be 2 to 8, got 1"),
    cnn("--n-bits-w 9", "--n_bits_w must be 2 to 8, got 9"),
    vit("--w-bit 9", "--w_bit must be 2 to 8, got 9"),
    Call("--first_last_bits 1", "--first_last_bits must be 2 to 8, got 1"),
    Call("--first_last_bits 9", "--first_last_bits must be 2 to 8, got 9"),
    Call("--bits_budget 1.9", "--bits_budget must be 2 to 8, got 1.9"),
    Call("--bits_budget 3 --size_budget 900", "--bits_budget and --size_budget exclude each other, got 3.0 and 900"),
    Call("--size_budget 0", "--size_budget must be at least 1, got 0"),
    Call("--bits_budget 3 --{bits} 3", "--{bits} has no effect here: a budget chooses the bits of each layer"),
    Call("--size_budget 900 {on_digits}", "--size_budget: 900 bytes of codes; the least possible is "),
    Call("--first_last_bits all", "--first_last_bits: 'all' is neither a number of bits nor 'same'"),
    Call("--scale_method cubic", "--scale_method: invalid choice: 'cubic'; expected one of log_2, log_sqrt2"),
    Call("--search_method tensor", "--search_method: invalid choice: 'tensor'; did you mean tensor_wise?"),
    Call("--scale_search full", "--scale_search: invalid choice: 'full'; expected one of none, grid, half_step"),
    cnn("--recon_input both", "--recon_input: invalid choice: 'both'"),
    vit("--optim_metric hessian", "--optim_metric: invalid choice: 'hessian'; did you mean hessian_perturb?"),
    vit("--optim_mode drop", "--optim_mode: invalid choice: 'drop'; did you mean qdrop?"),
    Call("--interpolation cubic", "--interpolation: invalid choice: 'cubic'; did you mean bicubic?"),
    Call("--rounding round", "--rounding: invalid choice: 'round'"),
    Call("--preset slow", "--preset: invalid choice: 'slow'"),
    Call("--cache tape", "--cache: invalid choice: 'tape'"),
    Call("--hardware_approx_terms 5", "--hardware_approx_terms: invalid choice: 5"),
    Call("--hardware_approx_terms two", "--hardware_approx_terms: invalid int value: 'two'"),
    *(Call(f"{{learn}} --{{{flag}}} 0", f"--{{{flag}}} must be at least 1, got 0")
      for flag in ("images_flag", "search_images", "batch")),
    vit("--calib_batch_size 0", "--calib_batch_size must be at least 1, got 0"),
    vit("--optimize --optim_batch_size -1", "--optim_batch_size must be at least 1, got -1"),
    Call("{learn} --iters_w -1", "--iters_w must be at least 0, got -1"),
    Call("--iters_w 1e3", "--iters_w: invalid int value: '1e3'"),
    Call("{learn} --{rate} 0", "--{rate} must be positive and --rrweight at least 0, got 0.0"),
    cnn("--calib_lr nan", "--calib_lr: 'nan' is not a finite number"),
    vit("--lr nan", "--lr: 'nan' is not a finite number"),
    Call("{learn} --rrweight -1", "--{rate} must be positive and --rrweight at least 0, got 0."),
    Call("--weight inf", "--rrweight: 'inf' is not a finite number"),
    Call("--rrweight inf", "--rrweight: 'inf' is not a finite number"),
    Call("{learn} --b_start 2 --b_end 20", "--b_start ≥ --b_end > 1 is needed, got 2.0 and 20.0"),
    Call("{learn} --b_end 1", "--b_start ≥ --b_end > 1 is needed"),
    Call("--b_start nan", "--b_start: 'nan' is not a finite number"),
    Call("{learn} --warmup 1.5", "--warmup must be 0 to 1, got 1.5"),
    Call("--warmup nan", "--warmup: 'nan' is not a finite number"),
    vit("--optimize --drop_prob 1.5", "--drop_prob must be 0 to 1, got 1.5"),
    vit("--optimize --drop_prob -0.5", "--drop_prob must be 0 to 1, got -0.5"),
    vit("--drop_prob nan", "--drop_prob: 'nan' is not a finite number"),
    vit("--optimize --temperature 0", "--temperature must be positive, got 0.0"),
    vit("--temperature inf", "--temperature: 'inf' is not a finite number"),
    Call("--mean nan", "--mean: 'nan' is not a finite number"),
    Call("--std inf", "--std: 'inf' is not a finite number"),
    Call("--crop_pct nan", "--crop_pct: 'nan' is not a finite number"),
    Call("--seed -1", "--seed: expected 0 to 4294967295, got -1"),
    Call("--seed 4294967296", "--seed: expected 0 to 4294967295, got 4294967296"),
    Call("--seed 1.5", "--seed: invalid int value: '1.5'"),
    vit("--val_batch_size 0", "--val_batch_size: expected 1 or more, got 0"),
    Call("--{workers} -1", "--{workers}: expected 0 or more, got -1"),
    Call("--device gpu", "--device: no device 'gpu'; expected auto, cpu, cuda or cuda:N"),
    Call("--device cuda:99", "--device: cuda:99 asked for, but torch sees"),
    Call("--device=", "--device: no device ''"),
    Call("{learn} --crops -1", "--crops must be at least 0, got -1"),
    Call("{learn} --crops 1", "--crops: the images are resized to 8×8, which is all that the network sees; expect"),
]  # fmt: skip

LLR = "iters_w 5, {rate} 0.1, rrweight 1, b_start 9, b_end 3, warmup 0.1"
UNLEARNED = "no stage of this run looks"
IDLE = [
    *idle("cache cpu, crops 1", "no stage of this run looks at calibration images", "--iters_w 0", cnn),
    *idle("cache cpu", "no stage of this run looks at calibration images", make=vit),
    *idle("search_method layer_wise, {search_images} 32", "--scale_method log_2 searches", "--scale_method log_2"),
    *idle("{search_images} 32", "--scale_method linear_mse", "--scale_method linear_mse"),
    *idle("calib_samples 8, batch_size 8, rrweight 1, calib_lr 0.1, b_start 9, b_end 3, warmup 0.1, recon_input float, "
          "test_before_calibration", "--iters_w 0 learns nothing", "--iters_w 0", cnn),
    *idle(f"{LLR}, iters_w 0, optim_size 8, optim_batch_size 8, optim_metric mse, temperature 2, optim_mode qdrop, "
          "drop_prob 0.5, test_before_calibration", "without --optimize nothing is learned", make=vit),
    *idle("lr 0.1", "--iters_w 0 learns nothing", "--optimize --iters_w 0", vit),
    *idle("lr 0.1", "--iters_w 0 learns nothing", "--optimize --config {unlearned}", vit),
    *idle("hardware_approx", "--scale_method log_2 has no √2", "--scale_method log_2"),
    *idle("hardware_approx", "--scale_method linear", "--scale_method linear_minmax"),
    *idle("test_with_hardware_approx", "", "--scale_method log_2"),
    *idle("test_with_hardware_approx", "", "--scale_method linear_mse"),
    *idle("test_with_hardware_approx", "", "--hardware_approx"),
    *idle("hardware_approx_terms 2", "neither --hardware_approx nor --test_"),
    Call("--hardware_approx --hardware_approx_terms 2 --scale_method log_2", "--hardware_approx has no effect here"),
    *(call for grid in ("linear_mse", "linear_minmax")
      for call in idle("scale_search, asymmetric, zero_code, wide_gap", f"it does not act on --scale_method {grid}",
                       f"--scale_method {grid}")),
    *(call for how in ("compensated", "both")
      for call in idle("search_method layer_wise, {search_images} 4, test_before_calibration",
                       f"--rounding {how} searches in the metric", f"--rounding {how}")),
    *(call for how in ("nearest", "compensated")
      for call in idle(f"{LLR}, {{inputs}} {{prefix}}", f"--rounding {how} learns nothing", f"--rounding {how}")),
    *idle("{images_flag} 8, {batch} 8, test_before_calibration", "--rounding nearest learns nothing",
          "--rounding nearest"),
    *(call for how in ("nearest", "compensated")
      for call in idle("optimize", f"--rounding {how} learns nothing", f"--rounding {how}", vit)),
    *idle("search_method tensor_wise", "--rounding compensated search", "--preset fast"),
    *idle("test_before_calibration", "--rounding compensated", "--preset best"),
    *idle("iters_w 5, calib_lr 0.1", "--rounding compensated learns nothing", "--preset fast", cnn),
    *idle("iters_w 5, lr 0.1, optim_metric mse", "without --optimize nothing is learned", "--preset fast", vit),
    *idle("calib_augment", UNLEARNED, "--rounding nearest", cnn),
    *idle("calib_augment, calib_list {twice}, save_calib_list new.txt", UNLEARNED, "--iters_w 0", cnn),
    *idle("save_calib_list new.txt", "--calib_list has", "--calib_list {twice}", cnn),
    *idle("calib_batch_size 4", "--rounding compensated", "--rounding compensated", vit),
    *idle("calib_batch_size 8", "--scale_method log_2 searches", "--scale_method log_2", vit),
    *(call for mode in ("qinp", "rinp")
      for call in idle("drop_prob 0.5", "only --optim_mode qdrop mixes", f"--optimize --optim_mode {mode}", vit)),
    *(call for metric in ("mse", "mae")
      for call in idle("temperature 2", "only --optim_metric hessian_perturb has one",
                       f"--optimize --optim_metric {metric}", vit)),
    *idle("drop_prob 0.5", "only --optim_mode qdrop", "--optimize --config {plain}", vit),
    *idle("temperature 2", "only --optim_metric hessian", "--optimize --config {plain}", vit),
    *idle("search_method tensor_wise", "--scale_method log_2", "--config {base_2}", vit),
    *idle("hardware_approx", "--scale_method log_2 has no √2", "--config {base_2}", vit),
    *(vit(f"--config {{base_2}} --preset {preset}", f"--preset: {preset} and --config {{base_2}} both set the defaults")
      for preset in ("fast", "paper", "best")),
]  # fmt: skip

CONFIGS = {
    "misspelt": "optim_sise = 3",
    "alien": "xyz = 3",
    "activations": "a_bit = 31",
    "textual": "w_bit = '4'",
    "metric": "optim_metric = 'hessian'",
    "one_bit": "w_bit = 1",
    "nan_lr": "lr = float('nan')",
    "no_batch": "val_batch_size = 0",
    "base_2": "scale_method = 'log_2'",
    "plain": "optim_metric, optim_mode = 'mse', 'qinp'",
    "unlearned": "iters_w = 0",
}
BAD_CONFIGS = [
    vit("--config {folder}/lost.py", "--config: {folder}/lost.py does not exist; expected a .py file that defines"),
    vit("--config {folder}", "--config: {folder} is a folder; expected a .py file"),
    vit("--config=", "--config: . is a folder"),
    vit("--config {text}", "--config: {text} is no .py file"),
    vit("--config {classless}", "--config: {classless} defines no class Config"),
    vit("--config {failing}", "--config: {failing} cannot be loaded (ModuleNotFoundError: No module named"),
    vit("--config {misspelt}", "--config: {misspelt} sets an unknown field optim_sise; did you mean optim_size?"),
    vit("--config {alien}", "--config: {alien} sets an unknown field xyz; expected one of w_bit, a_bit"),
    vit("--config {activations}", "--config: {activations}: a_bit must be 2 to 16, or 32 (float), got 31"),
    vit("--a_bit 1", "--a_bit must be 2 to 16, or 32 (float), got 1"),
    vit("--qhead_a_bit 8", "--qhead_a_bit has no effect here: without --a_bit activations stay float"),
    cnn("--act_scale pow2", "--act_scale has no effect here: without --n_bits_a activations stay float"),
    vit("--config {textual}", "--config: {textual}: w_bit must be an integer; got '4'"),
    vit("--config {metric} --optim_metric mse",
        "--config: {metric}: optim_metric must be one of hessian_perturb, mse, mae; got 'hessian'; did you mean hess"),
    vit("--config {one_bit}", "--config: {one_bit}: w_bit must be 2 to 8, got 1"),
    vit("--config {nan_lr}", "--config: {nan_lr}: lr must be positive and rrweight at least 0, got nan"),
    vit("--config {unlearned} --optimize --lr 0 --iters_w 5", "--lr must be positive and --rrweight at least 0, got"),
    vit("--config {no_batch}", "--config: {no_batch}: val_batch_size: expected 1 or more, got 0"),
    vit("--config {no_batch} --val_batch_size -1", "--val_batch_size: expected 1 or more, got -1"),
]

# No download.
LOST = f"{VIT_KWARGS} pretrained_cfg_overlay={{{{{{{{'file':'lost.pth','custom_load':False,'num_classes':4}}}}}}}}"
NETWORKS = [
    cnn("--arch resnet19", "--arch: no network 'resnet19'; did you mean resnet18"),
    vit("--model vit_bsae", "--model: no network 'vit_bsae'; did you mean vit_base"),
    vit("--model vit_tiny_patch16_224",
        "--model: no network 'vit_tiny_patch16_224'; did you mean timm:vit_tiny_patch16_224"),
    Call("--{net}=", "--{net}: no network ''"),
    cnn("--arch timm:resnt50", "--arch: timm has no model 'resnt50'; did you mean timm:resnet50"),
    vit("--model timm:vit_tiny_patch16_244",
        "--model: timm has no model 'vit_tiny_patch16_244'; did you mean timm:vit_"),
    cnn("--data_path {images} --arch resnet18 --num_classes 4 --iters_w 0",
        "--checkpoint: could not download http://127.0.0.1:9/resnet18_imagenet.pth.tar"),
    cnn("--arch cifar_resnet20", "--checkpoint: cifar_resnet20 comes without weights; expected a file of them"),
    vit(f"--dataset {{images}} --num_classes 4 --model vit_tiny --model_kwargs {LOST}",
        "--model: no pretrained weights for vit_tiny ("),
    Call("--checkpoint_key ema", "--checkpoint_key has no effect here: 'ema' is looked for in --checkpoint"),
    Call("{on_digits} --checkpoint_key xyz", "--checkpoint: {digits} has no entry 'xyz'; it holds a plain state dict"),
    Call("--checkpoint {folder}/lost.pth", "--checkpoint: {folder}/lost.pth does not exist"),
    Call("--checkpoint {folder}", "--checkpoint: {folder} is a folder; expected a checkpoint file"),
    Call("--checkpoint=", "--checkpoint: . is a folder; expected a checkpoint file"),
    Call("--checkpoint {garbage}", "--checkpoint: {garbage} is not a checkpoint, or is damaged"),
    Call("--checkpoint {header}", "--checkpoint: {header} is not a checkpoint, or is damaged"),
    Call("--checkpoint {empty}", "--checkpoint: {empty} holds an empty dict"),
    Call("--checkpoint {numbers}", "--checkpoint: {numbers} holds entries that are no tensors: epoch"),
    Call("--checkpoint {module}", "--checkpoint: {module} holds a logart_cnn.networks.DigitsResNet; only tensors are"),
    Call("--checkpoint {small}", "--checkpoint: the keys of small.safetensors do not fit the network: missing"),
    vit("{on_images} --dataset {images} --checkpoint {deep}",
        "--checkpoint: the keys of deep.pth do not fit the network: unexpected"),
    cnn("--checkpoint {seven}",
        "--checkpoint: seven.pth has 7 classes (linear.weight), but the network was built for 10"),
    vit("{on_images} --dataset {images} --checkpoint {seven}",
        "--checkpoint: seven.pth has 7 classes (head.weight), but the network was"),
    cnn("--checkpoint {nan}", "--arch, --checkpoint: the float network's logits are not all finite"),
    vit("{on_images} --dataset {images} --checkpoint {nan}",
        "--model, --checkpoint: the float network's logits are not"),
    cnn("--data_path {images} --arch squeezenet1_1 --checkpoint {squeezenet} --num_classes 4 "
        "--input_size 8 --iters_w 0",
        "--arch, --checkpoint: the network cannot run on images of 3×8×8 ("),
    Call("{on_digits} --num_classes 0", "--num_classes: 0; expected at least 1"),
    vit("{on_images} --num_classes 5 --model_kwargs num_classes=4",
        "--num_classes: 5, but --model_kwargs has num_class"),
    cnn("{on_digits} --model_kwargs drop_rate=0", "--model_kwargs: only for --arch timm:NAME, not for digits_resnet"),
    Call("{on_images} --model_kwargs stem", "--model_kwargs: 'stem' is not of the form KEY=VALUE"),
    Call("{on_images} --model_kwargs bogus=1", "--model_kwargs: timm cannot build {timm}"),
    Call("{on_images} --model_kwargs a=1 a=2", "--model_kwargs: a is given twice"),
    Call("{on_digits} --input_size 0", "--input_size: 0; expected at least 1"),
    vit("{on_images} --input_size 24", "--input_size: 24, but --model_kwargs has img_size=16"),
    Call("{on_digits} --crop_pct 2", "--crop_pct: 2.0; expected more than 0 and at most 1"),
    Call("{on_digits} --mean 1 2 3", "--mean: 3 values; expected 1 or 1, one per input channel"),
    Call("{on_digits} --std 0", "--std: 0.0; expected positive values"),
]  # fmt: skip

MANY = "images asked for; expected 1 to"
DATA = [
    Call("{on_images} --{data} {folder}/lost", "--{data}: no folder {folder}/lost; expected ImageNet layout"),
    Call("{on_images} --{data} {garbage}", "--{data}: no folder {garbage}; expected ImageNet layout"),
    Call("{on_images} --{data} {unsplit}", "--{data}: no folder 'train' under {unsplit}; expected ImageNet layout"),
    Call("{on_images} --{data} {bare}", "--{data}: no images in the class folders under {bare}/val; expected ImageNet"),
    Call("{on_images} --{data} {lone}", "--{data}: {lone} has 5 classes, but the network has 4"),
    Call("{on_images} --{data} {flat}", "--{data}: no class folders under {flat}/val; expected ImageNet layout"),
    Call("{on_images} --{data} {valued}", "--{data}: no folder 'train' under {valued}; expected ImageNet layout"),
    Call("{on_images} --{data} {numbered}", "--{data}: {numbered}: class 1 is '2' if folders are ordered as numbers, "),
    Call("{on_images} --{data} {images} --calib_path {folder}/lost", "--calib_path: no folder {folder}/lost; expected"),
    Call("{on_images} --{data} {images} --calib_path {void}", "--calib_path: no images under {void}"),
    Call("{on_images} --{data} {images} --calib_path {images} --calib_from_val 2", "--calib_from_val has no effect"),
    Call("{on_images} --{data} {images} --calib_from_val 8", f"--calib_from_val: 8 {MANY} 7"),
    Call("{on_images} --{data} {images} --calib_from_val 0", f"--calib_from_val: 0 {MANY} 7"),
    Call("{on_images} --{data} {images} --calib_from_val 3 --{images_flag} 4", f"--{{images_flag}}: 4 {MANY} 3"),
    Call("{on_images} --{data} {images} --val_limit 9", f"--val_limit: 9 {MANY} 8"),
    Call("{on_digits} --val_limit 0", f"--val_limit: 0 {MANY} 500"),
    Call("{on_digits} --class_map {text}", "--class_map has no effect here: 'digits' has no class folders"),
    Call("{on_digits} --class_order text", "--class_order has no effect here: 'digits' has no class folders"),
    Call("--class_order alphabet", "--class_order: invalid choice: 'alphabet'; expected one of number, text"),
    Call("{on_images} --{data} {images} --class_map {twice}", "--class_map: {twice} names 'train/class0/0.png' twice"),
    Call("{on_images} --{data} {images} --class_map {strangers}", "--class_map: {strangers} lacks the class folder 'c"),
    Call("{on_images} --{data} {images} --class_map {folder}/lost", "--class_map: cannot read {folder}/lost (No such"),
    Call("{on_images} --{data} {images} --class_map {high}", "--{data}: {images}: class 'class3' is output 4, but the"),
    Call("{on_images} --{data} {images} --class_map {high} --class_order text", "--class_order has no effect here: --"),
    Call("{on_images} --{data} {floats}", "--{data}: {floats}/val/class0/0.tif is a float image; expected 8 or 16 b"),
    Call("{on_images} --{data} {three}", "--{data}: {three} has 3 classes, but the network has 4; --class_map"),
    Call("{on_images}", "--{data}: 'digits' has 1 channel, the network 3"),
    Call("{on_digits} --{data} {images}", "--{data}: {images} has 4 classes, but the network has 10"),
    Call("{on_images} --{data} {broken}", "--{data}: cannot read the image {broken}/train/class"),
    Call("{on_images} --{data} {broken_val}", "--{data}: cannot read the image {broken_val}/val/class3/1.png"),
    Call("{on_images} --{data} {images} --{images_flag} 9", f"--{{images_flag}}: 9 {MANY} 8"),
    Call("{on_digits} --rounding compensated --{images_flag} 1298", f"--{{images_flag}}: 1298 {MANY} 1297"),
    Call("{on_digits} {learn} --{images_flag} 1298", f"--{{images_flag}}: 1298 {MANY} 1297"),
    Call("{on_digits} --search_method block_wise --{search_images} 2000", f"--{{search_images}}: 2000 {MANY} 1297"),
    Call("{on_digits} --search_method layer_wise --{search_images} 1298", f"--{{search_images}}: 1298 {MANY} 1297"),
    Call("{on_images} --{data} {images} --search_method block_wise --{search_images} 9",
         f"--{{search_images}}: 9 {MANY}"),
    cnn("{on_digits} --iters_w 0 --search_method block_wise --search_samples 2000",
        f"--search_samples: 2000 {MANY} 1297"),
    cnn("{on_digits} --iters_w 0 --search_method layer_wise --search_samples 1024 --calib_list {twice}",
        f"--search_samples: 1024 {MANY} 4, the size of the saved list"),
    cnn("{on_digits} --calib_list {folder}/lost.txt", "--calib_list: cannot read {folder}/lost.txt"),
    cnn("{on_images} --data_path {images} --calib_list {strangers} --calib_samples 2",
        "--calib_list: 'train/class0/7.png' is not a training image of pictures"),
    cnn("{on_images} --data_path {images} --calib_list {twice}", "--calib_list: 'train/class0/0.png' is listed twice"),
    cnn("{on_images} --data_path {images} --calib_list {strangers}", f"--calib_samples: 4 {MANY} 2"),
]  # fmt: skip

PLACES = [
    Call("--run_dir {folder}", "--run_dir: the folder {folder} is not empty; pass a new or empty one"),
    Call("--run_dir {header}", "--run_dir: {header} is a file; expected a folder"),
    Call("--run_dir {folder}/lost/run", "--run_dir: no folder {folder}/lost; make it or pass another path"),
    Call("--run_dir new {on_images} --model_kwargs a=1048576",
         "--model_kwargs: a packed file could not be loaded with these; with --run_dir, expected numbers, texts and"),
    Call("--save new.safetensors {on_images} --model_kwargs a={{{{1}}}}",
         "--model_kwargs: Object of type set is not JSON serializable; with --save, expected numbers, texts and lists"),
    Call("--save new.pth", "--save: 'new.pth'; expected a file that ends in .safetensors"),
    Call("--save {folder}/lost/new.safetensors", "--save: '{folder}/lost/new.safetensors' lies in no folder that"),
    *(Call(f"--{flag} {{long}}", f"--{flag}: ") for flag in ("run_dir", "resume", "results", "{data}", "checkpoint")),
    Call("--save {long}.safetensors", "--save: "),
    vit("--config {long}.py", "--config: "),
    cnn("--calib_list {long}", "--calib_list: cannot read {long} ("),
    cnn("--save_calib_list {long}", "--save_calib_list: "),
    Call("--once 5", "unrecognized arguments: 5"),
    Call("--run_dir new --resume {folder}",
         "--run_dir: new and --resume {folder} were both given; expected one of them"),
    Call("--resume {folder}", "--resume: {folder} holds no run (run.json is missing); expected a --run_dir"),
    Call("--resume {folder}/lost", "--resume: {folder}/lost holds no run (run.json is missing)"),
    Call("--resume {header}", "--resume: cannot read {header}/run.json ("),
    Call("--results {folder}/lost/results.csv", "--results: no folder '{folder}/lost'"),
    Call("--results {folder}", "--results: '{folder}' is a folder"),
    Call("--results=", "--results: '.' is a folder"),
    Call("--results {header}", "--results: '{header}' has no column 'utc_time'"),
    Call("--results {cut}", "--results: '{cut}' has a cut row at line 2"),
    cnn("--save_calib_list {folder}/lost/images.txt", "--save_calib_list: cannot write {folder}/lost/images.txt"),
    cnn("--save_calib_list {folder}", "--save_calib_list: cannot write {folder}; expected the path of a file"),
]  # fmt: skip

TABLE = [(track, call) for call in (*FLAGS, *IDLE, *BAD_CONFIGS, *NETWORKS, *DATA, *PLACES) for track in call.tracks]


class Wrong:
    """Files with something wrong in them, for a command whose sound files are `files`."""

    def __init__(self, folder: Path, files: Files | VitFiles, make: Callable[..., Path]) -> None:
        self.folder, self.images, self.digits, self.small = folder, files.images, files.digits, files.small
        self.weights(folder)
        self.pictures(folder, make)
        self.texts(folder)

    def weights(self, folder: Path) -> None:
        self.garbage, self.empty, self.numbers = folder / "garbage.pth", folder / "empty.pth", folder / "numbers.pth"
        self.garbage.write_bytes(b"no checkpoint")
        torch.save({}, self.empty)
        torch.save({"epoch": 3}, self.numbers)
        self.module = folder / "module.pth"
        torch.save(DigitsResNet(), self.module)
        self.nan, self.seven = folder / "nan.pth", folder / "seven.pth"
        self.deep, self.squeezenet = folder / "deep.pth", folder / "squeezenet.pth"

    def pictures(self, folder: Path, make: Callable[..., Path]) -> None:
        self.three = make(folder / "three", classes=3)
        self.lone = make(folder / "lone")
        (self.lone / "val" / "class3").rename(self.lone / "val" / "class9")
        self.unsplit = make(folder / "unsplit") / "train"
        self.bare, self.flat, self.valued = make(folder / "bare"), make(folder / "flat"), make(folder / "valued")
        for path in [*self.bare.glob("val/*/*.png"), *self.flat.glob("val/*/*.png")]:
            path.unlink()
        for path in self.flat.glob("val/*"):
            path.rmdir()
        shutil.rmtree(self.valued / "train")
        self.numbered, self.floats, self.void = make(folder / "numbered"), make(folder / "floats"), folder / "void"
        self.void.mkdir()
        for path in [*self.numbered.glob("*/class*")]:
            path.rename(path.with_name({"0": "1", "1": "2", "2": "9", "3": "10"}[path.name[-1]]))
        for path in [*self.floats.glob("val/*/*.png")]:
            Image.new("F", (40, 40)).save(path.with_suffix(".tif"))
            path.unlink()
        self.broken, self.broken_val = make(folder / "broken"), make(folder / "broken_val")
        for path in (*self.broken.glob("train/*/*.png"), self.broken_val / "val" / "class3" / "1.png"):
            path.write_bytes(path.read_bytes()[:200])

    def texts(self, folder: Path) -> None:
        self.long = "n" * 300  # than a file's name may be
        self.header, self.cut = folder / "header.csv", folder / "cut.csv"
        self.header.write_text("time,arch\n1,2\n")
        self.cut.write_text(",".join(NAMES) + "\n2026,cnn\n")
        self.strangers, self.twice = folder / "strangers.txt", folder / "twice.txt"
        self.strangers.write_text("train/class0/0.png\ntrain/class0/7.png\n")
        self.twice.write_text("train/class0/0.png\n" * 4)
        self.high = folder / "high.txt"
        self.high.write_text("class0 0\nclass1 1\nclass2 2\nclass3 4\n")
        self.text = folder / "config.txt"
        self.text.write_text("class Config:\n    w_bit = 4\n")
        for name, line in CONFIGS.items():
            path = folder / f"{name}.py"
            path.write_text(f"class Config:\n    {line}\n")
            setattr(self, name, path)
        self.classless, self.failing = folder / "classless.py", folder / "failing.py"
        self.classless.write_text("w_bit = 4\n")
        self.failing.write_text("import no_such_module\n")


def wrong_for_cnns(folder: Path, files: Files, make: Callable[..., Path]) -> Wrong:
    wrong = Wrong(folder, files, make)
    state = load_file(wrong.digits)
    torch.save(state | {"conv1.weight": state["conv1.weight"] * torch.nan}, wrong.nan)
    seeded(lambda: DigitsResNet(num_classes=7), wrong.seven)
    seeded(lambda: torchvision.models.squeezenet1_1(num_classes=4), wrong.squeezenet)
    return wrong


def wrong_for_transformers(folder: Path, files: VitFiles, make: Callable[..., Path]) -> Wrong:
    wrong = Wrong(folder, files, make)
    state = load_file(wrong.small)
    torch.save(state | {"pos_embed": state["pos_embed"] * torch.nan}, wrong.nan)
    torch.save(state | {"head.weight": torch.ones(7, 12), "head.bias": torch.ones(7)}, wrong.seven)
    seeded(lambda: small_transformer(words=VIT_KWARGS.replace("=2 ", "=3 ")), wrong.deep)
    return wrong
