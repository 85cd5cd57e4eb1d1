"""Seeing inside a network: what enters and leaves one module, image by image.

Hooks live in context managers and always come off; a forward is cut short, once the module has been seen, by a private
exception. Captured tensors are written into memory taken once, so that n images cost one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Seen(Exception):
    """Raised by a hook to end a forward that has gone as far as needed."""


@contextmanager
def forward_hook(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """`hook(module, args, output)` runs after the module's forward while the context lasts."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def stop_before(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """While the context lasts, a forward that reaches `module` puts its input into `seen` and ends."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_only_tensor(args, kwargs))
        raise _Seen

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    except _Seen:
        pass
    finally:
        handle.remove()


def _only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        raise ValueError(f"a block takes one tensor; this one was given {len(args)} arguments and {sorted(kwargs)}")
    return args[0]


def input_of(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """What `module` is given when the model runs on `images`; the model runs no further."""
    seen: list[Tensor] = []
    with stop_before(module, seen):
        model(images)
    if not seen:
        raise ValueError(f"the forward pass never reached {type(module).__name__}")
    return seen[0]


def output_and_input(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `module` gives and what it is given when `model` runs on x; the model runs no further."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.extend((output, args[0]))
        raise _Seen

    try:
        with forward_hook(module, hook):
            model(x)
    except _Seen:
        pass
    return seen[0], seen[1]


@torch.no_grad()
def collect(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """function(images), batch by batch on `device`, gathered in one tensor there.

    The result's memory is taken at the first batch, whole; no second copy of it ever exists.
    """
    result: Tensor | None = None
    for start in range(0, len(images), batch_size):
        batch = function(images[start : start + batch_size].to(device))
        if result is None:
            result = torch.empty((len(images), *batch.shape[1:]), dtype=batch.dtype, device=device)
        result[start : start + len(batch)] = batch
    if result is None:
        raise ValueError("no images to capture from")
    return result
