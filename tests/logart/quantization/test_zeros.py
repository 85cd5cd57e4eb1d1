"""Weights that are exactly zero, pruned ones say: how many are no longer is reported, and zero_code keeps all."""

from typing import Any

import pytest
import torch
from networks import small_resnet
from torch import nn
from torch.nn.utils import prune

from logart import QuantConfig, quantize_model
from logart.quantization.layer_report import Report

NEAREST: dict[str, Any] = {"rounding": "nearest"}
FEW: dict[str, Any] = {"calib_samples": 8, "batch_size": 4}
ROUNDINGS = [
    NEAREST,
    {**FEW, "rounding": "compensated"},
    {**FEW, "iters": 20},
    {**FEW, "rounding": "both", "iters": 20},
]


def pruned(how: str) -> tuple[nn.Module, torch.Tensor]:
    model, images = small_resnet(n_images=8)
    for name in ("stem", "blocks.1.conv1", "head"):
        layer = model.get_submodule(name)
        if how == "unstructured":
            prune.l1_unstructured(layer, "weight", 0.5)
        elif how == "channels":
            prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
        else:
            with torch.no_grad():
                layer.weight.flatten(1)[:, 0] = 0.0  # type: ignore[operator]
            continue
        prune.remove(layer, "weight")
    return model, images


@pytest.mark.parametrize("how", ["unstructured", "channels", "a column"])
@pytest.mark.parametrize("settings", ROUNDINGS)
@pytest.mark.parametrize("zero_code", [False, True])
def test_lost_zeros_are_counted(how: str, settings: dict[str, Any], zero_code: bool) -> None:
    model, images = pruned(how)
    quantized, report = quantize_model(model, QuantConfig(n_bits=3, zero_code=zero_code, **settings), images)
    folded = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    zeros = lost = 0
    for layer in report.layers:
        was = folded[layer.name].weight == 0  # folding scales channels, and zeros stay
        now = quantized.get_submodule(layer.name).weight == 0
        assert (layer.zeros, layer.zeros_lost) == (int(was.sum()), int((was & ~now).sum()))  # type: ignore[union-attr]
        zeros, lost = zeros + layer.zeros, lost + layer.zeros_lost
    assert zeros > 0 and f"{lost:,} of {zeros:,} zero weights" in report.zeros_line() or not lost
    if how == "channels":
        assert lost == 0  # a channel of zeros has the codebook {0}
    elif zero_code:
        assert lost == 0
    elif settings is NEAREST:
        assert lost == zeros
    said = quantized.packed_info["layers"]["stem"]  # type: ignore[index, union-attr]
    assert (said["zeros"], said["zeros_lost"]) == (report.layers[0].zeros, report.layers[0].zeros_lost)


def test_a_network_without_zeros_says_nothing() -> None:
    model, images = small_resnet(n_images=8)
    quantized, report = quantize_model(model, QuantConfig(**NEAREST), images)
    assert report.zeros_line() == Report().zeros_line() == ""
    assert "zeros" not in quantized.packed_info["layers"]["stem"]  # type: ignore[index, operator, union-attr]
