"""Seeing inside a network: what enters and leaves one module, image by image.

Hooks always come off; a forward is cut short, once the module has been seen, by a private exception. Captured tensors
are written into memory taken once, so that n images cost one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from logart.runtime import NetworkError


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

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise NetworkError(
                f"{type(module).__name__} was called with {len(args)} arguments and keywords {sorted(kwargs)}; "
                "what is reconstructed must take one tensor"
            )
        if not through:
            seen.append((args[0], None))
            raise _Seen

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append((args[0], output))
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


def inputs(model: nn.Module, name: str, images: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """What the module called `name` is given when the model runs on images [n, ...]; [n, ...] on `device`."""
    module = model.get_submodule(name)
    return collect(lambda x: run_to(model, module, x, through=False)[0], images, batch_size, device)


def outputs(model: nn.Module, name: str, images: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """What the module called `name` gives when the model runs on images [n, ...]; [n, ...] on `device`."""
    module = model.get_submodule(name)
    return collect(lambda x: _through(model, module, x)[1], images, batch_size, device)


def inputs_and_outputs(
    model: nn.Module, name: str, images: Tensor, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the module called `name` is given and what it gives, [n, ...] each on `device`, in one pass."""
    module = model.get_submodule(name)
    given = _Gathered(len(images), device)

    def output(x: Tensor) -> Tensor:
        entered, left = _through(model, module, x)
        given.add(entered)
        return left

    targets = collect(output, images, batch_size, device)
    return given.whole(), targets


def _through(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    entered, left = run_to(model, module, x, through=True)
    assert left is not None
    return entered, left


@torch.no_grad()
def collect(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """function(images), batch by batch on `device`, gathered in one tensor there."""
    result = _Gathered(len(images), device)
    for start in range(0, len(images), batch_size):
        result.add(function(images[start : start + batch_size].to(device)))
    return result.whole()


class _Gathered:
    """Batches in one tensor whose memory is taken at the first of them, whole; no second copy ever exists."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device, self._filled = count, device, 0
        self._tensor: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        if self._tensor is None:
            self._tensor = torch.empty((self._count, *batch.shape[1:]), dtype=batch.dtype, device=self._device)
        self._tensor[self._filled : self._filled + len(batch)] = batch
        self._filled += len(batch)

    def whole(self) -> Tensor:
        if self._tensor is None:
            raise NetworkError("no images to capture from")
        return self._tensor
