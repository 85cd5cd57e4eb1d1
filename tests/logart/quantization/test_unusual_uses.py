"""Weights used in unusual ways: the network answers as a plain one of the same levels does, or it is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Graph
from torch import Tensor, nn
from torch.nn import functional as F

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import NetworkError
from logart.quantization.layer_report import Report
from logart.quantization.layers import find_parameter
from logart.quantization.surgery import quantized_layers

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NEAREST, COMPENSATED = QuantConfig(rounding="nearest"), QuantConfig(rounding="compensated", calib_samples=32)


def rows(x: Tensor) -> Tensor:
    return x.flatten(1)


def tied_embedding() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        words = (rows(x) * 10).long().clamp(0, 19)
        return m.head(torch.relu(m.body(m.table(words).mean(1) + m.stem(rows(x)))))  # type: ignore[no-any-return]

    layers = {"head": nn.Linear(16, 20), "body": nn.Linear(16, 16), "stem": nn.Linear(192, 16)}
    model = Graph(forward, table=nn.Embedding(20, 16), **layers)
    model.head.weight = model.table.weight  # type: ignore[union-attr]
    return model


def there_and_back() -> nn.Module:
    return Graph(lambda m, x: torch.tanh(m.a(rows(x))) @ m.a.weight, a=nn.Linear(192, 16))


def penalty() -> nn.Module:
    return Graph(lambda m, x: m.a(rows(x)) + 0.01 * m.a.weight.square().sum(), a=nn.Linear(192, 5))


def cosine() -> nn.Module:
    return Graph(lambda m, x: F.linear(rows(x), m.a.weight) / m.a.weight.norm(dim=1), a=nn.Linear(192, 5))


def sliced() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cat([F.linear(rows(x), m.a.weight[:4]), F.linear(rows(x), m.a.weight[4:])], 1)

    return Graph(forward, a=nn.Linear(192, 10))


def chunked() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.a.weight.chunk(3)
        return F.linear(rows(x), q) * F.linear(rows(x), k) + F.linear(rows(x), v)

    return Graph(forward, a=nn.Linear(192, 12))


def reshaped() -> nn.Module:
    return Graph(lambda m, x: F.conv2d(x, m.a.weight.view(8, 3, 3, 3)).flatten(1), a=nn.Linear(27, 8))


def detached() -> nn.Module:
    layers = {name: nn.Linear(192, 5) for name in "ab"}
    return Graph(lambda m, x: F.linear(rows(x), m.a.weight.detach()) + F.linear(rows(x), m.b.weight.data), **layers)


def in_place() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(rows(x.mul_(2).relu_())), inplace=True))  # type: ignore[no-any-return]

    return Graph(forward, a=nn.Linear(192, 16), b=nn.Linear(16, 5))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
    model[1].register_forward_hook(lambda _, args, output: output * 3)
    model[3].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    return model


def vmapped() -> nn.Module:
    return Graph(lambda m, x: torch.vmap(lambda row: F.linear(row, m.a.weight, m.a.bias))(rows(x)), a=nn.Linear(192, 4))


@torch.jit.script
def _scripted(x: Tensor, w: Tensor) -> Tensor:
    return torch.relu(torch.matmul(x, w.t()))


def scripted() -> nn.Module:
    return Graph(lambda m, x: m.b(_scripted(rows(x), m.a.weight)), a=nn.Linear(192, 16), b=nn.Linear(16, 5))


def image_by_image() -> nn.Module:
    return Graph(lambda m, x: torch.cat([m.a(row[None]) for row in rows(x)]), a=nn.Linear(192, 4))


def crop_by_crop() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.a(image).mean((1, 2)) for image in x])

    return Graph(forward, a=nn.Conv2d(3, 8, 3))


def bias_elsewhere() -> nn.Module:
    return Graph(lambda m, x: m.a(rows(x)).relu() * m.a.bias, a=nn.Linear(192, 5))


def bias_twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(rows(x)) * F.linear(rows(x), m.b.weight, m.a.bias)  # type: ignore[no-any-return]

    return Graph(forward, a=nn.Linear(192, 5), b=nn.Linear(192, 5))


def bias_of_convolution() -> nn.Module:
    return Graph(lambda m, x: (m.a(x) - m.a.bias[:, None, None]).flatten(1), a=nn.Conv2d(3, 6, 3))


def expanded() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
    model[1].weight = nn.Parameter(torch.randn(16, 1).expand(16, 192))  # type: ignore[union-attr]
    return model


def lstm_cell() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = None
        for row in x.flatten(2).unbind(1):
            state = m.cell(row, state)
        return m.head(state[0])  # type: ignore[no-any-return, index]

    return Graph(forward, cell=nn.LSTMCell(64, 16), head=nn.Linear(16, 5))


def gru() -> nn.Module:
    layers = {"cells": nn.GRU(64, 16, batch_first=True, bidirectional=True), "head": nn.Linear(32, 5)}
    return Graph(lambda m, x: m.head(m.cells(x.flatten(2))[0][:, -1]), **layers)


def lstm() -> nn.Module:
    layers = {"cells": nn.LSTM(64, 16, 2, proj_size=8), "head": nn.Linear(8, 5)}
    return Graph(lambda m, x: m.head(m.cells(x.flatten(2).transpose(0, 1))[0][-1]), **layers)


# Why weights are rounded without data, where they are.
NETWORKS: dict[Callable[[], nn.Module], str] = {
    tied_embedding: "", there_and_back: "in several ways", penalty: "", cosine: "", sliced: "in parts",
    chunked: "in parts", reshaped: "", detached: "", in_place: "", hooked: "", vmapped: "under vmap",
    scripted: "no operation with it was seen", image_by_image: "", crop_by_crop: "", bias_elsewhere: "",
    bias_twice: "", bias_of_convolution: "", expanded: "",
    **dict.fromkeys((lstm_cell, gru, lstm), "inside of a recurrent operation"),
}  # fmt: skip


def quantized(build: Callable[[], nn.Module], config: QuantConfig) -> tuple[nn.Module, nn.Module, Report]:
    torch.manual_seed(0)
    model = build().eval()
    return model, *quantize_model(model, config, IMAGES)


@pytest.mark.parametrize("config", [NEAREST, COMPENSATED], ids=["nearest", "compensated"])
@pytest.mark.parametrize("build", NETWORKS)
def test_it_answers_as_a_plain_network_of_the_same_levels(build: Callable[[], nn.Module], config: QuantConfig) -> None:
    model, network, report = quantized(build, config)
    why = NETWORKS[build]
    assert bool(report.blind) == bool(why) and all(why in reason for reason in report.blind.values())
    assert report.skipped == [] and report.quantized_share == 1
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in quantized_layers(network).items():
            assert layer.codes is not None and layer.levels is not None
            module, own = find_parameter(plain, name)
            levels = layer.levels.gather(1, layer.codes.reshape(len(layer.levels), -1).long())
            getattr(module, own).copy_(layer.layout.as_parameter(levels, layer.parameter_shape))
            if layer.bias_name is not None and layer.bias is not None:
                setattr(module, layer.bias_name, nn.Parameter(layer.bias))
        torch.testing.assert_close(network(IMAGES.clone()), plain(IMAGES.clone()))


@pytest.mark.parametrize("build", [image_by_image, crop_by_crop, bias_elsewhere, bias_twice, bias_of_convolution])
def test_compensation_is_nearer_to_the_float_network(build: Callable[[], nn.Module]) -> None:
    errors = []
    for config in (NEAREST, COMPENSATED):
        model, network, _ = quantized(build, config)
        with torch.no_grad():
            errors.append(float((network(IMAGES) - model(IMAGES)).norm()))
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize("build", [bias_elsewhere, bias_twice, bias_of_convolution])
def test_a_bias_that_is_read_elsewhere_stays(build: Callable[[], nn.Module]) -> None:
    model, network, _ = quantized(build, COMPENSATED)
    assert torch.equal(network.a.bias, model.a.bias)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("build", [image_by_image, crop_by_crop])
def test_block_wise_search_of_operations_for_each_image_is_refused(build: Callable[[], nn.Module]) -> None:
    config = QuantConfig(rounding="nearest", search_method="block_wise", search_samples=8)  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match="^block a, layer a: its weight enters 8 operations for a batch and 2"):
        quantized(build, config)
    quantized(build, QuantConfig(rounding="nearest", search_method="layer_wise", search_samples=8))  # type: ignore[arg-type]


def cached(multiply: Callable[..., Tensor]) -> nn.Module:
    """Keeps what it has made of its weight once."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if not hasattr(m, "kept"):
            m.kept = m.a.weight.clone()
        return multiply(rows(x), m.kept) + m.a(rows(x))  # type: ignore[no-any-return]

    return Graph(forward, a=nn.Linear(192, 5))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("multiply", [F.linear, lambda x, w: x @ w.t(), lambda x, w: torch.einsum("bk,ck->bc", x, w)])
