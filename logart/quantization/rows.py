"""How many rows the tensors that a block takes and gives have for each image: seen in forwards of two and of three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from logart.errors import NetworkError
from logart.quantization.capture import Call
from logart.quantization.inputs import Inputs

Rows = tuple[int, ...]  # for each image, of each tensor; 0 where a tensor is the same whatever the number of images


class BlockRows(NamedTuple):
    """Of the tensors in a block's call, and in what it gives."""

    inputs: Rows
    outputs: Rows


@torch.no_grad()
def trace_rows(model: nn.Module, blocks: Mapping[str, nn.Module], example: Tensor | Inputs) -> list[BlockRows]:
    """The rows of each block; windows of an image, say, are several rows, a table of positions has none of its own.

    Args:
        blocks: by name.
        example: two inputs of the network.

    Raises:
        NetworkError: a block is never reached; the size of a tensor is not that many rows for each image.
    """
    two = Call.of(example)
    three = Call(*tree_map_only(Tensor, lambda t: torch.cat([t, t[:1]]), (two.args, two.kwargs)))
    shapes = [_shapes(model, blocks, inputs) for inputs in (two, three)]
    for name in blocks:
        if any(len(seen.get(name, ())) != 2 for seen in shapes):
            raise NetworkError(f"the forward pass never reached {name}")
    return [
        BlockRows(*(_rows(name, *both) for both in zip(*(seen[name] for seen in shapes), strict=True)))
        for name in blocks
    ]


def _shapes(model: nn.Module, blocks: Mapping[str, nn.Module], inputs: Call) -> dict[str, list[list[torch.Size]]]:
    """The shapes of all tensors that each block takes and gives."""
    seen: dict[str, list[list[torch.Size]]] = {}

    def look(name: str, *trees: Any) -> None:
        leaves = tree_leaves(trees[1:] if len(trees) > 2 else trees[-1])
        seen.setdefault(name, []).append([leaf.shape for leaf in leaves if isinstance(leaf, Tensor)])

    handles = []
    for name, block in blocks.items():
        handles += [
            block.register_forward_pre_hook(partial(look, name), with_kwargs=True),
            block.register_forward_hook(lambda _, args, output, name=name: look(name, output)),
        ]
    try:
        inputs.copy().on(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rows(name: str, of_two: Sequence[torch.Size], of_three: Sequence[torch.Size]) -> Rows:
    rows = []
    for two, three in zip(of_two, of_three, strict=True):
        if two == three:
            rows.append(0)
        elif two[1:] == three[1:] and 3 * two[0] == 2 * three[0]:
            rows.append(two[0] // 2)
        else:
            message = f"block {name}: a tensor of two images is {list(two)} and of three {list(three)}"
            raise NetworkError(f"{message}; expected as many rows for each image, in the first dimension")
    return tuple(rows)
