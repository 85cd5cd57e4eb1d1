"""Quantize a CNN onto a logarithmic weight grid and measure it: `python -m logart_cnn.main --help`."""

from __future__ import annotations

import argparse
import sys
import time

from logart.cli import FlagParser, given, key_values, refuse_idle, run_command
from logart.config import QuantConfig, ReconInput, SearchMethod
from logart.data import DIGITS, calibration_images, load_names, open_images, save_names
from logart.grid import ScaleMethod
from logart.results import check_results
from logart.run import RunOptions, run
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
    "batch_size", "rrweight", "calib_lr", "b_start", "b_end", "warmup", "recon_input", "test_before_calibration",
)  # fmt: skip


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
    parser.flag("--crop_pct", type=float, help="part of the resized image that the centre crop keeps")
    parser.flag("--mean", type=float, nargs="+", help="per channel, of pixels in 0..1")
    parser.flag("--std", type=float, nargs="+", help="per channel")
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
    parser.flag("--rrweight", "--weight", type=float,
                help=f"λ, the rounding penalty against the reconstruction loss (default {d.rrweight})")  # fmt: skip
    parser.flag("--calib_lr", type=float, help=f"LLR's learning rate at the start (default {d.lr})")
    parser.flag("--b_start", type=float, help=f"the penalty's exponent at the start (default {d.b_start:g})")
    parser.flag("--b_end", type=float, help=f"the penalty's exponent at the end (default {d.b_end:g})")
    parser.flag("--warmup", type=float, help=f"share of the steps without the penalty (default {d.warmup})")
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
    method = config.scale_method
    search = {name: f"--{name}" for name in ("search_method", "search_samples")}
    refuse_idle(args, search, method is ScaleMethod.DYNAMIC, f"--scale_method {method.value} searches nothing")
    llr = {name: f"--{name}" for name in LLR_FLAGS}
    refuse_idle(args, llr, config.iters > 0, "--iters_w 0 learns nothing")
    approx = {name: f"--{name}" for name in ("hardware_approx", "test_with_hardware_approx")}
    has_root2 = method in (ScaleMethod.LOG_SQRT2, ScaleMethod.DYNAMIC)
    refuse_idle(args, approx, has_root2, f"--scale_method {method.value} has no √2 to approximate")
    tested = {"test_with_hardware_approx": "--test_with_hardware_approx"}
    refuse_idle(args, tested, not args.hardware_approx, "--hardware_approx approximates from the start")
    images = {name: f"--{name}" for name in ("calib_augment", "calib_list", "save_calib_list")}
    refuse_idle(args, images, config.images_needed > 0, "no stage of this run looks at calibration images")
    refuse_idle(args, {"calib_samples": "--calib_samples"}, config.iters > 0, "--iters_w 0 learns nothing")
    return config


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
    results, workers = args.results or "results.csv", 2 if args.workers is None else args.workers
    if workers < 0:
        raise UserError(f"--workers: expected 0 or more, got {workers}")
    device = resolve_device(args.device or "auto")
    check_results(results)
    seed_everything(config.seed)
    network = load_network(
        args.arch or "digits_resnet",
        args.checkpoint,
        model_kwargs=key_values(args.model_kwargs, "--model_kwargs") if args.model_kwargs else None,
        **{
            name: getattr(args, name)
            for name in ("num_classes", "input_size", "crop_pct", "mean", "std", "interpolation")
        },
    )
    data_path = args.data_path or DIGITS
    source = open_images(data_path, network.preprocessing, network.num_classes)
    quiet = bool(args.quiet)
    needed = max(2, config.images_needed)
    names = load_names(args.calib_list) if args.calib_list else None
    flag = "--calib_samples" if config.images_needed == config.calib_samples else "--search_samples"
    images, chosen = calibration_images(
        source, needed, config.seed, augment=bool(args.calib_augment), names=names, flag=flag, quiet=quiet
    )
    if args.save_calib_list:
        save_names(args.save_calib_list, chosen)
    print(f"{network.arch} ({network.source}) on {source.name}: {describe(config)}, on {device}", flush=True)
    columns = {
        "track": "cnn",
        "arch": network.arch,
        "checkpoint": network.source,
        "checkpoint_sha256": network.sha256,
        "data": source.name,
    }
    if config.iters:
        columns["calib_augment"] = str(bool(args.calib_augment))
    options = RunOptions(
        device=device,
        results=results,
        workers=workers,
        test_before_calibration=bool(config.iters) and (bool(args.test_before_calibration) or data_path == DIGITS),
        test_with_hardware_approx=bool(args.test_with_hardware_approx),
        quiet=quiet,
    )
    run(network.model, network.block_types, source, images, config, options, columns, started)


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
