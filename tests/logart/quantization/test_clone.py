"""Copies to work on: of wrapped networks, and of networks that hold what cannot be copied."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import smooth_images
from torch import Tensor, nn

from logart.errors import NetworkError
from logart.quantization.clone import clone_sharing, unwrapped
from logart.quantization.config import QuantConfig
from logart.quantization.pipeline import quantize_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.jit|weight_norm).*:FutureWarning")
IMAGES = smooth_images(4, 3, 6).float()
NEAREST = QuantConfig(n_bits=4, rounding="nearest")  # type: ignore[arg-type]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()


class Keeps(nn.Module):
    """Keeps its last activation, as networks do whose attention maps are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self.conv(x)]
        return self.head(self.kept[0].flatten(1))  # type: ignore[no-any-return]


WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda m: torch.compile(m, backend="eager"),  # type: ignore[return-value]
    "data parallel": nn.DataParallel,
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),  # type: ignore[return-value]
}


@pytest.mark.parametrize("how", WRAPPINGS)
def test_a_wrapped_network_is_unwrapped(how: str) -> None:
    model = plain()
    assert unwrapped(WRAPPINGS[how](model)) is model
    quantized, report = quantize_model(WRAPPINGS[how](model), NEAREST, IMAGES)
    assert [layer.name for layer in report.layers] == ["0", "3"]
    assert torch.equal(quantized(IMAGES), quantize_model(model, NEAREST, IMAGES)[0](IMAGES))


@pytest.mark.parametrize("how", WRAPPINGS)
def test_wrappers_inside_are_left_out(how: str) -> None:
    model = plain()
    outer = nn.Sequential(WRAPPINGS[how](model[:3]), model[3])
    _, report = quantize_model(outer, NEAREST, IMAGES)
    assert [layer.name for layer in report.layers] == ["0.0", "1"]


def test_what_is_no_module_of_python_is_refused() -> None:
    for model in (torch.jit.script(plain()), torch.jit.trace(plain(), IMAGES)):
        with pytest.raises(NetworkError, match="the network is a ScriptModule"):
            quantize_model(model, NEAREST, IMAGES)
    with pytest.raises(NetworkError, match="its module 0 is a ScriptModule"):
        quantize_model(nn.Sequential(torch.jit.script(plain())), NEAREST, IMAGES)
    with pytest.raises(NetworkError, match="expected a network .* got OrderedDict"):
        quantize_model(plain().state_dict(), NEAREST, IMAGES)  # type: ignore[arg-type]


def test_attributes_that_cannot_be_copied_are_shared(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        for value in (threading.Lock(), file, (i for i in [1])):
            model = plain()
            model.extra = value  # type: ignore[assignment]
            clone = clone_sharing(model)
            assert clone.extra is value and clone[0] is not model[0]  # type: ignore[index]


def test_an_attribute_that_holds_modules_and_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(plain())
    model[0].hidden = [nn.Conv2d(3, 4, 3), threading.Lock()]  # type: ignore[assignment]
    with pytest.raises(NetworkError, match=r"attribute 0\.hidden cannot be copied \(.*lock"):
        quantize_model(model, NEAREST, IMAGES)


def ran(model: nn.Module) -> nn.Module:
    model(IMAGES)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: ran(Keeps()),
        lambda: ran(nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(64, 5))),
        lambda: ran(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(64, 5))),
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(64, 5)),
    ],
)
def test_kept_results_are_no_obstacle(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    _, report = quantize_model(model, NEAREST, IMAGES)
    assert report.layers[-1].name in ("head", "2")
