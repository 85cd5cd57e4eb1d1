"""Where the captured inputs and targets of a block live while it is worked on.

On the computing device they are fastest. Elsewhere, every batch that is asked for comes over to it, in its own type:
from host memory or disk with the same bits, from half precision rounded.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from logart.errors import NoRoomError

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
    """A tensor [n, ...] that lives elsewhere than where it is computed with.

    Attributes:
        shape, device: of what indexing by a slice or by indices [B] gives.
    """

    def __init__(self, snapshot: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self._held, self._dtype = snapshot, dtype
        self.device, self.shape = device, snapshot.shape

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, Tensor):
            index = index.to(self._held.device)
        return self._held[index].to(self.device, self._dtype, copy=True)


Captured = Tensor | OffloadedTensor


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

    def empty(self, count: int, batch: Tensor) -> tuple[Tensor, Captured]:
        """Memory for `count` images like those of a batch: to write to, and to read from."""
        shape, place = (count, *batch.shape[1:]), self.place
        if place is CacheLocation.DEVICE or (place is CacheLocation.CPU and self.device.type == "cpu"):
            tensor = torch.empty(shape, dtype=batch.dtype, device=self.device)
            return tensor, tensor
        halved = place is CacheLocation.HALF and batch.dtype.is_floating_point
        dtype = torch.float16 if halved else batch.dtype
        snapshot = (
            _mapped(shape, dtype, self.folder) if place is CacheLocation.DISK else torch.empty(shape, dtype=dtype)
        )
        return snapshot, OffloadedTensor(snapshot, batch.dtype, self.device)

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
        host = int(psutil.virtual_memory().available)
        device = host
        if self.device.type == "cuda":  # what torch holds in reserve is free to it too
            idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            device = torch.cuda.mem_get_info(self.device)[0] + idle
        disk = shutil.disk_usage(self.folder or tempfile.gettempdir()).free
        return {
            CacheLocation.DEVICE: device,
            CacheLocation.CPU: host,
            CacheLocation.HALF: host,
            CacheLocation.DISK: disk,
        }


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """A tensor in a file that has no name any more: it goes with the tensor, or with the process."""
    elements = math.prod(shape)
    try:
        descriptor, path = tempfile.mkstemp(".capture", ".", folder)
        try:
            size = elements * dtype.itemsize
            # Taken now: a disk that is full when a mapped page is written kills the process.
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.truncate(descriptor, size)
            return torch.from_file(path, shared=True, size=elements, dtype=dtype).reshape(shape)
        finally:
            os.close(descriptor)
            os.unlink(path)
    except OSError as error:
        raise NoRoomError(
            f"captured tensors of {_mib(elements * dtype.itemsize)} do not fit into {folder or tempfile.gettempdir()} "
            f"({error.strerror})"
        ) from error
