"""One quantized weight: what a parameter of a module becomes, and what its module reads in its place.

What `weight` gives follows from what is held: a soft rounding while it is learned, the levels of its codes once it is
rounded, the float weight before; in a network that was loaded from a packed file, what the packed codes stand for. The
float weight is shared with the float network, not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from logart.grids.grid import Codebook, CodebookSpec
from logart.grids.packing import dequantize_packed, is_exporting, pack, packed_bytes
from logart.grids.plain import stored_spec
from logart.grids.rounding import dequantize, nearest
from logart.quantization.damping import Damping
from logart.quantization.layout import Layout, WeightUse
from logart.quantization.read_only import ReadOnlyWeight
from logart.quantization.soft_rounding import SoftRounding
from logart.quantization.weight_state import describe, described, name_of

_CODES = ("codes", "levels", "packed_codes")
_MEMBERS = ("_parameters", "_buffers", "_modules")  # where a module keeps its tensors


class QuantizedWeight(nn.Module):
    """A parameter on a codebook.

    Attributes:
        float_weight: the float parameter, shared with the float network; None once `discard_float_weight` was called.
        codes: uint8, the weight's shape; None before rounding.
        levels: [G, L] float64.
        spec: what the codebooks are made of.
        damping: how compensated rounding chose it, where it did.
        n_codebooks: G; rows of the weight are split evenly among codebooks, in order.
        layout: how the parameter is a matrix, channels first.
        shape: the weight's, channels first, as that of its codes.
        parameter_shape: the parameter's.
        groups, n_uses, bias_name: see `WeightUse`.
        packed_codes: in a loaded network the packed codes [bytes] uint8, in place of codes and levels.
        dtype_marker: [0]; its type is what the user moved a loaded network to, as torch moves every buffer.
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
    layout: Layout
    groups: int
    n_uses: int
    bias_name: str | None
    shape: torch.Size
    parameter_shape: torch.Size
    dtype: torch.dtype

    def __init__(self, module: nn.Module, name: str, n_bits: int, n_codebooks: int, use: WeightUse) -> None:
        """Still holding the float weight: the parameter `name` of `module`."""
        super().__init__()
        weight = getattr(module, name)
        self.training = module.training
        self._owner = (module,)  # a tuple: the module is no child of its weight
        self.register_parameter("float_weight", weight)
        for buffer in _CODES:
            self.register_buffer(buffer, None)
        for buffer in ("dequantized_weight", "dtype_marker"):
            self.register_buffer(buffer, None, persistent=False)
        self.register_module("soft", None)
        self.n_bits, self.n_codebooks = n_bits, n_codebooks
        self.layout, self.groups, self.n_uses, self.bias_name = use.layout, use.groups, use.n_uses, use.bias
        self.shape, self.parameter_shape = use.layout.shape, weight.shape
        self.dtype, self.spec, self.damping = weight.dtype, None, None

    @property
    def module(self) -> nn.Module:
        """Whose weight it is."""
        return self._owner[0]

    @property
    def bias(self) -> nn.Parameter | None:
        """What the module adds to the product with the weight, where it can be corrected."""
        return None if self.bias_name is None else self.module._parameters.get(self.bias_name)

    def set_bias(self, bias: Tensor) -> None:
        """Let the module add this; only where it has a place for it (`bias_name`)."""
        assert self.bias_name is not None
        self.module._parameters[self.bias_name] = nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """What the module reads now: soft while learning, else rounded, else float."""
        if self.soft is not None:
            return self.soft_weight
        if self.dequantized_weight is not None:
            return self.dequantized_weight
        if self.packed_codes is not None:
            if is_exporting() and torch.compiler.is_dynamo_compiling():  # what makes codebooks is NumPy
                raise ValueError(
                    'torch.export: a network loaded with dequantize="on-the-fly" makes its codebooks in Python; '
                    'expected strict=False, dequantize="once", or to_float(network)'
                )
            weight = self.dequantize()
            plain = type(weight) is Tensor and not is_exporting() and not torch.compiler.is_compiling()
            return weight.as_subclass(ReadOnlyWeight) if plain else weight
        return self._float_weight

    @property
    def rows(self) -> Tensor:
        """The float weight as the matrix [G, M] that the core's functions take."""
        return self._rows_of(self._float_weight)

    @property
    def current_rows(self) -> Tensor:
        """What the module reads now as that matrix."""
        return self._rows_of(self.weight)

    def _rows_of(self, parameter: Tensor) -> Tensor:
        return self.layout.channels_first(parameter.detach()).reshape(self.n_codebooks, -1)

    def _as_parameter(self, weight: Tensor) -> Tensor:
        return self.layout.as_parameter(weight, self.parameter_shape)

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
        self.dequantized_weight = self.dequantize()
        self.soft = None

    def hold_float(self) -> None:
        """Forget codes and codebook: what is read is the float weight again."""
        self.codes = self.levels = self.dequantized_weight = self.spec = None

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
        self.soft_weight = self._as_parameter(self.rows)
        return self.soft

    def update_soft_weight(self, beta: float | Tensor | None) -> Tensor:
        """Compute the soft weights for the next forward; returns their rounding penalty (see `soft_round`)."""
        assert self.soft is not None
        soft, penalty = self.soft(beta)
        self.soft_weight = self._as_parameter(soft).to(self._float_weight.dtype)
        return penalty  # type: ignore[no-any-return]

    def codes_now(self) -> Tensor:
        """The codes [G, M] held, or those there would be if learning ended now."""
        if self.soft is not None:
            return self.soft.codes()
        assert self.codes is not None
        return self.codes.reshape(self.n_codebooks, -1)

    def harden_soft_weight(self) -> None:
        """While it is learned, let the next forward see what would be read if learning ended now."""
        if self.soft is not None and self.levels is not None:
            self.soft_weight = dequantize(self.soft.codes(), self.levels).to(self.rows.dtype).reshape(self.shape)

    def finish_learning(self) -> None:
        """Round where learning ended."""
        assert self.soft is not None
        self.set_codes(self.soft.codes())
        del self.soft_weight

    def approximate(self, terms: int) -> Callable[[], None]:
        """Let the codes stand for levels whose √2 has `terms` terms; what is returned takes that back."""
        self._check_unwritten()
        if self.packed_codes is not None and self.spec is not None:
            snapshot, dequantized_weight = self.spec, self.dequantized_weight is not None
            self.set_packed(self.packed_codes, replace(snapshot, terms=terms), dequantized_weight=dequantized_weight)
            return partial(self.set_packed, self.packed_codes, snapshot, dequantized_weight=dequantized_weight)
        assert self.codes is not None
        codes, exact = self.codes.reshape(self.n_codebooks, -1), self.codebook
        self.set_codebook(exact.with_terms(terms, self.dtype), codes)
        return partial(self.set_codebook, exact, codes)

    def snapshot(self) -> Callable[[], None]:
        """What puts back everything that is held now, and the bias."""
        kept = {k: v.copy() if k in _MEMBERS else v for k, v in self.__dict__.items()}
        bias = self.bias

        def restore() -> None:
            self.__setstate__(kept)
            if self.bias_name is not None:
                self.module._parameters[self.bias_name] = bias

        return restore

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """What torch moves a module with: levels keep their type, and weights of a new type are read off them anew.

        A weight that was written to stays what it is.
        """
        exact, before = self.levels, self.dequantized_weight
        super()._apply(fn, recurse)
        if exact is not None and self.levels is not None and self.levels.dtype != exact.dtype:
            self.levels = exact.to(self.levels.device)
        now = self.dequantized_weight
        if before is not None and now is not None and now.dtype != before.dtype:
            weight = self.dequantize()
            if torch.equal(before.to(weight), weight.to(before.dtype).to(weight)):
                self.dequantized_weight = weight.to(now.dtype)
        return self

    def dequantize(self) -> Tensor:
        """What the codes stand for, in the parameter's shape; of packed codes in the type it was moved to."""
        if self.packed_codes is not None and self.spec is not None and self.dtype_marker is not None:
            weight = dequantize_packed(self.packed_codes, self.spec, self.shape, self.n_bits, self.dtype)
            return self._as_parameter(weight.to(self.dtype_marker.dtype))
        assert self.codes is not None and self.levels is not None
        rows = self.codes.reshape(self.n_codebooks, -1)
        return self._as_parameter(dequantize(rows, self.levels).to(self.dtype))

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
            self.dequantized_weight = self.dequantize()

    def _check_unwritten(self) -> None:
        """Raise ValueError where the weight in use is not what the codes stand for: someone wrote into it."""
        used = self.dequantized_weight
        if used is None or self.soft is not None:
            return
        if not torch.equal(used, self.dequantize().to(used.dtype)):
            raise ValueError("its weight was written to, which its codes do not say; expected a change of the codes")

    def get_extra_state(self) -> Tensor:
        """What a state dict says beside codes; see `weight_state.describe`."""
        self._check_unwritten()
        return describe(self.spec, self.n_bits, self.dtype)

    def set_extra_state(self, state: Any) -> None:
        """Nothing is left to do: `_load_from_state_dict` took it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """What `load_state_dict` calls: the weight becomes what the state says, of whichever kind that is.

        A state with codes, packed or not, brings their codebooks along; a weight that held its codes packed and was
        read on the fly goes on so. A state that says only a part is an error, strict or not.
        """
        own = {name: state_dict.get(prefix + name) for name in ("float_weight", *_CODES)}
        try:
            if any(value is not None for value in own.values()):
                self._take_state(own, described(state_dict.get(f"{prefix}_extra_state"), self.shape))
            super()._load_from_state_dict(state_dict, prefix, *args)
        except (KeyError, TypeError, ValueError) as error:
            args[-1].append(f"layer {name_of(prefix)}: {error}")  # torch raises all of them as one

    def _take_state(self, own: Mapping[str, Tensor | None], said: tuple[CodebookSpec, int, torch.dtype] | None) -> None:
        """Hold tensors of a state's kinds and shapes, which torch copies over then, and what they stand for."""
        codes, packed = own["codes"], own["packed_codes"]
        if said is None and (codes is not None or packed is not None):
            raise ValueError("the state has codes, but not what their codebooks are made of (_extra_state)")
        if codes is not None and codes.shape != self.shape:
            raise ValueError(f"the state has codes {list(codes.shape)}; expected {list(self.shape)}")
        spec, n_bits, dtype = said or (None, self.n_bits, self.dtype)
        if packed is not None and packed.shape != (packed_bytes(self.shape.numel(), n_bits),):
            raise ValueError(f"the state has {len(packed)} bytes of codes of {n_bits} bits")
        now, device = self.weight.dtype, self.weight.device
        on_the_fly = self.packed_codes is not None and self.dequantized_weight is None
        held = {name: None if value is None else value.to(device, copy=True) for name, value in own.items()}
        weight = held.pop("float_weight")
        self.float_weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        for name, value in held.items():
            setattr(self, name, value)
        self.soft, self.spec, self.n_bits, self.dtype = None, spec, n_bits, dtype
        self.n_codebooks = self.n_codebooks if spec is None else spec.channels
        self.dtype_marker = None if packed is None else torch.empty(0, dtype=now, device=device)
        self.dequantized_weight = None
        if codes is not None or (packed is not None and not on_the_fly):
            self.dequantized_weight = self.dequantize().to(now)
