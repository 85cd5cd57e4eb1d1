"""timm's networks: how they are built, get their weights, in old layouts too, and which images they expect."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

from logart.errors import UserError, did_you_mean, one_line
from logart.networks.data import Preprocessing
from logart.networks.network import TIMM, Network, Plan, Size
from logart.networks.weights import load_state_dict, read_checkpoint, state_sha256

# What a family's own conversion of old checkpoints resizes: always from another network than the one asked for ...
_PATCHES = ("patch_embed.proj.weight",)
# ... and unless another image size is asked for.
_POSITIONS = ("pos_embed", "relative_position_bias_table")


def plan_timm(
    arch: str,
    name: str,
    weights: AbstractContextManager[Path] | None,
    checkpoint_key: str | None = None,
    *,
    flag: str,
    model_kwargs: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_size: Size | None = None,
) -> Plan:
    """Build a network of timm's, whose weights are still to come.

    Args:
        arch: What the result is called.
        name: timm's name of it, with or without a tag.
        weights: Gives a file of weights, in the network's own layout or an older one that timm converts; None takes
            timm's pretrained weights.
        checkpoint_key: The entry of the file, as for `weights.read_state_dict`.
        flag: The flag that errors about the name name.
        model_kwargs: Passed to `timm.create_model`.
        defaults: Likewise, where neither `model_kwargs` nor one of the following says otherwise.
        num_classes: The network's outputs.
        input_size: Height and width of the images; networks of a fixed size are built for it.

    Returns:
        The plan; its preprocessing is timm's, for the image size that the network was built for.

    Raises:
        UserError: A name timm does not know, or settings that do not fit; from the plan's `load`: weights that are
            missing or do not fit.
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
    preprocessing, classes = _timm_preprocessing(model, kwargs), model.num_classes
    if weights is None:
        _check_classes(name, model)

    def load() -> Network:
        if weights is None:
            trained, source = _pretrained(arch, name, kwargs, flag)
            return Network(arch, trained, preprocessing, classes, source, state_sha256(trained.state_dict()))
        with weights as path:
            file = read_checkpoint(path, checkpoint_key)
        _load_file(model, file.state, file.source, resize=input_size is not None or "img_size" in asked)
        return Network(arch, model, preprocessing, classes, file.source, file.sha256)

    return Plan(preprocessing, classes, load)


def build_timm(
    name: str,
    *,
    flag: str,
    model_kwargs: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_size: Size | None = None,
) -> tuple[Any, dict[str, Any]]:
    """A network of timm's without trained weights, and the arguments that gave it; all as for `load_timm`."""
    if not timm.is_model(name):
        hint = did_you_mean(TIMM + name, [TIMM + known for known in timm.list_models()])
        raise UserError(f"{flag}: timm has no model {name!r}" + f"; {hint}" * bool(hint))
    asked = dict(model_kwargs or {})
    if num_classes is not None and asked.setdefault("num_classes", num_classes) != num_classes:
        raise UserError(f"--num_classes: {num_classes}, but --model_kwargs has num_classes={asked['num_classes']}")
    if input_size is not None and to_2tuple(asked.get("img_size", input_size)) != to_2tuple(input_size):
        raise UserError(f"--input_size: {input_size}, but --model_kwargs has img_size={asked['img_size']}")
    try:
        return _build(name, {**(defaults or {}), **asked}, input_size)
    except Exception as error:  # whatever the model's own constructor raises
        culprit = "--model_kwargs" if model_kwargs else flag if input_size is None else "--input_size"
        raise UserError(f"{culprit}: timm cannot build {name} ({one_line(error)})") from error


def _build(name: str, kwargs: dict[str, Any], input_size: Size | None) -> tuple[Any, dict[str, Any]]:
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
    _check_classes(name, model)  # of the weights that were fetched
    return model, TIMM + ".".join(filter(None, (config["architecture"], config.get("tag"))))


def _check_classes(name: str, model: Any) -> None:
    """Raise UserError where timm's weights have another number of classes: their last layer would stay untrained."""
    theirs = model.pretrained_cfg.get("num_classes", model.num_classes)
    if theirs != model.num_classes:
        raise UserError(
            f"--num_classes: {model.num_classes} asked for, but timm's weights for {name} have {theirs}; "
            "expected --checkpoint PATH"
        )


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
