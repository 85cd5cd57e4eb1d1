"""A second device that is not there: its tensors lie on the CPU, but refuse to meet the CPU's, as a GPU's would.

Operations between tensors of both devices raise, as do conversions to NumPy without `.cpu()`; what is computed is what
the CPU computes, bit for bit. So a machine without a GPU still finds the tensor that was made on the wrong device. It
says nothing of a GPU's kernels. `install` changes torch for the whole process, so only a process of its own calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "away"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # from torch 2.9 on or so
aten = torch.ops.aten
_MAY_MIX = (aten._to_copy.default, aten.copy_.default)  # how tensors come over


class Away(Tensor):
    """A tensor of the pretended device; `inside` has its values."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Away:
        layout = {"strides": inside.stride(), "storage_offset": inside.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=_device(), **layout)  # type: ignore[attr-defined]
        made.inside = inside
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inside.tolist()


class Pretended(TorchDispatchMode):
    """Within it, tensors can be made on the device and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _device() -> torch.device:
    return torch.device(NAME, 0)


def _is_away(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Away)]
    if away and func not in _MAY_MIX and any(t.ndim for t in tensors if not isinstance(t, Away)):
        raise RuntimeError(f"{func}: expected all tensors on one device, got {[str(t.device) for t in tensors]}")
    inside_args, inside_kwargs = tree_map(lambda leaf: leaf.inside if isinstance(leaf, Away) else leaf, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        inside_kwargs["device"] = torch.device("cpu")
    result = func(*inside_args, **inside_kwargs)
    if device is not None:
        to_away = _is_away(device)
    else:
        to_away = isinstance(args[0], Away) if func is aten.copy_.default else bool(away)
    if not to_away:
        return result
    result = tree_map(lambda leaf: Away(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if away else result


def install() -> torch.device:
    """Make the device known to torch, and lead around it what torch computes without asking the dispatcher."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]  # autocast asks, also to be switched off
    torch.__future__.set_swap_module_params_on_conversion(True)  # else Module.double() changes a wrapper's label only
    numpy, tensor, as_tensor, data_ptr = Tensor.numpy, torch.tensor, torch.as_tensor, torch.UntypedStorage.data_ptr
    generator, adam = torch.Generator, torch.optim.Adam

    def to_numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Away):
            raise TypeError("can't convert a tensor of another device to numpy; use .cpu() first")
        return numpy(self, *args, **kwargs)

    def made(make: Any) -> Any:
        def on_device(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
            result: Tensor = make(data, dtype=dtype, device=None if _is_away(device) else device)
            return result.to(device) if _is_away(device) else result

        return on_device

    def address(self: torch.UntypedStorage) -> int:
        try:
            return int(data_ptr(self))
        except RuntimeError:  # a wrapper has no memory of its own
            return id(self)

    Tensor.numpy = to_numpy  # type: ignore[assignment, method-assign]
    torch.tensor, torch.as_tensor = made(tensor), made(as_tensor)
    Tensor.new_tensor = lambda self, data: torch.tensor(data, dtype=self.dtype, device=self.device)  # type: ignore[assignment, method-assign]
    torch.UntypedStorage.data_ptr = address  # type: ignore[assignment, method-assign]
    torch.Generator = lambda device="cpu": generator("cpu" if _is_away(device) else device)  # type: ignore[assignment, misc]
    torch.optim.Adam = lambda *args, fused, **kwargs: adam(*args, **kwargs)  # type: ignore[assignment, misc]
    return _device()
