"""The settings of a ViT run: their defaults, and the config files that differ from them."""

from __future__ import annotations

import runpy
from functools import cached_property
from inspect import getattr_static
from pathlib import Path
from typing import Any, get_type_hints

from logart.errors import UserError, did_you_mean, near_or_all
from logart.grids.activations import FLOAT_BITS, ActScale, SoftmaxGrid
from logart.grids.grid import ScaleSearch
from logart.grids.registry import GRIDS
from logart.quantization.config import SearchMethod

OPTIM_METRICS = ("hessian_perturb", "mse", "mae")
OPTIM_MODES = ("qinp", "rinp", "qdrop")
SOFTMAX_GRIDS = tuple(grid.value for grid in SoftmaxGrid)
ACT_SCALES = tuple(scale.value for scale in ActScale)


class Config:
    """The settings of a ViT run, and their defaults: those of configs/4bit/best.py, the paper's best at 4 bits.

    Attributes:
        w_bit: bits per weight, 2 to 8, for every layer but the first and last if `first_last_bits` says otherwise.
        a_bit: bits of the input of every quantized layer, 2 to 16; 32 leaves activations float.
        qconv_a_bit, qhead_a_bit: the same of the patch embedding and of the head alone; None is the same as `a_bit`.
        act_scale: steps between the levels of activations, of `ACT_SCALES`: powers of two, any, or as the hardware
            approximation has it.
        softmax_grid: levels of what softmax gives, of `SOFTMAX_GRIDS`: as of other activations, or a log grid's.
        calibrate_with_act: whether search and rounding of the weights see quantized activations.
        iters_a: steps for which the activation scales of each block are learned; 0 learns none.
        first_last_bits: bits of the first and last layer, 2 to 8; None is the same as `w_bit`.
        channel_wise: one codebook per output channel, or one per layer.
        scale_method: the grid, by its name.
        search_method: the measure of DBS and scale search, a value of `SearchMethod`.
        scale_search: which factors of the levels are tried, a value of `ScaleSearch`.
        asymmetric: whether codes that a channel's shorter sign never reaches become small levels.
        zero_code: whether one code is zero.
        wide_gap: whether the smallest magnitude may lie lower.
        calib_size: images for DBS, at least 1.
        calib_batch_size: images per forward pass of DBS, at least 1.
        optim_size: images for LLR, at least 1.
        optim_batch_size: images per LLR step, at least 1.
        optim_metric: how a block's output is compared with the float one, of `OPTIM_METRICS`.
        temperature: of the KL divergence behind `hessian_perturb`, positive.
        optim_mode: a block's input during LLR, of `OPTIM_MODES`: from the quantized prefix, from the float
            network, or mixed of both per element.
        drop_prob: probability of the quantized value in that mix, 0 to 1.
        iters_w: LLR steps per block; 0 leaves rounding to nearest.
        lr: start learning rate of α, positive.
        rrweight: λ, the weight of the rounding penalty, at least 0.
        b_start, b_end: the penalty's exponent β goes linearly from one to the other; b_start ≥ b_end > 1.
        warmup: share of the steps without the penalty, 0 to 1.
        val_batch_size: images per forward pass when accuracy is measured, at least 1.
        num_workers: processes that read images; 0 reads them in this one.
    """

    w_bit: int = 4
    a_bit: int = FLOAT_BITS
    qconv_a_bit: int | None = None
    qhead_a_bit: int | None = None
    act_scale: str = "auto"
    softmax_grid: str = "uniform"
    calibrate_with_act: bool = False
    iters_a: int = 0
    first_last_bits: int | None = None
    channel_wise: bool = True
    scale_method: str = "dynamic"
    search_method: str = "tensor_wise"
    scale_search: str = "none"
    asymmetric: bool = False
    zero_code: bool = False
    wide_gap: bool = False
    calib_size: int = 128
    calib_batch_size: int = 32
    optim_size: int = 1024
    optim_batch_size: int = 32
    optim_metric: str = "hessian_perturb"
    temperature: float = 20.0
    optim_mode: str = "qdrop"
    drop_prob: float = 0.5
    iters_w: int = 300
    lr: float = 0.1
    rrweight: float = 0.1
    b_start: float = 20.0
    b_end: float = 2.0
    warmup: float = 0.2
    val_batch_size: int = 128
    num_workers: int = 2


