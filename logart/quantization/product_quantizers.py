"""Where a network multiplies activations with each other, and quantizers at the operands of these products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from logart.errors import one_line
from logart.quantization.activation_quantizer import ActivationQuantizer
from logart.quantization.folding import same_outputs
from logart.quantization.layers import run_on_levels
from logart.quantization.operations import is_wrapped
from logart.quantization.products import Place, Products, operand_name, operands


@dataclass
class Found:
    """A module in whose forward, but in none of its children's, activations are multiplied.

    Attributes:
        places: the operands, and whether softmax gave each.
        counts: how many products of any kind each of its runs saw, those of its children among them.
        blocks: in which it ran, None for outside.
        refused: why a product is not seen; empty where all are.
    """

    places: dict[Place, bool] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    blocks: set[str | None] = field(default_factory=set)
    refused: str = ""


@dataclass
class _Running:
    name: str
    block: str | None
    count: int = 0


class _Finding(Products):
    """Finds such modules, by name, while a network runs."""

    def __init__(self, model: nn.Module, blocks: Iterable[str] = ()) -> None:
        super().__init__()
        self.found: dict[str, Found] = {}
        self._model, self._blocks = model, set(blocks)
        self._running = [_Running("", None)]
        self._handles: list[RemovableHandle] = []
        self._fixed = {_memory(t) for t in (*model.parameters(), *model.buffers())}
        self._of_softmax: dict[int, Tensor] = {}  # held, so that no address comes twice

    def __enter__(self) -> _Finding:
        for name, module in self._model.named_modules():
            enter = module.register_forward_pre_hook(partial(self._enter, name))
            self._handles += [enter, module.register_forward_hook(self._leave, always_call=True)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(_Running(name, name if name in self._blocks else self._running[-1].block))

    def _leave(self, *_: Any) -> None:
        left = self._running.pop()
        if left.name in self.found:
            self.found[left.name].counts.append(left.count)

    def multiply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = tree_leaves((args, kwargs))
        at, own = operands(leaves), self._running[-1]
        if func is torch.einsum and sum(map(self._is_activation, leaves)) > 2:
            self.refuse("more than two activations are multiplied at once")
        elif len(at) == 2 and all(self._is_activation(leaves[index]) for index in at):
            found = self._own()
            for side, index in enumerate(at):
                found.places[own.count, side] = _memory(leaves[index]) in self._of_softmax
        for running in self._running:
            running.count += len(at) == 2
        return func(*args, **kwargs)

    def softmax(self, of: Callable[[], Any]) -> Any:
        given = of()
        if not is_wrapped(given):
            self._of_softmax[_memory(given)] = given
        return given

    def refuse(self, why: str) -> None:
        self._own().refused = why

    def _own(self) -> Found:
        found = self.found.setdefault(self._running[-1].name, Found())
        found.blocks.add(self._running[-1].block)
        return found

    def _is_activation(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and not is_wrapped(leaf) and _memory(leaf) not in self._fixed


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def quantize_products(model: nn.Module, n_bits: int, blocks: Iterable[str], example: Any) -> list[tuple[str, str]]:
    """Put quantizers, which pass on what they are given, at the operands of all products of two activations.

    Args:
        blocks: the names of what is calibrated as one; only what runs inside one can be.
        example: images that the model can run on.

    Returns:
        (name, reason) of every module in which activations are still multiplied in float.
    """
    blocks = list(blocks)
    target = model(example.clone())
    eps = max(torch.finfo(leaf.dtype).eps for leaf in tree_leaves(target) if isinstance(leaf, Tensor))
    found = _find(model, blocks, example)
    try:
        of_one = _find(model, blocks, example[:1])
    except Exception:  # of any type: the network's own
        of_one = {}
    reasons: dict[str, str] = {}
    put: dict[str, Callable[[], Callable[[], None]]] = {}
    for name, each in found.items():
        held = tuple(f"{block}." if block else "" for block in each.blocks if block is not None)
        if len(each.blocks) > 1 or not f"{name}.".startswith(held):
            reasons[name] = "it is in no block"
        elif name not in of_one or of_one[name].counts != each.counts or len(set(each.counts)) > 1:
            reasons[name] = "how often it multiplies depends on the images"
        elif each.places:
            put[name] = partial(put_quantizers, model.get_submodule(name), each, n_bits)

    def difference() -> str:
        try:
            same = same_outputs(model(example.clone()), target, eps**0.5)
        except Exception as error:  # of any type: another release's forward
            return one_line(error)[:120]
        return "" if same else "with its products spelled out the network gave other outputs"

    undo = [each() for each in put.values()]
    if undo and difference():
        for restore in undo:
            restore()
        for name, one in put.items():  # which of them it is
            restore = one()
            if why := difference():
                reasons[name] = why
                restore()
    for name, each in _find(model, blocks, example).items():
        if each.refused:
            reasons.setdefault(name, each.refused)
    return list(reasons.items())


def _find(model: nn.Module, blocks: Iterable[str], images: Any) -> dict[str, Found]:
    with _Finding(model, blocks) as finding:
        model(images.clone())
    return finding.found


def put_quantizers(module: nn.Module, found: Found, n_bits: int) -> Callable[[], None]:
    """Let a module multiply quantized operands; what is returned takes that back."""
    in_attention = found.places.get((1, 0), False) and not any(found.places.get((0, side)) for side in (0, 1))
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    names = []
    for place, after_softmax in found.places.items():
        names.append(operand_name(place, in_attention))
        quantizer = ActivationQuantizer(n_bits, device, after_softmax=after_softmax).train(module.training)
        quantizer.n_uses = len(found.counts)
        module.add_module(names[-1], quantizer)
    undo = run_on_levels(module)

    def restore() -> None:
        undo()
        for name in names:
            delattr(module, name)

    return restore
