"""Activations handed forward: the inputs of each block are made once, from the outputs of the blocks before it.

Held are, of one network and batch by batch of its calibration images, the inputs of the block that is worked on and
those outputs of earlier blocks of which the inputs of later ones are made. When the block is through, its outputs take
the place of its inputs. What lies between blocks is run for every block, on the outputs held, with a blank in the place
of those that no later block needs; a block that cannot be reached so (see `trace_sources`) is reached from the images.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from logart.errors import NetworkError, NonFiniteError
from logart.quantization.blocks import Block
from logart.quantization.cache import Cache, Captured, OffloadedTensor, is_stored
from logart.quantization.capture import Call, only_tensor, replay_to_last
from logart.quantization.dataflow import Sources
from logart.quantization.inputs import Inputs
from logart.quantization.rows import BlockRows, Rows
from logart.ranks import own_batches


class Activations:
    """The activations of one network on the way through its blocks.

    Args:
        network: the float network, or the one being quantized: a block is passed as it is then.
        blocks: in the order they run.
        sources: of the float network, by `trace_sources`.
        images: [n, C, H, W], or several inputs; this rank has its own batches of them.
        batch_size: how many at a time.
        cache: where activations are held.
        rows: of the blocks' tensors, by `trace_rows`; without it, one for each image everywhere.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Sequence[Block],
        sources: Sequence[Sources | None],
        images: Tensor | Inputs,
        batch_size: int,
        cache: Cache,
        rows: Sequence[BlockRows] | None = None,
    ) -> None:
        self._network, self._sources, self._cache = network, sources, cache
        self._names = [block.name for block in blocks]
        self._modules = [network.get_submodule(name) for name in self._names]
        self._rows, self._own, self._count = rows, own_batches(len(images), batch_size), len(images)
        self._images = [images[own.start : own.stop] for own in self._own]
        self._last_reader = last_readers(sources)
        self._at = 0
        self._inputs: list[Call | None] = [None] * len(self._images)
        self._outputs: list[dict[int, Any]] = [{} for _ in self._images]  # by block
        self._empty = True  # blanks have no values

    @torch.no_grad()
    def inputs(self, index: int) -> Captured:
        """What a block is called with, of this rank's images: the block that was last asked for, or one further on.

        Raises:
            NetworkError: a block on the way takes no tensor, or one of other rows than `rows` says.
            NonFiniteError: some of it is not finite.
        """
        self._go_to(index)
        return self._captured(self._inputs, self._rows_of(index).inputs)

    @torch.no_grad()
    def outputs(self, index: int, *, keep_inputs: bool) -> Captured:
        """What it gives, in the place of its inputs or beside them; as `inputs`, of a block that gives one tensor."""
        self._go_to(index)
        self._leave(index, keep_inputs=keep_inputs)
        outputs = [only_tensor(held[index], self._modules[index]) for held in self._outputs]
        rows = self._rows_of(index).outputs
        for b, output in enumerate(outputs):
            self._check(output, b, rows)
        return self._captured(outputs, rows)

    def _captured(self, batches: Sequence[Any], rows: Sequence[int]) -> Captured:
        images = [image for own in self._own for image in own]
        return Captured(batches, rows, [len(own) for own in self._own], images, self._count)

    def _rows_of(self, index: int) -> BlockRows:
        if self._rows is not None:
            return self._rows[index]
        return BlockRows((1,), (1,))

    def move(self) -> None:
        """Hold everything where the cache says now."""
        for b, call in enumerate(self._inputs):
            self._inputs[b] = self._cache.store(self._cache.load(call))
            self._outputs[b] = self._cache.store(self._cache.load(self._outputs[b]))

    def _go_to(self, index: int) -> None:
        for passed in range(self._at, index):
            if self._sources[index] is not None:  # else outputs are of no use, of this block or any behind it
                self._enter(passed)
                self._leave(passed)
        self._enter(index)

    def _enter(self, index: int) -> None:
        """Make the inputs of a block where they are not there yet, and let go of what no later block reads."""
        if self._at != index:
            self._at, self._inputs = index, [None] * len(self._images)
        batches = [b for b, call in enumerate(self._inputs) if call is None and index not in self._outputs[b]]

        def take(place: int, call: Call) -> None:
            b = batches[place]
            self._check(call, b, self._rows_of(index).inputs)
            self._inputs[b] = self._stored(call, b)
            for passed, output in self._outputs[b].items():
                if self._last_reader[passed] <= index:
                    self._outputs[b][passed] = tree_map_only((Tensor, OffloadedTensor), _Released, output)

        modules = self._modules[: index + 1] if self._sources[index] is not None else [self._modules[index]]
        images = (self._images[b].to(self._cache.device) for b in batches)
        try:
            replay_to_last(self._network, modules, images, lambda place, i: self._replayed(batches[place], i), take)
        except RuntimeError as error:  # what torch raises, and what lies between blocks may
            if not self._empty or isinstance(error, torch.OutOfMemoryError):
                raise
            self._empty = False
            self._enter(index)

    def _replayed(self, b: int, passed: int) -> Any:
        """What a block that was passed gave, to be changed in place at will."""

        def leaf(held: Any) -> Any:
            if isinstance(held, Tensor):
                return held.clone()
            if isinstance(held, _Released):
                return self._blank(held.shape, held.dtype)
            return held.load() if isinstance(held, OffloadedTensor) else held

        return tree_map(leaf, self._outputs[b][passed])

    def _blank(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """In the place of values that reach no block: no values, so that nothing is computed with them.

        Where they meet others, parameters say, which torch refuses: zeros.
        """
        if self._empty:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.zeros(shape, dtype=dtype, device=self._cache.device)

    def _leave(self, index: int, *, keep_inputs: bool = False) -> None:
        """Run a block on its inputs."""
        for b, call in enumerate(self._inputs):
            if call is not None and index not in self._outputs[b]:
                output = self._cache.load(call).copy().on(self._modules[index])
                self._outputs[b][index] = self._stored(output, b)
            if not keep_inputs:
                self._inputs[b] = None

    def _stored(self, tree: Any, b: int) -> Any:
        stored = self._cache.store(tree)
        for leaf in tree_leaves(stored):
            if isinstance(leaf, OffloadedTensor) and leaf.held.dtype != leaf.dtype:
                self._check_finite(leaf.held, b, "are too large for half precision; expected another cache")
        return stored

    def _check(self, tree: Any, b: int, rows: Rows) -> None:
        """Raise unless each tensor of a batch has its rows for each image and is finite."""
        tensors, images = [leaf for leaf in tree_leaves(tree) if is_stored(leaf)], len(self._own[b])
        name = self._names[self._at]
        if not tensors or len(tensors) != len(rows):
            raise NetworkError(f"block {name} takes {len(tensors)} tensors; expected {len(rows) or 'one'}")
        for tensor, each in zip(tensors, rows, strict=True):
            seen = tensor.shape[0] if tensor.shape else 0
            if each and seen != each * images:
                message = f"block {name} has {seen} rows for {images} images"
                raise NetworkError(f"{message}; expected {'a row' if each == 1 else each} for each")
            self._check_finite(self._cache.load(tensor), b, "are not finite")

    def _check_finite(self, tensor: Tensor, b: int, reason: str) -> None:
        finite = tensor.isfinite()
        if not finite.all():
            of_rows = finite.flatten(1).all(1) if finite.ndim > 1 else finite.reshape(-1)
            row = int(of_rows.logical_not().nonzero()[0])
            image = self._own[b].start + row * len(self._own[b]) // len(of_rows)
            message = f"block {self._names[self._at]}: the activations of calibration image {image} {reason}"
            raise NonFiniteError(message, image)


class _Released:
    """What is known of a tensor that is held no longer."""

    def __init__(self, tensor: Tensor | OffloadedTensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


def last_readers(sources: Sequence[Sources | None]) -> list[int]:
    """For each block the last one whose inputs are made of its outputs; itself where there is none."""
    return [max((j for j, of in enumerate(sources) if of and i in of), default=i) for i in range(len(sources))]


class Capture(str, Enum):
    """What may be captured of a block, of n images."""

    FLOAT_INPUTS = "float_inputs"  # what the block is called with in the float network
    INPUTS = "inputs"  # what it is called with behind the quantized prefix
    TARGETS = "targets"  # what the float block gives


class BothActivations:
    """The activations of the float network and of the one being quantized; other arguments as `Activations`."""

    def __init__(
        self,
        reference: nn.Module,
        quantized: nn.Module,
        blocks: Sequence[Block],
        sources: Sequence[Sources | None],
        images: Tensor | Inputs,
        batch_size: int,
        cache: Cache,
        rows: Sequence[BlockRows] | None = None,
    ) -> None:
        how = (blocks, sources, images, batch_size, cache, rows)
        self._float, self._quantized = Activations(reference, *how), Activations(quantized, *how)

    def capture(self, index: int, needs: Set[Capture]) -> dict[Capture, Captured]:
        """What is needed of a block, one at a time and in order; errors as `Activations.inputs` and `outputs`."""
        captured: dict[Capture, Captured] = {}
        if Capture.TARGETS in needs:
            captured[Capture.TARGETS] = self._float.outputs(index, keep_inputs=Capture.FLOAT_INPUTS in needs)
        if Capture.FLOAT_INPUTS in needs:
            captured[Capture.FLOAT_INPUTS] = self._float.inputs(index)
        if Capture.INPUTS in needs:
            captured[Capture.INPUTS] = self._quantized.inputs(index)
        return captured

    def move(self) -> None:
        """Hold everything where the cache says now."""
        self._float.move()
        self._quantized.move()
