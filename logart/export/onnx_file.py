"""What an ONNX export came to: sizes, and how onnxruntime's logits differ from torch's. Needs the extra [onnx]."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import torch
from torch import Tensor

from logart.errors import UserError, one_line
from logart.packed.checkpoint import SizeTable


class OnnxFile(NamedTuple):
    """What was written.

    Attributes:
        sizes: what takes how much.
        difference: the largest difference of a logit to torch's, on noise.
        optimized: the same with onnxruntime's default optimizations, which may put integer kernels behind
            `DequantizeLinear`.
        largest: the largest of torch's logits there.
        opset: of the standard operators.
        ties, values: of activations that a `QuantizeLinear` puts on levels, how many lay exactly between two, and all.
    """

    sizes: SizeTable
    difference: float
    optimized: float
    largest: float
    opset: int
    ties: int
    values: int

    def __str__(self) -> str:
        text = (
            f"{self.sizes}\nlargest difference of a logit to torch: {self.difference:.2g}, with onnxruntime's "
            f"optimizations {self.optimized:.2g} (logits up to {self.largest:.3g}); opset {self.opset}"
        )
        if self.values:
            text += f"\nof {self.values} quantized activations {self.ties} lay exactly between two levels, where torch "
            text += "rounds up and ONNX to even"
        return text


def compare(
    data: bytes, images: Tensor, expected: Tensor, half: bool, tolerance: float, source: str | Path
) -> tuple[float, float]:
    """The largest difference of onnxruntime's logits to torch's, in a batch of another size than traced: of the graph
    as it stands, and as onnxruntime optimizes it.

    Raises:
        UserError: the graph as it stands is off by more than float rounding.
    """
    levels = onnxruntime.GraphOptimizationLevel
    differences, problem = [], "it gives other logits"
    inputs = (images.half() if half else images).numpy()
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.graph_optimization_level = 3, level
        difference = math.inf
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            logits = torch.from_numpy(session.run(None, {"images": inputs})[0]).float()
            if logits.shape == expected.shape:
                difference = float((logits - expected).abs().max())
        except Exception as error:  # onnxruntime's own kinds of error share no base but this
            problem = one_line(error)
        differences.append(difference)
    if not differences[0] <= tolerance * max(1.0, float(expected.abs().max())):
        raise UserError(f"--onnx: {source}: torch's export of the network does not run as it should ({problem:.200})")
    return differences[0], differences[1]
