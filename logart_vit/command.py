"""The command line of the transformer track: from flags and config file to a results row."""

from __future__ import annotations

import argparse
import time
from typing import Any, get_type_hints

from logart.cli import FlagParser, default_if_none, finite, flags_passed, refuse_without_effect, run_command
from logart.errors import UserError
from logart.networks.calibration import choose_calibration, load_calibration
from logart.networks.data import find_images
from logart.networks.digits import DIGITS
from logart.quantization.config import QuantConfig, ReconInput, ReconMetric, preset
from logart.quantization.rounding_methods import METHODS
from logart.ranks import joined
from logart.runs import flags
from logart.runs.flag_groups import GROUPS, TrackFlags
from logart.runs.job import Job
from logart.runs.preflight import check_outputs
from logart.runtime import seed_everything
from logart_vit.models import MODELS, plan_network
from logart_vit.settings import OPTIM_METRICS, Config, load_config

# setting of a config file, and flag that overrides it -> field of QuantConfig
FIELDS = {
    "w_bit": "n_bits",
    "first_last_bits": "first_last_bits",
    "channel_wise": "channel_wise",
    "scale_method": "scale_method",
    "search_method": "search_method",
    "calib_size": "search_samples",
    "calib_batch_size": "search_batch_size",
    "scale_search": "scale_search",
    "asymmetric": "asymmetric",
    "zero_code": "zero_code",
    "wide_gap": "wide_gap",
    "optim_size": "calib_samples",
    "optim_batch_size": "batch_size",
    "optim_metric": "recon_metric",
    "temperature": "temperature",
    "optim_mode": "recon_input",
    "drop_prob": "drop_prob",
    "iters_w": "iters",
    "lr": "lr",
    "rrweight": "rrweight",
    "b_start": "b_start",
    "b_end": "b_end",
    "warmup": "warmup",
    "a_bit": "n_bits_a",
    "qconv_a_bit": "input_bits_a",
    "qhead_a_bit": "head_bits_a",
    "act_scale": "act_scale",
    "softmax_grid": "softmax_grid",
    "calibrate_with_act": "calibrate_with_act",
    "iters_a": "iters_a",
}
# flags that no config file sets, too
FLAG_FIELDS = FIELDS | {name: name for name in ("rounding", "damping", "mirror", "crops", "seed")}
MODES = {"qinp": ReconInput.QUANTIZED, "rinp": ReconInput.FLOAT, "qdrop": ReconInput.MIXED}
LOADING = {"val_batch_size": 1, "num_workers": 0}  # and the least value of each


def build_parser() -> FlagParser:
    """The command line; every flag is None unless given, so that the config's settings can stand."""
    parser = FlagParser(
        GROUPS,
        prog="logart-vit",
        usage="%(prog)s [FLAG ...]",
        description="Quantize the weights of one of timm's vision transformers onto a logarithmic grid with DBS and "
        "LLR, measure it, append a row to the results file. Flags override the config. Every flag may be written with "
        "- or _, and under the name that logart-cnn has for it.",
    )
    shared = TrackFlags(parser, "vit", FIELDS, {field: getattr(Config, name) for name, field in FIELDS.items()})
    shared.data()
    shared.network(tuple(MODELS), "digits_vit", model_kwargs="")
    shared.grid()
    shared.search()
    others = {value.value: name for name, value in MODES.items()}  # as logart-cnn calls them
    shared.rounding("nearest; learned with --optimize", {name: name for name in MODES} | others)
    shared.add("rounding", "optim_metric", "LLR's loss; the head's is always the KL divergence", choices=OPTIM_METRICS)
    shared.add("rounding", "temperature", "of the KL divergence behind hessian_perturb", type=finite)
    shared.add("rounding", "drop_prob", "with qdrop, the probability of the quantized prefix's element", type=finite)
    shared.add("rounding", "optimize", "learn the rounding (LLR); without it the run ends after DBS", "off",
              action="store_true")  # fmt: skip
    shared.activations()
    shared.run()
    shared.add("run", "config", "a .py file with a class Config, whose code is run",
              "the settings of configs/4bit/best.py, built in")  # fmt: skip
    shared.output()
    parser.elsewhere(dict.fromkeys(("calib_augment", "calib_list", "save_calib_list"), "only logart-cnn has it"))
    return parser


