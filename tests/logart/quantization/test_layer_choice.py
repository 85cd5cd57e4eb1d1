"""Which layers are quantized and to how many bits; the share of the weights that was, and what is said about it."""

import warnings
from pathlib import Path

import pytest
import torch
from networks import small_resnet, small_vit
from torch import nn

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import PartlyQuantized, SettingError

MODEL, IMAGES = small_resnet()
WEIGHTS = {name: p.numel() for name, p in MODEL.named_parameters() if p.ndim > 1}


def nearest(**settings: object) -> QuantConfig:
    return QuantConfig(rounding="nearest", **settings)  # type: ignore[arg-type]


def test_bits_of_layers_by_name() -> None:
    config = nearest(n_bits=3, first_last_bits=8, layer_bits={"blocks.1.*": 5, "*.down": 6})
    quantized, report = quantize_model(MODEL, config, IMAGES)
    bits = {layer.name: layer.n_bits for layer in report.layers}
    assert bits == {
        "stem": 8, "blocks.0.conv1": 3, "blocks.0.conv2": 3, "blocks.1.conv1": 5, "blocks.1.conv2": 5,
        "blocks.1.down": 6, "head": 8,
    }  # fmt: skip
    assert report.bits == {3: 2, 5: 2, 6: 1, 8: 2}
    for name, n_bits in bits.items():
        for channel in quantized.get_submodule(name).weight:  # type: ignore[union-attr]
            assert len(channel.unique()) <= 2**n_bits


def test_both_heads_get_the_bits_of_the_ends() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(192, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x.flatten(1)).relu()
            return (self.one(x) + self.two(x)) / 2  # type: ignore[no-any-return]

    _, report = quantize_model(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 192), Two()), nearest(first_last_bits=8), IMAGES
    )
    assert [layer.n_bits for layer in report.layers] == [8, 4, 8, 8]


@pytest.mark.parametrize(
    ("skip", "folded"), [(["stem"], ["bn"]), (["blocks.*"], ["blocks.0.bn1"]), (["head", "*.conv2"], ["blocks.1.bn2"])]
)
@pytest.mark.filterwarnings("ignore::logart.errors.PartlyQuantized")
def test_skipped_layers_stay_as_they_are(skip: list[str], folded: list[str], tmp_path: Path) -> None:
    quantized, report = quantize_model(MODEL, nearest(skip=skip), IMAGES)
    left = {name for name, reason in report.skipped if "skipped by" in reason}
    assert left and left.isdisjoint(layer.name for layer in report.layers)
    for name in left:
        assert torch.equal(quantized.get_submodule(name).weight, MODEL.get_submodule(name).weight)  # type: ignore[arg-type]
    assert {name for name, reason in report.unfolded if "stays as it is" in reason} >= set(folded) - {"head"}
    save_packed(quantized, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", model=MODEL)
    assert torch.equal(loaded(IMAGES), quantized(IMAGES))
    expected = sum(count for name, count in WEIGHTS.items() if name.removesuffix(".weight") not in left)
    assert report.quantized_share == pytest.approx(expected / sum(WEIGHTS.values()))
    assert loaded.packed_info["quantized_share"] == pytest.approx(report.quantized_share, abs=1e-6)  # type: ignore[index]
    assert set(loaded.packed_info["skipped"]) == left  # type: ignore[index, arg-type]


@pytest.mark.parametrize("settings", [{"skip": ["heads"]}, {"layer_bits": {"*.conv3": 4}}, {"skip": ["bn"]}])
def test_a_pattern_without_a_layer_is_an_error(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match="matches no layer that is quantized; they are stem, "):
        quantize_model(MODEL, nearest(**settings), IMAGES)


def test_a_network_of_which_much_stays_float_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PartlyQuantized)
        quantize_model(MODEL, nearest(), IMAGES)
    with pytest.warns(PartlyQuantized, match=r"8\d\.\d\d % of the weights are.* float: blocks.0.conv1 \(skipped"):
        quantize_model(MODEL, nearest(skip=["*0.conv1"]), IMAGES)
    vit, images = small_vit()
    with pytest.warns(PartlyQuantized, match=r"9\d\.\d\d % of the weights .*float: cls_token .*pos_embed"):
        _, report = quantize_model(vit, nearest(), images)
    assert [name for name, _ in report.skipped] == ["cls_token", "pos_embed"]
