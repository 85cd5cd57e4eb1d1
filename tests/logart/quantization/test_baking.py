"""Weights computed from parameters alone are baked into plain layers; all others are left as they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import Graph, smooth_images
from timm.layers import ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from logart import QuantConfig, load_packed, quantize_model, save_packed

IMAGES = smooth_images(4, 3, 6).float()
CONFIG = QuantConfig(rounding="nearest", n_bits=8)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::logart.errors.PartlyQuantized")


def net(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        out = layer(IMAGES).flatten(1).shape[1]
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(out, 4)).eval()


BAKED: dict[str, Callable[[], nn.Module]] = {
    "standardised": lambda: StdConv2d(3, 8, 3, padding=1, bias=True),
    "standardised, same padding": lambda: StdConv2dSame(3, 8, 3, stride=2),
    "scaled": lambda: ScaledStdConv2d(3, 8, 3, padding=1),
    "weight norm": lambda: weight_norm(nn.Conv2d(3, 8, 3)),
    "spectral norm": lambda: spectral_norm(nn.Conv2d(3, 8, 3)),
    "parametrized weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
    "parametrized orthogonal": lambda: nn.Sequential(nn.Flatten(), parametrizations.orthogonal(nn.Linear(108, 8))),
    "pruned": lambda: prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.5),
}


@pytest.mark.parametrize("name", BAKED)
def test_a_computed_weight_is_quantized(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net(BAKED[name]())
    floats: list[Tensor] = []
    with torch.no_grad():
        network, report = quantize_model(
            model, CONFIG, IMAGES, on_stage_end=lambda stage, m: floats.append(m(IMAGES)) if stage == "float" else None
        )
        assert torch.allclose(floats[0], model(IMAGES), atol=1e-5)
        assert report.quantized_share == 1.0 and len(report.baked) == 1 and report.skipped == []
        save_packed(network, tmp_path / "net.safetensors")
        assert torch.equal(load_packed(tmp_path / "net.safetensors", model)(IMAGES), network(IMAGES))


class Dynamic(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


LEFT: dict[str, Callable[[], nn.Module]] = {
    "a weight of the images": lambda: Dynamic(3, 8, 3),
    "two runs": lambda: Graph(lambda m, x: m.a(m.a(x)), a=weight_norm(nn.Conv2d(3, 3, 3, padding=1))),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_understood_stays_float(name: str) -> None:
    torch.manual_seed(0)
    model = net(LEFT[name]())
    network, report = quantize_model(model, CONFIG, IMAGES)
    assert report.baked == [] and [layer.name for layer in report.layers] == ["3"] and len(report.skipped) == 1
