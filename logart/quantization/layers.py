"""Parameters read off codebooks: a module whose parameter is quantized is itself, but for where that parameter is read.

Its class becomes a subclass of its own, of the same name, in which the parameter is a property that asks a child of the
module, a `QuantizedWeight`. So whoever reads the parameter, the module's own forward or another's function, gets the
quantized weight, and every padding mode, stride and group works as it does in float. Beside a quantizer of activations
that weight uses it, see `input_quantized`; where a module multiplies quantized activations, its class also runs its
forward on their levels, see `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn

from logart.quantization.activation_quantizer import input_quantizer_of
from logart.quantization.input_quantized import InputQuantized
from logart.quantization.layout import WeightUse
from logart.quantization.products import OnLevels
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.weight_state import PREFIX, layer_name

# Exact types: a subclass may do with its weight what it likes (standardise it, say), and a codebook would be lost.
LAYER_TYPES = (nn.Conv2d, nn.Linear, Conv2dSame, TimmLinear)


class _Quantized:
    """What such a subclass adds: it is made anew where a module is copied or unpickled."""

    _float_type: type[nn.Module]
    _read_off_codes: tuple[str, ...]
    _on_levels: bool

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made = super().__reduce_ex__(protocol)
        return (_blank, (self._float_type, self._read_off_codes, self._on_levels), *made[2:])

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        """What `load_state_dict` calls: a state of float weights is none of a quantized network, strict or not."""
        for name in self._read_off_codes:
            if prefix + name in state and is_quantized(self, name):  # type: ignore[arg-type]
                what = "the state has a float weight; expected that of a quantized network"
                args[-1].append(f"layer {layer_name(prefix.removesuffix('.'), name)}: {what}")
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[misc]


@cache
def _subclass(kind: Any, names: tuple[str, ...], on_levels: bool) -> Any:
    def reading(name: str) -> property:
        def read(module: nn.Module) -> Tensor:
            plain = module._parameters.get(name)  # see `plain_parameters`
            weight = quantized_weight(module, name).weight if plain is None else plain
            quantizer = module._modules.get(input_quantizer_of(name))
            return weight if quantizer is None else InputQuantized.of(weight, quantizer)

        return property(read)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        products = OnLevels(module)
        with products:
            given = kind.forward(module, *args, **kwargs)
        products.check()
        return given

    members: dict[str, Any] = {name: reading(name) for name in names} | ({"forward": forward} if on_levels else {})
    members |= {"_float_type": kind, "_read_off_codes": names, "_on_levels": on_levels, "__module__": kind.__module__}
    return type(kind.__name__, (_Quantized, kind), members)


def _blank(kind: Any, names: tuple[str, ...], on_levels: bool) -> nn.Module:
    made: Any = _subclass(kind, names, on_levels)
    return made.__new__(made)  # type: ignore[no-any-return]


def _become(module: nn.Module, names: tuple[str, ...], on_levels: bool) -> None:
    """Let these parameters of a module be properties; where nothing is left to add, it is of its own class again."""
    kind: Any = getattr(module, "_float_type", type(module))
    module.__class__ = _subclass(kind, names, on_levels) if names or on_levels else kind


def run_on_levels(module: nn.Module) -> Callable[[], None]:
    """Let a module multiply activations on the levels of its quantizers; what is returned takes that back."""
    names: tuple[str, ...] = getattr(module, "_read_off_codes", ())
    _become(module, names, True)
    return partial(_become, module, names, False)


def runs_on_levels(module: nn.Module) -> bool:
    """Whether `run_on_levels` was called with it."""
    return getattr(module, "_on_levels", False)


def quantize_parameter(
    module: nn.Module, name: str, n_bits: int, n_codebooks: int, use: WeightUse | None = None
) -> QuantizedWeight:
    """Let a parameter be read off a codebook from here on; what is returned still holds the float weight.

    Args:
        use: how it is used; without it, as torch's own layers use their weight.
    """
    weight = QuantizedWeight(module, name, n_bits, n_codebooks, use or WeightUse.by_module(module, name))
    read_off(module, name, weight)
    return weight


def read_off(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Let a parameter be read off a quantized weight, which may be that of another module, too."""
    del module._parameters[name]
    _become(module, (*getattr(module, "_read_off_codes", ()), name), runs_on_levels(module))
    module.add_module(PREFIX + name, weight)


def plain_parameters(module: nn.Module) -> None:
    """Make the quantized parameters of a module plain ones again, of the weights that are read now."""
    if not isinstance(module, _Quantized):
        return
    names = [name for name in module._read_off_codes if is_quantized(module, name)]
    weights = [quantized_weight(module, name).weight.detach().clone() for name in names]
    quantizing = tuple(name for name in module._read_off_codes if input_quantizer_of(name) in module._modules)
    _become(module, quantizing, runs_on_levels(module))
    for name in names:
        del module._modules[PREFIX + name]
    plain = {n: nn.Parameter(w, requires_grad=False) for n, w in zip(names, weights, strict=True)}
    module._parameters = {**plain, **module._parameters}


def quantized_weight(module: nn.Module, name: str = "weight") -> QuantizedWeight:
    """What a parameter of a module is read off; AttributeError where it is a plain one."""
    weight = getattr(module, PREFIX + name)
    assert isinstance(weight, QuantizedWeight)
    return weight


def is_quantized(module: nn.Module, name: str = "weight") -> bool:
    """Whether a parameter of a module is read off a codebook."""
    return isinstance(module._modules.get(PREFIX + name), QuantizedWeight)


def is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of a type whose forward is known, its parameters quantized or not."""
    return getattr(module, "_float_type", type(module)) in LAYER_TYPES


def find_parameter(model: nn.Module, layer: str) -> tuple[nn.Module, str]:
    """The module and the name of a parameter there that a layer's name stands for.

    Raises:
        AttributeError: there is none.
    """
    modules = dict(model.named_modules())
    for owner, own in ((layer, "weight"), layer.rpartition(".")[::2]):
        module = modules.get(owner)
        if module is not None and (own in module._parameters or is_quantized(module, own)):
            return module, own
    raise AttributeError(f"{type(model).__name__} has no weight {layer}")


def get_weight(model: nn.Module, layer: str) -> Tensor:
    """The weight of a layer's name as it is read now."""
    module, name = find_parameter(model, layer)
    weight = getattr(module, name)
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def hardware_approximation(model: nn.Module, terms: int) -> Iterator[None]:
    """While the context lasts, the codes of log grids stand for levels whose √2 is a sum of `terms` powers of two."""
    undo: list[Callable[[], None]] = []
    try:
        for weight in (module for module in model.modules() if isinstance(module, QuantizedWeight)):
            undo.append(weight.approximate(terms))
        yield
    finally:
        for restore in undo:
            restore()
