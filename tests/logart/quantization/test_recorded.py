"""Steps of learning that are recorded as one CUDA graph (`pytest -m gpu` for what needs one)."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logart import QuantConfig, quantize_model
from logart.quantization.recorded import Recorded

CUDA = torch.device("cuda")


class Block(nn.Module):
    """Two convolutions and a shortcut, which begin with an operation in place; `waits` reads a value back."""

    def __init__(self, *, waits: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.waits = waits

    def forward(self, x: Tensor) -> Tensor:
        x = x.add_(1.0)
        y = self.conv2(self.conv1(x).relu())
        return x + y * (2.0 if self.waits and float(y.detach().sum()) < -1e30 else 1.0)


def learned(*, waits: bool = False, **fields: Any) -> nn.Module:
    """A network of two blocks, learned for 40 steps of which the first 8 have no penalty."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(waits=waits), Block(waits=waits)).eval()
    settings: dict[str, Any] = {"n_bits": 3, "calib_samples": 32, "batch_size": 8, "iters": 40, "lr": 0.1} | fields
    images = torch.randn(32, 8, 6, 6)
    quantized, _ = quantize_model(model, QuantConfig(**settings), images, device=CUDA)
    return quantized


def test_elsewhere_a_function_is_called_as_it_is() -> None:
    seen: list[Any] = []
    recorded = Recorded(lambda *arguments: seen.append(arguments), torch.device("cpu"))
    x = torch.ones(2)
    for _ in range(3):
        recorded(x, 0.5)
    assert len(seen) == 3
    assert all(given is x and number == 0.5 for given, number in seen)


@pytest.mark.gpu
def test_a_recording_gives_what_the_function_gives() -> None:
    calls = []

    def function(x: Tensor, number: Tensor | None, text: str) -> Tensor:
        calls.append(text)
        return x.mul_(2).sum() * (1.0 if number is None else number)

    recorded = Recorded(function, CUDA)
    for number in (None, None, None, 0.5, 1.5, 2.5, 3.5):
        x = torch.randn(5, device=CUDA)
        expected = float(x.clone().mul_(2).sum()) * (1.0 if number is None else number)
        assert float(recorded(x, number, "a")) == pytest.approx(expected, rel=1e-6)
    assert len(calls) == 4  # of each kind of call the plain one and the recorded one


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rounding": "both", "damping": 0.01},
        {"recon_input": "mixed"},
        {"n_bits_a": 4, "calibrate_with_act": True, "recon_input": "mixed", "iters_a": 20},
    ],
)
def test_recorded_steps_learn_the_same_codes(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded = learned(**fields).state_dict()
        again = learned(**fields).state_dict()
    monkeypatch.setattr(Recorded, "_record", lambda *_: False)
    plain = learned(**fields).state_dict()
    for name, tensor in plain.items():
        assert torch.equal(recorded[name], again[name]), name
        if name.endswith("codes"):
            assert float((recorded[name] == tensor).float().mean()) >= 0.99, name


@pytest.mark.gpu
def test_a_forward_that_waits_for_the_gpu_learns_step_by_step() -> None:
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        waited = learned(waits=True).state_dict()
    for name, tensor in learned().state_dict().items():
        if name.endswith("codes"):
            assert float((waited[name] == tensor).float().mean()) >= 0.99, name
    assert float(torch.ones(3, device=CUDA).sum()) == 3  # the device goes on
