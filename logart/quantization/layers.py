"""Quantized layers: torch's own Conv2d and Linear whose `weight` is read off a codebook.

A quantized layer is its float layer with one difference: `weight` is a property. The parent's forward reads it and
never knows, so every padding mode, stride and group works as it does in float. What the property gives follows from
what the layer holds: a soft rounding while it learns, the levels of its codes once it is rounded, the float weight
before; in a network that was loaded from a packed file, what its packed codes stand for. The float weight is shared
with the float network, not copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from logart.grids.grid import Codebook
from logart.grids.packing import pack
from logart.grids.plain import stored_spec
from logart.grids.rounding import dequantize, nearest, rectified_sigmoid, soft_neighbours, soft_round
from logart.grids.spec import CodebookSpec, dequantize_packed


class SoftRounding(nn.Module):
    """The α of one layer and what turns them into soft weights (DESIGN section 4)."""

    lower: Tensor
    lo: Tensor
    a: Tensor
    b: Tensor

    def __init__(self, w: Tensor, codebook: Codebook, codes: Tensor | None = None) -> None:
        """Start where the soft weights equal w [G, M], within the codebook's range, or near codes [G, M]."""
        super().__init__()
        lower, lo, a, b, alpha = soft_neighbours(w, codebook, codes)
        self.register_buffer("lower", lower)
        self.register_buffer("lo", lo)
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.alpha = nn.Parameter(alpha)

    def forward(self, beta: float | None = None) -> tuple[Tensor, Tensor]:
        """Soft weights [G, M] and the rounding penalty (0 without `beta`)."""
        return soft_round(self.alpha, self.lo, self.a, self.b, beta)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Where learning ended: the upper neighbour's code where h ≥ 1/2, else the lower one's; [G, M] uint8."""
        return self.lower + (rectified_sigmoid(self.alpha) >= 0.5).to(torch.uint8)


_MEMBERS = ("_parameters", "_buffers", "_modules")  # where a module keeps its tensors


class QuantizedLayer(nn.Module):
    """What QuantConv2d and QuantLinear add to their parents.

    Attributes:
        float_weight: the float parameter, shared with the float network; None once `discard_float_weight` was called.
        codes: uint8, the weight's shape; None before rounding.
        levels: [G, L] float64.
        spec: what the codebooks are made of.
        n_codebooks: G; rows of the weight are split evenly among codebooks, in order.
        shape: the weight's.
        packed_codes: in a loaded network the packed codes [bytes] uint8, in place of codes and levels.
        like: [0]; its type is what the user moved a loaded network to, as torch moves every buffer.
    """

    float_weight: nn.Parameter | None
    codes: Tensor | None
    levels: Tensor | None
    dequantized_weight: Tensor | None
    soft: SoftRounding | None
    soft_weight: Tensor
    packed_codes: Tensor | None
    dtype_marker: Tensor | None
    spec: CodebookSpec | None
    n_codebooks: int
    n_bits: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def from_float(cls, module: nn.Module, n_bits: int, n_codebooks: int) -> QuantizedLayer:
        """The quantized counterpart of `module` that shares its parameters, still holding float weights."""
        layer = copy.copy(module)
        for name, member in vars(module).items():
            if isinstance(member, dict):  # of tensors, and of hooks, which must not run on the float layer
                layer.__dict__[name] = member.copy()
        layer.__class__ = cls
        assert isinstance(layer, QuantizedLayer)
        weight = layer._parameters.pop("weight")
        layer.register_parameter("float_weight", weight)
        for name in ("codes", "levels", "packed_codes"):
            layer.register_buffer(name, None)
        for name in ("dequantized_weight", "dtype_marker"):
            layer.register_buffer(name, None, persistent=False)
        layer.register_module("soft", None)
        layer.n_bits, layer.n_codebooks = n_bits, n_codebooks
        assert weight is not None
        layer.shape, layer.dtype, layer.spec = weight.shape, weight.dtype, None
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight the forward uses now: soft while learning, else rounded, else float."""
        if self.soft is not None:
            return self.soft_weight
        if self.dequantized_weight is not None:
            return self.dequantized_weight
        if self.packed_codes is not None:
            return self._dequantize_packed()
        assert self.float_weight is not None
        return self.float_weight

    @property
    def rows(self) -> Tensor:
        """The float weight as the matrix [G, M] that the core's functions take."""
        assert self.float_weight is not None
        return self.float_weight.detach().reshape(self.n_codebooks, -1)

    @property
    def codebook(self) -> Codebook:
        """The codebook that was set, or that the packed integers make."""
        assert self.spec is not None
        if self.levels is None:
            return self.spec.codebook(self.n_bits, self.dtype)
        return Codebook(self.levels, self.spec.to(self.levels.device))

    def set_codebook(self, codebook: Codebook, codes: Tensor | None = None) -> None:
        """Take a codebook and round to nearest, or take the codes [G, M] given."""
        self.levels, self.spec = codebook.levels, codebook.spec
        self.set_codes(nearest(self.rows, codebook) if codes is None else codes)

    def set_codes(self, codes: Tensor) -> None:
        """Take codes [G, M] uint8 of the codebook already set; ends learning."""
        assert self.levels is not None
        if self.float_weight is not None:
            self.dtype = self.float_weight.dtype  # the module may have been moved to another since
        self.codes = codes.reshape(self.shape)
        self.dequantized_weight = self._dequantize()
        self.soft = None

    def start_learning(self, target: Tensor | None = None) -> SoftRounding:
        """Put soft rounding in place of the codes.

        Args:
            target: the weight's shape. Without it, soft weights start equal to the float ones, within the range; with
                it they start near the codes, free to move to the next level towards the target.
        """
        rows = self.rows
        towards = rows if target is None else target.reshape(rows.shape)
        if towards.dtype.itemsize < 4:  # α and its steps drown in half precision
            towards = towards.float()
        assert target is None or self.codes is not None
        codes = None if target is None or self.codes is None else self.codes.reshape(rows.shape)
        self.soft = SoftRounding(towards, self.codebook, codes)
        self.soft_weight = self.rows.reshape(self.shape)
        return self.soft

    def update_soft_weight(self, beta: float | None) -> Tensor:
        """Compute the soft weights for the next forward; returns their rounding penalty (see `soft_round`)."""
        assert self.soft is not None
        soft, penalty = self.soft(beta)
        self.soft_weight = soft.reshape(self.shape).to(self.rows.dtype)
        return penalty  # type: ignore[no-any-return]

    def finish_learning(self) -> None:
        """Round where learning ended."""
        assert self.soft is not None
        self.set_codes(self.soft.codes())
        del self.soft_weight

    def approximate(self, terms: int) -> Callable[[], None]:
        """Let the codes stand for levels whose √2 has `terms` terms; what is returned takes that back."""
        if self.packed_codes is not None and self.spec is not None:
            snapshot, dequantized_weight = self.spec, self.dequantized_weight is not None
            self.set_packed(self.packed_codes, replace(snapshot, terms=terms), dequantized_weight=dequantized_weight)
            return partial(self.set_packed, self.packed_codes, snapshot, dequantized_weight=dequantized_weight)
        assert self.codes is not None
        codes, exact = self.codes.reshape(self.n_codebooks, -1), self.codebook
        self.set_codebook(exact.with_terms(terms, self.dtype), codes)
        return partial(self.set_codebook, exact, codes)

    def snapshot(self) -> Callable[[], None]:
        """What puts back everything that the layer holds now."""
        kept = {k: v.copy() if k in _MEMBERS else v for k, v in self.__dict__.items()}
        return partial(self.__setstate__, kept)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """What torch moves a module with: levels keep their type, and weights of a new type are read off them anew."""
        exact, before = self.levels, self.dequantized_weight
        super()._apply(fn, recurse)
        if exact is not None and self.levels is not None and self.levels.dtype != exact.dtype:
            self.levels = exact.to(self.levels.device)
        now = self.dequantized_weight
        if before is not None and now is not None and now.dtype != before.dtype:
            self.dequantized_weight = (
                self._dequantize_packed() if self.packed_codes is not None else self._dequantize().to(now.dtype)
            )
        return self

    def _dequantize(self) -> Tensor:
        """The levels that the codes stand for, in the weight's shape and own type."""
        assert self.codes is not None and self.levels is not None
        rows = self.codes.reshape(self.n_codebooks, -1)
        return dequantize(rows, self.levels).to(self.dtype).reshape(self.shape)

    def discard_float_weight(self) -> None:
        """Forget the float weight: from here on the codes are all there is."""
        self.float_weight = None

    def packed(self) -> tuple[Tensor, CodebookSpec]:
        """The codes, packed, and what makes the codebooks.

        Raises:
            ValueError: the layer is not rounded, or was moved to another type since.
        """
        holder = self.dequantized_weight if self.packed_codes is None else self.dtype_marker
        if holder is not None and self.soft is None and holder.dtype != self.dtype:
            message = f"quantized as {self.dtype}, but moved to {holder.dtype} since"
            raise ValueError(f"{message}; expected the network in the type it was quantized in")
        if self.packed_codes is not None and self.spec is not None:
            return self.packed_codes, self.spec
        if self.codes is None or self.soft is not None:
            raise ValueError("the layer is not rounded")
        return pack(self.codes, self.n_bits), stored_spec(self.codebook, self.dtype)

    def set_packed(self, codes: Tensor, spec: CodebookSpec, *, dequantized_weight: bool) -> None:
        """Take packed codes in place of the float weight; expand them once, here, or whenever the weight is read."""
        self.discard_float_weight()
        self.packed_codes, self.spec = codes, spec
        if self.dtype_marker is None:
            self.dtype_marker = torch.empty(0, dtype=self.dtype)
        if dequantized_weight:
            self.dequantized_weight = self._dequantize_packed()

    def _dequantize_packed(self) -> Tensor:
        """The weight that the packed codes stand for, cast to the type that the network was moved to since."""
        assert self.packed_codes is not None and self.spec is not None and self.dtype_marker is not None
        return dequantize_packed(self.packed_codes, self.spec, self.shape, self.n_bits, self.dtype).to(
            self.dtype_marker.dtype
        )


class QuantConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override,misc]
    """A convolution on a codebook; forward is nn.Conv2d's own."""


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[override,misc]
    """A linear layer on a codebook; forward is nn.Linear's own."""


class QuantConv2dSame(QuantizedLayer, Conv2dSame):  # type: ignore[override,misc]
    """timm's TensorFlow-style padded convolution on a codebook; forward is its own."""


# Exact types: a subclass may do with its weight what it likes (standardise it, say), and a codebook would be lost.
QUANTIZED_TYPES: dict[type[nn.Module], Any] = {
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
    Conv2dSame: QuantConv2dSame,
}


@contextmanager
def hardware_approximation(model: nn.Module, terms: int) -> Iterator[None]:
    """While the context lasts, the codes of log grids stand for levels whose √2 is a sum of `terms` powers of two."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    undo: list[Callable[[], None]] = []
    try:
        for layer in layers:
            undo.append(layer.approximate(terms))
        yield
    finally:
        for restore in undo:
            restore()
