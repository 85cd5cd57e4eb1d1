"""Changes to a network's structure: replacing layers, and taking that back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from logart.errors import NetworkError
from logart.quantization.folding import replace_module, same_outputs
from logart.quantization.layers import QUANTIZED_TYPES, QuantizedLayer
from logart.quantization.survey import Survey, count_runs


def replace_layers(
    model: nn.Module, bits: dict[str, int], channel_wise: bool, row_groups: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Put a quantized layer, sharing the float weight, in the place of every layer that `bits` names.

    Args:
        bits: bit width of each layer, by name.
        channel_wise: one codebook per output channel, or one per layer.
        row_groups: layers that get several even so, one for each group of rows: how many, by the last part of the
            layer's name. Where the rows cannot be split evenly, the layer gets one.
    """
    for name, n_bits in bits.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        groups = row_groups.get(name.rpartition(".")[2], 1)
        per_layer = groups if weight.shape[0] % groups == 0 else 1
        n_codebooks = weight.shape[0] if channel_wise else per_layer
        replace_layer(model, name, n_bits, n_codebooks)


@torch.no_grad()
def check_replaced(model: nn.Module, example: Tensor, seen: Survey) -> None:
    """Compare a network whose quantized layers still hold their float weights with what `seen` showed of the float one.

    Raises:
        NetworkError: a quantized layer does not run, or the outputs differ.
    """
    ran, output = count_runs(model, lambda module: isinstance(module, QuantizedLayer), example.clone())
    for name in quantized_layers(model):
        if name not in ran:
            raise NetworkError(f"layer {name} is also held elsewhere, in a list for instance, and is run from there")
    if not same_outputs(output, seen.output, seen.eps**0.5):
        raise NetworkError("with quantized layers in place, still of float weights, the network gives other outputs")


def replace_layer(model: nn.Module, name: str, n_bits: int, n_codebooks: int) -> QuantizedLayer:
    """Put a quantized layer, sharing the float weight, in the place of one layer."""
    layer = model.get_submodule(name)
    quantized: QuantizedLayer = QUANTIZED_TYPES[type(layer)].from_float(layer, n_bits, n_codebooks)
    replace_module(model, name, quantized)
    return quantized


def to_float(model: nn.Module) -> nn.Module:
    """A plain network with the quantized weights in place and a plain state dict, for tools that know no codes.

    Args:
        model: as `quantize_model` or `load_packed` gives it; it is not changed.
    """
    plain = copy.deepcopy(model)
    for name, layer in quantized_layers(plain).items():
        replace_module(plain, name, layer.to_float())
    plain.__dict__.pop("packed_info", None)
    return plain


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