def test_a_copy_of_a_weight_that_a_network_keeps_is_listed(multiply: Callable[..., Tensor], first: bool) -> None:
    model = cached(multiply)
    if first:
        model(IMAGES)
    _, report = quantize_model(model, NEAREST, IMAGES)
    assert list(dict(report.skipped)) == ["kept"] and report.quantized_share == 0.5


def in_a_list() -> nn.Module:
    model = Graph(lambda m, x: F.linear(rows(x), m.held[0]), a=nn.Linear(192, 5))
    model.held = [model.a.weight]  # type: ignore[assignment, union-attr]
    return model


def in_part_in_a_dict() -> nn.Module:
    model = Graph(lambda m, x: F.linear(rows(x), m.held["a"]) + m.a(rows(x)), a=nn.Linear(192, 5))
    model.held = {"a": model.a.weight}  # type: ignore[assignment, union-attr]
    return model


def at_a_second_place() -> nn.Module:
    layer = nn.Linear(192, 5)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.read = layer, [layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            return rows(x) @ self.read[0].t()  # type: ignore[no-any-return]

    return Own()


@pytest.mark.parametrize("build", [in_a_list, in_part_in_a_dict, at_a_second_place])
def test_a_weight_that_is_read_past_the_parameter_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(NetworkError, match="^layer a: . of . operations read its weight as the module's parameter"):
        quantized(build, NEAREST)


@pytest.mark.parametrize("kind", ["quantized", "once", "on-the-fly"])
def test_a_quantized_network_is_quantized_again(kind: str, tmp_path: Path) -> None:
    """Its weights are those that its codes stand for: at the same bits nothing changes, at fewer they are rounded."""
    model, network, _ = quantized(in_place, NEAREST)
    if kind != "quantized":
        save_packed(network, tmp_path / "net.safetensors")
        network = load_packed(tmp_path / "net.safetensors", model, dequantize=kind)
    with torch.no_grad():
        same, fewer = (quantize_model(network, QuantConfig(rounding="nearest", n_bits=n), IMAGES)[0] for n in (4, 2))
        torch.testing.assert_close(same(IMAGES.clone()), network(IMAGES.clone()))
        assert all(len(row.unique()) <= 4 for layer in quantized_layers(fewer).values() for row in layer.current_rows)
