"""Effects of layers on the network's output, against networks that really have one layer quantized; budgets of runs."""

from pathlib import Path

import pytest
import torch
from networks import small_resnet, small_vit
from torch import Tensor, nn
from torch.nn import functional as F

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import SettingError
from logart.quantization import sensitivity
from logart.quantization.clone import clone_sharing
from logart.quantization.folding import fold_batch_norms
from logart.quantization.sensitivity import layer_effects
from logart.quantization.survey import survey

CPU = torch.device("cpu")
MODEL, IMAGES = small_resnet()
COMPENSATED = QuantConfig(rounding="compensated", calib_samples=8)


class Scaled(nn.Module):
    """Two equal branches, of which one counts `factor` times; its logits are small, so that their KL is quadratic."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.factor = nn.Linear(12, 16), factor
        self.loud, self.quiet = nn.Linear(16, 5), nn.Linear(16, 5)
        self.quiet.load_state_dict(self.loud.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        return self.factor * self.loud(x) + self.quiet(x)  # type: ignore[no-any-return]


def floats() -> tuple[nn.Module, list[str]]:
    reference = clone_sharing(MODEL).eval().requires_grad_(False)
    fold_batch_norms(reference, IMAGES[:2].clone(), lambda name: False)
    return reference, survey(reference, IMAGES[:2].clone()).layers


def test_the_effect_is_the_divergence_of_the_network_with_that_layer_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """At many bits, where it is quadratic, with enough probes and images that estimating it is not what is seen."""
    monkeypatch.setattr(sensitivity, "PROBES", 256)
    reference, names = floats()
    images = torch.randn(48, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(1))
    found = layer_effects(reference, names, images, QuantConfig(rounding="nearest"), {}, {}, CPU)
    for name in names:
        # a run of its own, all layers but one float
        config = QuantConfig(rounding="nearest", n_bits=4, skip=[other for other in names if other != name])
        with pytest.warns():
            quantized, _ = quantize_model(MODEL, config, images[:2])
        with torch.no_grad():
            logits = [network(images[24:].clone()).double().log_softmax(1) for network in (quantized, reference)]
        exact = float(F.kl_div(*logits, log_target=True, reduction="batchmean"))
        assert found[name][4] == pytest.approx(exact, rel=0.3), name


def test_a_loud_branch_counts_by_the_square_of_its_factor() -> None:
    images = torch.randn(32, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    effects = layer_effects(Scaled(0.1).requires_grad_(False), ["loud", "quiet"], images, COMPENSATED, {}, {}, CPU)
    for width in (2, 3, 4, 5):
        assert effects["loud"][width] == pytest.approx(0.01 * effects["quiet"][width], rel=1e-4)
    assert effects["quiet"][2] > effects["quiet"][3] > effects["quiet"][4]


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_a_layer_that_the_output_minds_gets_more_bits(rounding: str) -> None:
    images = torch.randn(32, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    config = QuantConfig(rounding=rounding, calib_samples=32, bits_budget=3, layer_bits={"stem": 3})
    _, report = quantize_model(Scaled(8), config, images)
    bits = {layer.name: layer.n_bits for layer in report.layers}
    assert bits["stem"] == 3 and bits["loud"] > bits["quiet"] and bits["loud"] + bits["quiet"] <= 6


def test_effects_are_of_codes_by_the_damping_of_the_run() -> None:
    reference, names = floats()
    found = [
        layer_effects(reference, names, IMAGES, QuantConfig(rounding="compensated", damping=damping), {}, {}, CPU)
        for damping in (0.01, 100.0, "auto")
    ]
    for name in names:
        assert len({effects[name][2] for effects in found}) > 1
    assert found[0] != found[2] != found[1]


def test_the_float_network_is_left_as_it_was() -> None:
    reference, names = floats()
    before, logits = {k: v.clone() for k, v in reference.state_dict().items()}, reference(IMAGES.clone())
    images = IMAGES.clone()
    layer_effects(reference, names, images, COMPENSATED, {}, {}, CPU)
    assert torch.equal(images, IMAGES) and torch.equal(reference(IMAGES.clone()), logits)
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())
    assert not any(m._forward_hooks for m in reference.modules())


@pytest.mark.parametrize("budget", [{"bits_budget": 2.6}, {"size_budget": 800}, {"bits_budget": 8.0}])
def test_a_run_keeps_to_its_budget(budget: dict[str, float], tmp_path: Path) -> None:
    config = QuantConfig(rounding="compensated", calib_samples=8, **budget)  # type: ignore[arg-type]
    quantized, report = quantize_model(MODEL, config, IMAGES)
    weights = {layer.name: torch.Size(layer.shape).numel() for layer in report.layers}
    total = sum(weights.values())
    used = sum(weights[layer.name] * layer.n_bits for layer in report.layers)
    assert report.mean_bits == pytest.approx(used / total)
    if "bits_budget" in budget:
        assert used <= budget["bits_budget"] * total
    else:
        assert sum(-(-weights[layer.name] * layer.n_bits // 8) for layer in report.layers) <= budget["size_budget"]
    assert len(report.bits) > 1 or budget == {"bits_budget": 8.0}
    sizes = save_packed(quantized, tmp_path / "net.safetensors")
    assert dict((name, after) for name, _, after in sizes.parts)["quantized weights"] <= budget.get("size_budget", 1e9)
    assert torch.equal(load_packed(tmp_path / "net.safetensors", model=MODEL)(IMAGES), quantized(IMAGES))
    for layer in report.layers:
        for channel in quantized.get_submodule(layer.name).weight:  # type: ignore[union-attr]
            assert len(channel.unique()) <= 2**layer.n_bits


def test_widths_given_by_name_stand_and_count() -> None:
    settings = {"rounding": "nearest", "search_samples": 16, "first_last_bits": 7, "layer_bits": {"*.down": 6}}
    _, report = quantize_model(MODEL, QuantConfig(bits_budget=3.5, **settings), IMAGES)  # type: ignore[arg-type]
    bits = {layer.name: layer.n_bits for layer in report.layers}
    assert (bits["stem"], bits["head"], bits["blocks.1.down"]) == (7, 7, 6)
    assert report.mean_bits <= 3.5
    weights = {layer.name: torch.Size(layer.shape).numel() for layer in report.layers}
    least = sum(count * (bits[name] if bits[name] > 5 else 2) for name, count in weights.items()) / sum(
        weights.values()
    )
    with pytest.raises(SettingError, match=f"^bits_budget: 2 bits a weight; the least possible is {least:.4g}$"):
        quantize_model(MODEL, QuantConfig(bits_budget=2, **settings), IMAGES)  # type: ignore[arg-type]


def test_a_transformer_with_a_codebook_per_layer() -> None:
    vit, images = small_vit()
    config = QuantConfig(rounding="compensated", calib_samples=8, channel_wise=False, bits_budget=2.5)
    with pytest.warns():
        _, report = quantize_model(vit, config, images, row_groups={"qkv": 3})
    assert report.mean_bits <= 2.5 and len(report.bits) > 1


def test_equal_runs_allocate_equally() -> None:
    config = QuantConfig(rounding="compensated", calib_samples=8, bits_budget=3)
    first, second = (quantize_model(MODEL, config, IMAGES)[1] for _ in range(2))
    assert [layer.n_bits for layer in first.layers] == [layer.n_bits for layer in second.layers]
