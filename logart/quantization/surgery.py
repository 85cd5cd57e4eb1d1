"""Changes to a network's structure: replacing layers, and taking that back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from logart.errors import NetworkError
from logart.quantization.activation_quantizer import ActivationQuantizer, input_quantizer_of
from logart.quantization.flow import memory_of
from logart.quantization.folding import same_outputs
from logart.quantization.layers import (
    find_parameter,
    is_quantized,
    plain_parameters,
    quantize_parameter,
    quantized_weight,
    read_off,
)
from logart.quantization.layout import WeightUse
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.survey import Survey
from logart.quantization.watching import Watch
from logart.quantization.weight_state import layer_name


def replace_layers(
    model: nn.Module,
    bits: dict[str, int],
    channel_wise: bool,
    row_groups: Mapping[str, int] = MappingProxyType({}),
    uses: Mapping[str, WeightUse] = MappingProxyType({}),
) -> None:
    """Let every layer that `bits` names read its weight off a codebook; the float weight is shared.

    Args:
        bits: bit width of each layer, by name.
        channel_wise: one codebook per output channel, or one per layer.
        row_groups: layers that get several even so, one for each group of rows: how many, by the last part of the
            layer's name. Where the rows cannot be split evenly, the layer gets one.
        uses: how weights are used, where it is not as torch's own layers use theirs.
    """
    held = holders(model)
    for name, n_bits in bits.items():
        module, own = find_parameter(model, name)
        same = held[memory_of(getattr(module, own))]
        use = uses.get(name, WeightUse.by_module(module, own))
        channels = use.layout.shape[0]
        groups = row_groups.get(name.rpartition(".")[2], 1)
        per_layer = groups if channels % groups == 0 else 1
        weight = quantize_parameter(module, own, n_bits, channels if channel_wise else per_layer, use)
        for other, its in same:
            if (other, its) != (module, own):
                read_off(other, its, weight)


def holders(model: nn.Module) -> dict[Any, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, by `memory_of` it, and what they call it."""
    held: dict[Any, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                held.setdefault(memory_of(parameter), []).append((module, own))
    return held


@torch.no_grad()
def check_replaced(model: nn.Module, example: Tensor, seen: Survey) -> None:
    """Compare a network whose quantized layers still hold their float weights with what `seen` showed of the float one.

    Raises:
        NetworkError: the outputs differ, or a weight is read elsewhere than where it is quantized.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if name not in seen.blind}
    uses: Counter[str] = Counter()
    try:
        for layer in layers.values():
            layer.dequantized_weight = layer.weight.detach().clone()  # told from the float one by its memory
        with Watch({name: layer.weight for name, layer in layers.items()}, lambda name, _: uses.update([name])):
            output = model(example.clone())
    finally:
        for layer in layers.values():
            layer.hold_float()
    if not same_outputs(output, seen.output, seen.eps**0.5):
        raise NetworkError("with quantized layers in place, still of float weights, the network gives other outputs")
    for name, layer in layers.items():
        if uses[name] != layer.n_uses:
            message = f"layer {name}: {uses[name]} of {layer.n_uses} operations read its weight as the module's"
            raise NetworkError(f"{message} parameter, others an attribute or a closure; expected all, or it skipped")


def to_float(model: nn.Module) -> nn.Module:
    """A plain network with the quantized weights in place and a plain state dict, for tools that know no codes.

    Args:
        model: as `quantize_model` or `load_packed` gives it; it is not changed.
    """
    plain = copy.deepcopy(model)
    for module in plain.modules():
        plain_parameters(module)
    plain.__dict__.pop("packed_info", None)
    return plain


def readers(model: nn.Module, weight: QuantizedWeight) -> list[tuple[str, nn.Module, str]]:
    """The modules that read a quantized weight, their names, and the parameter's there."""
    held = [(n, m, own) for n, m in model.named_modules() for own in getattr(m, "_read_off_codes", ())]
    return [(name, module, own) for name, module, own in held if quantized_weight(module, own) is weight]


def input_quantizers(model: nn.Module, layers: Iterable[str]) -> dict[str, ActivationQuantizer]:
    """What quantizes the inputs of these weights where functions use them, by name; one of several readers once."""
    known, found = quantized_layers(model), {}
    for layer in layers:
        name, module, own = readers(model, known[layer])[0]
        quantizer = module._modules.get(input_quantizer_of(own))
        if isinstance(quantizer, ActivationQuantizer):
            found[f"{name}.{input_quantizer_of(own)}".lstrip(".")] = quantizer
    return found


def quantized_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Every quantized weight by its layer's name, in the order of the network's modules; a shared one once."""
    found: dict[int, tuple[str, QuantizedWeight]] = {}
    for name, module in model.named_modules():
        for own in getattr(module, "_read_off_codes", ()):
            if is_quantized(module, own):
                weight = quantized_weight(module, own)
                found.setdefault(id(weight), (layer_name(name, own), weight))
    return dict(found.values())
