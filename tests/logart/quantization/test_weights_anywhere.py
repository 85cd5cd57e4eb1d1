"""Weights wherever they are held, used and shared are quantized by every rounding, and come back from a file."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functional_networks import IMAGES, NETWORKS, made
from networks import Graph
from torch import Tensor, nn
from torch.nn import functional as F

from logart import QuantConfig, load_packed, quantize_model, save_packed, to_float
from logart.quantization.layer_report import Report
from logart.quantization.surgery import quantized_layers

ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest"},
    "compensated": {"rounding": "compensated", "calib_samples": 32},
    "learned": {"rounding": "learned", "calib_samples": 32, "iters": 6},
    "block-wise": {"rounding": "nearest", "search_method": "block_wise", "search_samples": 16},
}


def quantized(model: nn.Module, how: str, n_bits: int = 4, **more: Any) -> tuple[nn.Module, Report]:
    return quantize_model(model, QuantConfig(n_bits=n_bits, **ROUNDINGS[how] | more), IMAGES)


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_quantized_and_comes_back_from_a_file(name: str, how: str, tmp_path: Path) -> None:
    model = made(name)
    network, report = quantized(model, how)
    assert [layer.name for layer in report.layers] == NETWORKS[name][1]
    assert report.skipped == [] and report.blind == {} and report.quantized_share == 1
    wanted = network(IMAGES)
    for layer in quantized_layers(network).values():
        for row in layer.current_rows:
            assert len(row.unique()) <= 16
    save_packed(network, tmp_path / "net.safetensors")
    for way in ("once", "on-the-fly"):
        loaded = load_packed(tmp_path / "net.safetensors", model, dequantize=way)
        assert torch.equal(loaded(IMAGES), wanted)
        loaded.load_state_dict(network.state_dict())
        assert torch.equal(loaded(IMAGES), wanted)
    assert torch.equal(copy.deepcopy(network)(IMAGES), wanted)
    plain = to_float(network)
    assert torch.equal(plain(IMAGES), wanted)
    assert set(plain.state_dict()) == {name for name, _ in plain.named_parameters()} >= set(model.state_dict())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "alone"])  # whose inputs are white noise
def test_compensated_rounding_is_nearer_to_the_float_network(name: str) -> None:
    model = made(name)
    errors = [float((quantized(model, how, 3)[0](IMAGES) - model(IMAGES)).norm()) for how in ("nearest", "compensated")]
    assert errors[1] < 0.8 * errors[0]


def test_functional_weights_get_the_codes_of_the_layers_that_do_the_same() -> None:
    """The same network of torch's own layers."""
    model = made("functional")
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 16, 3, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(256, 10, bias=False),
    ).eval()  # fmt: skip
    own = [model.first.weight, model.other.weight, model.kernel, model.head.t()]  # type: ignore[union-attr, operator]
    with torch.no_grad():
        layers[0].bias.copy_(model.first.bias)  # type: ignore[union-attr, arg-type, operator]
        for index, weight in zip((0, 2, 4, 7), own, strict=True):
            layers[index].weight.copy_(weight)  # type: ignore[union-attr, operator, arg-type]
    for measure in ("tensor_wise", "layer_wise"):
        ours, theirs = (quantized(m, "nearest", search_method=measure, search_samples=32)[0] for m in (model, layers))
        for name, index in {"first": "0", "other": "2", "kernel": "4", "head": "7"}.items():
            a, b = quantized_layers(ours)[name].codes, quantized_layers(theirs)[index].codes
            assert a is not None and b is not None and torch.equal(a.flatten(1), b.flatten(1))


def shared_head() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.body(x))
        return torch.cat([m.head(x).flatten(1), m.head(F.avg_pool2d(x, 2)).flatten(1)], 1)

    return Graph(forward, body=nn.Conv2d(3, 8, 3, 2), head=nn.Conv2d(8, 4, 1))


def two_names() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return Graph(lambda m, x: m.b(F.relu(m.a(x))), a=conv, b=conv)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192))
    model[3].weight = model[1].weight
    return model


def repeated() -> nn.Module:
    return Graph(lambda m, x: m.head(m.a(F.relu(m.a(m.a(x)))).flatten(1)), a=nn.Conv2d(3, 3, 1), head=nn.Linear(192, 4))


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("build", [shared_head, two_names, tied, repeated])
def test_a_shared_weight_has_one_codebook_from_all_its_uses(
    build: Callable[[], nn.Module], how: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = build().eval()
    network, report = quantized(model, how)
    assert report.skipped == [] and report.blind == {} and report.quantized_share == 1
    wanted = network(IMAGES)
    for module in network.modules():
        for name in ("weight",):
            if isinstance(module, nn.Linear | nn.Conv2d):
                assert all(len(row.unique()) <= 16 for row in getattr(module, name).flatten(1))
    save_packed(network, tmp_path / "net.safetensors")
    for way in ("once", "on-the-fly"):
        assert torch.equal(load_packed(tmp_path / "net.safetensors", model, dequantize=way)(IMAGES), wanted)
    assert torch.equal(copy.deepcopy(network)(IMAGES), wanted) and torch.equal(to_float(network)(IMAGES), wanted)
