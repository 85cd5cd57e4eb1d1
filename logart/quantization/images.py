"""Calibration images as data loaders, lists and arrays give them, gathered in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logart.errors import NetworkError

_IMAGE_CHANNELS = (1, 3, 4)
_EXPECTED = "expected a tensor [n, ...], an array, or an iterable of such batches"


def gather_images(
    images: Any, count: int, input_key: str | None = None, prepare: Callable[[Any], Any] | None = None
) -> Tensor:
    """The first `count` images as one tensor.

    Args:
        images: a tensor or NumPy array [n, ...], or an iterable of batches or single images [C, H, W], each of them a
            tensor or array, a list or tuple whose first element is one, as (images, labels), or a dict.
        count: how many.
        input_key: under which key of a dict the images are.
        prepare: makes one of the above of what the iterable gives.

    Raises:
        NetworkError: fewer images, none of these forms, values that are not finite, or integers.
    """
    with torch.inference_mode(False):
        if isinstance(images, Tensor | np.ndarray):
            gathered = _tensor(images if prepare is None else prepare(images))[:count]
        else:
            gathered = _joined(images, count, input_key, prepare)
        gathered = gathered.clone() if gathered.is_inference() else gathered
    if not (gathered.is_floating_point() or gathered.is_complex()) and len(gathered):
        what = f"the calibration images are {gathered.dtype}".replace("torch.", "")
        raise NetworkError(f"{what}; expected floating point, scaled and normalised as the network takes them")
    if len(gathered) < count:
        raise NetworkError(f"the settings ask for {count} calibration images, got {len(gathered)}")
    if not torch.isfinite(gathered).all():
        raise NetworkError("the calibration images hold NaN or infinite values")
    return gathered


def _joined(batches: Any, count: int, input_key: str | None, prepare: Callable[[Any], Any] | None) -> Tensor:
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise NetworkError(f"the calibration images are a {type(batches).__name__}; {_EXPECTED}")
    gathered: list[Tensor] = []
    for batch in batches:
        found = _tensor(_pick(batch if prepare is None else prepare(batch), input_key))
        # Batches of three dimensions are tokens; an image's first dimension is its few channels.
        single = found.ndim == 3 and found.shape[0] in _IMAGE_CHANNELS and found.shape[1] > 4
        gathered.append(found[None] if single else found)
        if len({tuple(one.shape[1:]) for one in gathered}) > 1:
            shapes = [list(one.shape[1:]) for one in (gathered[0], gathered[-1])]
            raise NetworkError(f"calibration images differ in shape: {shapes[0]} and {shapes[1]}")
        if sum(map(len, gathered)) >= count:
            break
    return torch.cat(gathered)[:count] if gathered else torch.empty(0)


def _pick(batch: Any, input_key: str | None) -> Any:
    """The images of a batch that may hold more than these."""
    while isinstance(batch, list | tuple) and len(batch):
        batch = batch[0]
    if isinstance(batch, Mapping):
        if input_key is None or input_key not in batch:
            seen = f"dicts with {', '.join(map(repr, batch))}"
            raise NetworkError(f"calibration batches are {seen}, input_key is {input_key!r}; expected one of the keys")
        return _pick(batch[input_key], None)
    return batch


def _tensor(value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
        return value.to(torch.get_default_dtype()) if value.dtype is torch.float64 else value
    if not isinstance(value, Tensor):
        raise NetworkError(f"calibration images come as {type(value).__name__}; {_EXPECTED}")
    if value.ndim == 0:
        raise NetworkError("calibration images come as single numbers; expected batches [n, ...]")
    return value.detach()
