"""A quantized weight as an entry of a state dict, and back."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from logart.grids.grid import CodebookSpec
from logart.grids.registry import stored_grid

PREFIX = "quantized_"  # of a parameter's name, in that of its quantized weight


def layer_name(module: str, parameter: str) -> str:
    """What a weight is called: as its module where it is the `weight` there, else by the parameter's own full name."""
    return module if module and parameter == "weight" else f"{module}.{parameter}".lstrip(".")


def describe(spec: CodebookSpec | None, n_bits: int, dtype: torch.dtype) -> Tensor:
    """What a state dict says beside codes, their width and what the codebooks are made of: JSON as bytes [n] uint8.

    A tensor, as whatever handles state dicts expects of every entry; empty before rounding.
    """
    if spec is None:
        return torch.empty(0, dtype=torch.uint8)
    said = {
        "n_bits": n_bits,
        "n_codebooks": spec.channels,
        "dtype": str(dtype).removeprefix("torch."),
        "grid": spec.grid.name,
        "terms": spec.terms,
        "columns": {name: column.tolist() for name, column in spec.columns.items()},
    }
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def described(said: Any, shape: torch.Size) -> tuple[CodebookSpec, int, torch.dtype] | None:
    """Spec, bits and type from `describe`, checked against the weight's shape; None of a weight before rounding."""
    extra = json.loads(bytes(said.tolist())) if isinstance(said, Tensor) and len(said) else None
    if not isinstance(extra, dict):
        return None
    n_bits, dtype, grid = int(extra["n_bits"]), getattr(torch, extra["dtype"]), stored_grid(extra["grid"])
    columns = {
        name: torch.tensor(column, dtype=torch.float64 if name in grid.floats else torch.int64)
        for name, column in extra["columns"].items()
    }
    return CodebookSpec.checked(grid, columns, int(extra["terms"]), shape, n_bits, dtype), n_bits, dtype


def name_of(prefix: str) -> str:
    """The layer's name, from what a state dict puts before the entries of its weight."""
    module, _, own = prefix.removesuffix(".").rpartition(".")
    return layer_name(module, own.removeprefix(PREFIX))
