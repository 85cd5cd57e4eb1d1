"""What follows from the flags of both command lines: settings, flags without effect, the row's columns.

Only the entry points import this; the core never reads a command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from logart import ranks
from logart.cli import default_if_none, flags_passed, key_values, refuse_without_effect
from logart.errors import UserError
from logart.networks.data import DataChoice, ImageSource
from logart.networks.digits import DIGITS
from logart.networks.network import Network
from logart.quantization.cache import CacheLocation
from logart.quantization.config import QuantConfig
from logart.runs.columns import Cell
from logart.runs.results_file import RESULTS
from logart.runs.resume import flags_to_keep, stored_flags
from logart.runs.run import RunOptions
from logart.runtime import resolve_device

DATA_SETTINGS = ("input_size", "crop_pct", "mean", "std", "interpolation")
RESOLVED = ("input_bits_a", "head_bits_a", "act_scale")  # fields whose `actual_` property says what they come to
DATA_CHOICE = ("class_map", "class_order", "calib_path", "calib_from_val", "val_limit")


def with_stored(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the run that `--resume` names, with those given now on top; without it, `args` as they are.

    Raises:
        UserError: as `resume.stored_flags`; or `--run_dir` was given too.
    """
    if args.resume is None:
        return args
    if args.run_dir is not None:
        raise UserError(f"--run_dir: {args.run_dir} and --resume {args.resume} were both given; expected one of them")
    return argparse.Namespace(**vars(args) | stored_flags(args.resume) | flags_passed(args, vars(args)))


def kept_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What a run's folder keeps of the flags given."""
    return flags_to_keep(flags_passed(args, vars(args)))


def build_config(args: argparse.Namespace, flags: Mapping[str, str], settings: Mapping[str, Any]) -> QuantConfig:
    """The settings of a run; UserError for a value out of range, naming its flag.

    Args:
        args: the flags given.
        flags: destination of a flag -> field of QuantConfig, one flag for each field that has one.
        settings: fields of QuantConfig by name, which the flags have gone into already.
    """
    settings = dict(settings)
    if args.first_last_bits is not None:
        settings["first_last_bits"] = _first_last_bits(args.first_last_bits)
    settings |= {"layer_bits": _layer_bits(args.layer_bits or ()), "skip": args.skip or ()}
    settings |= {"bits_budget": args.bits_budget, "size_budget": args.size_budget}
    settings["hardware_terms"] = default_if_none(args.hardware_approx_terms, 2) if args.hardware_approx else 0
    try:
        config = QuantConfig(**settings)
    except ValueError as error:
        raise UserError(_named(str(error), args, flags)) from None
    if not 0 <= config.seed < 2**32:  # one seed for torch, which takes more, and for numpy, which does not
        raise UserError(f"--seed: expected 0 to {2**32 - 1}, got {config.seed}")
    return config


def _named(error: str, args: argparse.Namespace, flags: Mapping[str, str]) -> str:
    """The message with the user's names: of the flags, or of the config file where no flag that it names was given."""
    names = {field: flag for flag, field in flags.items()} | {
        name: name for name in ("first_last_bits", "layer_bits", "skip", "bits_budget", "size_budget")
    }
    words = error.split()
    message = [names[word] for word in words if word in names]
    of_file = getattr(args, "config", None) is not None and not flags_passed(args, message)
    start, dashes = (f"--config: {args.config}: ", "") if of_file else ("", "--")
    return start + " ".join(f"{dashes}{names[word]}" if word in names else word for word in words)


def preset_bits(args: argparse.Namespace, n_bits: int | None, default: int) -> float:
    """The bits that a preset's defaults are for: the budget's, or the flag's or the default."""
    bits: float = default_if_none(args.bits_budget, default_if_none(n_bits, default))
    return bits


def _first_last_bits(text: str) -> int | None:
    if text == "same":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--first_last_bits: {text!r} is neither a number of bits nor 'same'") from None


def _layer_bits(words: Sequence[str]) -> dict[str, int]:
    bits = {}
    for word in words:
        pattern, equals, width = word.rpartition("=")
        if not (pattern and equals and width.isdecimal()):
            raise UserError(f"--layer_bits: {word!r} is not of the form PATTERN=BITS")
        bits[pattern] = int(width)
    return bits


