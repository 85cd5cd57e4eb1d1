"""Where the captured inputs and targets of a block live while it is worked on.

On the computing device they are fastest. Elsewhere, every batch that is asked for comes over to it, in its own type:
from host memory or disk with the same bits, from half precision rounded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from logart.errors import NoRoomError
from logart.ranks import local_size

_RESERVE = 0.8  # of what is free; the rest is for what no estimate knows


class CacheLocation(str, Enum):
    """Where captured tensors live: on the computing device, in host memory, there in half precision, or on disk."""

    DEVICE = "device"
    CPU = "cpu"
    HALF = "half"
    DISK = "disk"

    def __str__(self) -> str:
        return self.value


class OffloadedTensor:
    """A tensor that lives elsewhere than where it is computed with, perhaps in half precision.

    Attributes:
        held: where and as it lives.
        dtype, device: of what `load` gives.
        shape: of both.
    """

    def __init__(self, held: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.held, self.dtype, self.device = held, dtype, device
        self.shape = held.shape

    def __getitem__(self, rows: slice) -> OffloadedTensor:
        """Some of its rows, which stay where they are."""
        return OffloadedTensor(self.held[rows], self.dtype, self.device)

    def load(self, rows: slice = slice(None)) -> Tensor:
        """Its rows, a copy."""
        return self.held[rows].to(self.device, self.dtype, copy=True)


class Captured:
    """What a block is called with, or gives, for n images: batches of trees of tensors that live where the cache says.

    Indexing by a slice or by indices [B] gives such a tree of contiguous tensors, for these images.

    Args:
        batches: equal trees.
        rows: of each tensor, how many rows it has for each image, as `rows.Rows`; without it, one.
        sizes: how many images are in each batch; without it, as many as rows of the first tensor.
        images: [n] which of the images of all ranks these are, ascending; without it, they are all.
        total: how many all ranks have.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        rows: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        images: Sequence[int] | None = None,
        total: int | None = None,
    ) -> None:
        self._batches = list(batches)
        leaves = [[leaf for leaf in tree_leaves(batch) if is_stored(leaf)] for batch in batches]
        self._columns = list(zip(*leaves, strict=True))  # of each tensor the batches
        self.rows = [1] * len(self._columns) if rows is None else list(rows)
        self._sizes = [batch[0].shape[0] for batch in leaves] if sizes is None else list(sizes)
        self._images: list[list[Tensor]] = []
        self.images = range(len(self)) if images is None else images
        self.total = len(self) if total is None else total

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def shape(self) -> torch.Size:
        """Of the first tensor, of all images."""
        first = self._columns[0][0].shape
        return torch.Size((len(self) * self.rows[0], *first[1:])) if self.rows[0] else first

    @property
    def device(self) -> torch.device:
        """Of the tensors that indexing gives."""
        return self._columns[0][0].device

    def __getitem__(self, index: slice | Tensor) -> Any:
        if isinstance(index, slice):
            return self._tree(map(partial(self._slice, index), self._columns, self.rows))
        if not self._images:  # views
            self._images = [
                [image for held in column for image in _held(held).split(rows)] if rows else []
                for column, rows in zip(self._columns, self.rows, strict=True)
            ]
        return self._tree(map(partial(self._gather, index.tolist()), self._columns, self.rows, self._images))

    def own(self, images: range) -> range:
        """Where, of consecutive images of all ranks, those that are here lie."""
        return range(bisect_left(self.images, images.start), bisect_left(self.images, images.stop))

    def part(self, images: range) -> Captured:
        """The same of consecutive images of all ranks, no copy."""
        own = self.own(images)
        first, parts, sizes = 0, [], []
        for batch, size in zip(self._batches, self._sizes, strict=True):
            some = slice(max(own.start - first, 0), min(own.stop - first, size))
            if some.start < some.stop:
                parts.append(self.of_images(batch, some))
                sizes.append(some.stop - some.start)
            first += size
        if not parts:  # none of them is here
            parts, sizes = [self.of_images(self._batches[0], slice(0, 0))], [0]
        return Captured(parts, self.rows, sizes, [self.images[i] - images.start for i in own], len(images))

    def of_images(self, tree: Any, images: slice) -> Any:
        """What a tree like those given here, of several images, is for some of them."""
        rows = iter(self.rows)
        return tree_map(lambda leaf: _of_images(leaf, next(rows), images) if is_stored(leaf) else leaf, tree)

    def _slice(self, index: slice, column: Sequence[Tensor | OffloadedTensor], rows: int) -> Tensor:
        if not rows:
            return _loaded(column[0])
        start, stop, _ = index.indices(len(self))
        parts, first = [], 0
        for held, size in zip(column, self._sizes, strict=True):
            some = slice(max(start - first, 0), min(stop - first, size))
            if some.start < some.stop:
                parts.append(_loaded(_of_images(held, rows, some)))
            first += size
        if not parts:
            parts.append(_loaded(column[0][:0]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    def _gather(
        self, chosen: Sequence[int], column: Sequence[Tensor | OffloadedTensor], rows: int, images: Sequence[Tensor]
    ) -> Tensor:
        if not rows:
            return _loaded(column[0])
        return torch.cat([images[i] for i in chosen]).to(column[0].device, column[0].dtype)

    def _tree(self, tensors: Iterable[Tensor]) -> Any:
        each = iter(tensors)
        return tree_map(lambda leaf: next(each) if is_stored(leaf) else leaf, self._batches[0])


def is_stored(leaf: Any) -> bool:
    """Whether it is a tensor, wherever it lives."""
    return isinstance(leaf, Tensor | OffloadedTensor)


def _of_images(stored: Tensor | OffloadedTensor, rows: int, images: slice) -> Tensor | OffloadedTensor:
    return stored[images.start * rows : images.stop * rows] if rows else stored


def _loaded(stored: Tensor | OffloadedTensor) -> Tensor:
    return stored if isinstance(stored, Tensor) else stored.load()


def _held(stored: Tensor | OffloadedTensor) -> Tensor:
    return stored if isinstance(stored, Tensor) else stored.held


class MemoryEstimate(NamedTuple):
    """Bytes that a block takes while it is worked on.

    Attributes:
        captured: its inputs and targets of all images, which live where the cache says.
        working: beside them, always on the computing device; see `memory`.
    """

    captured: int
    working: int


@dataclass
class Cache:
    """Takes the memory for captured tensors.

    Attributes:
        device: the computing device.
        place: where the tensors go; None is decided by `choose`.
        folder: for `CacheLocation.DISK`; None is the system's folder for temporary files.
    """

    device: torch.device
    place: CacheLocation | None = CacheLocation.DEVICE
    folder: Path | None = None

    def store(self, tree: Any) -> Any:
        """A tree with its tensors put where the cache says; on the computing device they are not copied."""
        return tree_map_only(Tensor, self._store, tree)

    def load(self, tree: Any) -> Any:
        """A tree as it was before `store`."""
        return tree_map_only(OffloadedTensor, OffloadedTensor.load, tree)

    def _store(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        tensor, place = tensor.detach(), self.place
        if place is CacheLocation.DEVICE or (place is CacheLocation.CPU and self.device.type == "cpu"):
            whole = tensor.untyped_storage().nbytes() <= tensor.nbytes
            return tensor if whole else tensor.clone()  # a view would keep all of what it is a part of
        dtype = torch.float16 if place is CacheLocation.HALF and tensor.dtype.is_floating_point else tensor.dtype
        like = torch.empty_like(tensor, dtype=dtype, device="meta")  # the order of dimensions in memory is kept
        if place is CacheLocation.DISK:
            flat = _mapped(like.numel(), dtype, self.folder)
        else:
            flat = torch.empty(like.numel(), dtype=dtype)
        held = flat.as_strided(like.shape, like.stride())
        return OffloadedTensor(held.copy_(tensor), tensor.dtype, self.device)

    def choose(self, needs: Mapping[str, MemoryEstimate]) -> str:
        """Decide on a place where none was given: the first that has room for the block that takes most of it.

        Args:
            needs: of each block.

        Returns:
            A line that says what that block needs, and where it gets it.

        Raises:
            NoRoomError: the captured tensors fit nowhere.
        """
        free = self._free()
        places = [CacheLocation.DEVICE, CacheLocation.CPU, CacheLocation.DISK]
        if self.place is None:
            self.place = next((p for p in places if self._largest(needs, p)[1] <= _RESERVE * free[p]), None)
        name, taken = self._largest(needs, self.place or CacheLocation.DISK)
        need = needs[name]
        if self.place is None:
            have = ", ".join(f"{place} {_mib(free[place])}" for place in places)
            message = f"captured inputs and targets of {name} take {_mib(need.captured)}; free: {have}"
            raise NoRoomError(f"{message}; expected fewer calibration images or more room")
        line = f"captured inputs and targets are kept on {self.place} ({_mib(free[self.place])} free): "
        line += f"at most {_mib(need.captured)}, and {_mib(need.working)} to work with, in block {name}"
        return line + ", too little" * (taken > free[self.place])

    def _largest(self, needs: Mapping[str, MemoryEstimate], place: CacheLocation) -> tuple[str, float]:
        """The block that takes most of a place, and the bytes: captured ones, and working ones where it shares them."""
        shared = place is CacheLocation.DEVICE or (self.device.type == "cpu" and place is not CacheLocation.DISK)
        share = 0.5 if place is CacheLocation.HALF else 1.0
        taken = {name: share * need.captured + shared * need.working for name, need in needs.items()}
        return max(taken.items(), key=lambda item: item[1])

    def fall_back(self) -> CacheLocation | None:
        """Leave the GPU that ran out of memory; None where nothing of its memory is captured tensors.

        Never to half precision, which changes the codes; nor from host memory to disk, which frees nothing of a GPU.
        """
        self.place = CacheLocation.CPU if self.place is CacheLocation.DEVICE else None
        return self.place

    def _free(self) -> dict[CacheLocation, int]:
        host, device = free_bytes(torch.device("cpu")), free_bytes(self.device)
        disk = shutil.disk_usage(self.folder or tempfile.gettempdir()).free // local_size()
        return {
            CacheLocation.DEVICE: device,
            CacheLocation.CPU: host,
            CacheLocation.HALF: host,
            CacheLocation.DISK: disk,
        }


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def _mapped(elements: int, dtype: torch.dtype, folder: Path | None) -> Tensor:
    """A tensor in a file that has no name any more: it goes with the tensor, or with the process."""
    try:
        descriptor, path = tempfile.mkstemp(".capture", ".", folder)
        try:
            size = elements * dtype.itemsize
            # Taken now: a disk that is full when a mapped page is written kills the process.
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.truncate(descriptor, size)
            return torch.from_file(path, shared=True, size=elements, dtype=dtype)
        finally:
            os.close(descriptor)
            os.unlink(path)
    except OSError as error:
        raise NoRoomError(
            f"captured tensors of {_mib(elements * dtype.itemsize)} do not fit into {folder or tempfile.gettempdir()} "
            f"({error.strerror})"
        ) from error


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device: a rank's share of the host's, a GPU's with what torch holds of it in reserve."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available) // local_size()
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + idle
