"""A copy of a network to work on: unwrapped, and sharing the memory of its parameters with the one that was given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from logart.errors import NetworkError, one_line

_MEMBERS = ("_parameters", "_buffers", "_modules")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel or DistributedDataParallel, in any nesting.

    Raises:
        NetworkError: it is or holds a ScriptModule, or is no module at all.
    """
    while not isinstance(model, torch.jit.ScriptModule):
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._orig_mod  # type: ignore[assignment] # what torch.compile makes
        else:
            break
    if not isinstance(model, nn.Module):
        raise NetworkError(f"expected a network (torch.nn.Module), got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its module {name}" if name else "the network"
            raise NetworkError(
                f"{what} is a ScriptModule, whose layers cannot be replaced; expected what it is made of"
            )
    return model


def clone_sharing(model: nn.Module) -> nn.Module:
    """A copy of the network's structure that shares the memory of every parameter and buffer with it.

    The parameters are objects of their own, without gradient: what is done to the copy (`to`, say) stays there.
    Wrappers are left out, inside too; attributes that cannot be copied, such as locks and open files, are shared.

    Raises:
        NetworkError: an attribute, which is named, cannot be copied and holds modules or tensors.
    """
    model = unwrapped(model)
    with torch.inference_mode(False):  # whose tensors take part in no gradient
        memo: dict[int, Any] = {id(p): _parameter(p) for p in model.parameters()}
        memo |= {id(buffer): _normal(buffer) for buffer in model.buffers()}
        for _, _, value in attributes(model):
            for t in tree_leaves(value):
                if isinstance(t, Tensor) and id(t) not in memo and (t.grad_fn is not None or t.is_inference()):
                    memo[id(t)] = _normal(t.detach())  # a kept activation, say
        try:
            clone = copy.deepcopy(model, dict(memo))
        except Exception:  # each type that cannot be copied has its own
            clone = copy.deepcopy(model, memo | _not_copied(model, memo))
    _unwrap_inside(clone)
    return clone


def _normal(tensor: Tensor) -> Tensor:
    strides = tensor.stride() if tensor.layout is torch.strided else tensor.shape
    if any(step == 0 and n > 1 for n, step in zip(tensor.shape, strides, strict=True)):
        return tensor.contiguous()  # one that was expanded: elements share memory, and cannot have codes each
    return tensor.clone() if tensor.is_inference() else tensor


def _parameter(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_normal(parameter.detach()), requires_grad=False)


def attributes(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Module's name, attribute's name and value of all that modules hold beside parameters, buffers and modules."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _MEMBERS:
                yield name, attribute, value


def _not_copied(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """What is to be shared because it cannot be copied, by its id."""
    probe = {id(module): module for module in model.modules()} | memo
    shared: dict[int, Any] = {}
    for name, attribute, value in attributes(model):
        try:
            copy.deepcopy(value, probe)
        except Exception as error:
            if any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(value)):
                where = f"{name}.{attribute}" if name else attribute
                why = f"cannot be copied ({one_line(error):.80})"
                raise NetworkError(f"the network's attribute {where} {why}") from None
            shared[id(value)] = value
    return shared


def _unwrap_inside(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = unwrapped(child)
