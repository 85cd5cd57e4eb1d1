"""What a network does, seen in one forward: how weights are used, what stays float, input layers and heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from logart.errors import NetworkError
from logart.quantization.clone import attributes
from logart.quantization.flow import RUN_THEIR_CHILDREN, Flow, Owner, Seen
from logart.quantization.layers import LAYER_TYPES
from logart.quantization.layout import WeightUse
from logart.quantization.weight_state import layer_name

IDLE = "no operation with it was seen in the forward pass"


@dataclass(frozen=True)
class Survey:
    """What one forward showed.

    Attributes:
        uses: of every weight that can be quantized how it is used, in the order they are first used; by the layer's
            name, or the parameter's where it is not the `weight` of a layer.
        places: of each, for each operation, the innermost module in whose forward it is that runs once, by name.
        blind: by name why a weight is rounded without data: what it is multiplied with is not seen, or it did not run.
        skipped: (name, reason) of every weight that stays float.
        inputs: the layers that see the network's input before any other layer did.
        heads: the layers whose output reaches the network's without another layer between.
        n_weights: elements of all weights, which are the parameters of two dimensions and more, and whatever else
            enters a linear operation in a weight's place.
        output: the network's.
        autocast: the type of autocast that each module was entered under, by name; not those outside of autocast.
        eps: of the coarsest floating type that was computed in.
    """

    uses: dict[str, WeightUse]
    places: dict[str, list[str]]
    blind: dict[str, str]
    skipped: list[tuple[str, str]]
    inputs: list[str]
    heads: list[str]
    n_weights: int
    output: Any
    autocast: dict[str, torch.dtype]
    eps: float

    @property
    def layers(self) -> list[str]:
        """The names of the weights that can be quantized."""
        return list(self.uses)


@torch.no_grad()
def survey(model: nn.Module, example: Tensor) -> Survey:
    """Look at a network in one forward of `example`.

    Raises:
        NetworkError: a weight, or a parameter beside it, is not finite; the message names it.
    """
    flow = Flow(model, example)
    with flow.watching(model):
        output = model(flow.example)
    uses: dict[str, WeightUse] = {}
    blind: dict[str, str] = {}
    for name in (*flow.seen, *_idle(flow)):
        for kind, parameter in flow.owners[name].module.named_parameters(recurse=False):
            if not torch.isfinite(parameter).all():
                raise NetworkError(f"layer {name}: its {kind} holds NaN or infinite values")
    for name, seen in flow.seen.items():
        uses[name], why = _how(flow.owners[name], seen, flow.entered)
        if why:
            blind[name] = why
    for name, owner in _idle(flow).items():
        uses[name], blind[name] = WeightUse.by_module(owner.module, owner.name), IDLE
    n_weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    n_weights += sum(t.numel() for t in _unregistered(model, flow).values())
    places = {name: [_place(flow, one) for one in seen] for name, seen in flow.seen.items()}
    skipped = [(name, reason) for name, reason in _skipped(model, flow) if name not in uses]
    return Survey(uses, places, blind, skipped, *flow.ends(output), n_weights, output, flow.autocast, flow.eps)


def _how(owner: Owner, seen: Sequence[Seen], entered: Mapping[int, int]) -> tuple[WeightUse, str]:
    """How a weight is used, and why what it is multiplied with is not seen; empty where it is."""
    first = seen[0]
    why = next((one.hidden for one in seen if one.hidden), "")
    if not why and any(one.layout is None for one in seen):
        why = "is used in parts"
    if not why and any((one.layout, one.groups) != (first.layout, first.groups) for one in seen):
        why = "is used in several ways"
    if why or first.layout is None:
        return replace(WeightUse.by_module(owner.module, owner.name), n_uses=len(seen), bias=None), why
    return WeightUse(first.layout, first.groups, len(seen), _bias(owner, seen, entered)), ""


def _bias(owner: Owner, seen: Sequence[Seen], entered: Mapping[int, int]) -> str | None:
    """Where a bias that only these operations add can be corrected, in the weight's own module."""
    own, bias = owner.module._parameters, seen[0].bias
    if any(one.bias is not bias for one in seen) or entered[id(bias)] > len(seen):
        return None
    if bias is not None:
        return next((name for name, parameter in own.items() if parameter is bias), None)
    return "bias" if "bias" in own and all(_is_all_of(owner, one) for one in seen) else None


def _is_all_of(owner: Owner, seen: Seen) -> bool:
    """Whether an operation is what one of torch's own layers does with its `weight`."""
    own = isinstance(owner.module, nn.Linear | nn.modules.conv._ConvNd) and owner.name == "weight"
    return own and seen.own_forward


def _place(flow: Flow, seen: Seen) -> str:
    return next(name for name in reversed(seen.running) if flow.runs[name] == 1 or not name)


def _idle(flow: Flow) -> dict[str, Owner]:
    """The weights of layers of torch's own that did not run, heads that act while training, say."""
    return {
        name: owner
        for name, owner in flow.owners.items()
        if owner.name == "weight"
        and isinstance(owner.module, nn.Linear | nn.modules.conv._ConvNd)
        and id(owner.parameter) not in flow.used
    }


def is_plain(module: nn.Module) -> bool:
    """Whether it is a layer of a type whose forward is known, with a weight of its own."""
    return type(module) in LAYER_TYPES and "weight" in module._parameters


def _skipped(model: nn.Module, flow: Flow) -> Iterable[tuple[str, str]]:
    known = {id(owner.parameter): name for name, owner in flow.owners.items()}
    for name, module in model.named_modules():
        if type(module) in LAYER_TYPES and "weight" not in module._parameters:
            yield name, "its weight is computed from other tensors, by pruning or a norm"
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and known.get(id(parameter)) not in flow.seen:
                used = id(parameter) in flow.used
                how = f"{type(module).__name__} uses it, but not as the weight of a linear operation that is known"
                if isinstance(module, RUN_THEIR_CHILDREN):
                    how = f"a {type(module).__name__} itself holds it, which would run its codes as one of its modules"
                yield layer_name(name, own), how if used else IDLE
    for name, _ in _unregistered(model, flow):
        yield name, "is used as a weight, but no module holds it as a parameter or buffer"


def _unregistered(model: nn.Module, flow: Flow) -> dict[tuple[str, int], Tensor]:
    """What was used in a weight's place, but is no parameter; of what the forward computed, what a module keeps.

    Returns:
        The tensors by name and memory.
    """
    kept, made_anew = {}, set()
    for name, key, value in attributes(model):
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                memory = leaf.untyped_storage().data_ptr()
                kept[memory] = layer_name(name, key)
                made_anew |= {memory} if key == "weight" else set()  # by pruning or a norm, in each forward
    found = {}
    for tensor in (*flow.unregistered.values(), *flow.computed.values()):
        memory = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
        if id(tensor) in flow.unregistered or (memory in kept and memory not in made_anew):
            found[kept.get(memory, "a tensor"), memory] = tensor
    return found
