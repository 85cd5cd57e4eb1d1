"""Quantized activations: a module that puts a tensor onto the levels of one codebook, held by the layer that reads it.

A quantizer is a child of its layer, and the layer's forward_pre_hook calls it; the hook knows only the module that it
is called with, so that copies, state dicts and traces follow. A weight that other functions use has its quantizer
beside it, and calls it where it is multiplied (`input_quantized`). Until its levels are chosen, a quantizer passes on
what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logart.grids.activations import EvenGrid, code_range, quantize_even, quantize_log
from logart.quantization.weight_state import layer_name

INPUT = "input_quantizer"  # of a layer, by this name; behind a parameter's, of what this is multiplied with
_TENSORS = ("step", "limits", "levels")
_MEMBERS = ("_parameters", "_buffers", "_modules")


class Measured(NamedTuple):
    """How a quantizer does on the calibration images.

    Attributes:
        error: Σ|x - q|^2.4 / Σ|x|^2.4.
        saturated: share of the values beyond the end levels by more than half a step.
    """

    error: float
    saturated: float


class ActivationQuantizer(nn.Module):
    """Puts every element of a tensor on the nearest level.

    Attributes:
        n_bits: of a code.
        after_softmax: the input is softmax's output, which may have a grid of its own.
        n_uses: how often it runs in a forward.
        apart: in no one block, so that its levels are chosen in the whole network.
        step: scalar float32, of an even grid; None on a log grid, and before levels are chosen.
        limits: [2] int32, its least and largest code.
        levels: [2^n] float64, of a log grid.
        measured: on the calibration images, once chosen.
        log_step: while the step is learned, its logarithm to base 2, rounded in every forward where `pow2`.
        mix: while a block is learned with mixed inputs, the probability of a quantized element, and what draws.
    """

    step: Tensor | None
    limits: Tensor | None
    levels: Tensor | None

    def __init__(self, n_bits: int, device: torch.device, *, after_softmax: bool = False) -> None:
        """`device` is where the levels will be."""
        super().__init__()
        self.n_bits, self.after_softmax, self._device = n_bits, after_softmax, device
        self.n_uses, self.apart = 1, False
        self.measured: Measured | None = None
        self.log_step: Tensor | None = None
        self.pow2 = False
        self.mix: tuple[float, torch.Generator] | None = None
        for name in _TENSORS:
            self.register_buffer(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """The levels next to x, in its shape and type."""
        if self.levels is not None:
            q = quantize_log(x, self.levels)
        elif self.limits is not None:
            q = quantize_even(x, self.current_step(), self.limits[0], self.limits[1])
        else:
            return x
        if self.mix is None:
            return q
        share, generator = self.mix
        return torch.where(torch.rand(x.shape, generator=generator, device=x.device) < share, q, x)

    def current_step(self) -> Tensor:
        """The step, differentiable in its logarithm while that is learned."""
        assert self.step is not None
        if self.log_step is None:
            return self.step
        exponent = self.log_step
        if self.pow2:
            exponent = exponent + (exponent.round() - exponent).detach()
        return exponent.exp2()

    @property
    def device(self) -> torch.device:
        """Where the levels are, or will be."""
        return next(iter(self.tensors().values())).device if self.tensors() else self._device

    @property
    def even_grid(self) -> EvenGrid | None:
        """The levels where they are evenly spaced; None on a log grid, and before levels are chosen."""
        if self.step is None or self.limits is None:
            return None
        return EvenGrid(float(self.step), *self.limits.tolist())

    def ends(self) -> tuple[float, float]:
        """Where values saturate: half a step beyond the end levels, on a log grid half its last ratio."""
        grid = self.even_grid
        if grid is not None:
            return (grid.low - 0.5) * grid.step, (grid.high + 0.5) * grid.step
        if self.levels is None:
            return -math.inf, math.inf
        below, top = self.levels[-2:].tolist()
        return -math.inf, top * math.sqrt(top / below)

    def set_even(self, grid: EvenGrid) -> None:
        """Take evenly spaced levels."""
        self.step = torch.tensor(grid.step, dtype=torch.float32, device=self.device)
        self.limits = torch.tensor([grid.low, grid.high], dtype=torch.int32, device=self.device)
        self.levels = None

    def set_log(self, levels: Tensor) -> None:
        """Take the levels [2^n] of a log grid."""
        self.step, self.limits, self.levels = None, None, levels

    def snapshot(self) -> Callable[[], None]:
        """What puts back everything that the quantizer holds now."""
        kept = {k: v.copy() if k in _MEMBERS else v for k, v in self.__dict__.items()}
        return partial(self.__setstate__, kept)

    def tensors(self) -> dict[str, Tensor]:
        """What makes the levels, by name."""
        return {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold what another quantizer's `tensors` gave.

        Raises:
            ValueError: they make no levels.
        """
        _check(tensors)
        device = self.device
        for name in _TENSORS:
            value = tensors.get(name)
            setattr(self, name, None if value is None else value.to(device, copy=True))
        count = len(tensors["levels"]) if self.levels is not None else 1 + int(tensors["limits"].diff())
        self.n_bits = count.bit_length() - 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActivationQuantizer:
        """What torch moves a module with: levels keep their type."""
        before = self.tensors()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """What `load_state_dict` calls: the quantizer gets the levels that the state says, of whichever kind."""
        own = {name: state_dict[prefix + name] for name in _TENSORS if prefix + name in state_dict}
        try:
            if own:
                self.take(own)
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:
            args[-1].append(f"{prefix.removesuffix('.')}: {error}")


