"""Quantized layers: torch's own Conv2d and Linear whose `weight` is read off a codebook.

A quantized layer is its float layer with one difference: `weight` is a property. The parent's forward reads it and
never knows, so every padding mode, stride and group works as it does in float. What the property gives follows from
what the layer holds: a soft rounding while it learns, the levels of its codes once it is rounded, the float weight
before; in a network that was loaded from a packed file, what its packed codes stand for. The float weight is shared
with the float network, not copied.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn

from logart.grids.grid import Codebook, CodebookSpec
from logart.grids.packing import dequantize_packed, pack, packed_bytes
from logart.grids.plain import stored_spec
from logart.grids.registry import stored_grid
from logart.grids.rounding import dequantize, nearest, rectified_sigmoid, soft_neighbours, soft_round
from logart.quantization.damping import Damping


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
        damping: how compensated rounding chose it, where it did.
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
    damping: Damping | None
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
        layer.shape, layer.dtype, layer.spec, layer.damping = weight.shape, weight.dtype, None, None
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
        return self._float_weight

    @property
    def rows(self) -> Tensor:
        """The float weight as the matrix [G, M] that the core's functions take."""
        return self._float_weight.detach().reshape(self.n_codebooks, -1)

    @property
    def _float_weight(self) -> nn.Parameter:
        if self.float_weight is None:  # AttributeError: torch.jit.trace asks for every attribute
            raise AttributeError("the float weight was discarded")
        return self.float_weight

    @property
    def codebook(self) -> Codebook:
        """The codebook that was set, or that the packed integers make."""
        if self.spec is None:
            raise AttributeError("the layer has no codebook yet")
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
        self._check_unwritten()
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

    def _check_unwritten(self) -> None:
        """Raise ValueError where the weight in use is not what the codes stand for: someone wrote into it."""
        used = self.dequantized_weight
        if used is None or self.soft is not None:
            return
        meant = self._dequantize() if self.packed_codes is None else self._dequantize_packed()
        if not torch.equal(used, meant.to(used.dtype)):
            raise ValueError("its weight was written to, which its codes do not say; expected a change of the codes")

    def get_extra_state(self) -> Tensor:
        """What a state dict says beside codes, their width and what the codebooks are made of: JSON as bytes [n] uint8.

        A tensor, as whatever handles state dicts expects of every entry; empty before rounding.
        """
        self._check_unwritten()
        if self.spec is None:
            return torch.empty(0, dtype=torch.uint8)
        said = {
            "n_bits": self.n_bits,
            "n_codebooks": self.n_codebooks,
            "dtype": str(self.dtype).removeprefix("torch."),
            "grid": self.spec.grid.name,
            "terms": self.spec.terms,
            "columns": {name: column.tolist() for name, column in self.spec.columns.items()},
        }
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing is left to do: `_load_from_state_dict` took it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """What `load_state_dict` calls: the layer becomes what the state says, of whichever kind that is.

        A state with codes, packed or not, brings their codebooks along; a layer that held its codes packed and read
        its weight on the fly goes on to do so. A state that says only a part is an error, strict or not.
        """
        own = {name: state_dict.get(prefix + name) for name in ("float_weight", "codes", "levels", "packed_codes")}
        try:
            if f"{prefix}weight" in state_dict:
                raise ValueError("the state has a float weight; expected that of a quantized network")
            if any(value is not None for value in own.values()):
                self._take_state(own, state_dict.get(f"{prefix}_extra_state"))
            super()._load_from_state_dict(state_dict, prefix, *args)
        except (KeyError, TypeError, ValueError) as error:
            args[-1].append(f"layer {prefix.removesuffix('.')}: {error}")  # torch raises all of them as one

    def _take_state(self, own: Mapping[str, Tensor | None], said: Tensor | None) -> None:
        """Hold tensors of a state's kinds and shapes, which torch copies over then, and what they stand for."""
        codes, packed = own["codes"], own["packed_codes"]
        extra = json.loads(bytes(said.tolist())) if isinstance(said, Tensor) and len(said) else None
        if (codes is not None or packed is not None) and not isinstance(extra, dict):
            raise ValueError("the state has codes, but not what their codebooks are made of (_extra_state)")
        if codes is not None and codes.shape != self.shape:
            raise ValueError(f"the state has codes {list(codes.shape)}; expected {list(self.shape)}")
        now, device = self.weight.dtype, self.weight.device
        on_the_fly = self.packed_codes is not None and self.dequantized_weight is None
        held = {name: None if value is None else value.to(device, copy=True) for name, value in own.items()}
        spec, n_bits, dtype = None, self.n_bits, self.dtype
        if isinstance(extra, dict):
            n_bits, dtype, grid = int(extra["n_bits"]), getattr(torch, extra["dtype"]), stored_grid(extra["grid"])
            columns = {
                name: torch.tensor(column, dtype=torch.float64 if name in grid.floats else torch.int64)
                for name, column in extra["columns"].items()
            }
            spec = CodebookSpec.checked(grid, columns, int(extra["terms"]), self.shape, n_bits, dtype)
            if packed is not None and packed.shape != (packed_bytes(self.shape.numel(), n_bits),):
                raise ValueError(f"the state has {len(packed)} bytes of codes of {n_bits} bits")
        weight = held.pop("float_weight")
        self.float_weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        for name, value in held.items():
            setattr(self, name, value)
        self.soft, self.spec, self.n_bits, self.dtype = None, spec, n_bits, dtype
        self.n_codebooks = self.n_codebooks if spec is None else spec.channels
        self.dtype_marker = None if packed is None else torch.empty(0, dtype=now, device=device)
        self.dequantized_weight = None
        if codes is not None:
            self.dequantized_weight = self._dequantize().to(now)
        elif packed is not None and not on_the_fly:
            self.dequantized_weight = self._dequantize_packed()

    def to_float(self) -> nn.Module:
        """The float layer of the same type whose weight is the quantized one."""
        plain = next(float_type for float_type, quantized in QUANTIZED_TYPES.items() if type(self) is quantized)
        layer = copy.copy(self)
        for name, member in vars(self).items():
            if isinstance(member, dict):
                layer.__dict__[name] = member.copy()
        layer.__class__ = plain  # type: ignore[assignment]
        for name in ("codes", "levels", "packed_codes", "dequantized_weight", "dtype_marker"):
            del layer._buffers[name]
        layer._non_persistent_buffers_set = set()
        del layer._modules["soft"], layer._parameters["float_weight"]
        for name in ("n_bits", "n_codebooks", "shape", "dtype", "spec"):
            layer.__dict__.pop(name, None)
        weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        layer._parameters = {"weight": weight, **layer._parameters}
        return layer

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


class QuantTimmLinear(QuantizedLayer, TimmLinear):  # type: ignore[override,misc]
    """timm's own linear layer, whose forward differs under TorchScript alone, on a codebook."""


# Exact types: a subclass may do with its weight what it likes (standardise it, say), and a codebook would be lost.
QUANTIZED_TYPES: dict[type[nn.Module], Any] = {
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
    Conv2dSame: QuantConv2dSame,
    TimmLinear: QuantTimmLinear,
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
