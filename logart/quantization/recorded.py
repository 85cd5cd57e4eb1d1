"""A step of learning as one CUDA graph: its hundreds of small kernels are launched at the cost of one.

Launched one by one from Python they leave a GPU idle for most of a step of LLR; a recording launches them again in the
same order with the same arguments, so the numbers are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from logart import ranks
from logart.errors import one_line


class Recorded:
    """A function of trees of tensors, which on CUDA is recorded at its second call and replayed from then on.

    The first runs plainly, as every call does on another device, under several ranks, whose shares of a batch differ,
    and where recording fails: a forward that waits for the GPU, by `.item()` say, cannot be recorded. Arguments in new
    shapes are recorded anew. What is given lies in the same memory every time.

    Args:
        function: of tensors, whose memory may be read again only through its arguments, and anything that stays equal;
            a number that changes, a float, comes as a tensor.
        generators: what it draws from.
    """

    def __init__(
        self, function: Callable[..., Any], device: torch.device, generators: Sequence[torch.Generator] = ()
    ) -> None:
        self._function, self._device, self._generators = function, device, generators
        self._usable = device.type == "cuda" and ranks.size() == 1
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: list[Any] = []
        self._result: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if not self._usable:
            return self._function(*arguments)
        arguments = tuple(self._as_tensor(each) if isinstance(each, float) else each for each in arguments)
        leaves, tree = tree_flatten(arguments)
        shapes = [(leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)]
        if shapes != self._shapes:
            self._shapes, self._graph, self._result = shapes, None, None
            return self._function(*tree_unflatten(leaves, tree))
        if self._graph is None and not self._record(leaves, tree):
            return self._function(*arguments)
        for own, leaf in zip(self._given, leaves, strict=True):
            if isinstance(leaf, Tensor):
                own.copy_(leaf)
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _as_tensor(self, number: float) -> Tensor:
        return torch.tensor(number, dtype=torch.float64, device=self._device)

    def _record(self, leaves: list[Any], tree: Any) -> bool:
        self._given = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in self._generators:
                graph.register_generator_state(generator)
            with torch.cuda.device(self._device), torch.cuda.graph(graph):
                self._result = self._function(*tree_unflatten(self._given, tree))
        except RuntimeError as error:
            self._usable, self._result = False, None
            warnings.warn(
                f"a step of learning cannot be recorded as a CUDA graph ({one_line(error):.120}): its kernels are "
                "launched one by one, which takes longer",
                stacklevel=2,
            )
            return False
        self._graph = graph
        return True
