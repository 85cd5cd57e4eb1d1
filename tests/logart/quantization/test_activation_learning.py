"""Weights that see quantized activations, and learned activation scales."""

import copy
from typing import Any

import pytest
import torch
from networks import small_resnet, small_vit
from torch import Tensor, nn

from logart import QuantConfig, quantize_model
from logart.grids.activations import EvenGrid
from logart.quantization.activation_learning import learn_steps
from logart.quantization.activation_quantizer import ActivationQuantizer, attach, quantizers
from logart.quantization.cache import Captured
from logart.quantization.capture import Call

NETWORK, IMAGES = small_resnet()
FAST: dict[str, Any] = {"calib_samples": 8, "batch_size": 4, "n_bits_a": 3, "seed": 1}


def quantized(rounding: str, **settings: Any) -> nn.Module:
    config = QuantConfig(**{**FAST, "rounding": rounding, "iters": 8, "lr": 0.1, **settings})
    return quantize_model(NETWORK, config, IMAGES)[0]


def error(model: nn.Module) -> float:
    """On the calibration images."""
    return float((model(IMAGES[:8]) - NETWORK(IMAGES[:8])).detach().square().mean())


@pytest.mark.parametrize(
    ("rounding", "settings"),
    [
        ("compensated", {}),
        ("learned", {}),
        ("both", {}),
        ("nearest", {"search_method": "layer_wise", "search_samples": 8}),
        ("nearest", {"search_method": "block_wise", "search_samples": 8}),
    ],
)
def test_weights_see_quantized_activations_where_asked(rounding: str, settings: dict[str, Any]) -> None:
    without, seeing = quantized(rounding, **settings), quantized(rounding, **settings, calibrate_with_act=True)
    codes = [
        {name: t for name, t in model.state_dict().items() if name.endswith(".codes")} for model in (without, seeing)
    ]
    assert codes[0].keys() == codes[1].keys()
    assert any(not torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    assert len(quantizers(seeing)) == 7 and all(q.even_grid and q.measured for q in quantizers(seeing).values())
    again = quantized(rounding, **settings, calibrate_with_act=True)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in seeing.state_dict().items())


def test_compensation_that_sees_quantized_activations_undoes_some_of_their_error() -> None:
    assert error(quantized("compensated", calibrate_with_act=True)) < 0.9 * error(quantized("compensated"))


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.layer.weight.data = torch.eye(4)
        attach(self.layer, 3).set_even(EvenGrid(0.5, 0, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


@pytest.mark.parametrize("scale", ["float", "pow2"])
def test_a_step_that_clips_is_learned_until_it_does_not(scale: str) -> None:
    block = OneLayer().requires_grad_(False)
    x = torch.arange(1.0, 8.0).repeat(64, 1)[:, :4] * 1.0 + 3.0  # up to 7, clipped at 3.5
    inputs, targets = Captured([Call((x,), {})]), Captured([x])
    config = QuantConfig(n_bits_a=3, iters_a=600, batch_size=16, act_scale=scale)  # type: ignore[arg-type]
    before = float(squared(block(x), x))
    assert learn_steps(block, inputs, targets, config, squared)
    q = block.layer.input_quantizer
    assert isinstance(q, ActivationQuantizer) and q.even_grid is not None and q.log_step is None and q.mix is None
    assert float(squared(block(x), x)) < 0.1 * before
    assert q.even_grid.step == (1.0 if scale == "pow2" else pytest.approx(1.0, abs=0.1))


def test_steps_that_do_not_lessen_the_error_are_reverted() -> None:
    block = OneLayer().requires_grad_(False)
    x = torch.rand(8, 4).div(0.5).round() * 0.5  # on the levels: nothing to gain
    state = copy.deepcopy(block.state_dict())
    config = QuantConfig(n_bits_a=3, iters_a=5, batch_size=4)
    assert not learn_steps(block, Captured([Call((x,), {})]), Captured([x]), config, squared)
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize(("rounding", "with_act"), [("compensated", False), ("nearest", True)])
def test_learned_scales_lessen_the_error_of_blocks_and_leave_codes_alone(rounding: str, with_act: bool) -> None:
    chosen = quantized(rounding, calibrate_with_act=with_act)
    learned = quantized(rounding, calibrate_with_act=with_act, iters_a=60)
    names = [name for name, _ in chosen.named_modules() if name.endswith("input_quantizer")]
    steps = [[model.get_submodule(name).even_grid.step for name in names] for model in (chosen, learned)]  # type: ignore[union-attr]
    assert steps[0] != steps[1]
    for name, tensor in chosen.state_dict().items():
        assert name.endswith(".step") or torch.equal(tensor, learned.state_dict()[name])
    assert error(learned) < error(chosen)


def test_mixed_inputs_mix_quantized_activations_too(monkeypatch: pytest.MonkeyPatch) -> None:
    q = ActivationQuantizer(2, torch.device("cpu"))
    q.set_even(EvenGrid(1.0, 0, 3))
    x = torch.full((4000,), 0.3)
    q.mix = 0.25, torch.Generator().manual_seed(0)
    share = float((q(x) == 0).double().mean())
    assert set(q(x).tolist()) == {0.0, x[0].item()} and share == pytest.approx(0.25, abs=0.03)
    seen: list[float] = []
    forward = ActivationQuantizer.forward

    def watched(self: ActivationQuantizer, x: Tensor) -> Tensor:
        seen.extend([] if self.mix is None else [self.mix[0]])
        return forward(self, x)

    monkeypatch.setattr(ActivationQuantizer, "forward", watched)
    network, images = small_vit()
    settings = {"rounding": "learned", "iters": 2, "iters_a": 2, "recon_input": "mixed", "drop_prob": 0.7}
    model, _ = quantize_model(network, QuantConfig(**{**FAST, **settings, "calibrate_with_act": True}), images)
    assert set(seen) == {0.7} and all(each.mix is None for each in quantizers(model).values())
