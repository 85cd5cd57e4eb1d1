"""A network of every operation that has an integer form, and quantized networks as the integer export sees them."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logart import QuantConfig, quantize_model
from logart.export.hardware import Array, HardwareLevels
from logart.export.integer_graph import IntegerNetwork
from logart.export.integer_trace import trace
from logart.quantization.surgery import quantized_layers

Layers: TypeAlias = dict[str, tuple[HardwareLevels, Array, Tensor | None]]


class Odd(nn.Module):
    """Every operation that has an integer form, in shapes that tell axes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 2), bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, dilation=1, groups=6)
        self.point = nn.Conv2d(6, 4, 1)
        self.relu6, self.drop = nn.ReLU6(), nn.Dropout(0.5)
        self.pool, self.mean = nn.MaxPool2d(3, 2, padding=1), nn.AvgPool2d((2, 3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.first(x))
        y = self.depthwise(x)
        x = F.relu(self.point(self.drop(y + x)))
        x = self.pool(x)
        x = torch.cat([x, F.relu(F.pad(x[:, ::2], (0, 0, 0, 0, 1, 1)) + x)], dim=1)
        x = self.mean(x)
        x = torch.cat([x.mean((2, 3)), torch.flatten(F.adaptive_avg_pool2d(x[:, 1:5], 1), 1)], 1)
        return self.head(x)  # type: ignore[no-any-return]


def built(model: nn.Module, images: Tensor, a_bit: int = 8, **settings: Any) -> tuple[nn.Module, IntegerNetwork]:
    config = QuantConfig(**{"rounding": "nearest", "hardware_terms": 2, **settings})
    network = quantize_model(model.eval(), config, images)[0]
    layers = exported(network)
    return network, IntegerNetwork.calibrate(trace(network, images[:2]), layers, images, a_bit)


def exported(network: nn.Module) -> Layers:
    """Levels, codes and bias of every layer, by name."""
    layers: Layers = {}
    for name, layer in quantized_layers(network).items():
        _, spec = layer.packed()
        assert layer.codes is not None
        bias = None if layer.bias is None else layer.bias.detach().double()
        layers[name] = (HardwareLevels.of(spec, layer.n_bits), layer.codes.numpy(), bias)
    return layers
