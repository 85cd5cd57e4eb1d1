"""Seeing inside a network: what enters and leaves one module, image by image.

Hooks always come off; a forward is cut short, once the module has been seen, by a private exception. Captured tensors
are written into memory taken once, so that n images cost one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from logart.errors import NetworkError, NonFiniteError
from logart.quantization.cache import Cache, Captured


class _Seen(Exception):
    """Raised by a hook to end a forward that has gone as far as needed."""


def run_to(model: nn.Module, module: nn.Module, x: Tensor, *, through: bool) -> tuple[Tensor, Tensor | None]:
    """What `module` is given, and with `through` what it gives, when `model` runs on x; the model runs no further.

    Args:
        model: holds `module`, or is it.
        x: the model's input.
        through: run the module too.

    Returns:
        The module's one input tensor, and its output or None.

    Raises:
        ValueError: the forward never reaches the module, or the module takes anything but one tensor.
    """
    seen: list[tuple[Tensor, Tensor | None]] = []
    entered: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise NetworkError(
                f"{type(module).__name__} was called with {len(args)} arguments and keywords {sorted(kwargs)}; "
                "what is reconstructed must take one tensor"
            )
        if not through:
            seen.append((args[0], None))
            raise _Seen
        entered.append(args[0].clone())  # the module may begin with an operation in place

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            message = f"{type(module).__name__} gave a {type(output).__name__}"
            raise NetworkError(f"{message}; what is reconstructed must give one tensor")
        seen.append((entered[0], output))
        raise _Seen

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        model(x.clone())  # an in-place operation at the start must not reach the caller's images
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise NetworkError(f"the forward pass never reached {type(module).__name__}")
    return seen[0]


def inputs(model: nn.Module, name: str, images: Tensor, batch_size: int, cache: Cache) -> Captured:
    """What the module called `name` is given when the model runs on images [n, ...]; [n, ...], kept in the cache.

    Raises:
        NonFiniteError: some of it is not finite.
    """
    module = model.get_submodule(name)
    return _collect(lambda x: run_to(model, module, x, through=False)[0], images, batch_size, cache, name)


def outputs(model: nn.Module, name: str, images: Tensor, batch_size: int, cache: Cache) -> Captured:
    """What the module called `name` gives when the model runs on images [n, ...]; as `inputs`."""
    module = model.get_submodule(name)
    return _collect(lambda x: _through(model, module, x)[1], images, batch_size, cache, name)


def inputs_and_outputs(
    model: nn.Module, name: str, images: Tensor, batch_size: int, cache: Cache
) -> tuple[Captured, Captured]:
    """What the module called `name` is given and what it gives, in one pass; as `inputs`."""
    module = model.get_submodule(name)
    inputs = _Gathered(len(images), cache, name)

    def output(x: Tensor) -> Tensor:
        entered, outputs = _through(model, module, x)
        inputs.add(entered, len(x))
        return outputs

    targets = _collect(output, images, batch_size, cache, name)
    return inputs.whole(), targets


def _through(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    entered, outputs = run_to(model, module, x, through=True)
    assert outputs is not None
    return entered, outputs


@torch.no_grad()
def collect(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """function(images), batch by batch on `device`, gathered in one tensor there."""
    result = _collect(function, images, batch_size, Cache(device))
    assert isinstance(result, Tensor)
    return result


@torch.no_grad()
def _collect(
    function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, cache: Cache, name: str | None = None
) -> Captured:
    result = _Gathered(len(images), cache, name)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(cache.device)
        result.add(function(batch), len(batch))
    return result.whole()


class _Gathered:
    """Batches in one tensor whose memory is taken at the first of them, whole; no second copy ever exists.

    Batches must have a row for every image; with the name of a block, they must be finite, too.
    """

    def __init__(self, count: int, cache: Cache, name: str | None = None) -> None:
        self._count, self._cache, self._name, self._filled = count, cache, name, 0
        self._memory: tuple[Tensor, Captured] | None = None

    def add(self, batch: Tensor, images: int) -> None:
        if len(batch) != images:
            what = "what is captured" if self._name is None else f"block {self._name}"
            raise NetworkError(f"{what} has {len(batch)} rows for {images} images; expected a row for each")
        if self._memory is None:
            self._memory = self._cache.empty(self._count, batch)
        rows = self._memory[0][self._filled : self._filled + len(batch)]
        rows.copy_(batch)
        if self._name is not None:
            self._check(batch)
            if rows.dtype != batch.dtype:
                self._check(rows, "are too large for half precision; expected another cache")
        self._filled += len(batch)

    def _check(self, batch: Tensor, reason: str = "are not finite") -> None:
        finite = batch.isfinite()
        if not finite.all():
            assert self._name is not None
            image = self._filled + int(finite.flatten(1).all(1).logical_not().nonzero()[0])
            raise NonFiniteError(f"block {self._name}: the activations of calibration image {image} {reason}", image)

    def whole(self) -> Captured:
        if self._memory is None:
            raise NetworkError("no images to capture from")
        return self._memory[1]
