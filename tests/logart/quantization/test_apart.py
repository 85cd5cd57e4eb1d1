"""Weights in no one block, used in several or where images are in no rows: rounded through the whole network."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Graph
from torch import Tensor, nn

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import NetworkError
from logart.packed.block_state import load_state, save_state
from logart.quantization.state import StageResult, StageStore, Stored
from logart.quantization.surgery import quantized_layers

IMAGES = torch.randn(64, 4, 12, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest"},
    "layer-wise": {"rounding": "nearest", "search_method": "layer_wise", "search_samples": 40},
    "block-wise": {"rounding": "nearest", "search_method": "block_wise", "search_samples": 40},
    "compensated": {"rounding": "compensated", "calib_samples": 64, "damping": "auto"},
    "learned": {"rounding": "learned", "calib_samples": 64, "iters": 10, "batch_size": 24},
    "both": {"rounding": "both", "calib_samples": 64, "iters": 10, "batch_size": 24},
}


class Mixing(nn.Module):
    """Two linear layers over channels and one, which blocks may share, over positions; [n, 4, 16]."""

    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.a, self.positions, self.b = nn.Linear(16, 16), positions, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.positions(self.a(x).mT).relu().mT)  # type: ignore[no-any-return]


def shared() -> nn.Module:
    """As CoaT: blocks share a layer."""
    positions = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(12, 16), Mixing(positions), Mixing(positions), nn.Flatten(), nn.Linear(64, 5))


def beside_blocks() -> nn.Module:
    """A raw weight of the network itself, which has blocks."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.blocks(torch.relu(m.stem(x) @ m.kernel)).flatten(1))  # type: ignore[no-any-return]

    blocks = nn.Sequential(Mixing(nn.Linear(4, 4)), Mixing(nn.Linear(4, 4)))
    model = Graph(forward, stem=nn.Linear(12, 16), blocks=blocks, head=nn.Linear(64, 5))
    model.kernel = nn.Parameter(torch.randn(16, 16) / 4)
    return model


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x) if batch_first else m.stem(x).transpose(0, 1)
        return m.head(m.layers(x).mean(1 if batch_first else 0))  # type: ignore[no-any-return]

    return Graph(forward, stem=nn.Linear(12, 16), layers=layers, head=nn.Linear(16, 5))


def sequence_first() -> nn.Module:
    return encoder(batch_first=False)


