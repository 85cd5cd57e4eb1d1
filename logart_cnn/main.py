"""Quantize a CNN onto a logarithmic weight grid and measure it: `python -m logart_cnn.main --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from torch import Tensor

from logart.cli import FlagParser, default_if_none, finite, given, refuse_without_effect, run_command
from logart.errors import UserError
from logart.networks.calibration import calibration_images, load_names, names_digest, save_names
from logart.networks.data import DIGITS, ImageSource, open_images
from logart.quantization.config import QuantConfig, ReconInput, Rounding, preset
from logart.runs import flags
from logart.runs.checks import check_outputs
from logart.runs.job import Job
from logart.runtime import seed_everything
from logart_cnn.models import load_network

DEFAULT = QuantConfig()

# flag's destination -> field of QuantConfig
FIELDS = {
    "n_bits_w": "n_bits",
    "channel_wise": "channel_wise",
    "scale_method": "scale_method",
    "search_method": "search_method",
    "search_samples": "search_samples",
    "scale_search": "scale_search",
    "asymmetric": "asymmetric",
    "zero_code": "zero_code",
    "rounding": "rounding",
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
LIST_FLAGS = ("calib_list", "save_calib_list")


def build_parser() -> FlagParser:
    """The command line; every flag is None unless given, so that an idle one can be told from a default."""
    parser = FlagParser(
        prog="logart-cnn",
        description="Quantize a CNN's weights onto a logarithmic grid with DBS and LLR, measure it, append a row to "
        "the results file. Every flag may be written with - or _.",
    )
    d = DEFAULT
    parser.flag("--data_path", help="a folder in ImageNet layout, or digits (default digits)")
    parser.flag("--arch", help="resnet18, resnet50, mobilenetv2, regnetx_600m, regnetx_3200m, mnasnet, squeezenet1_1, "
                "cifar_resnet20/32/44/56, digits_resnet or timm:NAME (default digits_resnet)")  # fmt: skip
    flags.add_network_flags(parser, model_kwargs=", with --arch timm:NAME")
    parser.flag("--n_bits_w", type=int, help=f"bits per weight, 2 to 8 (default {d.n_bits})")
    parser.flag("--search_samples", type=int,
                help=f"images for DBS (default {d.search_samples}; tensor_wise looks at none)")  # fmt: skip
    parser.flag(
        "--calib_samples", type=int, help=f"images for LLR and compensated rounding (default {d.calib_samples})"
    )
    parser.flag("--batch_size", type=int, help=f"images per LLR step (default {d.batch_size})")
    parser.flag("--calib_lr", type=finite, help=f"LLR's learning rate at the start (default {d.lr})")
    flags.add_grid_flags(
        parser, vars(d) | {"scale_method": d.scale_method.value, "search_method": d.search_method.value}
    )
    parser.flag("--recon_input", choices=[m.value for m in (ReconInput.QUANTIZED, ReconInput.FLOAT)],
                help=f"what blocks are fed during LLR: the prefix's output in which network "
                f"(default {d.recon_input.value})")  # fmt: skip
    parser.flag("--calib_augment", action="store_true", help="random-resized crops and flips of calibration images")
    parser.flag("--calib_list", metavar="FILE", help="take the calibration images that this list names")
    parser.flag("--save_calib_list", metavar="FILE", help="write the chosen calibration images there")
    flags.add_run_flags(parser)
    parser.flag("--workers", type=int, help="processes that read validation images (default 2; 0 reads in this one)")
    return parser


def build_config(args: argparse.Namespace) -> QuantConfig:
    """The settings that the flags ask for; UserError for a value out of range or a flag that cannot act."""
    chosen = {} if args.preset is None else preset(args.preset, default_if_none(args.n_bits_w, QuantConfig.n_bits))
    chosen = chosen | {FIELDS[name]: value for name, value in given(args, FIELDS).items()}
    config = flags.build_config(args, FIELDS, chosen)
    learning = ("calib_lr", "recon_input")
    would = config.rounding in (Rounding.LEARNED, Rounding.BOTH)
    why = "--iters_w 0 learns nothing" if would else f"--rounding {config.rounding.value} learns nothing"
    flags.refuse_idle_flags(args, config, search=("search_samples",), learning=learning, unlearned=why)
    images = {name: f"--{name}" for name in ("calib_samples", "batch_size")}
    refuse_without_effect(args, images, config.learns or config.compensates, why)
    refuse_without_effect(args, {"iters_w": "--iters_w"}, would, why)
    lists = {name: f"--{name}" for name in ("calib_augment", *LIST_FLAGS)}
    refuse_without_effect(args, lists, config.images_needed > 0, "no stage of this run looks at calibration images")
    save = {"save_calib_list": "--save_calib_list"}
    refuse_without_effect(args, save, args.calib_list is None, "--calib_list has the list already")
    return config


def command(args: argparse.Namespace) -> None:
    """One run from flags to results row."""
    started = time.perf_counter()
    args = flags.with_stored(args)
    config = build_config(args)
    data_path, workers = default_if_none(args.data_path, DIGITS), default_if_none(args.workers, 2)
    if workers < 0:
        raise UserError(f"--workers: expected 0 or more, got {workers}")
    options = flags.run_options(
        args, config, data=data_path, workers=workers, val_batch_size=128, network_flags="--arch, --checkpoint"
    )
    network_arguments = flags.network_arguments(args)
    check_outputs(options, network_arguments["model_kwargs"], args.checkpoint)
    if args.save_calib_list is not None:
        _refuse_unwritable("--save_calib_list", Path(args.save_calib_list))
    names = None if args.calib_list is None else load_names(args.calib_list)
    seed_everything(config.seed)
    network = load_network(
        default_if_none(args.arch, "digits_resnet"),
        args.checkpoint,
        **network_arguments,
    )
    source = open_images(data_path, network.preprocessing, network.num_classes)
    columns = flags.network_columns(args, network, "cnn", source.name)
    if config.images_needed:
        columns["calib_augment"] = str(bool(args.calib_augment))
        columns["calib_list"] = None if names is None else names_digest(names)
    settings = flags.settings_line(config, FIELDS)
    job = Job(network, source, config, options, columns, started, settings, flags.kept_flags(args))
    chosen = job.do(lambda: _calibration_images(args, config, source, names))
    if args.save_calib_list is not None:
        save_names(args.save_calib_list, chosen)


def _refuse_unwritable(flag: str, path: Path) -> None:
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag}: cannot write {path}; expected the path of a file in a folder that exists")


def _calibration_images(
    args: argparse.Namespace, config: QuantConfig, source: ImageSource, names: list[str] | None
) -> tuple[Tensor, list[str]]:
    """The images that the stages look at, two at least, which tracing needs; and their names."""
    return calibration_images(
        source,
        max(2, config.images_needed),
        config.seed,
        augment=bool(args.calib_augment),
        names=names,
        flag=flags.images_flag(config, rounding="--calib_samples", search="--search_samples", data="--data_path"),
        quiet=bool(args.quiet),
    )


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_command(build_parser(), command, argv)


if __name__ == "__main__":
    sys.exit(main())
