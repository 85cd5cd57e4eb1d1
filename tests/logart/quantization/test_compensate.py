"""Compensated rounding against explicit inverses, enumeration and plain loops; in float64, so codes are equal."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from logart.errors import NetworkError
from logart.grids.grid import Codebook, ScaleMethod, log_codebook
from logart.grids.measures import OutputMoments
from logart.grids.rounding import dequantize, nearest
from logart.grids.search import ScaleSearch, choose_codebook
from logart.networks.calibration import calibration_images
from logart.networks.data import open_images
from logart.quantization import compensate
from logart.quantization.clone import clone_sharing
from logart.quantization.compensate import (
    compensate_block,
    coordinate_descent,
    error_feedback,
    metric,
    quadratic_error,
    round_compensated,
    target,
)
from logart.quantization.config import QuantConfig, Rounding
from logart.quantization.dbs import layer_moments
from logart.quantization.layers import QUANTIZED_TYPES, QuantizedLayer
from logart.quantization.pipeline import quantize_model
from logart.quantization.surgery import Block, quantized_layers, replace_layers
from logart_cnn.models import load_network

IMAGES = (6, 4, 6, 5)  # neither square nor divisible by the strides
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGES),
    "strided": (lambda: nn.Conv2d(4, 3, (3, 2), stride=(2, 3), bias=False), IMAGES),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), IMAGES),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGES),
    "linear": (lambda: nn.Linear(7, 6), (50, 7)),
    "tokens": (lambda: nn.Linear(7, 6, bias=False), (5, 8, 7)),
    "more weights than rows": (lambda: nn.Linear(30, 6), (8, 30)),
}
DAMPING, FLOOR = 0.01, 1e-12


def twins(build: Callable[[], nn.Module], n_bits: int = 3, n_codebooks: int = 0) -> tuple[nn.Module, QuantizedLayer]:
    """A layer and its quantized twin, still float; a codebook per channel unless told."""
    layer = build().requires_grad_(False)
    return layer, QUANTIZED_TYPES[type(layer)].from_float(layer, n_bits, n_codebooks or len(layer.weight))  # type: ignore[arg-type]


def double_case(name: str, **options: int) -> tuple[nn.Module, QuantizedLayer, Tensor, Tensor]:
    """Twins in float64, X and X̂, whose means are far from zero and from each other."""
    torch.manual_seed(len(name))
    build, shape = LAYERS[name]
    x = torch.randn(shape, dtype=torch.float64) + 2
    return *twins(lambda: build().double(), **options), x, x + 0.2 * torch.randn_like(x) + 0.3


def matrices(layer: nn.Module, x: Tensor) -> Tensor:
    """X as [C, n, K], each output channel's own: column k is what the layer gives for the weight e_k."""
    weight, columns = layer.weight.clone(), []  # type: ignore[operator]
    nothing = layer(torch.zeros_like(x))
    for k in range(weight[0].numel()):
        layer.weight.zero_().flatten(1)[:, k] = 1  # type: ignore[operator]
        columns.append(layer(x) - nothing)
    layer.weight.copy_(weight)  # type: ignore[operator]
    y = torch.stack(columns)  # the bias, if any, is in both
    return (y.movedim(2, 0) if isinstance(layer, nn.Conv2d) else y.movedim(-1, 0)).flatten(2).mT