def refuse_idle_flags(
    args: argparse.Namespace, config: QuantConfig, *, search: Sequence[str], learning: Sequence[str], unlearned: str
) -> None:
    """Raise UserError for a flag that was given and has no effect.

    Args:
        search, learning: the track's own flags that act in DBS and in LLR.
        unlearned: why nothing is learned, where nothing is.
    """

    def refuse(names: Sequence[str], acts: bool, why: str) -> None:
        refuse_without_effect(args, {name: f"--{name}" for name in names}, acts, why)

    grid = config.grid
    width = "n_bits_w" if hasattr(args, "n_bits_w") else "w_bit"
    refuse((width,), not config.has_budget, "a budget chooses the bits of each layer")
    for option in ("scale_search", "asymmetric", "zero_code", "wide_gap"):
        refuse((option,), option in grid.options, f"it does not act on --scale_method {grid.name}")
    refuse(("search_method", *search), config.searches, f"--scale_method {grid.name} searches nothing")
    closed = f"--rounding {config.rounding} searches in the metric of each layer's inputs"
    refuse(("search_method", *search, "test_before_calibration"), config.method.uses_dbs, closed)
    refuse(("damping",), not config.method.uses_dbs, f"--rounding {config.rounding} estimates nothing that it damps")
    schedule = ("rrweight", "b_start", "b_end", "warmup", "test_before_calibration")
    refuse((*learning, *schedule), config.learns, unlearned)
    refuse(("cache", "mirror", "crops"), config.images_needed > 0, "no stage of this run looks at calibration images")
    approximate = ("hardware_approx", "test_with_hardware_approx")
    refuse(approximate, "terms" in grid.options, f"--scale_method {grid.name} has no √2 to approximate")
    refuse(approximate[1:], not args.hardware_approx, "--hardware_approx approximates from the start")
    approximates = bool(args.hardware_approx or args.test_with_hardware_approx)
    refuse(
        ("hardware_approx_terms",), approximates, "neither --hardware_approx nor --test_with_hardware_approx is given"
    )


def refuse_idle_activations(args: argparse.Namespace, config: QuantConfig, *, bits: str, names: Sequence[str]) -> None:
    """Raise UserError for a flag about activations that was given where these stay float; `bits` is what asks."""
    why = f"without --{bits} activations stay float"
    refuse_without_effect(args, {name: f"--{name}" for name in names}, config.quantizes_activations, why)


def network_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the network and its images, as keywords of both tracks' `load_network`."""
    kwargs = None if args.model_kwargs is None else key_values(args.model_kwargs, "--model_kwargs")
    names = ("checkpoint_key", "num_classes", *DATA_SETTINGS)
    result = {"model_kwargs": kwargs} | {name: getattr(args, name) for name in names}
    if isinstance(args.input_size, list):
        result["channels"], *size = args.input_size
        result["input_size"] = size[0] if size[0] == size[1] else tuple(size)
    return result


def data_choice(args: argparse.Namespace, path: str, config: QuantConfig) -> DataChoice:
    """What the flags say of the images; `path` is what the data flag says."""
    asked = {name: getattr(args, name) for name in DATA_CHOICE}
    return DataChoice(path, **asked, calibrates=config.images_needed > 0)


def images_flag(config: QuantConfig, *, rounding: str, search: str, data: str) -> str:
    """The flag to name where there are fewer images than asked for: of the stage that looks at most of them."""
    if config.images_needed < 2:
        return data  # two are needed for tracing alone
    return rounding if config.calibrates and config.images_needed == config.calib_samples else search


def run_options(
    args: argparse.Namespace, config: QuantConfig, *, data: str, workers: int, val_batch_size: int, network_flags: str
) -> RunOptions:
    """How the run goes about it, from the flags; `data` is what the data flag says. Only the first rank writes."""
    options = RunOptions(
        device=resolve_device(default_if_none(args.device, "auto")),
        results=default_if_none(args.results, RESULTS),
        val_batch_size=val_batch_size,
        workers=workers,
        # The built-in digits tell the whole story; elsewhere one more evaluation may take minutes.
        test_before_calibration=config.learns and (bool(args.test_before_calibration) or data == DIGITS),
        test_with_terms=default_if_none(args.hardware_approx_terms, 2) if args.test_with_hardware_approx else 0,
        quiet=bool(args.quiet),
        network_flags=network_flags,
        save=args.save,
        run_dir=args.run_dir,
        resume=args.resume,
        cache=None if args.cache in (None, "auto") else CacheLocation(args.cache),
        once=bool(args.once),
    )
    if ranks.is_first():
        return options
    return replace(options, quiet=True, save=None, run_dir=None, resume=None, once=False)


def network_columns(args: argparse.Namespace, network: Network, track: str, source: ImageSource) -> dict[str, Cell]:
    """What the results row says of the network and the data."""
    words = list(args.model_kwargs or ())
    for name, value in flags_passed(args, ("num_classes", *DATA_SETTINGS)).items():
        words.append(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return {
        "track": track,
        "arch": network.arch,
        "checkpoint": network.source,
        "checkpoint_sha256": network.sha256,
        "network_options": " ".join(words),
        "data": source.name,
        "preset": args.preset,
        "capture_precision": args.cache if args.cache == CacheLocation.HALF.value else None,
        **source.options,
    }


def settings_line(config: QuantConfig, fields: Mapping[str, str], **others: Any) -> str:
    """All settings, resolved, each under the name of its flag; `others` replace their namesakes."""
    values = {flag: getattr(config, field) for flag, field in fields.items()}
    values |= {
        "first_last_bits": config.first_last_bits or "same",
        **{flag: getattr(config, f"actual_{field}") for flag, field in fields.items() if field in RESOLVED},
        "hardware_approx_terms": config.hardware_terms,
        "rounding": config.method.name,
        "seed": config.seed,
    }
    budgets = {"bits_budget": config.bits_budget, "size_budget": config.size_budget}
    values |= {flag: budget for flag, budget in budgets.items() if budget is not None}
    if config.layer_bits or config.skip:
        values |= {"layer_bits": config.layer_bits, "skip": ",".join(config.skip)}
    values |= others
    return " ".join(f"{flag}={getattr(value, 'value', value)}" for flag, value in values.items())
