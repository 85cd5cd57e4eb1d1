"""Under whatever modes quantize_model is called, and whatever modes the network has of its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from networks import fingerprint, hooks_of, small_resnet, smooth_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from logart import QuantConfig, quantize_model
from logart.errors import NetworkError

MODEL, IMAGES = small_resnet(n_images=16)
CONFIGS = {
    "nearest": QuantConfig(rounding="nearest"),
    "layer-wise": QuantConfig(rounding="nearest", search_method="layer_wise", search_samples=8),  # type: ignore[arg-type]
    "block-wise": QuantConfig(rounding="nearest", search_method="block_wise", search_samples=8),  # type: ignore[arg-type]
    "compensated": QuantConfig(rounding="compensated", calib_samples=16),
    "learned": QuantConfig(calib_samples=16, iters=20, lr=0.1, batch_size=8),
    "perturbation": QuantConfig(calib_samples=16, iters=4, batch_size=8, recon_metric="hessian_perturb"),  # type: ignore[arg-type]
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients off": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_callers_modes_change_nothing(name: str) -> None:
    def codes(context: AbstractContextManager[Any]) -> Any:
        with context:
            return fingerprint(quantize_model(MODEL, CONFIGS[name], IMAGES, block_types=("ResidualBlock",))[0])

    expected = codes(nullcontext())
    for mode in MODES.values():
        assert codes(mode()) == expected
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


class Autocast(nn.Module):
    """Computes in bfloat16 of its own accord, one convolution outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.c(F.relu(self.b(F.relu(x))).flatten(1))
        return x.float()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_with_autocast_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    model = Autocast().eval()
    quantized, report = quantize_model(model, CONFIGS[name], IMAGES)
    assert [layer.name for layer in report.layers] == ["a", "b", "c"]
    with torch.no_grad():
        error = (quantized(IMAGES) - model(IMAGES)).norm() / model(IMAGES).norm()
    assert error < 0.35
    assert hooks_of(quantized) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_ends_near_single(dtype: torch.dtype, name: str) -> None:
    single = quantize_model(MODEL, CONFIGS[name], IMAGES, block_types=("ResidualBlock",))[0]
    model = small_resnet()[0].to(dtype)
    half = quantize_model(model, CONFIGS[name], IMAGES.to(dtype), block_types=("ResidualBlock",))[0]
    with torch.no_grad():
        wanted = MODEL(IMAGES)
        errors = [float((net(x).float() - wanted).norm()) for net, x in ((single, IMAGES), (half, IMAGES.to(dtype)))]
    assert half.head.weight.dtype is dtype  # type: ignore[union-attr]
    assert errors[1] <= 1.5 * errors[0] + 0.02 * float(wanted.norm())


@pytest.mark.parametrize("name", ["layer-wise", "block-wise", "learned", "compensated"])
def test_large_values_do_not_overflow_half_precision(name: str) -> None:
    """Outputs of 2,000, whose squares float16 does not hold, choose the grids that outputs of 2 do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Linear(64, 4))
    images = smooth_images(16, 3, 8).half()
    with torch.no_grad():
        model[1].weight.mul_(2**10)
    quantized, _ = quantize_model(model.half(), CONFIGS[name], images)
    with torch.no_grad():
        wanted = model(images).float()
        assert wanted.abs().max() > 300
        assert (quantized(images).float() - wanted).norm() < 0.25 * wanted.norm()


def test_errors_that_overflow_name_the_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight.mul_(1e15)
    with pytest.raises(NetworkError, match="layer 1: the errors of all its grids overflow"):
        quantize_model(model, CONFIGS["layer-wise"], IMAGES * 1e15)


class Cut(nn.Module):
    """Two convolutions whose gradient is cut in one of three ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def inner(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return x + self.inner(x)
        if self.how == "detach":
            return x + self.b(self.a(x).detach())  # type: ignore[no-any-return]
        if self.how in ("reentrant", "checkpoint"):
            return x + checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")  # type: ignore[no-any-return]
        return x + self.inner(x)


def cut(how: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), Cut(how), nn.Flatten(), nn.Linear(216, 4)).eval()


@pytest.mark.parametrize(("how", "count"), [("no_grad", 2), ("reentrant", 2), ("detach", 1)])
@pytest.mark.parametrize("name", ["learned", "block-wise"])
def test_a_block_that_cuts_the_gradient_is_named(name: str, how: str, count: int) -> None:
    with pytest.raises(NetworkError, match="^block 1.*no gradient reaches"):
        quantize_model(cut(how), CONFIGS[name], IMAGES, block_types=("Cut",))
    quantize_model(cut(how), CONFIGS["compensated"], IMAGES, block_types=("Cut",))


@pytest.mark.parametrize("how", ["plain", "checkpoint"])
def test_a_block_that_keeps_the_gradient_learns(how: str) -> None:
    _, report = quantize_model(cut(how), CONFIGS["learned"], IMAGES, block_types=("Cut",))
    assert all(layer.n_changed_codes for layer in report.layers if layer.block == "1")


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.a(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (TwoInputs(), IMAGES, "TwoInputs does not run on the calibration images, .*missing 1 required.*'y'"),
        (MODEL, IMAGES[:, :2], r"SmallResNet does not run on the calibration images, \[2, 2, 8, 8\] torch.float32"),
        (MODEL, IMAGES.half(), r"does not run on .* torch.float16"),
    ],
)
def test_a_network_that_does_not_run_on_the_images_is_refused_in_a_line(
    model: nn.Module, images: Tensor, message: str
) -> None:
    with pytest.raises(NetworkError, match=message) as caught:
        quantize_model(model, CONFIGS["nearest"], images)
    assert "\n" not in str(caught.value)
