"""The modes of torch under which a network is quantized, whatever the caller's are, and those of the network's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """Gradients on, inference mode and autocast off, and attention by its layers instead of one fused call."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def autocast_now(device_type: str) -> torch.dtype | None:
    """The type that autocast computes in now; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


@contextmanager
def autocast_inside(
    models: Iterable[nn.Module], dtypes: Mapping[str, torch.dtype | None], device_type: str
) -> Iterator[None]:
    """While the context lasts, the modules named run under autocast of these types also when they run alone."""
    handles = []
    for name, dtype in dtypes.items():
        for model in models:
            if dtype is not None:
                stack = ExitStack()
                module = model.get_submodule(name)
                handles += [
                    module.register_forward_pre_hook(partial(_enter, stack, device_type, dtype), prepend=True),
                    module.register_forward_hook(partial(_leave, stack), always_call=True),
                ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(stack: ExitStack, device_type: str, dtype: torch.dtype, *_: object) -> None:
    stack.enter_context(torch.autocast(device_type, dtype))


def _leave(stack: ExitStack, *_: object) -> None:
    stack.close()
