"""The command line of the CNN track: from flags to a results row."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from logart.cli import FlagParser, default_if_none, flags_passed, refuse_without_effect, run_command
from logart.errors import UserError
from logart.networks.calibration import choose_calibration, load_calibration, load_names, names_digest, save_names
from logart.networks.data import find_images
from logart.networks.digits import DIGITS
from logart.quantization.config import QuantConfig, ReconInput, preset
from logart.quantization.rounding_methods import METHODS
from logart.ranks import is_first, joined
from logart.runs import flags
from logart.runs.flag_groups import GROUPS, VAL_BATCH_SIZE, WORKERS, TrackFlags
from logart.runs.job import Job
from logart.runs.preflight import check_outputs
from logart.runtime import seed_everything
from logart_cnn.models import ARCHS, plan_network

DEFAULT = QuantConfig()

# flag's destination -> field of QuantConfig
FIELDS = {
    "n_bits_w": "n_bits",
    "channel_wise": "channel_wise",
    "scale_method": "scale_method",
    "search_method": "search_method",
    "search_samples": "search_samples",
    "search_batch_size": "search_batch_size",
    "scale_search": "scale_search",
    "asymmetric": "asymmetric",
    "zero_code": "zero_code",
    "wide_gap": "wide_gap",
    "rounding": "rounding",
    "calib_samples": "calib_samples",
    "batch_size": "batch_size",
    "damping": "damping",
    "mirror": "mirror",
    "crops": "crops",
    "iters_w": "iters",
    "rrweight": "rrweight",
    "calib_lr": "lr",
    "b_start": "b_start",
    "b_end": "b_end",
    "warmup": "warmup",
    "recon_input": "recon_input",
    "n_bits_a": "n_bits_a",
    "input_bits_a": "input_bits_a",
    "head_bits_a": "head_bits_a",
    "act_scale": "act_scale",
    "calibrate_with_act": "calibrate_with_act",
    "iters_a": "iters_a",
    "seed": "seed",
}
SHOWN_INPUTS = (ReconInput.QUANTIZED.value, ReconInput.FLOAT.value)
OTHER_INPUTS = {"qinp": ReconInput.QUANTIZED.value, "rinp": ReconInput.FLOAT.value}  # as logart-vit calls them
LIST_FLAGS = ("calib_list", "save_calib_list")


def build_parser() -> FlagParser:
    """The command line; every flag is None unless given, so that one without effect can be told from a default."""
    parser = FlagParser(
        GROUPS,
        prog="logart-cnn",
        usage="%(prog)s [FLAG ...]",
        description="Quantize a CNN's weights onto a logarithmic grid with DBS and LLR, measure it, append a row to "
        "the results file. Every flag may be written with - or _, and under the name that logart-vit has for it.",
    )
    d = {name: getattr(value, "value", value) for name, value in vars(DEFAULT).items()}
    shared = TrackFlags(parser, "cnn", FIELDS, d)
    shared.data()
    parser.flag("--calib_augment", group="data", default="off", action="store_true",
                help="random-resized crops and flips of calibration images")  # fmt: skip
    parser.flag("--calib_list", group="data", default="the seed chooses", metavar="FILE",
                help="take the calibration images that this list names")  # fmt: skip
    shared.network(ARCHS, "digits_resnet", model_kwargs=", with --arch timm:NAME")
    shared.grid()
    shared.search()
    shared.rounding(d["rounding"], {shown: shown for shown in SHOWN_INPUTS} | OTHER_INPUTS)
    shared.activations()
    shared.run()
    shared.output()
    parser.flag("--save_calib_list", group="output", default="none", metavar="FILE",
                help="write the chosen calibration images there")  # fmt: skip
    parser.elsewhere(
        {
            "optimize": "did you mean --rounding learned? It is the default",
            "config": "only logart-vit reads config files; here each setting is a flag",
            **dict.fromkeys(("optim_metric", "temperature", "drop_prob", "softmax_grid"), "only logart-vit has it"),
        }
    )
    return parser


def build_config(args: argparse.Namespace) -> QuantConfig:
    """The settings that the flags ask for; UserError for a value out of range or a flag without effect."""
    n_bits = flags.preset_bits(args, args.n_bits_w, QuantConfig.n_bits)
    chosen = {} if args.preset is None else preset(args.preset, n_bits)
    chosen = chosen | {FIELDS[name]: value for name, value in flags_passed(args, FIELDS).items()}
    config = flags.build_config(args, FIELDS, chosen)
    learning = ("calib_lr", "recon_input")
    would = METHODS[config.rounding].learns
    why = "--iters_w 0 learns nothing" if would else f"--rounding {config.rounding} learns nothing"
    search = ("search_samples", "search_batch_size")
    flags.refuse_idle_flags(args, config, search=search, learning=learning, unlearned=why)
    images = {name: f"--{name}" for name in ("calib_samples", "batch_size")}
    refuse_without_effect(args, images, config.calibrates, why)
    acts = ("input_bits_a", "head_bits_a", "act_scale", "calibrate_with_act", "iters_a")
    flags.refuse_idle_activations(args, config, bits="n_bits_a", names=acts)
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
    data_path, workers = default_if_none(args.data_path, DIGITS), default_if_none(args.workers, WORKERS)
    batch_size = default_if_none(args.val_batch_size, VAL_BATCH_SIZE)
    for flag, value, least in (("--workers", workers, 0), ("--val_batch_size", batch_size, 1)):
        if value < least:
            raise UserError(f"{flag}: expected {least} or more, got {value}")
    network_flags = "--arch, --checkpoint"
    options = flags.run_options(
        args, config, data=data_path, workers=workers, val_batch_size=batch_size, network_flags=network_flags
    )
    network_arguments = flags.network_arguments(args)
    check_outputs(options, network_arguments["model_kwargs"], args.checkpoint)
    if args.save_calib_list is not None:
        _refuse_unwritable("--save_calib_list", Path(args.save_calib_list))
    names = None if args.calib_list is None else load_names(args.calib_list)
    found = find_images(flags.data_choice(args, data_path, config))
    seed_everything(config.seed)
    # All that can be wrong with flags and data shows before weights are fetched.
    plan = plan_network(default_if_none(args.arch, "digits_resnet"), args.checkpoint, **network_arguments)
    preprocessing, classes = plan.preprocessing, plan.num_classes
    source = found.open(preprocessing, classes, published=plan.published, class_indices=plan.class_indices)
    flag = flags.images_flag(config, rounding="--calib_samples", search="--search_samples", data="--data_path")
    count = max(2, config.images_needed)  # tracing needs two
    indices = choose_calibration(source, count, config.seed, names=names, flag=flag)
    network = plan.load()
    columns = flags.network_columns(args, network, "cnn", source)
    if config.images_needed:
        columns["calib_augment"] = str(bool(args.calib_augment))
        columns["calib_list"] = None if names is None else names_digest(names)
    settings = flags.settings_line(config, FIELDS)
    job = Job(network, source, config, options, columns, started, settings, flags.kept_flags(args))
    how: dict[str, Any] = {"augment": bool(args.calib_augment), "crops": config.crops, "quiet": options.quiet}
    chosen = job.do(lambda: load_calibration(source, indices, config.seed, **how))
    if args.save_calib_list is not None and is_first():
        save_names(args.save_calib_list, chosen)


def _refuse_unwritable(flag: str, path: Path) -> None:
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag}: cannot write {path}; expected the path of a file in a folder that exists")


def main(argv: list[str] | None = None) -> int:
    """What `logart_cnn.main` runs; returns the exit code."""
    with joined("logart-cnn", argv):
        return run_command(build_parser(), command, argv)
