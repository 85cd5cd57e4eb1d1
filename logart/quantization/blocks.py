"""What is reconstructed as one: blocks, found in one forward of a network, and the layers outside of them.

A block is a module of a class that comes more than once with two layers or more in it, that runs once in a forward and
gives one tensor; of nested ones the outermost. Stages are looked into: they hold a list of such modules, and all
they give comes through these. That is tried, not guessed: with every member giving what it gave before, a stage gives
the same for other inputs; a block with a shortcut around its members does not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from logart.errors import NetworkError
from logart.quantization.capture import Call, intercepted
from logart.quantization.inputs import Inputs

_LISTS = (nn.Sequential, nn.ModuleList)
_CONTAINERS = (*_LISTS, nn.ModuleDict)  # these very types: a subclass may be a block


@dataclass(frozen=True)
class Block:
    """What is reconstructed as one: a block, or a layer outside every block.

    Attributes:
        name: its name in the network.
        layers: the names in the network of the quantized layers inside, in the order they run.
        whole: it is the whole network, and its one layer is one that is used in no one block.
    """

    name: str
    layers: tuple[str, ...]
    whole: bool = False


def in_order(blocks: Sequence[Block], apart: Iterable[str], layers: Sequence[str]) -> list[Block]:
    """Blocks and, each at the place where it is used first, the layers in none of them.

    Args:
        layers: the names of all, in the order they are first used.
    """
    place = {name: index for index, name in enumerate(layers)}
    every = [*blocks, *(Block("", (name,), whole=True) for name in apart)]
    return sorted(every, key=lambda block: min(place[name] for name in block.layers))


def find_blocks(
    model: nn.Module,
    layers: Sequence[str],
    example: Tensor | Inputs,
    places: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Block]:
    """Group layers, given in the order they run, into the blocks found and single layers.

    Args:
        layers: names of the layers.
        example: a few inputs of the network.
        places: of a layer, the modules that its weight is used in; without, it is the layer itself. Layers that are
            used in several blocks, or in a module with a block inside, are left out.
    """
    used = [place for layer in layers for place in dict.fromkeys(places.get(layer, [layer]))]
    blocks = _Finder(model, used, example).blocks()
    found = _grouped(layers, blocks, places)
    modules = [b.name for b in found if b.name not in blocks and b.name not in b.layers]
    runs = _look(model, {name: model.get_submodule(name) for name in modules}, example) if modules else {}
    return [block for block in found if block.name not in modules or runs[block.name].is_usable]


def blocks_of_types(
    model: nn.Module,
    layers: Sequence[str],
    block_types: Sequence[str],
    places: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Block]:
    """Group layers, given in the order they run, into blocks of these classes and single layers.

    Args:
        layers: names of the layers.
        block_types: class names; of nested blocks the outermost counts. Without any, each layer is one.
        places: as for `find_blocks`.

    Raises:
        NetworkError: the network has none of them.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in block_types and not any(_inside(name, block) for block in blocks):
            blocks.append(name)
    if block_types and not blocks:
        raise NetworkError(f"no module of type {', '.join(block_types)} in {type(model).__name__}")
    return _grouped(layers, blocks, places)


def _grouped(layers: Sequence[str], blocks: Sequence[str], places: Mapping[str, Sequence[str]]) -> list[Block]:
    owners = {
        layer: {next((b for b in blocks if _inside(place, b)), place) for place in places.get(layer, [layer])}
        for layer in layers
    }
    for of_layer in owners.values():
        if len(of_layer) > 1 and not of_layer & set(blocks):
            common = os.path.commonprefix([name.split(".") for name in of_layer])
            of_layer.clear()
            of_layer.add(".".join(common))
    outside = {owner for of_layer in owners.values() for owner in of_layer} - set(blocks)
    outside = {name for name in outside if not any(_inside(block, name) for block in blocks)}
    members: dict[str, list[str]] = {}
    for layer, of_layer in owners.items():
        # The outermost of the modules that are blocks for what is used in them; a layer of its own is one of them.
        into = {next((o for o in sorted(outside, key=len) if _inside(owner, o)), owner) for owner in of_layer}
        owner = into.pop()
        if not into and (owner in blocks or owner in outside):
            members.setdefault(owner, []).append(layer)
    return [Block(name, tuple(inside)) for name, inside in members.items()]


