"""Quantize a CNN onto a logarithmic weight grid and measure it: `python -m logart_cnn.main --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from logart.cli import FlagParser, finite, given, key_values, refuse_idle, run_command
from logart.config import QuantConfig, ReconInput, SearchMethod
from logart.data import DIGITS, ImageSource, calibration_images, load_names, open_images, save_names
from logart.grid import ScaleMethod
from logart.results import Cell, check_results
from logart.run import RunOptions, check_network, run
from logart.runtime import UserError, resolve_device, seed_everything
from logart_cnn.models import INTERPOLATIONS, load_network

DEFAULT = QuantConfig()

# flag's destination -> field of QuantConfig
FIELDS = {
    "n_bits_w": "n_bits",
    "channel_wise": "channel_wise",
    "scale_method": "scale_method",
    "search_method": "search_method",
    "search_samples": "search_samples",
    "calib_samples": "calib_samples",
    "batch_size": "batch_size",
    "iters_w": "iters",
    "rrweight": "rrweight",
    "calib_lr": "lr",
    "b_start": "b_start",
    "b_end": "b_end",
    "warmup": "warmup",
    "recon_input": "recon_input",
    "seed": "seed",
}
LLR_FLAGS = (
    "calib_samples", "batch_size", "rrweight", "calib_lr", "b_start", "b_end", "warmup", "recon_input",
    "test_before_calibration",
)  # fmt: skip
LIST_FLAGS = ("calib_list", "save_calib_list")
DATA_SETTINGS = ("input_size", "crop_pct", "mean", "std", "interpolation")
OTHER_DEFAULTS = {
    "data_path": DIGITS,
    "arch": "digits_resnet",
    "device": "auto",
    "workers": 2,
    "results": "results.csv",
}


def build_parser() -> FlagParser:
    """The command line; every flag is None unless given, so that an idle one can be told from a default."""
    parser = FlagParser(
        prog="logart-cnn",
        description="Quantize a CNN's weights onto a logarithmic grid with DBS and LLR, measure it, append a row to "
        "the results file. Every flag may be written with - or _.",
    )
    _add_network_flags(parser)
    _add_quantization_flags(parser)
    parser.flag("--test_before_calibration", action="store_true",
                help="also evaluate after DBS, before LLR (always on for the built-in digits)")  # fmt: skip
    parser.flag("--test_with_hardware_approx", action="store_true",
                help="evaluate a second time with √2 ≈ 1+1/2 in a network calibrated without it")  # fmt: skip
    parser.flag("--seed", type=int, help="of every random choice (default 0)")
    parser.flag("--device", help="auto (CUDA when there is one), cpu, cuda or cuda:N (default auto)")
    parser.flag("--workers", type=int, help="processes that read validation images (default 2; 0 reads in this one)")
    parser.flag("--results", help="the CSV file that gets a row (default results.csv)")
    parser.flag("--quiet", action="store_true", help="no progress, no tables; only the accuracies")
    return parser


def _add_network_flags(parser: FlagParser) -> None:
    parser.flag("--data_path", help="a folder in ImageNet layout, or digits (default digits)")
    parser.flag("--arch", help="resnet18, resnet50, mobilenetv2, regnetx_600m, regnetx_3200m, mnasnet, squeezenet1_1, "
                "cifar_resnet20/32/44/56, digits_resnet or timm:NAME (default digits_resnet)")  # fmt: skip
    parser.flag("--checkpoint", help="float weights: .pth, .pt, .th, .tar or .safetensors (default: the network's own)")
    parser.flag("--model_kwargs", nargs="+", metavar="KEY=VALUE", help="for timm.create_model, with --arch timm:NAME")
    parser.flag("--num_classes", type=int, help="outputs of the network")
    parser.flag("--input_size", type=int, help="height and width of the input in pixels")
    parser.flag("--crop_pct", type=finite, help="part of the resized image that the centre crop keeps")
    parser.flag("--mean", type=finite, nargs="+", help="per channel, of pixels in 0..1")
    parser.flag("--std", type=finite, nargs="+", help="per channel")
    parser.flag("--interpolation", choices=INTERPOLATIONS, help="how images are resized")


def _add_quantization_flags(parser: FlagParser) -> None:
    d = DEFAULT
    parser.flag("--n_bits_w", type=int, help=f"bits per weight, 2 to 8 (default {d.n_bits})")
    parser.flag("--channel_wise", action=argparse.BooleanOptionalAction,
                help="one codebook per output channel, or one per layer (default: per channel)")  # fmt: skip
    parser.flag("--scale_method", type=_scale_method, metavar="{" + ",".join(m.value for m in ScaleMethod) + "}",
                help=f"the grid (default {d.scale_method.value})")  # fmt: skip
    parser.flag("--search_method", choices=[m.value for m in SearchMethod],
                help=f"the error that DBS minimises; dynamic grid only (default {d.search_method.value})")  # fmt: skip
    parser.flag("--search_samples", type=int,
                help=f"images for DBS (default {d.search_samples}; tensor_wise looks at none)")  # fmt: skip
    parser.flag("--calib_samples", type=int, help=f"images for LLR (default {d.calib_samples})")
    parser.flag("--batch_size", type=int, help=f"images per LLR step (default {d.batch_size})")
    parser.flag("--iters_w", type=int, help=f"LLR steps per block; 0 leaves plain rounding (default {d.iters})")
    parser.flag("--rrweight", "--weight", type=finite,
                help=f"λ, the rounding penalty against the reconstruction loss (default {d.rrweight})")  # fmt: skip
    parser.flag("--calib_lr", type=finite, help=f"LLR's learning rate at the start (default {d.lr})")
    parser.flag("--b_start", type=finite, help=f"the penalty's exponent at the start (default {d.b_start:g})")
    parser.flag("--b_end", type=finite, help=f"the penalty's exponent at the end (default {d.b_end:g})")
    parser.flag("--warmup", type=finite, help=f"share of the steps without the penalty (default {d.warmup})")
    parser.flag("--recon_input", choices=[m.value for m in ReconInput],
                help=f"what blocks are fed during LLR: the prefix's output in which network "
                f"(default {d.recon_input.value})")  # fmt: skip
    parser.flag("--calib_augment", action="store_true", help="random-resized crops and flips of calibration images")
    parser.flag("--calib_list", metavar="FILE", help="take the calibration images that this list names")
    parser.flag("--save_calib_list", metavar="FILE", help="write the chosen calibration images there")
    parser.flag("--hardware_approx", action="store_true", help="√2 ≈ 1+1/2 during search, LLR and evaluation")
    parser.flag("--first_last_bits", metavar="{2..8,same}", help="bits of the first and last layer (default same)")


def _scale_method(text: str) -> str:
    text = "dynamic" if text == "log_dynamic" else text
    if text not in {method.value for method in ScaleMethod}:
        raise argparse.ArgumentTypeError(
            f"unknown grid {text!r}; expected one of {', '.join(method.value for method in ScaleMethod)}"
        )
    return text


def build_config(args: argparse.Namespace) -> QuantConfig:
    """The settings that the flags ask for; UserError for a value out of range or a flag that cannot act."""
    fields = {FIELDS[name]: value for name, value in given(args, FIELDS).items()}
    fields["first_last_bits"] = _first_last_bits(args.first_last_bits)
    fields["hardware_terms"] = 2 if args.hardware_approx else 0
    try:
        config = QuantConfig(**fields)
    except ValueError as error:
        raise UserError(_in_flags(str(error))) from None
    if not 0 <= config.seed < 2**32:  # one seed for torch, which takes more, and for numpy, which does not
        raise UserError(f"--seed: expected 0 to {2**32 - 1}, got {config.seed}")
    _refuse_idle_flags(args, config)
    return config


def _refuse_idle_flags(args: argparse.Namespace, config: QuantConfig) -> None:
    method = config.scale_method

    def refuse(names: Sequence[str], acts: bool, why: str) -> None:
        refuse_idle(args, {name: f"--{name}" for name in names}, acts, why)

    searches = method is ScaleMethod.DYNAMIC
    refuse(("search_method", "search_samples"), searches, f"--scale_method {method.value} searches nothing")
    refuse(LLR_FLAGS, config.iters > 0, "--iters_w 0 learns nothing")
    has_root2 = method in (ScaleMethod.LOG_SQRT2, ScaleMethod.DYNAMIC)
    approximate = ("hardware_approx", "test_with_hardware_approx")
    refuse(approximate, has_root2, f"--scale_method {method.value} has no √2 to approximate")
    refuse(approximate[1:], not args.hardware_approx, "--hardware_approx approximates from the start")
    looks = config.images_needed > 0
    refuse(("calib_augment", *LIST_FLAGS), looks, "no stage of this run looks at calibration images")
    refuse(("save_calib_list",), args.calib_list is None, "--calib_list has the list already")


def _first_last_bits(text: str | None) -> int | None:
    if text in (None, "same"):
        return None
    try:
        return int(str(text))
    except ValueError:
        raise UserError(f"--first_last_bits: {text!r} is neither a number of bits nor 'same'") from None


def _in_flags(message: str) -> str:
    """A message of QuantConfig with its fields written as flags."""
    flags = {field: f"--{flag}" for flag, field in FIELDS.items()} | {"first_last_bits": "--first_last_bits"}
    return " ".join(flags.get(word, word) for word in message.split())


def command(args: argparse.Namespace) -> None:
    """One run from flags to results row."""
    started = time.perf_counter()
    config = build_config(args)
    settings = argparse.Namespace(**OTHER_DEFAULTS | given(args, OTHER_DEFAULTS))
    options = _run_options(args, settings, config)
    check_results(options.results)
    if args.save_calib_list is not None:
        _refuse_unwritable("--save_calib_list", Path(args.save_calib_list))
    names = None if args.calib_list is None else load_names(args.calib_list)
    seed_everything(config.seed)
    network = load_network(
        settings.arch,
        args.checkpoint,
        model_kwargs=None if args.model_kwargs is None else key_values(args.model_kwargs, "--model_kwargs"),
        num_classes=args.num_classes,
        **{name: getattr(args, name) for name in DATA_SETTINGS},
    )
    source = open_images(settings.data_path, network.preprocessing, network.num_classes)
    images, chosen = _calibration_images(args, config, source, names)
    check_network(network.model, images, network.num_classes)
    if not options.quiet:
        origin = f"{network.arch} ({network.source}) on {source.name}"
        print(f"{origin}: {describe(config)}, on {options.device}", flush=True)
    columns: dict[str, Cell] = {
        "track": "cnn",
        "arch": network.arch,
        "checkpoint": network.source,
        "checkpoint_sha256": network.sha256,
        "network_options": _network_options(args),
        "data": source.name,
    }
    if config.images_needed:
        columns["calib_augment"] = str(bool(args.calib_augment))
    run(network.model, network.block_types, source, images, config, options, columns, started)
    if args.save_calib_list is not None:
        save_names(args.save_calib_list, chosen)


def _network_options(args: argparse.Namespace) -> str:
    """What the flags override of the network's own settings, as `name=value name=value`."""
    words = list(args.model_kwargs or ())
    for name, value in given(args, ("num_classes", *DATA_SETTINGS)).items():
        words.append(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)


