"""Networks as both tracks know them: how timm's are built and get their weights, and which images they expect."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

from logart.data import Preprocessing
from logart.errors import UserError
from logart.weights import file_sha256, load_state_dict, one_line, read_state_dict, state_sha256

DIGITS_PREPROCESSING = Preprocessing((1, 8, 8), 1.0, "bilinear", (0.3053,), (0.3761,))  # of the training split
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
TIMM = "timm:"

# What a family's own conversion of old checkpoints resizes: always from another network than the one asked for ...
_PATCHES = ("patch_embed.proj.weight",)
# ... and unless another image size is asked for.
_POSITIONS = ("pos_embed", "relative_position_bias_table")


@dataclass(frozen=True)
class Network:
    """A trained network and what else its name decides.

    Attributes:
        arch: The name it was asked for by.
        model: float32, in eval mode.
        preprocessing: The images it expects.
        block_types: Class names of the blocks to reconstruct; empty means layer by layer.
        num_classes: Its outputs.
        source: Where the weights came from: a file's name, a URL, or timm's name of them.
        sha256: Of the weights' file; for timm's pretrained weights, of the state dict (`state_sha256`).
        row_groups: Last part of a layer's name -> how many groups its rows form, where not channel-wise.
        recipe: What `build_network` of the track needs to build it without weights: track, arch, model_kwargs,
            num_classes, input_size.
    """

    arch: str
    model: nn.Module
    preprocessing: Preprocessing
    block_types: tuple[str, ...]
    num_classes: int
    source: str
    sha256: str
    row_groups: Mapping[str, int] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def check_counts(num_classes: int | None, input_size: int | None) -> None:
    """Raise UserError where a number that a network shall be built with is below 1."""
    for flag, value in (("--num-classes", num_classes), ("--input-size", input_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: {value}; expected at least 1")


def network_recipe(
    track: str,
    arch: str,
    model_kwargs: Mapping[str, Any] | None,
    num_classes: int | None,
    input_size: int | None,
) -> dict[str, Any]:
    """A network's `recipe`."""
    return {
        "track": track,
        "arch": arch,
        "model_kwargs": dict(model_kwargs or {}),
        "num_classes": num_classes,
        "input_size": input_size,
    }


def unknown_network(name: str, known: Sequence[str], *, flag: str) -> UserError:
    """The error about a name that is none of the track's, with a hint."""
    hint = f"; perhaps {TIMM}{name}" if timm.is_model(name) else _close(name, known)
    return UserError(f"{flag}: no network {name!r}{hint}; expected {', '.join(known)} or {TIMM}NAME")