def build_settings(args: argparse.Namespace) -> tuple[QuantConfig, dict[str, Any]]:
    """The settings of the run, and how images are loaded: the config's or the preset's, or the flag's where given."""
    if args.config is not None and args.preset is not None:
        raise UserError(f"--preset: {args.preset} and --config {args.config} both set the defaults; give one of them")
    values = {name: getattr(Config, name) for name in get_type_hints(Config)}
    if args.config is not None:
        values = load_config(args.config)
    loading = {name: default_if_none(getattr(args, name), values[name]) for name in LOADING}
    for name, least in LOADING.items():
        if loading[name] < least:
            of_file = args.config is not None and getattr(args, name) is None
            written = f"--config: {args.config}: {name}" if of_file else f"--{name}"
            raise UserError(f"{written}: expected {least} or more, got {loading[name]}")
    fields = {field: values[name] for name, field in FIELDS.items()} | {"first_last_bits": values["first_last_bits"]}
    fields |= {"recon_input": values["optim_mode"], "rounding": "nearest", "head_kl": True, "seed": 0}
    fields |= {} if args.preset is None else preset(args.preset, flags.preset_bits(args, args.w_bit, fields["n_bits"]))
    fields |= {FLAG_FIELDS[name]: value for name, value in flags_passed(args, FLAG_FIELDS).items()}
    fields["recon_input"] = MODES[fields["recon_input"]]
    if args.optimize and args.rounding is None:
        fields["rounding"] = METHODS[fields["rounding"]].with_steps
    config = flags.build_config(args, FLAG_FIELDS, fields)
    _refuse_idle_flags(args, config)
    return config, loading


def _refuse_idle_flags(args: argparse.Namespace, config: QuantConfig) -> None:
    learns = METHODS[config.rounding].learns
    why = "--iters_w 0 learns nothing"
    if not learns:
        why = f"--rounding {args.rounding} learns nothing" if args.rounding else "without --optimize nothing is learned"
    refuse_without_effect(args, {"optimize": "--optimize", "iters_w": "--iters_w"}, learns, why)
    learning = ("optim_metric", "temperature", "optim_mode", "drop_prob", "lr")
    search = ("calib_size", "calib_batch_size")
    flags.refuse_idle_flags(args, config, search=search, learning=learning, unlearned=why)
    images = {name: f"--{name}" for name in ("optim_size", "optim_batch_size")}
    refuse_without_effect(args, images, config.calibrates, why)
    acts = ("qconv_a_bit", "qhead_a_bit", "act_scale", "softmax_grid", "calibrate_with_act", "iters_a")
    flags.refuse_idle_activations(args, config, bits="a_bit", names=acts)
    mixes = config.recon_input is ReconInput.MIXED
    refuse_without_effect(args, {"drop_prob": "--drop_prob"}, mixes, "only --optim_mode qdrop mixes inputs")
    weighs = config.recon_metric is ReconMetric.HESSIAN_PERTURB
    refuse_without_effect(args, {"temperature": "--temperature"}, weighs, "only --optim_metric hessian_perturb has one")


def command(args: argparse.Namespace) -> None:
    """One run from flags to results row."""
    started = time.perf_counter()
    args = flags.with_stored(args)
    config, loading = build_settings(args)
    dataset = default_if_none(args.dataset, DIGITS)
    options = flags.run_options(
        args,
        config,
        data=dataset,
        workers=loading["num_workers"],
        val_batch_size=loading["val_batch_size"],
        network_flags="--model, --checkpoint",
    )
    network_arguments = flags.network_arguments(args)
    check_outputs(options, network_arguments["model_kwargs"], args.checkpoint)
    found = find_images(flags.data_choice(args, dataset, config), flag="--dataset")
    seed_everything(config.seed)
    # All that can be wrong with flags and data shows before weights are fetched.
    plan = plan_network(default_if_none(args.model, "digits_vit"), args.checkpoint, **network_arguments)
    preprocessing, classes = plan.preprocessing, plan.num_classes
    source = found.open(preprocessing, classes, published=plan.published, class_indices=plan.class_indices)
    flag = flags.images_flag(config, rounding="--optim_size", search="--calib_size", data="--dataset")
    indices = choose_calibration(source, max(2, config.images_needed), config.seed, flag=flag)  # tracing needs two
    network = plan.load()
    columns = flags.network_columns(args, network, "vit", source)
    columns["config"] = args.config
    mode = next(name for name, value in MODES.items() if value is config.recon_input)
    settings = flags.settings_line(config, FLAG_FIELDS, optim_mode=mode, **loading)
    job = Job(network, source, config, options, columns, started, settings, flags.kept_flags(args))
    job.do(lambda: load_calibration(source, indices, config.seed, crops=config.crops, quiet=options.quiet))


def main(argv: list[str] | None = None) -> int:
    """What `logart_vit.main` runs; returns the exit code."""
    with joined("logart-vit", argv):
        return run_command(build_parser(), command, argv)
