"""One layer of a packed file: its entry in the description, its codes and its codebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logart.grid import MAX_BITS, MIN_BITS
from logart.packing import packed_bytes, unpack
from logart.spec import LOG_COLUMNS, CodebookSpec, expand, row_bytes

KINDS = {"Conv2d": 4, "Linear": 2, "Conv2dSame": 4}  # class of the float layer: dimensions of its weight
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
_USUAL = {"dtype": "float32", "terms": 0, "columns": list(LOG_COLUMNS[:2])}  # what an entry need not say


class Flat:
    """A one-dimensional tensor of a file, taken apart from its start."""

    def __init__(self, tensor: Tensor | None, dtype: torch.dtype) -> None:
        if tensor is None or tensor.ndim != 1 or tensor.dtype != dtype:
            seen = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{seen} where there should be one row of {dtype}")
        self._tensor, self._taken = tensor, 0

    @property
    def left(self) -> int:
        """How many elements were not taken yet."""
        return len(self._tensor) - self._taken

    def take(self, count: int) -> Tensor:
        """The next elements, in memory of their own; ValueError where there are fewer."""
        if count > self.left:
            raise ValueError(f"{count} elements, and {self.left} are left")
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
        return expand(self.codes, self.spec, self.shape, self.n_bits, self.dtype)

    @property
    def n_bytes(self) -> tuple[int, int]:
        """Of the codes and of the codebooks."""
        return self.codes.numel(), self.spec.to_bytes().numel()

    def entry(self) -> dict[str, Any]:
        """What the description says of the layer, beside its name."""
        entry = {
            "kind": self.kind,
            "shape": list(self.shape),
            "bits": self.n_bits,
            "codebooks": self.spec.channels,
            "dtype": str(self.dtype).removeprefix("torch."),
            "terms": self.spec.terms,
            "columns": self.spec.stored,
        }
        usual = {**_USUAL, "codebooks": self.shape[0]}
        return {key: value for key, value in entry.items() if usual.get(key) != value}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], codes: Flat, codebooks: Flat) -> PackedLayer:
        """The layer of an entry, checked; its bytes are the next ones of codes and codebooks.

        Raises:
            ValueError: an entry that describes no layer, or bytes that are not there or not the layer's.
        """
        entry = {**_USUAL, **entry}
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
        count = math.prod(shape)
        packed, width = codes.take(packed_bytes(count, n_bits)), row_bytes(columns)
        if count * n_bits % 8 and int(packed[-1]) >> count * n_bits % 8:
            raise ValueError("bits after the last code")
        rows = codebooks.take(channels * width).reshape(channels, width)
        spec = CodebookSpec.from_bytes(rows, columns, terms, n_bits, DTYPES[dtype])
        return cls(kind, torch.Size(shape), n_bits, DTYPES[dtype], packed, spec)


def _positive(size: Any) -> bool:
    return type(size) is int and 0 < size < 2**40
