"""Output errors of layers against outputs that are worked out one by one."""

import pytest
import torch
from torch import Tensor, nn

from logart.grids.rounding import nearest
from logart.quantization.config import QuantConfig
from logart.quantization.fidelity import KINDS, N_IMAGES, layer_output_errors, output_errors
from logart.quantization.folding import fold_batch_norms
from logart.quantization.pipeline import quantize_model
from logart.quantization.surgery import quantized_layers


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2), nn.Flatten(), nn.Linear(4 * 9, 6))
    return nn.Sequential(*layers).eval().requires_grad_(False)


def relative(wanted: Tensor, given: Tensor, dim: tuple[int, ...]) -> float:
    centred = wanted - wanted.mean(dim, keepdim=True)
    return float((wanted - given).square().sum() / centred.square().sum())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_errors_are_of_outputs_behind_the_quantized_prefix(rounding: str, images: Tensor) -> None:
    model = network()
    config = QuantConfig(n_bits=3, rounding=rounding, calib_samples=20)
    quantized, report = quantize_model(model, config, images, held_out_images=images.flip(-1))
    exact, rounded = images.flip(-1), images.flip(-1)
    for index, (plain, layer) in enumerate(zip(model, quantized.children(), strict=True)):
        exact, rounded = plain(exact), layer(rounded)
        if str(index) in quantized_layers(quantized):
            expected = relative(exact, rounded, (0,) if exact.ndim == 2 else (0, 2, 3))
            found = next(one for one in report.layers if one.name == str(index)).output_errors
            assert found[KINDS.index("held out, final")] == pytest.approx(expected, rel=1e-4)
            assert (found[0] is None) == (found[1] is None) == (rounding == "nearest")


def test_the_nearest_codes_are_measured_with_float_biases_and_nothing_is_changed(images: Tensor) -> None:
    model = network()
    quantized, _ = quantize_model(model, QuantConfig(n_bits=2, rounding="compensated", calib_samples=20), images)
    before = quantized(images)
    found = layer_output_errors(model, quantized, images, None)
    assert torch.equal(quantized(images), before)
    layers = quantized_layers(quantized)
    for name, layer in layers.items():
        layer.set_codes(nearest(layer.rows, layer.codebook))
        layer.module.bias = model.get_submodule(name).bias
    assert {name: errors[0] for name, errors in found.items()} == output_errors(model, quantized, layers, images, [])[0]
    assert all(errors[2:] == (None, None) and errors[0] != errors[1] for errors in found.values())


def test_only_the_first_images_are_looked_at(images: Tensor) -> None:
    model = network()
    quantized, _ = quantize_model(model, QuantConfig(n_bits=2, rounding="nearest"), images)
    many = images.repeat(-(-N_IMAGES // 20) + 1, 1, 1, 1)
    spoilt = torch.cat([many[:N_IMAGES], many[N_IMAGES:] * 1e6])
    assert layer_output_errors(model, quantized, None, many) == layer_output_errors(model, quantized, None, spoilt)


def test_a_network_of_equal_outputs_has_no_error() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    model = model.eval().requires_grad_(False)
    model[0].weight.copy_(torch.tensor([1.0, -0.5]).reshape(2, 1, 1, 1).expand(2, 1, 3, 3))
    model[3].weight.copy_(torch.tensor([[0.25], [2.0]]).expand(2, 8))
    images = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    fold_batch_norms(model, images)
    model[0].weight.copy_(torch.tensor([1.0, -0.5]).reshape(2, 1, 1, 1).expand(2, 1, 3, 3))
    config = QuantConfig(n_bits=3, scale_method="log_2", rounding="nearest")
    _, report = quantize_model(model, config, images, held_out_images=images)
    assert [layer.output_errors for layer in report.layers] == [(None, None, 0.0, 0.0)] * 2


def test_outputs_that_hardly_vary_have_a_right_error_and_those_that_do_not_have_none(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 5), nn.Linear(5, 4)).eval().requires_grad_(False)
    model[1].weight.mul_(1e-6)
    model[1].bias.copy_(torch.arange(1.0, 6))
    model[2].weight.mul_(1e-6)  # of inputs that hardly vary: what is left is lost in the rounding of the bias
    quantized, _ = quantize_model(model, QuantConfig(n_bits=3, rounding="nearest"), images)
    hidden = images.flatten(1)
    expected = relative(model[1](hidden).double(), quantized[1](hidden).double(), (0,))
    found = layer_output_errors(model, quantized, None, images)
    assert 1e-3 < expected < 1 and found["1"][3] == pytest.approx(expected, rel=1e-6)
    assert found["2"] == (None,) * 4