FIELDS: dict[str, Any] = get_type_hints(Config)
TYPE_NAMES = {int: "an integer", float: "a number", bool: "True or False", int | None: "an integer or None"}
CHOICES = {
    "scale_method": tuple(GRIDS),
    "search_method": tuple(method.value for method in SearchMethod),
    "scale_search": tuple(search.value for search in ScaleSearch),
    "act_scale": ACT_SCALES,
    "softmax_grid": SOFTMAX_GRIDS,
    "optim_metric": OPTIM_METRICS,
    "optim_mode": OPTIM_MODES,
}


def load_config(path: str | Path, *, flag: str = "--config") -> dict[str, Any]:
    """Run a config file and read the class `Config` that it defines.

    Args:
        path: A .py file. Its `Config`, made without arguments, holds settings as attributes of the class or of
            the instance; those that it lacks keep their defaults. Private names are ignored, and so are methods
            and properties, unless they carry a setting's name.
        flag: The flag that errors name.

    Returns:
        Every field of `logart_vit.settings.Config` by name, in its order: of the field's type, and one of the
        known values where it is a choice. Ranges of numbers are left to `QuantConfig`.

    Raises:
        UserError: The file cannot be run, defines no `Config`, or sets an unknown field or a wrong value.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        problem = "is a folder" if path.is_dir() else "is no .py file" if path.is_file() else "does not exist"
        raise UserError(f"{flag}: {path} {problem}; expected a .py file that defines a class Config")
    where = f"{flag}: {path}"
    found = _settings(_config_class(path, where), where)
    for name in found:
        if name not in FIELDS:
            raise UserError(f"{where} sets an unknown field {name}; {near_or_all(name, FIELDS)}")
    return {name: _checked(name, found.get(name, getattr(Config, name)), where) for name in FIELDS}


def _config_class(path: Path, where: str) -> type:
    try:
        # Unlike an import, this leaves neither bytecode beside the user's file nor an entry in sys.modules.
        namespace = runpy.run_path(str(path), run_name="_logart_config")
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(f"{where} cannot be loaded ({_described(error)})") from error
    if not isinstance(namespace.get("Config"), type):
        raise UserError(f"{where} defines no class Config")
    return namespace["Config"]


def _settings(config_class: type, where: str) -> dict[str, Any]:
    """The public attributes of an instance that are values, and whatever carries a field's name."""
    try:
        config = config_class()
        names = [name for name in dir(config) if not name.startswith("_")]
        return {name: getattr(config, name) for name in names if name in FIELDS or _is_value(config, name)}
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: Config() fails ({_described(error)}); it is made without arguments") from error


def _is_value(config: object, name: str) -> bool:
    computed = isinstance(getattr_static(config, name), (property, cached_property))
    return not computed and not callable(getattr(config, name))


def _checked(name: str, value: Any, where: str) -> Any:
    """The value as a plain bool, int, float, str or None; UserError where it does not fit the field."""
    kind, shown = FIELDS[name], " ".join(repr(value).split())
    if name in CHOICES:
        if value not in CHOICES[name]:
            hint = did_you_mean(value, CHOICES[name]) if isinstance(value, str) else ""
            expected = f"must be one of {', '.join(CHOICES[name])}"
            raise UserError(f"{where}: {name} {expected}; got {shown}" + f"; {hint}" * bool(hint))
        return CHOICES[name][CHOICES[name].index(value)]  # an enum's member would be printed by its own name
    # To Python a bool is an int, and an int is no float; to a user it is the other way round.
    fits = kind is bool if isinstance(value, bool) else isinstance(value, (int, float) if kind is float else kind)
    if not fits:
        raise UserError(f"{where}: {name} must be {TYPE_NAMES[kind]}; got {shown}")
    return float(value) if kind is float else value


def _described(error: BaseException) -> str:
    """The error's type and message in one line; that of a SyntaxError ends with the line number."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