def load_timm(
    arch: str,
    name: str,
    checkpoint: str | Path | None,
    *,
    flag: str,
    find_blocks: Callable[[nn.Module], tuple[str, ...]],
    model_kwargs: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> Network:
    """Build a network of timm's and load its weights.

    Args:
        arch: What the result is called.
        name: timm's name of it, with or without a tag.
        checkpoint: A file of weights, in the network's own layout or an older one that timm converts; None takes
            timm's pretrained weights.
        flag: The flag that errors about the name name.
        find_blocks: From the network, still untrained, to `block_types`; may refuse it before weights are fetched.
        model_kwargs: Passed to `timm.create_model`.
        defaults: Likewise, where neither `model_kwargs` nor one of the following says otherwise.
        num_classes: The network's outputs.
        input_size: Height and width of the images; networks of a fixed size are built for it.

    Returns:
        The network; its preprocessing is timm's, for the image size that it was built for.

    Raises:
        UserError: A name timm does not know, settings that do not fit, or weights that are missing or do not fit.
    """
    asked = dict(model_kwargs or {})
    model, kwargs = build_timm(
        name,
        flag=flag,
        model_kwargs=model_kwargs,
        defaults=defaults,
        num_classes=num_classes,
        input_size=input_size,
    )
    blocks = find_blocks(model)
    if checkpoint is None:
        model, source = _pretrained(arch, name, kwargs, flag)
        sha256 = state_sha256(model.state_dict())
    else:
        state, source, sha256 = read_state_dict(checkpoint), Path(checkpoint).name, file_sha256(checkpoint)
        _load_file(model, state, source, resize=input_size is not None or "img_size" in asked)
    return Network(arch, model, _timm_preprocessing(model, kwargs), blocks, model.num_classes, source, sha256)


def build_timm(
    name: str,
    *,
    flag: str,
    model_kwargs: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> tuple[Any, dict[str, Any]]:
    """A network of timm's without trained weights, and the arguments that gave it; all as for `load_timm`."""
    if not timm.is_model(name):
        raise UserError(f"{flag}: timm has no model {name!r}{_close(name, timm.list_models())}")
    asked = dict(model_kwargs or {})
    if num_classes is not None and asked.setdefault("num_classes", num_classes) != num_classes:
        raise UserError(f"--num-classes: {num_classes}, but --model-kwargs has num_classes={asked['num_classes']}")
    if input_size is not None and to_2tuple(asked.get("img_size", input_size)) != (input_size, input_size):
        raise UserError(f"--input-size: {input_size}, but --model-kwargs has img_size={asked['img_size']}")
    try:
        return _build(name, {**(defaults or {}), **asked}, input_size)
    except Exception as error:  # whatever the model's own constructor raises
        culprit = "--model-kwargs" if model_kwargs else flag if input_size is None else "--input-size"
        raise UserError(f"{culprit}: timm cannot build {name} ({one_line(error)})") from error


def _build(name: str, kwargs: dict[str, Any], input_size: int | None) -> tuple[Any, dict[str, Any]]:
    """The model, for this image size where its constructor asks for one; and the arguments that gave it."""
    if input_size is not None:
        sized = {**kwargs, "img_size": input_size}
        try:
            return timm.create_model(name, **sized), sized
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **kwargs), kwargs


def _pretrained(arch: str, name: str, kwargs: Mapping[str, Any], flag: str) -> tuple[Any, str]:
    """The model with timm's own weights, and timm's name of these."""
    try:
        model: Any = timm.create_model(name, pretrained=True, **kwargs)
    except Exception as error:  # network, disk and timm, each with its own errors
        raise UserError(
            f"{flag}: no pretrained weights for {arch} ({one_line(error)}); expected --checkpoint PATH"
        ) from error
    config = model.pretrained_cfg
    if config["num_classes"] != model.num_classes:  # timm would leave the last layer untrained
        raise UserError(
            f"--num-classes: {model.num_classes} asked for, but timm's weights for {name} "
            f"have {config['num_classes']}; expected --checkpoint PATH"
        )
    return model, TIMM + ".".join(filter(None, (config["architecture"], config.get("tag"))))


def _load_file(model: nn.Module, state: dict[str, Tensor], source: str, *, resize: bool) -> None:
    """Load a file's weights; where they do not fit as they are, after the conversion that timm has for the family."""
    try:
        load_state_dict(model, state, flag="--checkpoint", source=source)
    except UserError:
        converted = _converted(model, state, _PATCHES if resize else _PATCHES + _POSITIONS)
        if converted is None:
            raise
        load_state_dict(model, converted, flag="--checkpoint", source=source)


def _converted(model: nn.Module, state: dict[str, Tensor], keep: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The state as timm's `checkpoint_filter_fn` renames it: older files have other keys, and buffers too.

    Args:
        keep: Ends of the keys whose tensors it shall not resize.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hints to timm's developers
            converted = convert(dict(state), model)
    except Exception:  # of a state that is not this family's, it may expect anything
        return None
    for key in converted:
        if key.endswith(keep) and key in state and state[key].numel() != converted[key].numel():
            converted[key] = state[key]
    return converted  # type: ignore[no-any-return]


def _timm_preprocessing(model: nn.Module, kwargs: Mapping[str, Any]) -> Preprocessing:
    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            channels = module.in_channels  # timm's config ignores in_chans
            break
    height, width = to_2tuple(kwargs.get("img_size", size))  # and img_size
    return Preprocessing(
        (channels, height, width),
        config["crop_pct"],
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
    )


def override(
    preprocessing: Preprocessing,
    input_size: int | None,
    crop_pct: float | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
) -> Preprocessing:
    """The preprocessing with those settings changed that are given; UserError for one out of range."""
    p = preprocessing
    channels = p.input_size[0]
    result = Preprocessing(
        p.input_size if input_size is None else (channels, input_size, input_size),
        p.crop_pct if crop_pct is None else crop_pct,
        p.interpolation if interpolation is None else interpolation,
        _per_channel("--mean", p.mean if mean is None else mean, channels),
        _per_channel("--std", p.std if std is None else std, channels),
    )
    if not 0 < result.crop_pct <= 1:
        raise UserError(f"--crop-pct: {result.crop_pct}; expected more than 0 and at most 1")
    if result.interpolation not in INTERPOLATIONS:
        raise UserError(f"--interpolation: {result.interpolation!r}; expected {', '.join(INTERPOLATIONS)}")
    if not min(result.std) > 0:
        raise UserError(f"--std: {min(result.std)}; expected positive values")
    return result


def _per_channel(flag: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UserError(f"{flag}: {len(values)} values; expected 1 or {channels}, one per input channel")
    return tuple(values) * (channels // len(values))


def _close(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name."""
    close = get_close_matches(name, known)
    return f"; perhaps {' or '.join(close)}" if close else ""