def _check(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless these are the tensors of one kind of grid, and make levels."""
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if kinds == {"step": (torch.float32, ()), "limits": (torch.int32, (2,))}:
        low, high = tensors["limits"].tolist()
        ranges = [code_range(n_bits, signed) for n_bits in range(2, 17) for signed in (False, True)]
        if (low, high) in ranges and 0 < float(tensors["step"]) < torch.inf:
            return
    elif set(kinds) == {"levels"} and kinds["levels"][0] == torch.float64 and tensors["levels"].ndim == 1:
        levels = tensors["levels"]
        if len(levels) in [2**n for n in range(2, 9)] and levels.isfinite().all() and (levels.diff() > 0).all():
            return
    raise ValueError(f"{ {name: str(kind) for name, kind in kinds.items()} } make no levels of activations")


def attach(layer: nn.Module, n_bits: int) -> ActivationQuantizer:
    """Let a layer read its input through a quantizer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    quantizer = ActivationQuantizer(n_bits, weight.device).train(layer.training)
    layer.add_module(INPUT, quantizer)
    layer.register_forward_pre_hook(_quantize_input)
    return quantizer


def _quantize_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return layer.input_quantizer(args[0]), *args[1:]


def input_quantizer_of(parameter: str) -> str:
    """What the quantizer of what a module's parameter is multiplied with is called there."""
    return f"{parameter}_{INPUT}"


def quantized_name(quantizer: str) -> str:
    """The layer, or the operand of a product, that a quantizer's name belongs to."""
    module, _, own = quantizer.rpartition(".")
    if own == INPUT:
        return layer_name(module, "weight")
    if own.endswith(f"_{INPUT}"):
        return layer_name(module, own.removesuffix(f"_{INPUT}"))
    return quantizer.removesuffix("_quantizer")


def quantizers(module: nn.Module, prefix: str = "") -> dict[str, ActivationQuantizer]:
    """Every activation quantizer by name; `prefix` is the module's own."""
    return {name: m for name, m in module.named_modules(prefix=prefix) if isinstance(m, ActivationQuantizer)}


def block_quantizers(block: nn.Module, prefix: str = "") -> dict[str, ActivationQuantizer]:
    """Those in a block that no other block has a part in."""
    return {name: quantizer for name, quantizer in quantizers(block, prefix).items() if not quantizer.apart}


@contextmanager
def watching(modules: Sequence[nn.Module], see: Callable[[int, Any], None]) -> Iterator[None]:
    """While the context lasts, `see` is given the index of each of these that runs, and its input."""

    def hook(index: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        see(index, args[0] if args else None)

    handles = [module.register_forward_pre_hook(partial(hook, index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
