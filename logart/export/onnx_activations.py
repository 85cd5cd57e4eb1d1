"""Quantized activations in an ONNX file: a `QuantizeLinear` and a `DequantizeLinear` where a quantizer was.

Runtimes with integer kernels look for these pairs. Both round to nearest; what lies exactly between two levels goes up
in torch and to the even one in ONNX (`count_ties` says how much does). Codes are integers of 8 or 16 bits; of other
widths, values are cut to the range of the levels first. Log grids after softmax stay the operators that they are.
Needs the extra [onnx].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn

from logart.export.onnx_graph import Graph
from logart.grids.activations import quantize_even
from logart.quantization.activation_quantizer import ActivationQuantizer, quantizers, watching

OPSET_INT16 = 21  # the first whose QuantizeLinear gives 16 bits
_DOMAIN, _PLACEHOLDER = "logart.trace", "Quantize"
_TYPES: dict[tuple[bool, bool], tuple[Any, int]] = {
    (True, False): (np.uint8, TensorProto.UINT8),
    (True, True): (np.int8, TensorProto.INT8),
    (False, False): (np.uint16, TensorProto.UINT16),
    (False, True): (np.int16, TensorProto.INT16),
}  # by whether 8 bits are enough, and whether codes have a sign


def even_quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers that get such pairs, by name."""
    return {name: quantizer for name, quantizer in quantizers(network).items() if quantizer.even_grid is not None}


@torch.no_grad()
def count_ties(network: nn.Module, images: Tensor) -> tuple[int, int]:
    """How many of the values that are put on even levels lie exactly between two of them, and how many there are."""
    found = list(even_quantizers(network).values())
    ties = count = 0

    def see(index: int, x: Tensor) -> None:
        nonlocal ties, count
        low, high = found[index].ends()
        scaled = x.float() / found[index].current_step()
        ties += int(((scaled - scaled.floor() == 0.5) & (x > low) & (x < high)).sum())
        count += x.numel()

    with watching(found, see):
        network(images.clone())
    return ties, count


class _Placeholder(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor, name: str, step: float, low: int, high: int) -> Tensor:  # type: ignore[override]
        return quantize_even(x, torch.tensor(step, device=x.device), low, high)

    @staticmethod
    def symbolic(g: Any, x: Any, name: str, step: float, low: int, high: int) -> Any:
        settings = {"layer_s": name, "step_f": step, "low_i": low, "high_i": high}
        return g.op(f"{_DOMAIN}::{_PLACEHOLDER}", x, **settings).setType(x.type())


class _TracedQuantizer(ActivationQuantizer):
    """A quantizer that the exporter writes as one node, which `add_pair` replaces."""

    traced_name: str

    def forward(self, x: Tensor) -> Tensor:
        grid = self.even_grid
        assert grid is not None
        return _Placeholder.apply(x, self.traced_name, *grid)  # type: ignore[no-any-return]


def mark(network: nn.Module) -> None:
    """Let the exporter see the quantizers of a network, which is changed, as single nodes."""
    for name, quantizer in even_quantizers(network).items():
        quantizer.__class__ = _TracedQuantizer
        quantizer.traced_name = name.removesuffix("_quantizer")  # type: ignore[assignment]


def is_marked(node: Any) -> bool:
    """Whether an ONNX node is one that `mark` made."""
    return bool(node.domain == _DOMAIN and node.op_type == _PLACEHOLDER)


def add_pair(graph: Graph, node: Any, to: int) -> None:
    """Add what stands for a marked node, whose tensors are of type `to`."""
    values = {a.name: a.s.decode() if a.name == "layer" else a.f if a.name == "step" else a.i for a in node.attribute}
    name, step, low, high = values["layer"], np.float32(values["step"]), values["low"], values["high"]
    dtype, kind = _TYPES[high - low < 256, low < 0]
    x = node.input[0] if to == TensorProto.FLOAT else graph.cast(node.input[0], TensorProto.FLOAT)
    if (low, high) != (np.iinfo(dtype).min, np.iinfo(dtype).max):
        ends = (graph.constant(np.float32(end * step), np.float32) for end in (low, high))
        x = graph.node("Clip", x, *ends, name=f"{name}.clip")
    scale = graph.constant(step, np.float32, f"network.{name}.scale")
    zero = graph.integers(np.zeros(()), kind, f"network.{name}.zero_point")
    codes = graph.node("QuantizeLinear", x, scale, zero, name=f"{name}.quantize")
    half = to != TensorProto.FLOAT
    output = None if half else node.output[0]
    y = graph.node("DequantizeLinear", codes, scale, zero, output=output, name=f"{name}.dequantize")
    if half:
        graph.node("Cast", y, output=node.output[0], to=to)