def plain_metric_and_target(layer: nn.Module, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """A [C, K, K] and T [C, K] as the module's docstring defines them, channel by channel."""
    metrics, targets = [], []
    for of_x, of_x_hat, w in zip(matrices(layer, x), matrices(layer, x_hat), layer.weight.flatten(1), strict=True):  # type: ignore[operator, union-attr]
        mean = of_x_hat.mean(0)
        of_x, of_x_hat = of_x - of_x.mean(0), of_x_hat - mean
        gram = of_x_hat.T @ of_x_hat
        ridge = DAMPING * gram.diagonal().mean() + FLOOR * len(of_x) * (1 + mean.square().mean())
        metrics.append(gram + ridge * torch.eye(len(w), dtype=w.dtype))
        targets.append(torch.linalg.solve(metrics[-1], of_x_hat.T @ (of_x @ w) + ridge * w))
    return torch.stack(metrics), torch.stack(targets)


def correlated(groups: int, rows: int, size: int, seed: int, n_bits: int = 3) -> tuple[Tensor, Tensor, Codebook]:
    """T, A of inputs that share a few directions, and a codebook of the best mixes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(groups, 2 * size + 3, 3) @ draw(groups, 3, size) + 0.5 * draw(groups, 2 * size + 3, size)
    a = x.mT @ x + torch.eye(size, dtype=torch.float64)
    t = draw(groups * rows, size)
    return t, a, choose_codebook(t, ScaleMethod.DYNAMIC, n_bits, error=lambda d: quadratic_error(d, a))


def plain_error(codes: Tensor, t: Tensor, a: Tensor, codebook: Codebook) -> list[float]:
    """(q - T)ᵀA(q - T), channel by channel."""
    delta, rows = dequantize(codes, codebook.levels) - t, len(t) // len(a)
    return [float(d @ a[c // rows] @ d) for c, d in enumerate(delta)]


def assert_no_worse(first: list[float], second: list[float]) -> None:
    """First ≤ second, but for the rounding of the sums."""
    assert all(x <= y * (1 + 1e-9) for x, y in zip(first, second, strict=True)), (first, second)


# ---------------------------------------------------------------- A and T


@pytest.mark.parametrize("name", LAYERS)
def test_metric_and_target_equal_a_plain_computation(name: str) -> None:
    layer, quantized, x, x_hat = double_case(name)
    moments = layer_moments(layer, quantized, layer, quantized, x, x_hat, batch_size=4, shifted=True).centred()
    a, t = plain_metric_and_target(layer, x, x_hat)
    groups = getattr(layer, "groups", 1)
    found = metric(moments)
    assert found.shape == (groups, *a.shape[1:]) and found.dtype == torch.float64
    torch.testing.assert_close(found.repeat_interleave(len(a) // groups, 0), a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(target(quantized.rows, found, moments), t, rtol=1e-9, atol=1e-10)
    assert float((t - quantized.rows).abs().amax()) > 0.01  # else T = w would pass


def test_target_is_the_weight_where_the_prefix_is_exact() -> None:
    layer, quantized, x, _ = double_case("conv")
    moments = layer_moments(layer, quantized, layer, quantized, x, x, shifted=True).centred()
    assert torch.equal(target(quantized.rows, metric(moments), moments), quantized.rows)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_the_ridge_is_a_share_of_the_mean_diagonal(share: float) -> None:
    moments = OutputMoments.zeros(2, 2, 3, torch.device("cpu"))
    moments.gram.copy_(torch.diag_embed(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])))
    moments.count = 10
    added = (metric(moments, share) - moments.gram).diagonal(dim1=1, dim2=2)
    expected = torch.tensor([[3 * share] * 3, [0.0] * 3], dtype=torch.float64) + 10 * FLOOR
    torch.testing.assert_close(added, expected, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------- hard inputs, in float32


def hard_inputs(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs = {
        "dead": lambda: draw(8, 4, 6, 6) * torch.tensor([1.0, 0, 1, 0])[:, None, None],
        "all dead": lambda: torch.zeros(8, 4, 6, 6),
        "constant": lambda: torch.tensor([1.1, 0, 1.2345e4, -0.3])[:, None, None].expand(32, 4, 9, 9).contiguous(),
        "mean 1e4": lambda: draw(32, 4, 9, 9) + 1e4,
        "one image": lambda: draw(1, 4, 3, 3),
        "tiny": lambda: 1e-20 * draw(8, 4, 6, 6),
    }
    return inputs[name]()


HARD = ["dead", "all dead", "constant", "mean 1e4", "one image", "tiny"]


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(4, 4, 3), lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False)])
@pytest.mark.parametrize("name", HARD)
def test_hard_inputs_leave_a_definite_metric_and_sane_weights(name: str, build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer, quantized = twins(build)
    x = hard_inputs(name)
    x_hat = 1.01 * x + 0.1 * (x != 0)
    moments = layer_moments(layer, quantized, layer, quantized, x, x_hat, batch_size=16, shifted=True).centred()
    assert float(torch.linalg.eigvalsh(metric(moments)).amin()) > 0
    config = QuantConfig(n_bits=3, rounding=Rounding.COMPENSATED, batch_size=16)
    (t,) = compensate_block(nn.Sequential(layer), nn.Sequential(quantized), Block("0", ("0",)), (x, x_hat), config)
    w = layer.weight
    assert isinstance(w, Tensor) and isinstance(quantized.bias, Tensor)
    assert bool(torch.isfinite(quantized.bias).all())
    # Where inputs tell nothing, nothing is to be compensated; a scale of 1.01 asks for no more than 1 %. A floor of λ
    # that forgets the mean makes the noise of float32 sums a weight of 1e5 where all inputs are constant.
    torch.testing.assert_close(t, w, rtol=0.05, atol=0.1 if name == "constant" else 0.02)
    if name == "dead":
        assert torch.equal(t[:, 1::2], w[:, 1::2])  # type: ignore[index] # exactly: nothing is known of them


def test_large_means_cost_no_accuracy_in_float32() -> None:
    """Without taking the first batch's mean away, float32 products of 1e8 would leave no variance of 1 to be seen."""
    torch.manual_seed(0)
    layer, quantized = twins(lambda: nn.Conv2d(4, 6, 3))
    x = hard_inputs("mean 1e4")
    x_hat = x + 0.2 * torch.randn_like(x)
    moments = layer_moments(layer, quantized, layer, quantized, x, x_hat, batch_size=8, shifted=True).centred()
    exact = layer.double()
    a, t = plain_metric_and_target(exact, x.double(), x_hat.double())
    torch.testing.assert_close(metric(moments)[0], a[0], rtol=0, atol=1e-5 * float(a.amax()))
    found = target(exact.weight.flatten(1), metric(moments), moments)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(found, t, rtol=0, atol=2e-3)  # the outputs, of 1e4, are float32 too


# ---------------------------------------------------------------- error feedback and descent


def plain_feed_back(t: Tensor, a: Tensor, levels: list[float]) -> list[int]:
    """OBQ in a fixed order: one channel, the inverse of what is left of A taken afresh at every step."""
    left = sorted(range(len(t)), key=lambda j: (-float(a[j, j]), j))
    t, codes = t.clone(), [0] * len(t)
    while left:
        inverse = torch.linalg.inv(a[left][:, left])
        j = left[0]
        codes[j] = min(range(len(levels)), key=lambda i: abs(levels[i] - float(t[j])))
        error = (t[j] - levels[codes[j]]) / inverse[0, 0]
        t[left] -= error * inverse[0]
        left = left[1:]
    return codes


def plain_order(a: Tensor) -> list[int]:
    """From the most important column, always to the one left that is most correlated with the last."""
    order = [int(a.diagonal().argmax())]
    while len(order) < len(a):
        left = [k for k in range(len(a)) if k not in order]
        order.append(max(left, key=lambda k: abs(float(a[order[-1], k])) / float(a[k, k]) ** 0.5))
    return order


def plain_descend(codes: Tensor, t: Tensor, a: Tensor, levels: list[float]) -> list[int]:
    """One channel: each weight in turn tries its options on the whole objective, the next one all of its levels."""
    found, order = codes.tolist(), plain_order(a)
    q = torch.tensor([levels[i] for i in found], dtype=torch.float64)

    def objective(j: int, level: float) -> float:
        tried = q.clone()
        tried[j] = level
        return float((tried - t) @ a @ (tried - t))

    def after_answer(j: int, option: int, answering: int | None) -> float:
        if answering is None:
            return objective(j, levels[option])
        own, q[j] = float(q[j]), levels[option]
        least = min(objective(answering, level) for level in levels)
        q[j] = own
        return least

    n_changed_codes = True
    while n_changed_codes:
        n_changed_codes = False
        for place, j in enumerate(order):
            answering = None if place % 64 == 63 or place == len(order) - 1 else order[place + 1]
            best = min(range(len(levels)), key=lambda i: objective(j, levels[i]))  # noqa: B023
            own, top = found[j], len(levels) - 1
            options = [own, best, max(own - 1, 0), min(own + 1, top)]
            errors = [after_answer(j, i, answering) for i in options]
            k = min(range(4), key=errors.__getitem__)
            if errors[k] < errors[0] * (1 - 1e-12):
                found[j], n_changed_codes = options[k], True
            q[j] = levels[found[j]]
    return found


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 9), (3, 20), (1, 64), (1, 65), (2, 150)])
def test_feed_back_is_the_recursion_with_explicit_inverses(groups: int, size: int) -> None:
    """Also where the columns do not fill the last block."""
    t, a, codebook = correlated(groups, 2, size, seed=size)
    codes = error_feedback(t, a, codebook)
    assert codes.dtype == torch.uint8
    levels = codebook.levels.tolist()
    assert codes.tolist() == [plain_feed_back(row, a[c // 2], levels[c]) for c, row in enumerate(t)]
    assert size < 9 or not torch.equal(codes, nearest(t, codebook))


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 9), (1, 64), (1, 65), (2, 130)])
def test_descent_is_the_plain_one(groups: int, size: int) -> None:
    """Blocks of 64 columns: the last of a block has no next to answer."""
    t, a, codebook = correlated(groups, 2, size, seed=size)
    start = nearest(t, codebook)
    levels = codebook.levels.tolist()
    expected = [plain_descend(start[c], t[c], a[c // 2], levels[c]) for c in range(len(t))]
    assert coordinate_descent(start, t, a, codebook).tolist() == expected
    assert size < 9 or start.tolist() != expected


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("start", ["nearest", "fed back", "lowest", "random"])
def test_descent_never_rises_and_ends_where_no_weight_can_improve(
    start: str, n_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, a, codebook = correlated(2, 4, 40, seed=n_bits, n_bits=n_bits)
    random = torch.randint(0, 2**n_bits, t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    starts = {"nearest": nearest(t, codebook), "fed back": error_feedback(t, a, codebook), "random": random}
    codes = starts.get(start, torch.zeros_like(random))
    given, end = codes.clone(), coordinate_descent(codes, t, a, codebook)
    assert torch.equal(codes, given)
    monkeypatch.setattr(compensate, "SWEEPS", 1)
    sweeps = 0
    while not torch.equal(after := coordinate_descent(codes, t, a, codebook), codes):
        assert_no_worse(plain_error(after, t, a, codebook), plain_error(codes, t, a, codebook))
        codes, sweeps = after, sweeps + 1
    assert sweeps < 100 and torch.equal(codes, end)  # so the real one ended by itself
    delta = dequantize(end, codebook.levels) - t
    slope = (delta.unflatten(0, (2, -1)) @ a).flatten(0, 1)
    steps = codebook.levels[:, None] - dequantize(end, codebook.levels)[:, :, None]  # [C, K, levels]
    curvature = a.diagonal(dim1=1, dim2=2).repeat_interleave(4, 0)[:, :, None]
    changes = 2 * steps * slope[:, :, None] + steps.square() * curvature
    assert float(changes.amin()) > -1e-9 * float(curvature.amax())


def test_codes_follow_linear_distance_on_a_log_grid() -> None:
    """1.45 is nearer to 1 than to 2 by distance, not by ratio; A = I leaves nothing else to decide."""
    codebook = log_codebook(torch.tensor([2.0]), 3, 4)
    t, a = torch.tensor([[1.45, -1.45, 1.55, -2.95]], dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None]
    for codes in (error_feedback(t, a, codebook), coordinate_descent(nearest(t, codebook), t, a, codebook)):
        assert dequantize(codes, codebook.levels).tolist() == [[1.0, -1.0, 2.0, -2.0]]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 20), st.integers(2, 8), st.sampled_from(ScaleMethod))
def test_the_result_is_no_worse_than_feedback_or_nearest(
    seed: int, groups: int, size: int, n_bits: int, method: ScaleMethod
) -> None:
    t, a, _ = correlated(groups, 3, size, seed)
    t[0] = 0
    codebook = choose_codebook(t, method, n_bits)
    codes = round_compensated(t, a, codebook)
    reached = plain_error(codes, t, a, codebook)
    assert_no_worse(reached, plain_error(error_feedback(t, a, codebook), t, a, codebook))
    assert_no_worse(reached, plain_error(nearest(t, codebook), t, a, codebook))
    assert torch.equal(codes, coordinate_descent(codes, t, a, codebook))


TOYS: dict[str, Callable[[Callable[[int, int], Tensor]], Tensor]] = {
    "8 rows": lambda draw: draw(8, 3),
    "4 rows": lambda draw: draw(4, 3),
    "correlated": lambda draw: draw(50, 1) + 0.3 * draw(50, 3),
}


@pytest.mark.parametrize("inputs", TOYS)
def test_toy_problems_are_within_5_percent_of_the_optimum(inputs: str) -> None:
    """2×3 weights, 2 bits, all 64 assignments of each channel enumerated."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    every = torch.tensor(list(product(range(4), repeat=3)), dtype=torch.uint8)
    ratios, plainly = [], []
    for _ in range(300):
        t, x = draw(2, 3), TOYS[inputs](draw)
        a = (x.T @ x + 0.01 * x.square().sum(0).mean() * torch.eye(3))[None]
        codebook = choose_codebook(t, ScaleMethod.DYNAMIC, 2, error=lambda d, a=a: quadratic_error(d, a))  # type: ignore[misc]
        found = plain_error(round_compensated(t, a, codebook), t, a, codebook)
        rounded = plain_error(nearest(t, codebook), t, a, codebook)
        assert_no_worse(found, rounded)
        best = [min(plain_error(c.expand(2, 3), t, a, codebook)[row] for c in every) for row in range(2)]
        assert_no_worse(best, found)
        ratios += [x / y for x, y in zip(found, best, strict=True)]
        plainly += [x / y for x, y in zip(rounded, best, strict=True)]
    assert sum(ratios) / len(ratios) < 1.05
    assert sum(plainly) / len(plainly) > 1.05  # else nearest would pass as well


# ---------------------------------------------------------------- layers and units


def dequantized_weight(codebook: Codebook, channels: int) -> Codebook:
    """A codebook of every channel, from one per group of consecutive channels."""
    return codebook.select(torch.arange(len(codebook.levels)).repeat_interleave(channels // len(codebook.levels)))


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "scaled": {"scale_search": ScaleSearch.GRID},
    "all": {"scale_search": ScaleSearch.HALF_STEP, "asymmetric": True, "zero_code": True, "hardware_terms": 3},
    "linear": {"scale_method": ScaleMethod.LINEAR_MSE},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("name", "n_codebooks"), [*((name, 0) for name in LAYERS), ("tokens", 3), ("conv", 1)])
def test_a_layer_gets_target_codebook_codes_and_bias(name: str, n_codebooks: int, options: str) -> None:
    """One codebook per channel, per third of the rows as for q, k and v, or per layer."""
    layer, quantized, x, x_hat = double_case(name, n_codebooks=n_codebooks)
    channels, w, wanted = len(layer.weight), quantized.rows.clone(), layer(x)  # type: ignore[arg-type]
    float_bias = layer.bias
    config = QuantConfig(n_bits=3, rounding=Rounding.COMPENSATED, batch_size=4, **OPTIONS[options])  # type: ignore[arg-type]
    block, models = Block("0", ("0",)), (nn.Sequential(layer), nn.Sequential(quantized))
    (t,) = compensate_block(*models, block, (x, x_hat), config)
    a, plain_t = plain_metric_and_target(layer, x, x_hat)
    plain_t = plain_t.reshape(t.shape)
    torch.testing.assert_close(t, plain_t, rtol=1e-9, atol=1e-10)

    def error(delta: Tensor) -> Tensor:
        each = torch.einsum("ck,ckl,cl->c", delta.reshape(channels, -1), a, delta.reshape(channels, -1))
        return each.reshape(quantized.n_codebooks, -1).sum(1)

    codebook = choose_codebook(
        t.reshape(quantized.n_codebooks, -1), config.scale_method, 3, error=error, **config.grid_options
    )
    assert torch.equal(quantized.codebook.levels, codebook.levels)
    codes = round_compensated(t.flatten(1), a, dequantized_weight(codebook, channels))
    assert quantized.codes is not None and torch.equal(quantized.codes.flatten(1), codes)
    levels = codebook.levels.tolist()
    for c, row in enumerate(quantized.weight.flatten(1).tolist()):
        assert set(row) <= set(levels[c * quantized.n_codebooks // channels])
    assert not torch.equal(quantized.weight.reshape(w.shape), w)
    channel = 1 if isinstance(layer, nn.Conv2d) else -1
    mean = lambda y: y.movedim(channel, 0).flatten(1).mean(1)  # noqa: E731
    torch.testing.assert_close(mean(quantized(x_hat)), mean(wanted), rtol=0, atol=1e-9)
    assert layer.bias is float_bias and torch.equal(layer(x), wanted)  # the float network keeps its own


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_output_is_kept_in_float32_at_large_means(bias: bool) -> None:
    torch.manual_seed(0)
    layer, quantized = twins(lambda: nn.Conv2d(4, 6, 3, bias=bias))
    x = hard_inputs("mean 1e4")
    x_hat = x + 0.2 * torch.randn_like(x) + 3
    config = QuantConfig(n_bits=3, rounding=Rounding.COMPENSATED, batch_size=8)
    compensate_block(nn.Sequential(layer), nn.Sequential(quantized), Block("0", ("0",)), (x, x_hat), config)
    assert isinstance(quantized.bias, nn.Parameter)
    assert quantized.bias.dtype == torch.float32 and not quantized.bias.requires_grad
    layer.double()
    given = nn.functional.conv2d(x_hat.double(), quantized.weight.double(), quantized.bias.double())
    wanted = layer(x.double())
    largest = float(wanted.abs().amax())
    torch.testing.assert_close(given.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0, atol=1e-6 * largest)


def test_later_layers_make_up_for_the_earlier_ones() -> None:
    """The second layer's target is taken behind the rounded first one, its new bias included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).double().requires_grad_(False)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    x_hat = x + 0.1 * torch.randn_like(x)
    quantized = clone_sharing(model)
    replace_layers(quantized, {"0": 2, "2": 2}, channel_wise=True)
    config = QuantConfig(n_bits=2, rounding=Rounding.COMPENSATED, batch_size=4)
    first, second = compensate_block(model, quantized, Block("", ("0", "2")), (x, x_hat), config)
    _, t = plain_metric_and_target(model[0], x, x_hat)
    torch.testing.assert_close(first, t.reshape(first.shape), rtol=1e-9, atol=1e-10)
    _, t = plain_metric_and_target(model[2], model[:2](x), quantized[:2](x_hat))  # type: ignore[index]
    torch.testing.assert_close(second, t.reshape(second.shape), rtol=1e-9, atol=1e-10)


def test_a_trained_network_gains_in_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of the digits network, as they come to be rounded."""
    network = load_network("digits_resnet")
    source = open_images("digits", network.preprocessing, network.num_classes)
    images, _ = calibration_images(source, 32, 0, quiet=True)
    seen: list[tuple[Tensor, Tensor, Codebook]] = []

    def watched(*arguments: Tensor | Codebook) -> Tensor:
        seen.append(arguments)  # type: ignore[arg-type]
        return round_compensated(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compensate, "round_compensated", watched)
    config = QuantConfig(n_bits=3, rounding=Rounding.COMPENSATED, calib_samples=32)
    _, report = quantize_model(network.model, config, images, block_types=network.block_types)
    assert len(seen) == len(report.layers) > 4
    feedback_wins = descent_wins = 0.0
    for t, a, codebook in seen:
        reached, fed_back, rounded = (
            torch.tensor(plain_error(how, t, a, codebook), dtype=torch.float64)
            for how in (round_compensated(t, a, codebook), error_feedback(t, a, codebook), nearest(t, codebook))
        )
        assert_no_worse(reached.tolist(), fed_back.minimum(rounded).tolist())
        feedback_wins += float((fed_back < rounded).double().mean()) / len(seen)
        descent_wins += float((reached < 0.999 * fed_back).double().mean()) / len(seen)
    assert feedback_wins > 0.9 and descent_wins > 0.5, (feedback_wins, descent_wins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_networks_of_short_types_are_compensated(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).to(dtype).eval()
    model.requires_grad_(False)
    images = torch.rand(16, 3, 8, 8).to(dtype)
    errors = {}
    for rounding in ("nearest", "compensated"):
        config = QuantConfig(n_bits=3, rounding=rounding, calib_samples=16, batch_size=5)
        quantized, _ = quantize_model(model, config, images, quiet=True)
        errors[rounding] = float((quantized(images) - model(images)).float().square().mean())
        assert all(layer.weight.dtype == dtype for layer in quantized_layers(quantized).values())
    assert errors["compensated"] < 0.5 * errors["nearest"]


def test_inputs_whose_squares_overflow_are_an_error_that_names_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).eval()
    config = QuantConfig(rounding="compensated", calib_samples=4)
    with pytest.raises(NetworkError, match=r"layer 0: its inputs are so large .* overflow torch.float32"):
        quantize_model(model, config, 1e20 * torch.rand(4, 3, 5, 5), quiet=True)
