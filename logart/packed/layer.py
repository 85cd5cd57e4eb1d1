"""One layer of a packed file: its entry in the metadata, and its tensors: the codes and the codebooks' integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logart.grids.grid import MAX_BITS, MIN_BITS, CodebookSpec
from logart.grids.packing import dequantize_packed, packed_bytes, unpack
from logart.grids.registry import stored_grid
from logart.quantization.layout import Layout

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
CODES = "codes"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ENTRY = ("kind", "shape", "bits", "dtype", "grid", "terms", "layout")
_DEFAULTS = {"dtype": "float32", "terms": 0, "layout": None}  # what an entry need not say


@dataclass(frozen=True)
class PackedLayer:
    """A quantized layer as the file holds it.

    Attributes:
        kind: the class of the module that holds the weight.
        shape: the weight's, output channels first.
        n_bits: of a code.
        dtype: of the weight.
        codes: [bytes] uint8.
        spec: of the codebooks, which share the weight's rows evenly, in order.
        layout: how the module's parameter lies as that weight; None where it is the weight as it is.
    """

    kind: str
    shape: torch.Size
    n_bits: int
    dtype: torch.dtype
    codes: Tensor
    spec: CodebookSpec
    layout: Layout | None = None

    def unpacked(self) -> Tensor:
        """The codes [*shape] uint8."""
        return unpack(self.codes, self.n_bits, self.shape.numel()).reshape(self.shape)

    def weight(self) -> Tensor:
        """The weight that the codes stand for."""
        return dequantize_packed(self.codes, self.spec, self.shape, self.n_bits, self.dtype)

    def n_bytes(self) -> tuple[int, int]:
        """Of the codes and of the codebooks."""
        sizes = {name: tensor.nbytes for name, tensor in self.tensors().items()}
        return sizes.pop(CODES), sum(sizes.values())

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds of the layer: its codes, and by name the integers of its codebooks."""
        return {CODES: self.codes, **{name: _narrowest(column) for name, column in self.spec.columns.items()}}

    def entry(self) -> dict[str, Any]:
        """What the metadata says of the layer, beyond `_DEFAULTS`."""
        dtype = str(self.dtype).removeprefix("torch.")
        layout = None if self.layout is None else [list(self.layout.view), list(self.layout.order)]
        values = (self.kind, list(self.shape), self.n_bits, dtype, self.spec.grid.name, self.spec.terms, layout)
        return {key: value for key, value in zip(_ENTRY, values, strict=True) if value != _DEFAULTS.get(key)}

    @classmethod
    def from_entry(cls, entry: Any, tensors: Mapping[str, Tensor]) -> PackedLayer:
        """The layer of an entry and of the tensors of its name, checked.

        Raises:
            ValueError: an entry that describes no layer, or tensors that are not the layer's.
        """
        if not isinstance(entry, dict) or {*_DEFAULTS, *entry} != set(_ENTRY):
            raise ValueError(f"{entry!r:.80}; expected {', '.join(_ENTRY)}")
        entry = {**_DEFAULTS, **entry}
        kind, shape, n_bits, dtype, grid, terms, layout = (entry[name] for name in _ENTRY)
        if not isinstance(kind, str) or not kind.isidentifier():
            raise ValueError(f"kind {kind!r:.40}")
        if not isinstance(shape, list) or not 2 <= len(shape) <= 8 or not all(_positive(size) for size in shape):
            raise ValueError(f"shape {shape!r:.40}")
        if type(n_bits) is not int or not MIN_BITS <= n_bits <= MAX_BITS:
            raise ValueError(f"bits {n_bits!r:.40}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r:.40}")
        if not isinstance(grid, str):
            raise ValueError(f"grid {grid!r:.40}")
        if type(terms) is not int or terms not in (0, 2, 3, 4):
            raise ValueError(f"terms {terms!r:.40}")
        columns = {name: _widest(name, tensor) for name, tensor in tensors.items() if name != CODES}
        codes, size = tensors.get(CODES), packed_bytes(math.prod(shape), n_bits)
        if codes is None or codes.dtype != torch.uint8 or codes.shape != (size,):
            seen = "none" if codes is None else f"{list(codes.shape)} {codes.dtype}"
            raise ValueError(f"codes: {seen}; expected {size} bytes")
        weight = torch.Size(shape)
        spec = CodebookSpec.checked(stored_grid(grid), columns, terms, weight, n_bits, DTYPES[dtype])
        return cls(kind, weight, n_bits, DTYPES[dtype], codes, spec, _layout(layout, weight))


def _layout(said: Any, shape: torch.Size) -> Layout | None:
    """The layout that an entry says; ValueError where it is none of a weight of this shape."""
    if said is None:
        return None
    try:
        view, order = said
        if sorted(order) == list(range(len(view))) and all(_positive(size) for size in view) and len(view) <= 8:
            for channel_dims in range(1, len(order)):
                layout = Layout(tuple(view), tuple(order), channel_dims)
                if layout.shape == shape:
                    return layout
    except (IndexError, TypeError, ValueError):
        pass
    raise ValueError(f"layout {said!r:.60}")


def _narrowest(column: Tensor) -> Tensor:
    """Integers in the shortest type that holds them all; floats as they are."""
    if column.is_floating_point():
        return column
    low, high = (int(end) for end in column.aminmax())
    return column.to(next(t for t in _INTEGERS if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max))


def _widest(name: str, column: Tensor) -> Tensor:
    if column.dtype not in (*_INTEGERS, torch.float64):
        raise ValueError(f"{name} is {column.dtype}, neither an integer nor float64")
    return column if column.is_floating_point() else column.long()


def _positive(size: Any) -> bool:
    return type(size) is int and 0 < size < 2**40