def _inside(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(block + ".")


@dataclass
class _Run:
    """How a module ran: how often, its last call and what it gave."""

    count: int = 0
    call: Call = field(default_factory=lambda: Call((), {}))
    output: Any = None

    @property
    def is_usable(self) -> bool:
        """Whether it ran once, on tensors, and gave one."""
        return self.count == 1 and len(_tensors(self.output)) == 1 and bool(_tensors(self.call))


def _look(model: nn.Module, modules: Mapping[str, nn.Module], example: Tensor | Inputs) -> dict[str, _Run]:
    """How each of the modules runs in one forward."""
    runs = {name: _Run() for name in modules}

    def enter(run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.count += 1
        run.call = Call(args, kwargs).copy()

    def leave(run: _Run, output: Any) -> None:
        run.output = tree_map_only(Tensor, torch.clone, output)

    handles = []
    for name, run in runs.items():
        module = modules[name]
        handles += [
            module.register_forward_pre_hook(lambda _, a, k, run=run: enter(run, a, k), with_kwargs=True),
            module.register_forward_hook(lambda _, a, output, run=run: leave(run, output)),
        ]
    try:
        with torch.no_grad():
            Call.of(example).copy().on(model)
    finally:
        for handle in handles:
            handle.remove()
    return runs


class _Finder:
    """Finds the names of a network's blocks; arguments as `find_blocks`."""

    def __init__(self, model: nn.Module, layers: Sequence[str], example: Tensor | Inputs) -> None:
        self._model, self._example = model, example
        prefixes = Counter(".".join(parts[:n]) for parts in map(_parts, layers) for n in range(len(parts)))
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if name and prefixes[name] > 1 and type(module) not in _CONTAINERS
        }
        self._classes = Counter(type(module) for module in self._modules.values())

    def blocks(self) -> list[str]:
        """The names, in the order of the network's modules."""
        blocks: list[str] = []
        for name in self._candidates:
            if not any(_inside(name, block) for block in blocks) and type(self._modules[name]) not in self._stages:
                blocks.append(name)
        beside = list(self._beside(blocks))
        blocks = [name for name in blocks if not any(_inside(name, other) for other in beside)]
        return sorted([*blocks, *beside], key=list(self._modules).index)

    @cached_property
    def _runs(self) -> Mapping[str, _Run]:
        """How each of the modules runs in one forward."""
        return _look(self._model, self._modules, self._example)

    def _usable(self, name: str) -> bool:
        """Whether the module runs once, on tensors, and gives one."""
        return self._runs[name].is_usable

    @cached_property
    def _candidates(self) -> list[str]:
        """What is of a class that comes more than once."""
        return [name for name, m in self._modules.items() if self._classes[type(m)] > 1 and self._usable(name)]

    @cached_property
    def _stages(self) -> set[type[nn.Module]]:
        """The classes whose instances pass everything through their members."""
        members = {name: list(self._members(name)) for name in self._candidates}
        lists = {type(self._modules[name]) for name in self._candidates if self._holds_list(members[name])}
        found = set()
        for kind in lists:
            own = [name for name in self._candidates if type(self._modules[name]) is kind and members[name]]
            if all(self._all_through(name, members[name]) for name in own):
                found.add(kind)
        return found

    def _members(self, name: str) -> Iterator[str]:
        """The outermost candidates inside of a module."""
        last = None
        for other in self._candidates:
            if other.startswith(name + ".") and (last is None or not _inside(other, last)):
                last = other
                yield other

    def _holds_list(self, members: Sequence[str]) -> bool:
        """Whether some of a module's members lie in a list, or are numbered."""
        parents = (self._model.get_submodule(member.rpartition(".")[0]) for member in members)
        numbered = {member.rstrip("0123456789") for member in members}
        return any(isinstance(parent, _LISTS) for parent in parents) or len(numbered) == 1 < len(members)

    def _all_through(self, name: str, members: Sequence[str]) -> bool:
        """Whether a module gives the same for other inputs as long as its members do."""
        run = self._runs[name]
        outputs = [self._runs[member].output for member in members]
        other = Call(*tree_map_only(Tensor, lambda t: t.flip(0) if t.ndim else t, (run.call.args, run.call.kwargs)))
        modules = [self._modules[member] for member in members]
        try:
            with (
                torch.no_grad(),
                intercepted(modules, lambda i, _: tree_map_only(Tensor, torch.clone, outputs[i])),
            ):
                replayed = other.copy().on(self._modules[name])
        except Exception:  # of any type: the module is the user's, and not made for this
            return False
        pairs = zip(_tensors(replayed), _tensors(run.output), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def _beside(self, blocks: Sequence[str]) -> Iterable[str]:
        """What stands in one list with blocks, nested lists counted as one, and is none only for coming once."""
        rows = {self._row(block) for block in blocks} - {None}
        for name in self._modules:
            if name not in self._candidates and self._row(name) in rows and self._usable(name):
                members = list(self._members(name))
                if not (self._holds_list(members) and self._all_through(name, members)):
                    yield name

    def _row(self, name: str) -> str | None:
        """The outermost of the lists, one directly inside the other, that hold a module."""
        row, parent = None, name
        while parent:
            parent = parent.rpartition(".")[0]
            if type(self._model.get_submodule(parent)) not in _CONTAINERS:
                break
            row = parent
        return row


def _parts(name: str) -> list[str]:
    return name.split(".")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
