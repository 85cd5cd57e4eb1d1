"""quantize_model: the whole way on a small network; what it returns and reports, and that every setting acts."""

from collections import Counter
from typing import Any

import pytest
import torch
from networks import fingerprint, small_resnet
from torch import Tensor, nn

from logart import QuantConfig, Report, quantize_model
from logart.grid import ScaleMethod
from logart.rounding import nearest
from logart.surgery import quantized_layers

BASE: dict[str, Any] = {
    "n_bits": 3,
    "iters": 25,
    "calib_samples": 16,
    "search_samples": 8,
    "batch_size": 8,
    "lr": 0.05,
    "rrweight": 0.5,
}


def run(seed: int = 0, **settings: Any) -> tuple[nn.Module, Report]:
    model, images = small_resnet(seed)
    return quantize_model(model, QuantConfig(**{**BASE, **settings}), images, block_types=["ResidualBlock"])


@pytest.mark.parametrize("search_method", ["tensor_wise", "layer_wise", "block_wise"])
def test_the_report_agrees_with_the_network(search_method: str) -> None:
    seen: dict[str, nn.Module] = {}
    model, images = small_resnet()
    quantized, report = quantize_model(
        model,
        QuantConfig(**BASE, search_method=search_method),  # type: ignore[arg-type]
        images,
        block_types=["ResidualBlock"],
        observe=lambda stage, network: seen.update({stage: network}),
    )
    layers = quantized_layers(quantized)
    assert [layer.name for layer in report.layers] == ["stem", *LAYERS_OF_BLOCKS, "head"] and len(layers) == 7
    assert [layer.block for layer in report.layers] == ["stem", *["blocks.0"] * 2, *["blocks.1"] * 3, "head"]
    assert report.folded == ["bn", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"]
    assert report.skipped == []
    assert [block.name for block in report.blocks] == ["stem", "blocks.0", "blocks.1", "head"]
    assert all(b.error_learned <= b.error_before or b.kept == "before" for b in report.blocks)
    assert report.search_seconds > 0 and report.reconstruction_seconds > 0
    for entry in report.layers:
        layer, w = layers[entry.name], seen["float"].get_submodule(entry.name).weight
        assert isinstance(w, Tensor) and layer.codes is not None and layer.n_base2 is not None
        w = w.detach()
        assert entry.shape == tuple(w.shape) and entry.n_bits == layer.n_bits == 3
        assert entry.base_mix == Counter(layer.n_base2.tolist())
        assert sum(entry.base_mix.values()) == len(w)
        plain = nearest(w.flatten(1), layer.codebook)
        assert entry.moved == int((layer.codes.flatten(1) != plain).sum())
        q = layer.codebook.levels.gather(1, plain.long())
        energy = w.double().square().sum()
        error_nearest = float((q - w.flatten(1)).square().sum() / energy)
        assert entry.error_nearest == pytest.approx(error_nearest, rel=1e-6)
        assert entry.error == pytest.approx(float((layer.weight - w).double().square().sum() / energy), rel=1e-6)
        assert entry.error >= entry.error_nearest * (1 - 1e-6)
    assert sum(entry.moved for entry in report.layers) > 10


LAYERS_OF_BLOCKS = [f"blocks.{name}" for name in ("0.conv1", "0.conv2", "1.conv1", "1.conv2", "1.down")]


def test_stages_are_observed_in_order_and_the_last_is_returned() -> None:
    model, images = small_resnet()
    seen: list[tuple[str, Tensor]] = []
    quantized, _ = quantize_model(
        model,
        QuantConfig(**BASE),
        images,
        block_types=["ResidualBlock"],
        observe=lambda stage, network: seen.append((stage, network(images).detach())),
    )
    assert [stage for stage, _ in seen] == ["float", "searched", "learned"]
    logits = model(images).detach()
    errors = [float((output - logits).square().mean()) for _, output in seen]
    assert errors[0] < 1e-9 < errors[2] < 0.5 * errors[1]
    assert torch.equal(quantized(images), seen[2][1])
    assert not quantized.training


def test_without_iterations_rounding_is_to_nearest() -> None:
    quantized, report = run(iters=0)
    assert report.blocks == [] and report.reconstruction_seconds == 0
    assert all(layer.moved == 0 and layer.error == pytest.approx(layer.error_nearest) for layer in report.layers)
    for layer in quantized_layers(quantized).values():
        assert layer.codes is not None
        assert torch.equal(layer.codes.reshape(layer.n_codebooks, -1), nearest(layer.rows, layer.codebook))


def test_the_result_is_deterministic() -> None:
    assert fingerprint(run()[0]) == fingerprint(run()[0])


CHANGES: list[dict[str, Any]] = [
    {"n_bits": 4},
    {"first_last_bits": 8},
    {"channel_wise": False},
    {"scale_method": "log_2"},
    {"scale_method": "log_sqrt2"},
    {"scale_method": "linear_minmax"},
    {"scale_method": "linear_mse"},
    {"search_method": "layer_wise"},
    {"search_method": "block_wise"},
    {"calib_samples": 12},
    {"batch_size": 4},
    {"iters": 0},
    {"iters": 24},
    {"rrweight": 0.05},
    {"lr": 0.02},
    {"b_start": 10.0},
    {"b_end": 6.0},
    {"warmup": 0.5},
    {"recon_input": "float"},
    {"recon_input": "mixed"},
    {"recon_input": "mixed", "drop_prob": 0.8},
    {"recon_metric": "mae"},
    {"recon_metric": "hessian_perturb"},
    {"recon_metric": "hessian_perturb", "temperature": 1.0},
    {"head_kl": True, "lr": 0.1},
    {"lr": 0.1},
    {"hardware_terms": 2},
    {"hardware_terms": 3},
    {"seed": 1},
]


def test_every_field_changes_the_result() -> None:
    settings = [{}, *CHANGES, {**LW}, {**LW, "search_samples": 4}, {**BW}, {**BW, "seed": 5}]
    settings += [{**BW, "search_batch_size": 3}]
    found = [str(fingerprint(run(**change)[0])) for change in settings]
    same = [(a, b) for i, a in enumerate(settings) for j, b in enumerate(settings) if i < j and found[i] == found[j]]
    assert same == []
    named = {name for change in settings for name in change}
    assert named == set(QuantConfig.__dataclass_fields__)


LW, BW = {"search_method": "layer_wise", "iters": 0}, {"search_method": "block_wise", "iters": 0, "n_bits": 5}


def test_first_and_last_layer_follow_the_order_they_run() -> None:
    quantized, report = run(first_last_bits=6, iters=0)
    bits = {layer.name: layer.n_bits for layer in report.layers}
    assert bits == {**dict.fromkeys(bits, 3), "stem": 6, "head": 6}
    assert {name: layer.codebook.levels.shape[1] for name, layer in quantized_layers(quantized).items()} == {
        name: 2**n for name, n in bits.items()
    }


@pytest.mark.parametrize("search_method", ["tensor_wise", "layer_wise", "block_wise"])
def test_one_codebook_per_layer(search_method: str) -> None:
    quantized, report = run(channel_wise=False, search_method=search_method)
    for name, layer in quantized_layers(quantized).items():
        assert layer.n_codebooks == 1
        assert len(layer.weight.unique()) <= 2**3, name
    assert all(sum(layer.base_mix.values()) == 1 for layer in report.layers)


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("method", list(ScaleMethod))
def test_no_channel_ever_has_more_values_than_its_bits_can_name(method: ScaleMethod, n_bits: int) -> None:
    """With many weights a channel, zeros and tiny ones among them, after learning, for every approximation of √2."""
    torch.manual_seed(n_bits)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(3 * 16, 700), nn.ReLU(), nn.Linear(700, 3))
    for layer in (model[0], model[2], model[4]):
        nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight.flatten(1)[:, ::7] *= 1e-6  # type: ignore[operator]
            layer.weight[1] = 0  # type: ignore[index]
            layer.weight.flatten(1)[0, :2] = torch.tensor([0.0, -0.0])  # type: ignore[operator]
    images = torch.randn(4, 3, 6, 6)
    for terms in (0, 2, 3, 4) if method.spacing.value == "log" else (0,):
        config = QuantConfig(
            n_bits, scale_method=method, hardware_terms=terms, iters=2, calib_samples=4, batch_size=4, lr=0.5
        )
        quantized, _ = quantize_model(model, config, images)
        for name, layer in quantized_layers(quantized).items():
            most = max(len(channel.unique()) for channel in layer.weight)
            assert most <= 2**n_bits, (name, terms)
            assert layer.levels is not None and layer.levels.shape[1] == 2**n_bits
            if name == "4":
                assert most >= min(2 ** (n_bits - 1), 20)  # there were weights for many levels
            assert bool((layer.weight[1] == 0).all())
