"""How many rows the tensors that a block takes and gives have for each image: seen in forwards of two and of three.

Rows of an image stand together, in the first dimension: where they do not, sequences before images say, the block
cannot be given some images of those captured, and has a reason in place of rows.
"""

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

_NOISE = 1e-2  # of a tensor's norm: two images alone and beside a third differ by no more, rows of others by far more

Rows = tuple[int, ...]  # for each image, of each tensor; 0 where a tensor is the same whatever the number of images


class BlockRows(NamedTuple):
    """Of the tensors in a block's call, and in what it gives."""

    inputs: Rows
    outputs: Rows


@torch.no_grad()
def trace_rows(model: nn.Module, blocks: Mapping[str, nn.Module], example: Tensor | Inputs) -> list[BlockRows | str]:
    """The rows of each block; windows of an image, say, are several rows, a table of positions has none of its own.

    Of a block with a tensor that does not have as many rows for each image, in order, what was seen in place of them.

    Args:
        blocks: by name.
        example: two inputs of the network.

    Raises:
        NetworkError: a block does not run once.
    """
    two = Call.of(example)
    three = Call(*tree_map_only(Tensor, lambda t: torch.cat([t, t[:1]]), (two.args, two.kwargs)))
    of_two, of_three = (_tensors(model, blocks, inputs) for inputs in (two, three))
    for name in blocks:
        runs = [len(seen.get(name, ())) // 2 for seen in (of_two, of_three)]
        if runs != [1, 1]:
            message = f"block {name} runs {runs[0]} times for two images and {runs[1]} for three"
            raise NetworkError(f"{message}; expected once for any number")
    return [_rows_or_reason(of_two[name], of_three[name]) for name in blocks]


def _tensors(model: nn.Module, blocks: Mapping[str, nn.Module], inputs: Call) -> dict[str, list[list[Tensor]]]:
    """All tensors that each block takes and gives."""
    seen: dict[str, list[list[Tensor]]] = {}

    def look(name: str, *trees: Any) -> None:
        leaves = tree_leaves(trees[1:] if len(trees) > 2 else trees[-1])
        seen.setdefault(name, []).append([leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)])

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


def _rows_or_reason(of_two: Sequence[Sequence[Tensor]], of_three: Sequence[Sequence[Tensor]]) -> BlockRows | str:
    rows: list[Rows] = []
    for pairs in (list(zip(*both, strict=True)) for both in zip(of_two, of_three, strict=True)):
        torn = next((pair for pair in pairs if _rows(*pair) is None), None)
        if torn is not None:
            return f"{list(torn[0].shape)} of two images and {list(torn[1].shape)} of three"
        rows.append(tuple(_rows(*pair) or 0 for pair in pairs))
    return BlockRows(*rows)


def _rows(two: Tensor, three: Tensor) -> int | None:
    """How many there are for each image; None where they are not in order."""
    if two.shape == three.shape:
        return 0
    if two.shape[1:] != three.shape[1:] or 3 * len(two) != 2 * len(three):
        return None
    difference, size = (t.double().nan_to_num().norm() for t in (two.double() - three[: len(two)].double(), two))
    return len(two) // 2 if difference <= _NOISE * size else None
