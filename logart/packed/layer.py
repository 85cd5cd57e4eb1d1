"""One layer of a packed file: its entry in the description, its codes and its codebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logart.grids.grid import MAX_BITS, MIN_BITS
from logart.grids.packing import unpack
from logart.grids.spec import CodebookSpec, Ranges, dequantize_packed, row_bits

KINDS = {"Conv2d": 4, "Linear": 2, "Conv2dSame": 4}  # class of the float layer: dimensions of its weight
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
_DEFAULTS = {"dtype": "float32", "terms": 0}  # what an entry need not say


class ByteReader:
    """A file's bytes [n] uint8, taken apart from their start."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._taken = tensor, 0

    @property
    def left(self) -> int:
        """How many bytes were not taken yet."""
        return len(self._tensor) - self._taken

    def peek(self, most: int) -> Tensor:
        """The next bytes, at most so many, which stay to be taken."""
        return self._tensor[self._taken :][:most]

    def take(self, count: int) -> Tensor:
        """The next bytes, in memory of their own; ValueError where there are fewer."""
        if count > self.left:
            raise ValueError(f"{count} bytes, and {self.left} are left")
        self._taken += count
        return self._tensor[self._taken - count : self._taken].clone()


@dataclass(frozen=True)
class PackedLayer:
    """A quantized layer as the file holds it.

    Attributes:
        kind: the class of the float layer, one of `KINDS`.
        shape: the weight's.
        n_bits: of a code.
        dtype: of the weight.
        codes: [bytes] uint8.
        spec: of the codebooks, which share the weight's rows evenly, in order.
    """

    kind: str
    shape: torch.Size
    n_bits: int
    dtype: torch.dtype
    codes: Tensor
    spec: CodebookSpec

    def unpacked(self) -> Tensor:
        """The codes [*shape] uint8."""
        return unpack(self.codes, self.n_bits, self.shape.numel()).reshape(self.shape)

    def weight(self) -> Tensor:
        """The weight that the codes stand for."""
        return dequantize_packed(self.codes, self.spec, self.shape, self.n_bits, self.dtype)

    def n_bytes(self, ranges: Ranges) -> tuple[int, int]:
        """Of the codes and of the codebooks, in a file of these ranges."""
        return self.codes.numel(), self.spec.to_bytes(ranges).numel()

    def entry(self, ranges: Ranges) -> dict[str, Any]:
        """What the description says of the layer, beside its name; None is what is usual."""
        entry = {
            "kind": self.kind,
            "shape": list(self.shape),
            "bits": self.n_bits,
            "codebooks": self.spec.channels,
            "dtype": str(self.dtype).removeprefix("torch."),
            "terms": self.spec.terms,
            "columns": self.spec.stored(ranges),
        }
        usual = {**_DEFAULTS, "codebooks": self.shape[0], "columns": list(ranges)}
        return {key: None if usual.get(key) == value else value for key, value in entry.items()}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], ranges: Ranges, data: ByteReader) -> PackedLayer:
        """The layer of an entry, checked; the next bytes are its codes, and those of its codebooks follow.

        Raises:
            ValueError: an entry that describes no layer, or bytes that are not there or not the layer's.
        """
        said = {key: value for key, value in entry.items() if value is not None}
        entry = {**_DEFAULTS, "columns": list(ranges), **said}
        kind, shape, n_bits = entry.get("kind"), entry.get("shape"), entry.get("bits")
        dtype, terms, columns = entry.get("dtype"), entry.get("terms"), entry.get("columns")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"kind {kind!r:.40}")
        if not isinstance(shape, list) or len(shape) != KINDS[kind] or not all(_positive(size) for size in shape):
            raise ValueError(f"shape {shape!r:.40}")
        if type(n_bits) is not int or not MIN_BITS <= n_bits <= MAX_BITS:
            raise ValueError(f"bits {n_bits!r:.40}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r:.40}")
        if type(terms) is not int or terms not in (0, 2, 3, 4):
            raise ValueError(f"terms {terms!r:.40}")
        if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
            raise ValueError(f"columns {columns!r:.40}")
        channels: Any = entry.get("codebooks", shape[0])
        if not _positive(channels) or shape[0] % channels:
            raise ValueError(f"{channels!r:.40} codebooks for {shape[0]} rows")
        codes = _take_bits(data, math.prod(shape) * n_bits, "code")
        rows = _take_bits(data, channels * row_bits(columns, ranges), "codebook")
        spec = CodebookSpec.from_bytes(rows, channels, columns, ranges, terms, n_bits, DTYPES[dtype])
        return cls(kind, torch.Size(shape), n_bits, DTYPES[dtype], codes, spec)


def _take_bits(data: ByteReader, count: int, what: str) -> Tensor:
    taken = data.take(-(-count // 8))
    if count % 8 and int(taken[-1]) >> count % 8:
        raise ValueError(f"bits after the last {what}")
    return taken


def _positive(size: Any) -> bool:
    return type(size) is int and 0 < size < 2**40
