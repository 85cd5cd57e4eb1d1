"""Which blocks' outputs a block's inputs are made of, by what lies between blocks: found in one forward, then tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from logart.errors import NetworkError
from logart.quantization.capture import Call, intercepted, replay_to_last

Sources = frozenset[int]


@torch.no_grad()
def trace_sources(model: nn.Module, blocks: Sequence[nn.Module], example: Tensor) -> list[Sources | None]:
    """For each block the indices of those whose outputs, and no others, its inputs are made of.

    What lies between blocks runs for each block in turn, with the outputs of these and zeros for all others. Where that
    does not give the very inputs that the block has in a forward of the network, bit for bit, it is tried with the
    outputs of all blocks before; where it does not even then, some block before does more than give outputs, and this
    block and all behind it have None.

    Args:
        model: holds the blocks, or is the only one.
        blocks: in the order they run.
        example: a few images [n, ...].

    Raises:
        NetworkError: the forward never reaches a block.
    """
    flow = _Flow(blocks)
    with intercepted(blocks, flow.run), flow:
        model(example.clone())
    missing = [type(block).__name__ for index, block in enumerate(blocks) if index not in flow.sources]
    if missing:
        raise NetworkError(f"the forward pass never reached {missing[0]}")
    model(example.flip(0, -1))  # what a block leaves behind elsewhere is not of the example any more

    def faithful(index: int, sources: Sources) -> bool:
        def replay(_: int, i: int) -> Any:
            return tree_map_only(Tensor, torch.clone if i in sources else torch.zeros_like, flow.outputs[i])

        calls: list[Call] = []
        try:
            replay_to_last(model, blocks[: index + 1], [example], replay, lambda _, call: calls.append(call))
        except Exception:  # of any type: what lies between blocks is the user's, and not made for this
            return False
        return _same(calls[0], flow.calls[index])

    found: list[Sources | None] = []
    for index in range(len(blocks)):
        tries = (flow.sources[index], frozenset(range(index))) if None not in found else ()
        found.append(next((sources for sources in tries if faithful(index, sources)), None))
    return found


class _Flow(TorchFunctionMode):
    """Follows which blocks the values in each memory came from; blocks are opaque.

    Attributes:
        calls, outputs, sources: of each block that ran, by index.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.calls: dict[int, Call] = {}
        self.outputs: dict[int, Any] = {}
        self.sources: dict[int, Sources] = {}
        self._blocks = blocks
        self._runs = [type(block).__call__ for block in blocks]
        self._came: dict[int, Sources] = {}
        self._alive: list[Tensor] = []  # so that no address comes twice
        self._inside = False

    def run(self, index: int, call: Call) -> Any:
        """Run a block for real, and note what it was called with and gave."""
        self._inside = True
        self.calls[index] = call.copy()
        output = self._runs[index](self._blocks[index], *call.args, **call.kwargs)
        self.outputs[index] = tree_map_only(Tensor, torch.clone, output)
        self._inside = False
        self.sources[index] = self._of(call)
        self._mark(output, frozenset([index]))
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self._mark(args if result is None else result, self._of((args, kwargs)))  # y[...] = value gives nothing
        return result

    def _of(self, tree: Any) -> Sources:
        return frozenset().union(*(self._came.get(_memory(tensor), frozenset()) for tensor in _tensors(tree)))

    def _mark(self, tree: Any, came: Sources) -> None:
        for tensor in _tensors(tree) if came else ():
            self._came[_memory(tensor)] = self._came.get(_memory(tensor), frozenset()) | came
            self._alive.append(tensor)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same(call: Call, other: Call) -> bool:
    mine, others = tree_leaves(call), tree_leaves(other)
    return len(mine) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        for a, b in zip(mine, others, strict=True)
    )
