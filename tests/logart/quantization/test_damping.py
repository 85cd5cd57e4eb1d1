"""Damping chosen on images kept back: against a plain computation, and by a third set of images."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from logart.grids.grid import Codebook
from logart.grids.measures import OutputMoments
from logart.grids.registry import grid_named
from logart.grids.rounding import dequantize
from logart.grids.search import choose_codebook
from logart.packed.block_state import load_state, save_state
from logart.quantization.clone import clone_sharing
from logart.quantization.column_rounding import Factor, error_feedback
from logart.quantization.config import QuantConfig
from logart.quantization.damping import CHANNELS, RIDGE_FLOOR, SHARES, choose_damping
from logart.quantization.layer_report import LayerReport, Report
from logart.quantization.pipeline import quantize_model
from logart.quantization.state import StageResult
from logart.quantization.surgery import quantized_layers

INPUTS = 24
search = partial(choose_codebook, grid=grid_named("dynamic"), n_bits=3)


def rows(count: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """X and X̂ [groups, n, K]: inputs that share directions, and what a prefix made of them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mix = torch.randn(groups, 6, INPUTS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = draw(groups, count, 6) @ mix + 0.3 * draw(groups, count, INPUTS) + 1
    return x, x + 0.5 * draw(groups, count, INPUTS)


def moments(x: Tensor, x_hat: Tensor, w: Tensor) -> OutputMoments:
    found = OutputMoments.zeros(len(x), len(w), INPUTS, x.device)
    found.add(x_hat, (x - x_hat) @ w.unflatten(0, (len(x), -1)).mT)
    return found.centred()


def weights(channels: int) -> Tensor:
    return torch.randn(channels, INPUTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def plain_codes(x: Tensor, x_hat: Tensor, w: Tensor, share: float, codebook: Codebook, order: Tensor) -> Tensor:
    """Rounded weights [C, K] of one group, A and T as DESIGN section 4 has them, columns in an order [K]."""
    mean = x_hat.mean(0)
    x, x_hat = x - x.mean(0), x_hat - mean
    gram = x_hat.T @ x_hat
    strength = share * gram.diagonal().mean() + RIDGE_FLOOR * len(x) * (1 + mean.square().mean())
    a = gram + strength * torch.eye(INPUTS, dtype=torch.float64)
    t = torch.linalg.solve(a, x_hat.T @ (x @ w.T) + strength * w.T).T
    back = order.flip(0)
    factor = Factor(order[None], torch.linalg.cholesky(a[back][:, back])[None])
    return dequantize(error_feedback(t, factor, codebook), codebook.levels)


def downhill(errors: list[float], start: int) -> int:
    """Where a walk to the left ends, or to the right if there is no better to the left."""
    left = right = start
    while left > 0 and errors[left - 1] < errors[left]:
        left -= 1
    while right + 1 < len(errors) and errors[right + 1] < errors[right]:
        right += 1
    return right if left == start else left


def plain_error(x: Tensor, x_hat: Tensor, w: Tensor, q: Tensor) -> float:
    """‖Xw - X̂q‖² about the means."""
    difference = x @ w.T - x_hat @ q.T
    return float((difference - difference.mean(0)).square().sum())


@pytest.mark.parametrize(
    ("groups", "count", "start"), [(1, 40, 1.0), (1, 6, 10.0), (1, 400, 0.3), (2, 60, 1.0), (3, 4000, 0.3)]
)
def test_the_choice_is_that_of_a_plain_computation(groups: int, count: int, start: float) -> None:
    w = weights(4 * groups)
    halves = [rows(count, groups, seed) for seed in (1, 2)]
    found, damping = choose_damping(w, tuple(moments(*half, w) for half in halves), search)  # type: ignore[arg-type]
    codebook = search(w)
    table = torch.zeros(len(SHARES), groups, 2, dtype=torch.float64)  # seen and unseen
    order = torch.stack([x_hat.var(1) for _, x_hat in halves]).sum(0).argsort(dim=1, descending=True)
    for i, share in enumerate(SHARES):
        for g in range(groups):
            own = torch.arange(4 * g, 4 * g + 4)
            for fit, other in (halves, halves[::-1]):
                q = plain_codes(fit[0][g], fit[1][g], w[own], share, codebook.select(own), order[g])
                for which, half in enumerate((fit, other)):
                    table[i, g, which] += plain_error(half[0][g], half[1][g], w[own], q)
    best = torch.tensor([downhill(table[:, g, 1].tolist(), SHARES.index(start)) for g in range(groups)])
    assert found.tolist() == [SHARES[i] for i in best]
    variance = 0.0
    for _, x_hat in halves:
        outputs = x_hat @ w.unflatten(0, (groups, -1)).mT
        variance += float((outputs - outputs.mean(1, keepdim=True)).square().sum())
    expected = [float(table[best, torch.arange(groups), which].sum()) / variance for which in (0, 1)]
    assert [damping.error_seen, damping.error_unseen] == pytest.approx(expected, rel=1e-9)
    assert damping.share == float(found.median())


def test_few_rows_are_damped_more_and_do_better_on_a_third_set() -> None:
    w = weights(8)
    third = [x[0] for x in rows(4000, 1, 3)]
    chosen, errors = [], []
    for count in (6, 3000):
        halves = [rows(count, 1, seed) for seed in (1, 2)]
        share, damping = choose_damping(w, tuple(moments(*half, w) for half in halves), search)  # type: ignore[arg-type]
        both = [torch.cat([halves[0][i][0], halves[1][i][0]]) for i in (0, 1)]
        order = both[1].var(0).argsort(descending=True)
        rounded = [plain_codes(both[0], both[1], w, value, search(w), order) for value in (float(share), 0.01)]
        chosen.append(float(share))
        errors.append([plain_error(third[0], third[1], w, q) for q in rounded])
        assert damping.error_unseen > damping.error_seen
    assert chosen[0] > chosen[1]
    assert errors[0][0] < 0.95 * errors[0][1] and errors[1][0] < 1.05 * errors[1][1]


def test_no_more_channels_take_part_than_needed() -> None:
    seen: list[int] = []

    def watched(w: Tensor) -> Codebook:
        seen.append(len(w))
        return search(w)

    w = weights(3 * CHANNELS)
    halves = tuple(moments(*rows(50, 1, seed), w) for seed in (1, 2))
    choose_damping(w, halves, watched)  # type: ignore[arg-type]
    assert seen == [CHANNELS]


def test_inputs_of_one_half_alone_are_no_error() -> None:
    """Their products about a shift that is far away leave nothing of them but rounding errors, below zero as well."""
    x = rows(500, 40, 1)[0].float()
    silent = torch.zeros_like(x)
    w = torch.randn(40, INPUTS, generator=torch.Generator().manual_seed(5))
    halves = []
    for each in (x, silent):
        half = OutputMoments.zeros(40, 40, INPUTS, x.device)
        half.shift = x.mean(1)
        half.add(each, torch.zeros(40, 500, 1))
        halves.append(half)
    assert (halves[1].centred().gram.diagonal(dim1=1, dim2=2) < 0).any()
    shares, damping = choose_damping(w, (halves[0], halves[1]), search)
    assert len(shares) == 40 and all(share in SHARES for share in shares.tolist())
    assert math.isfinite(damping.error_seen) and math.isfinite(damping.error_unseen)


def test_damping_that_float32_is_too_coarse_for_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logart.quantization.damping.SHARES", (1.0, 1e-12))
    x = torch.rand(1, 500, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, INPUTS)
    half = OutputMoments.zeros(1, 4, INPUTS, x.device)
    half.add(x, torch.zeros(1, 500, 4))
    shares, _ = choose_damping(weights(4).float(), (half, half), search)
    assert shares.tolist() == [1.0]


# ---------------------------------------------------------------- in a network


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    return nn.Sequential(*layers).eval().requires_grad_(False)


def images() -> Tensor:
    return torch.rand(10, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def config(**settings: object) -> QuantConfig:
    return QuantConfig(**{"n_bits": 3, "rounding": "compensated", "calib_samples": 10, "batch_size": 4} | settings)  # type: ignore[arg-type]


def test_the_report_says_what_was_chosen() -> None:
    _, report = quantize_model(network(), config(damping="auto"), images())
    report_of = {layer.name: layer.damping for layer in report.layers}
    for layer in report.layers:
        assert layer.damping in SHARES
        assert layer.output_error_calibration is not None and layer.output_error_held_out is not None
        assert 0 < layer.output_error_calibration < layer.output_error_held_out < 1
    assert all(entry["damping"] == float(f"{report_of[name]:.4g}") for name, entry in report.as_dict().items())
    _, report = quantize_model(network(), config(damping=0.1), images())
    assert all(layer.damping is None for layer in report.layers) and report.gap_line() == ""
    assert all("damping" not in entry for entry in report.as_dict().values())


def test_a_gap_is_named() -> None:
    errors = {"first": (0.1, 0.15), "second": (0.01, 0.03), "third": (0.01, 0.05), "fixed": (None, None)}
    layers = [
        LayerReport(name, (1, 1), 4, name, {}, 0.0, 0.0, 0, (), 1.0, seen, unseen)
        for name, (seen, unseen) in errors.items()
    ]
    assert Report(layers).gap_line() == (
        "output error of 2 of 4 layers more than doubles on images kept back, most of third, 0.01 to 0.05; "
        "more calibration images would help"
    )
    assert Report(layers[:1]).gap_line() == ""


def test_mirror_images_are_images() -> None:
    """And each stands beside its own, so that both are in the same half."""
    model, x = network(), images()
    both = torch.stack([x, x.flip(3)], 1).flatten(0, 1)
    mirrored, _ = quantize_model(model, config(damping="auto", mirror=True), x)
    given, _ = quantize_model(model, config(damping="auto", calib_samples=20), both)
    plain, _ = quantize_model(model, config(damping="auto"), x)
    codes = lambda model: torch.cat([layer.codes.flatten() for layer in quantized_layers(model).values()])  # type: ignore[union-attr]  # noqa: E731
    assert torch.equal(codes(mirrored), codes(given)) and not torch.equal(codes(mirrored), codes(plain))


def test_crops_are_images_that_stay_beside_their_own() -> None:
    """Given with their image, in the same half; with mirror images each is seen twice."""
    model, x = network(), images()
    cropped, _ = quantize_model(model, config(damping="auto", calib_samples=5, crops=1), x)
    given, _ = quantize_model(model, config(damping="auto", calib_samples=10), x)
    codes = lambda model: torch.cat([layer.codes.flatten() for layer in quantized_layers(model).values()])  # type: ignore[union-attr]  # noqa: E731
    # halves of 5 images are 2 and 3 with their crops, of 10 images 5 and 5
    assert not torch.equal(codes(cropped), codes(given))
    cropped, _ = quantize_model(model, config(damping="auto", calib_samples=2, crops=4), x)
    assert torch.equal(codes(cropped), codes(given))
    assert config(crops=2, mirror=True).views == 6


def test_a_block_that_is_resumed_knows_its_damping(tmp_path: Path) -> None:
    quantized, report = quantize_model(network(), config(damping="auto"), images())
    layers = quantized_layers(quantized)
    save_state(tmp_path / "state", layers, StageResult(1.0))
    wiped = quantized_layers(clone_sharing(quantized))
    expected = {name: layer.damping for name, layer in layers.items()}
    for layer in wiped.values():
        layer.damping = None
    load_state(tmp_path / "state", wiped)
    assert {name: layer.damping for name, layer in wiped.items()} == expected
    assert [layer.damping for layer in report.layers] == [kept.share for kept in expected.values() if kept]


def test_one_image_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match="calib_samples must be at least 2 with damping auto, got 1"):
        config(damping="auto", calib_samples=1)
