"""Networks as both tracks know them: what there is to say of one, and which images it expects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from torch import nn

from logart.errors import UserError, near_or_all
from logart.networks.data import Preprocessing
from logart.networks.weights import check_file, class_indices

DIGITS_PREPROCESSING = Preprocessing((1, 8, 8), 1.0, "bilinear", (0.3053,), (0.3761,))  # of the training split
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
TIMM = "timm:"
Size = int | tuple[int, int]  # height and width, one number where they are equal


@dataclass(frozen=True)
class Network:
    """A trained network and what else its name decides.

    Attributes:
        arch: The name it was asked for by.
        model: float32, in eval mode.
        preprocessing: The images it expects.
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
    num_classes: int
    source: str
    sha256: str
    row_groups: Mapping[str, int] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A network that is known, but whose weights nobody has read or fetched yet.

    Attributes:
        preprocessing: The images it expects.
        num_classes: Its outputs.
        load: Gives the network with its weights; UserError where they are missing or do not fit.
        published: Whether the weights are those that the name stands for, and not a file of the user's.
        class_indices: Gives the output of each class by name, where the user's file says so.
    """

    preprocessing: Preprocessing
    num_classes: int
    load: Callable[[], Network]
    published: bool = False
    class_indices: Callable[[], Mapping[str, int] | None] = lambda: None


Planner = Callable[..., Plan]


def network_recipe(
    track: str,
    arch: str,
    model_kwargs: Mapping[str, Any] | None,
    num_classes: int | None,
    input_size: Size | None,
) -> dict[str, Any]:
    """A network's `recipe`."""
    return {
        "track": track,
        "arch": arch,
        "model_kwargs": dict(model_kwargs or {}),
        "num_classes": num_classes,
        "input_size": list(input_size) if isinstance(input_size, tuple) else input_size,
    }


def plan_by(
    plan: Planner,
    track: str,
    arch: str,
    checkpoint: str | Path | None = None,
    *,
    checkpoint_key: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_size: Size | None = None,
    channels: int | None = None,
    crop_pct: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
) -> Plan:
    """Check all that is asked of a network, and say which images it expects, before its weights are read or fetched.

    Args:
        plan: The track's way from (arch, checkpoint, checkpoint_key, model_kwargs, num_classes, input_size) to its
            plan.
        track: cnn or vit.
        arch: A name of the track's, or 'timm:' and a name that timm knows.
        checkpoint: A file of weights, in place of those that `arch` has by default.
        checkpoint_key: The entry of it, as for `weights.read_state_dict`.
        model_kwargs: Passed to `timm.create_model`.
        num_classes: The network's outputs, where they differ from the default.
        input_size: Height and width, for which a network of a fixed size is built; this and the following override the
            network's data settings.
        channels: Those of its images, where the user said; they must be the network's.
        crop_pct: The part of the resized image that the centre crop keeps, in (0, 1].
        mean: Of pixels in [0, 1], one value or one per channel.
        std: Likewise, positive.
        interpolation: One of `INTERPOLATIONS`.

    Raises:
        UserError: An unknown name, settings that do not fit, or no such file; from the plan's `load`: weights that are
            missing or do not fit.
    """
    check_counts(num_classes, input_size)
    if checkpoint is not None:
        check_file(checkpoint)
    elif checkpoint_key is not None:
        raise UserError(f"--checkpoint_key has no effect here: {checkpoint_key!r} is looked for in --checkpoint")
    planned = plan(arch, checkpoint, checkpoint_key, model_kwargs, num_classes, input_size)
    settings = override(planned.preprocessing, input_size, crop_pct, mean, std, interpolation)
    if channels is not None and channels != settings.input_size[0]:
        raise UserError(
            f"--input_size: {channels} channels asked for, but the network takes {settings.input_size[0]}; "
            f"networks of timm's take others with --model_kwargs in_chans={channels}"
        )
    recipe = network_recipe(track, arch, model_kwargs, num_classes, input_size)

    def load() -> Network:
        network = planned.load()
        network.model.eval().float()
        return replace(network, preprocessing=settings, recipe=recipe)

    classes = (lambda: None) if checkpoint is None else partial(class_indices, checkpoint)
    return Plan(settings, planned.num_classes, load, published=checkpoint is None, class_indices=classes)


def check_counts(num_classes: int | None, input_size: Size | None) -> None:
    """Raise UserError where a number that a network shall be built with is below 1."""
    sides = input_size if isinstance(input_size, tuple) else (input_size,)
    for flag, value in (("--num_classes", num_classes), *(("--input_size", side) for side in sides)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: {value}; expected at least 1")


def unknown_network(name: str, known: Sequence[str], *, flag: str) -> UserError:
    """The error about a name that is none of the track's, with a hint."""
    hint = f"did you mean {TIMM}{name}?" if timm.is_model(name) else near_or_all(name, known, f" or {TIMM}NAME")
    return UserError(f"{flag}: no network {name!r}; {hint}")


def names_table(rows: Iterable[tuple[str, str, Sequence[int], int, str]]) -> str:
    """The names of a track's networks as a table in Markdown.

    Args:
        rows: of each its name, what it is, the [channels, height, width] of its images, its classes, and where its own
            weights are, if any.
    """
    lines = ["| name | network | input | classes | its own weights |", "|---|---|---|---|---|"]
    for name, about, size, classes, weights in rows:
        lines.append(f"| `{name}` | {about} | {'×'.join(map(str, size))} | {classes} | {weights or 'none'} |")
    return "\n".join(lines)


def override(
    preprocessing: Preprocessing,
    input_size: Size | None,
    crop_pct: float | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
) -> Preprocessing:
    """The preprocessing with those settings changed that are given; UserError for one out of range."""
    p = preprocessing
    channels = p.input_size[0]
    result = Preprocessing(
        p.input_size if input_size is None else (channels, *to_2tuple(input_size)),
        p.crop_pct if crop_pct is None else crop_pct,
        p.interpolation if interpolation is None else interpolation,
        _per_channel("--mean", p.mean if mean is None else mean, channels),
        _per_channel("--std", p.std if std is None else std, channels),
    )
    if not 0 < result.crop_pct <= 1:
        raise UserError(f"--crop_pct: {result.crop_pct}; expected more than 0 and at most 1")
    if result.interpolation not in INTERPOLATIONS:
        raise UserError(f"--interpolation: {result.interpolation!r}; expected {', '.join(INTERPOLATIONS)}")
    if not min(result.std) > 0:
        raise UserError(f"--std: {min(result.std)}; expected positive values")
    return result


def _per_channel(flag: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UserError(f"{flag}: {len(values)} values; expected 1 or {channels}, one per input channel")
    return tuple(values) * (channels // len(values))