class TimeMajor(nn.Module):
    """A block of rows [4 times, n images] in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = Mixing(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.mixing(x.unflatten(0, (4, -1)).transpose(0, 1)).transpose(0, 1).flatten(0, 1)  # type: ignore[no-any-return]


def time_major() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.blocks(m.stem(x).transpose(0, 1).flatten(0, 1))
        return m.head(x.unflatten(0, (4, -1)).mean(0))  # type: ignore[no-any-return]

    blocks = nn.Sequential(TimeMajor(), TimeMajor())
    return Graph(forward, stem=nn.Linear(12, 16), blocks=blocks, head=nn.Linear(16, 5))


ENCODER = [f"layers.layers.{i}.{name}" for i in (0, 1) for name in (
    "self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")]  # fmt: skip
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "shared": (shared, ["1.positions"]),
    "beside blocks": (beside_blocks, ["kernel"]),
    "sequence first": (sequence_first, ENCODER),
    "time major": (time_major, [f"blocks.{i}.mixing.{name}" for i in (0, 1) for name in ("a", "positions", "b")]),
}


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval()


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_weight_in_no_block_is_rounded_and_named(name: str, how: str, tmp_path: Path) -> None:
    build, apart = NETWORKS[name]
    model = made(build)
    network, report = quantize_model(model, QuantConfig(n_bits=4, **SETTINGS[how]), IMAGES)
    in_rows = how == "nearest" and name in ("sequence first", "time major")  # no images are looked at
    assert list(report.apart) == ([] if in_rows else apart)
    assert report.blind == {} and report.skipped == [] and report.quantized_share == 1
    learns = "iters" in SETTINGS[how]
    assert report.apart_line().startswith("compensated in place of learned: " * learns)
    assert bool(report.blocks) == learns
    assert [layer.name for layer in report.layers] == list(dict.fromkeys(layer.name for layer in report.layers))
    with torch.no_grad():
        wanted = network(IMAGES)
        assert (wanted - model(IMAGES)).norm() < 0.35 * model(IMAGES).norm()
        save_packed(network, tmp_path / "net.safetensors")
        assert torch.equal(load_packed(tmp_path / "net.safetensors", model)(IMAGES), wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_compensated_rounding_is_nearer_to_the_float_network(name: str) -> None:
    """In the mean of some draws: of weights this few a draw alone may be half as good or twice."""
    ratios = []
    for seed in (0, 1000, 2000, 3000):
        model = made(NETWORKS[name][0], seed)
        with torch.no_grad():
            configs = [QuantConfig(n_bits=3, **SETTINGS[how]) for how in ("nearest", "compensated")]
            networks = [quantize_model(model, config, IMAGES)[0] for config in configs]
            nearest, compensated = (float((network(IMAGES) - model(IMAGES)).norm()) for network in networks)
        ratios.append(compensated / nearest)
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.6


def test_moments_are_summed_over_all_uses() -> None:
    """The codes and the bias are those of a layer that is given, as images, what all uses are given."""
    model = made(shared)
    config = QuantConfig(n_bits=3, rounding="compensated", calib_samples=64, skip=["0", "*.a", "*.b", "4"])
    network, report = quantize_model(model, config, IMAGES)
    assert [layer.name for layer in report.layers] == ["1.positions"]
    seen: list[Tensor] = []
    model[1].positions.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))  # type: ignore[index, union-attr, operator]
    with torch.no_grad():
        model(IMAGES)
    rows = torch.cat(seen)
    assert len(rows) == 2 * 64 * 16
    alone = nn.Sequential(model[1].positions)  # type: ignore[index, arg-type]
    expected, _ = quantize_model(alone, QuantConfig(n_bits=3, rounding="compensated", calib_samples=len(rows)), rows)
    ours, theirs = quantized_layers(network)["1.positions"], quantized_layers(expected)["0"]
    assert ours.codes is not None and theirs.codes is not None and torch.equal(ours.codes, theirs.codes)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_sequences_before_images_end_where_images_before_sequences_do() -> None:
    model, turned = made(sequence_first), encoder(batch_first=True).eval()
    turned.load_state_dict(model.state_dict())
    config = QuantConfig(n_bits=3, rounding="compensated", calib_samples=64)
    ours, theirs = (quantized_layers(quantize_model(m, config, IMAGES)[0]) for m in (model, turned))
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert (layer.codes == theirs[name].codes).float().mean() > 0.99  # sums in another order


def test_activations_are_not_quantized_where_images_are_in_no_rows() -> None:
    config = QuantConfig(rounding="compensated", calib_samples=64, n_bits_a=8)
    with pytest.raises(NetworkError, match=r"activations cannot be .*block layers\.layers\.0 has its images elsewhere"):
        quantize_model(made(sequence_first), config, IMAGES)


class Interrupted(Exception):
    pass


class Folder(StageStore):
    """Keeps states, and stops behind some of them."""

    def __init__(self, path: Path, stop_after: int) -> None:
        self.path, self.left, self.restored = path, stop_after, 0

    def _state(self, stage: str, index: int) -> Path:
        return self.path / f"{stage}-{index}"

    def restore(self, stage: str, index: int, own: Mapping[str, Stored]) -> StageResult | None:
        self.restored += self._state(stage, index).exists()
        return load_state(self._state(stage, index), own) if self._state(stage, index).exists() else None

    def save(self, stage: str, index: int, own: Mapping[str, Stored], done: StageResult) -> None:
        save_state(self._state(stage, index), own, done)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


@pytest.mark.parametrize("stop_after", [2, 5, 9])
@pytest.mark.parametrize("how", ["compensated", "learned"])
def test_a_run_resumes_behind_them(how: str, stop_after: int, tmp_path: Path) -> None:
    model, config = made(shared), QuantConfig(n_bits=4, **SETTINGS[how])
    whole = quantize_model(model, config, IMAGES)[0].state_dict()
    with suppress(Interrupted):
        quantize_model(model, config, IMAGES, stage_store=Folder(tmp_path, stop_after))
    store = Folder(tmp_path, 0)
    resumed = quantize_model(model, config, IMAGES, stage_store=store)[0].state_dict()
    assert store.restored > 0
    changed = [name for name, value in whole.items() if not torch.equal(resumed[name], value)]
    assert [name for name in changed if not name.endswith("_extra_state")] == []  # which may leave columns out
