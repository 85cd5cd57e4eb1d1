"""Compensated rounding against explicit inverses, enumeration and plain loops; in float64, so codes are equal."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import calls, quantized_twin
from quadratic import assert_no_worse, plain_error
from torch import Tensor, nn

from logart.errors import NetworkError, NoRoomError
from logart.grids.grid import Codebook, ScaleSearch, Spacing
from logart.grids.measures import OutputMoments
from logart.grids.rounding import nearest
from logart.grids.search import choose_codebook
from logart.networks.calibration import calibration_images
from logart.networks.data import open_images
from logart.quantization import compensate
from logart.quantization.blocks import Block
from logart.quantization.clone import clone_sharing
from logart.quantization.column_rounding import (
    Factor,
    error_feedback,
    round_compensated,
)
from logart.quantization.compensate import compensate_block
from logart.quantization.config import QuantConfig
from logart.quantization.damping import metric, target
from logart.quantization.dbs import layer_moments
from logart.quantization.pipeline import quantize_model
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.surgery import quantized_layers, replace_layers
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


def twins(build: Callable[[], nn.Module], n_bits: int = 3, n_codebooks: int = 0) -> tuple[nn.Module, QuantizedWeight]:
    """A layer and its quantized counterpart, still float; a codebook per channel by default."""
    layer = build().requires_grad_(False)
    return layer, quantized_twin(layer, n_bits, n_codebooks)


def double_case(name: str, **options: int) -> tuple[nn.Module, QuantizedWeight, Tensor, Tensor]:
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


# ---------------------------------------------------------------- A and T


@pytest.mark.parametrize("name", LAYERS)
def test_metric_and_target_equal_a_plain_computation(name: str) -> None:
    layer, quantized, x, x_hat = double_case(name)
    moments = layer_moments(
        layer, quantized.module, layer.weight, quantized, calls(x), calls(x_hat), batch_size=4, shifted=True
    ).centred()
    a, t = plain_metric_and_target(layer, x, x_hat)
    groups = getattr(layer, "groups", 1)
    found = metric(moments, DAMPING)
    assert found.shape == (groups, *a.shape[1:]) and found.dtype == torch.float64
    torch.testing.assert_close(found.repeat_interleave(len(a) // groups, 0), a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(target(quantized.rows, Factor.of(found), moments), t, rtol=1e-9, atol=1e-10)
    assert float((t - quantized.rows).abs().amax()) > 0.01  # else T = w would pass


def test_target_is_the_weight_where_the_prefix_is_exact() -> None:
    layer, quantized, x, _ = double_case("conv")
    arguments = (layer, quantized.module, layer.weight, quantized, calls(x), calls(x))
    moments = layer_moments(*arguments, shifted=True).centred()  # type: ignore[arg-type]
    assert torch.equal(target(quantized.rows, Factor.of(metric(moments, DAMPING)), moments), quantized.rows)


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
    moments = layer_moments(
        layer, quantized.module, layer.weight, quantized, calls(x), calls(x_hat), batch_size=16, shifted=True
    ).centred()
    assert float(torch.linalg.eigvalsh(metric(moments, DAMPING)).amin()) > 0
    config = QuantConfig(n_bits=3, rounding="compensated", batch_size=16)
    (t,) = compensate_block(
        nn.Sequential(layer), nn.Sequential(quantized.module), Block("0", ("0",)), (calls(x), calls(x_hat)), config
    )
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
    moments = layer_moments(
        layer, quantized.module, layer.weight, quantized, calls(x), calls(x_hat), batch_size=8, shifted=True
    ).centred()
    exact = layer.double()
    a, t = plain_metric_and_target(exact, x.double(), x_hat.double())
    torch.testing.assert_close(metric(moments, DAMPING)[0], a[0], rtol=0, atol=1e-5 * float(a.amax()))
    found = target(exact.weight.flatten(1), Factor.of(metric(moments, DAMPING)), moments)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(found, t, rtol=0, atol=2e-3)  # the outputs, of 1e4, are float32 too


# ---------------------------------------------------------------- layers and units


def dequantized_weight(codebook: Codebook, channels: int) -> Codebook:
    """A codebook of every channel, from one per group of consecutive channels."""
    return codebook.select(torch.arange(len(codebook.levels)).repeat_interleave(channels // len(codebook.levels)))


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "scaled": {"scale_search": ScaleSearch.GRID},
    "all": {"scale_search": ScaleSearch.HALF_STEP, "asymmetric": True, "zero_code": True, "hardware_terms": 3},
    "linear": {"scale_method": "linear_mse"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("name", "n_codebooks"), [*((name, 0) for name in LAYERS), ("tokens", 3), ("conv", 1)])
def test_a_layer_gets_target_codebook_codes_and_bias(name: str, n_codebooks: int, options: str) -> None:
    """One codebook per channel, per third of the rows as for q, k and v, or per layer."""
    layer, quantized, x, x_hat = double_case(name, n_codebooks=n_codebooks)
    channels, w, wanted = len(layer.weight), quantized.rows.clone(), layer(x)  # type: ignore[arg-type]
    float_bias = layer.bias
    config = QuantConfig(n_bits=3, rounding="compensated", batch_size=4, **OPTIONS[options])  # type: ignore[arg-type]
    block, models = Block("0", ("0",)), (nn.Sequential(layer), nn.Sequential(quantized.module))
    (t,) = compensate_block(*models, block, (calls(x), calls(x_hat)), config)
    a, plain_t = plain_metric_and_target(layer, x, x_hat)
    plain_t = plain_t.reshape(t.shape)
    torch.testing.assert_close(t, plain_t, rtol=1e-9, atol=1e-10)

    def error(delta: Tensor) -> Tensor:
        each = torch.einsum("ck,ckl,cl->c", delta.reshape(channels, -1), a, delta.reshape(channels, -1))
        return each.reshape(quantized.n_codebooks, -1).sum(1)

    rows, by_distance = t.reshape(quantized.n_codebooks, -1), Spacing.LINEAR
    codebook = choose_codebook(rows, config.grid, 3, error=error, options=config.grid_options, spacing=by_distance)
    assert torch.equal(quantized.codebook.levels, codebook.levels)
    codes = round_compensated(t.flatten(1), a, dequantized_weight(codebook, channels))
    assert quantized.codes is not None and torch.equal(quantized.codes.flatten(1), codes)
    levels = codebook.levels.tolist()
    for c, row in enumerate(quantized.weight.flatten(1).tolist()):
        assert set(row) <= set(levels[c * quantized.n_codebooks // channels])
    assert not torch.equal(quantized.weight.reshape(w.shape), w)
    channel = 1 if isinstance(layer, nn.Conv2d) else -1
    mean = lambda y: y.movedim(channel, 0).flatten(1).mean(1)  # noqa: E731
    torch.testing.assert_close(mean(quantized.module(x_hat)), mean(wanted), rtol=0, atol=1e-9)
    assert layer.bias is float_bias and torch.equal(layer(x), wanted)  # the float network keeps its own


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_output_is_kept_in_float32_at_large_means(bias: bool) -> None:
    torch.manual_seed(0)
    layer, quantized = twins(lambda: nn.Conv2d(4, 6, 3, bias=bias))
    x = hard_inputs("mean 1e4")
    x_hat = x + 0.2 * torch.randn_like(x) + 3
    config = QuantConfig(n_bits=3, rounding="compensated", batch_size=8)
    compensate_block(
        nn.Sequential(layer), nn.Sequential(quantized.module), Block("0", ("0",)), (calls(x), calls(x_hat)), config
    )
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
    config = QuantConfig(n_bits=2, rounding="compensated", batch_size=4)
    first, second = compensate_block(model, quantized, Block("", ("0", "2")), (calls(x), calls(x_hat)), config)
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

    def watched(t: Tensor, a: Tensor, codebook: Codebook, factor: Factor) -> Tensor:
        seen.append((t, a, codebook))
        return round_compensated(t, a, codebook, factor)

    monkeypatch.setattr(compensate, "round_compensated", watched)
    config = QuantConfig(n_bits=3, rounding="compensated", calib_samples=32)
    _, report = quantize_model(network.model, config, images)
    assert len(seen) == len(report.layers) > 4
    feedback_wins = descent_wins = 0.0
    for t, a, codebook in seen:
        reached, fed_back, rounded = (
            torch.tensor(plain_error(how, t, a, codebook), dtype=torch.float64)
            for how in (
                round_compensated(t, a, codebook),
                error_feedback(t, Factor.of(a), codebook),
                nearest(t, codebook),
            )
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


@pytest.mark.parametrize("rounding", ["compensated", "both"])
def test_moments_that_do_not_fit_are_refused_before_any_work(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG's first linear layer has 25,088 inputs: 4.7 GiB a matrix; here the bound is met by a layer of 48."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(48, 4)).eval()
    need = 7 * 48**2 * 8
    moments: list[object] = []
    monkeypatch.setattr(compensate, "layer_moments", lambda *args, **kwargs: moments.append(args))
    monkeypatch.setattr(compensate, "free_bytes", lambda device: need - 1)
    config = QuantConfig(rounding=rounding, calib_samples=4)
    with pytest.raises(NoRoomError, match=r"^layer 2: compensated rounding holds up to .* of its 48 inputs, .* on cpu"):
        quantize_model(model, config, torch.rand(4, 3, 4, 4), quiet=True)
    assert moments == []
    monkeypatch.undo()
    monkeypatch.setattr(compensate, "free_bytes", lambda device: need)
    quantize_model(model, replace(config, iters=2), torch.rand(4, 3, 4, 4), quiet=True)