def _run_options(args: argparse.Namespace, settings: argparse.Namespace, config: QuantConfig) -> RunOptions:
    if settings.workers < 0:
        raise UserError(f"--workers: expected 0 or more, got {settings.workers}")
    return RunOptions(
        device=resolve_device(settings.device),
        results=settings.results,
        workers=settings.workers,
        # The built-in digits tell the whole story; elsewhere one more evaluation may take minutes.
        test_before_calibration=config.iters > 0
        and (bool(args.test_before_calibration) or settings.data_path == DIGITS),
        test_with_hardware_approx=bool(args.test_with_hardware_approx),
        quiet=bool(args.quiet),
    )


def _refuse_unwritable(flag: str, path: Path) -> None:
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag}: cannot write {path}; expected the path of a file in a folder that exists")


def _calibration_images(
    args: argparse.Namespace, config: QuantConfig, source: ImageSource, names: list[str] | None
) -> tuple[Tensor, list[str]]:
    """The images that the stages look at, two at least, which tracing needs; and their names."""
    count = config.images_needed
    flag = "--calib_samples" if config.iters and count == config.calib_samples else "--search_samples"
    return calibration_images(
        source,
        max(2, count),
        config.seed,
        augment=bool(args.calib_augment),
        names=names,
        flag=flag if count >= 2 else "--data_path",
        quiet=bool(args.quiet),
    )


def describe(config: QuantConfig) -> str:
    """The settings in a line."""
    grid = f"{config.n_bits} bits, {config.scale_method.value}"
    if config.scale_method is ScaleMethod.DYNAMIC:
        grid += f" ({config.search_method.value} DBS)"
    per = "channel" if config.channel_wise else "layer"
    learning = f"LLR {config.iters} steps a block" if config.iters else "plain rounding"
    approx = ", √2 ≈ 1+1/2" if config.hardware_terms else ""
    return f"{grid}, a codebook per {per}, {learning}{approx}, seed {config.seed}"


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_command(build_parser(), command, argv)


if __name__ == "__main__":
    sys.exit(main())
