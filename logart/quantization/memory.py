"""How much memory a block takes while it is worked on: an upper bound by formula, from two images.

    captured = images of this rank × (inputs + outputs + the larger of both + 2·outputs held for later blocks)
    working  = the largest `Stage.working_bytes`, or 4 × batch × the network's largest tensor to reach the block

all in bytes per image and tensor as the float network makes them: while the float network's inputs of a block become
outputs there are the other's inputs and, where asked for, both of the float one; then those of the other network become
outputs beside the float outputs. What libraries take for themselves is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logart import ranks
from logart.quantization.activations import last_readers
from logart.quantization.blocks import Block
from logart.quantization.cache import MemoryEstimate
from logart.quantization.config import QuantConfig
from logart.quantization.dataflow import Sources
from logart.quantization.layers import find_parameter, get_weight
from logart.quantization.layout import WeightUse
from logart.quantization.rounding_methods import BlockSize


def estimate_memory(
    reference: nn.Module,
    blocks: Sequence[Block],
    sources: Sequence[Sources | None],
    example: Tensor,
    config: QuantConfig,
    uses: Mapping[str, WeightUse] = MappingProxyType({}),
) -> dict[str, MemoryEstimate]:
    """The most that each block of a float network will take, by name.

    Args:
        reference: the float network.
        sources: of `trace_sources`.
        example: a few images [n, ...] on its device.
        uses: how weights are used, where it is not as torch's own layers use theirs.
    """
    sizes = block_sizes(reference, blocks, example, uses)
    stages = [stage for stage in config.stages if stage.needs(config)]
    largest = max(size.largest for size in sizes)
    forward = 4 * largest * max((stage.images(config)[1] for stage in stages), default=0)
    readers = last_readers(sources)
    needs = {}
    for index, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        held = sum(sizes[i].outputs for i in range(index) if readers[i] > index)
        each = size.inputs + size.outputs + max(size.inputs, size.outputs) + 2 * held
        working = max((forward, *(stage.working_bytes(size, config) for stage in stages)))
        images = -(-config.views * config.images_needed // ranks.size())
        needs[block.name] = MemoryEstimate(images * each, working)
    return needs


@torch.no_grad()
def block_sizes(
    model: nn.Module, blocks: Sequence[Block], example: Tensor, uses: Mapping[str, WeightUse]
) -> list[BlockSize]:
    """The sizes of a network's blocks, from one forward of `example`."""
    made = {block.name: _Made() for block in blocks}
    handles = []
    for name, seen in made.items():
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(partial(_enter, seen), with_kwargs=True),
            module.register_forward_hook(partial(_leave, seen)),
        ]
    try:
        model(example.clone())
    finally:
        for handle in handles:
            handle.remove()
        for seen in made.values():
            if seen.inside:  # the forward raised in this block
                seen.leave()
    return [made[block.name].size(model, block, len(example), uses) for block in blocks]


class _Made(TorchDispatchMode):
    """Sums up the tensors that operations make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = self.outputs = self.activations = self.largest = 0
        self.inside = False

    def enter(self) -> None:
        """From here on, what is made counts."""
        self.inside = True
        self.__enter__()

    def leave(self) -> None:
        """From here on, nothing does."""
        self.inside = False
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs_held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs_held:
                self.activations += tensor.nbytes
                self.largest = max(self.largest, tensor.nbytes)
        return result

    def size(self, model: nn.Module, block: Block, images: int, uses: Mapping[str, WeightUse]) -> BlockSize:
        weights = [get_weight(model, name) for name in block.layers]
        known = (uses.get(name) or WeightUse.by_module(*find_parameter(model, name)) for name in block.layers)
        grams = (use.groups * use.layout.shape[1:].numel() ** 2 for use in known)
        return BlockSize(
            inputs=self.inputs // images,
            outputs=self.outputs // images,
            activations=(self.activations + self.inputs) // images,
            largest=max(self.largest, self.inputs) // images,
            weights=sum(weight.nbytes for weight in weights),
            gram=torch.float64.itemsize * max(grams),
        )


def _enter(seen: _Made, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen.inputs = _bytes((args, kwargs))
    seen.enter()


def _leave(seen: _Made, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    seen.leave()
    seen.outputs = _bytes(output)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
