"""Calibration images as data loaders, lists and arrays give them, gathered in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_structure

from logart.errors import NetworkError
from logart.quantization.inputs import Inputs

_IMAGE_CHANNELS = (1, 3, 4)
_EXPECTED = "expected a tensor [n, ...], an array, or an iterable of such batches"


def gather_images(
    images: Any,
    count: int,
    input_key: str | Sequence[str] | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Any:
    """The first `count` images as one tensor, or as `Inputs` for a network that takes several.

    Args:
        images: a tensor or NumPy array [n, ...], or an iterable of batches or single images [C, H, W], each of them a
            tensor or array, a list or tuple whose first element is one, as (images, labels), a dict, or `Inputs`.
        count: how many.
        input_key: under which key of a dict the images are; of several keys, each names a keyword of the network.
        prepare: makes one of the above of what the iterable gives.

    Raises:
        NetworkError: fewer images, none of these forms, values that are not finite, or integers.
    """
    with torch.inference_mode(False):
        if isinstance(images, Tensor | np.ndarray | Inputs):
            gathered = _inputs_or_tensor(images if prepare is None else prepare(images))[:count]
        else:
            gathered = _joined(images, count, input_key, prepare)
        tensors = gathered.tensors if isinstance(gathered, Inputs) else [gathered]
        if any(tensor.is_inference() for tensor in tensors):
            gathered = gathered.clone()
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors) and len(gathered):
        what = f"the calibration images are {gathered.dtype}".replace("torch.", "")
        raise NetworkError(f"{what}; expected floating point, scaled and normalised as the network takes them")
    if len(gathered) < count:
        raise NetworkError(f"the settings ask for {count} calibration images, got {len(gathered)}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NetworkError("the calibration images hold NaN or infinite values")
    return gathered


def _joined(
    batches: Any, count: int, input_key: str | Sequence[str] | None, prepare: Callable[[Any], Any] | None
) -> Tensor | Inputs:
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise NetworkError(f"the calibration images are a {type(batches).__name__}; {_EXPECTED}")
    gathered: list[Any] = []
    for batch in batches:
        found = _inputs_or_tensor(_pick(batch if prepare is None else prepare(batch), input_key))
        if isinstance(found, Inputs):
            gathered.append(found)
            _check_alike(gathered)
            if sum(map(len, gathered)) >= count:
                break
            continue
        # Batches of three dimensions are tokens; an image's first dimension is its few channels.
        single = found.ndim == 3 and found.shape[0] in _IMAGE_CHANNELS and found.shape[1] > 4
        gathered.append(found[None] if single else found)
        if len({tuple(one.shape[1:]) for one in gathered}) > 1:
            shapes = [list(one.shape[1:]) for one in (gathered[0], gathered[-1])]
            raise NetworkError(f"calibration images differ in shape: {shapes[0]} and {shapes[1]}")
        if sum(map(len, gathered)) >= count:
            break
    if gathered and isinstance(gathered[0], Inputs):
        return Inputs.joined(gathered)[:count]
    return torch.cat(gathered)[:count] if gathered else torch.empty(0)


def _check_alike(batches: Sequence[Any]) -> None:
    """Raise where the last of several batches of inputs is of another form than the first."""
    first, last = batches[0], batches[-1]
    shapes = [
        [list(t.shape[1:]) for t in inputs.tensors] if isinstance(inputs, Inputs) else "one tensor"
        for inputs in (first, last)
    ]
    if shapes[0] != shapes[1] or tree_structure(first) != tree_structure(last):
        raise NetworkError(f"the inputs of calibration images differ in form: {shapes[0]} and {shapes[1]}")


def _pick(batch: Any, input_key: str | Sequence[str] | None) -> Any:
    """The images of a batch that may hold more than these."""
    if isinstance(batch, Mapping) and input_key is not None and not isinstance(input_key, str):
        missing = [key for key in input_key if key not in batch]
        if missing or not input_key:
            raise NetworkError(f"calibration batches have no {missing}; they hold {', '.join(map(repr, batch))}")
        return Inputs(**{key: _tensor(batch[key]) for key in input_key})
    while isinstance(batch, list | tuple) and len(batch):
        batch = batch[0]
    if isinstance(batch, Mapping):
        if input_key is None or input_key not in batch:
            seen = f"dicts with {', '.join(map(repr, batch))}"
            raise NetworkError(f"calibration batches are {seen}, input_key is {input_key!r}; expected one of the keys")
        return _pick(batch[input_key], None)
    return batch


def _inputs_or_tensor(value: Any) -> Tensor | Inputs:
    return value.map(_tensor) if isinstance(value, Inputs) else _tensor(value)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
        return value.to(torch.get_default_dtype()) if value.dtype is torch.float64 else value
    if not isinstance(value, Tensor):
        raise NetworkError(f"calibration images come as {type(value).__name__}; {_EXPECTED}")
    if value.ndim == 0:
        raise NetworkError("calibration images come as single numbers; expected batches [n, ...]")
    return value.detach()
