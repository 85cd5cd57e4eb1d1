"""Quantized activations: levels of least error, at most 2^n values, the same weights as without, state that follows."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import small_resnet
from torch import Tensor, nn

from logart import QuantConfig, load_packed, quantize_model, save_packed, to_float
from logart.errors import UserError
from logart.grids.activations import ActScale, EvenGrid, Seen, choose_even_grid, code_range, even_error, quantize_even
from logart.packed.block_state import load_state, save_state
from logart.packed.file import PackedFileError
from logart.quantization.activation_quantizer import ActivationQuantizer, Measured, quantizers
from logart.quantization.activation_stage import seen_by
from logart.quantization.cache import Captured
from logart.quantization.capture import Call
from logart.quantization.config import describe
from logart.quantization.state import StageResult

NETWORK, IMAGES = small_resnet()
FAST = {"rounding": "compensated", "calib_samples": 8, "batch_size": 4}
WEIGHTS = QuantConfig(**FAST)  # type: ignore[arg-type]


def quantized(n_bits_a: int = 4, **settings: object) -> nn.Module:
    return quantize_model(NETWORK, QuantConfig(**FAST, n_bits_a=n_bits_a, **settings), IMAGES)[0]  # type: ignore[arg-type]


def plain_error(x: np.ndarray, step: float, low: int, high: int) -> float:
    q = np.clip(np.floor(x.astype(np.float64) / step + 0.5), low, high) * step
    return float((np.abs(q - x) ** 2.4).sum())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_the_scale_leaves_the_least_error_of_power_2_4(n_bits: int, signed: bool) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(n_bits)) ** 3
    x = x if signed else x.abs()
    low, high = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
    pow2 = choose_even_grid(Seen.of(x), n_bits, pow2=True)
    least = min(range(-30, 10), key=lambda e: plain_error(x.numpy(), 2.0**e, low, high))
    assert pow2 == EvenGrid(2.0**least, low, high)
    found = choose_even_grid(Seen.of(x), n_bits, pow2=False)
    best = min(plain_error(x.numpy(), step, low, high) for step in np.geomspace(1e-4, 40, 4000))
    assert (found.low, found.high) == (low, high)
    assert plain_error(x.numpy(), found.step, low, high) <= 1.05 * best  # steps tried are 4.4 % apart


def test_of_equal_values_the_grid_holds_zero_alone() -> None:
    assert choose_even_grid(Seen.of(torch.zeros(5)), 4, pow2=False) == EvenGrid(1.0, 0, 15)
    for pow2 in (False, True):
        grid = choose_even_grid(Seen.of(torch.full((5,), 3.0)), 3, pow2=pow2)
        assert float(quantize_even(torch.tensor(3.0), torch.tensor(grid.step), grid.low, grid.high)) == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_level_midpoint_and_end(dtype: torch.dtype) -> None:
    step = torch.tensor(0.25)
    x = torch.tensor([-9.0, -0.125, -0.0, 0.124, 0.125, 0.25, 1.62, 1.625, 99.0], dtype=dtype)
    wanted = torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.25, 0.25, 1.5, 1.75, 1.75], dtype=dtype)  # ties go up
    assert torch.equal(quantize_even(x, step, *code_range(4, True)), wanted)
    assert quantize_even(x, step, 0, 15).min() == 0


def test_gradients_pass_straight_through_within_the_range_and_reach_the_step() -> None:
    x = torch.tensor([-3.0, -0.6, 0.2, 0.7, 5.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    y = quantize_even(x, step, -2, 1)
    assert torch.equal(y, quantize_even(x.detach(), step.detach(), -2, 1))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    slopes = [-2, -1 + 1.2, 0 - 0.4, 1 - 1.4, 1]  # LSQ: the end codes beyond, q - x/step within
    assert step.grad is not None and float(step.grad) == pytest.approx(sum(slopes), abs=1e-6)


class Wide(nn.Module):
    """Gives a quantizer values of which every 64th belongs to another channel."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = ActivationQuantizer(4, torch.device("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)  # type: ignore[no-any-return]


def test_what_errors_are_measured_on_is_spread_evenly_over_images_and_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(6 * 64 * 4.0).reshape(6, 4, 64)
    inputs = Captured([Call((part,), {}) for part in x.split(2)])
    block = Wide()
    every = seen_by(block, block.quantizer, inputs, 4)
    assert torch.equal(every.values, x.flatten()) and every.counts == 1.0
    assert every.extremes == (0.0, 6 * 64 * 4 - 1)
    monkeypatch.setattr("logart.grids.activations.SAMPLE", 100)
    monkeypatch.setattr("logart.grids.activations.LARGEST", 33)
    some = seen_by(block, block.quantizer, inputs, 4)
    assert isinstance(some.counts, Tensor) and some.extremes == every.extremes
    largest, others = some.values[some.counts == 1.0], some.values[some.counts > 1.0]
    assert sorted(largest.tolist()) == x.flatten()[-32:].tolist()  # the 33rd is a limit, which others may share
    assert 80 < len(others) <= 100 and len(set(others.diff().tolist())) == 1
    assert len({int(value) % 64 for value in others}) > 50
    assert float(some.counts.sum()) == pytest.approx(x.numel())


def test_a_grid_chosen_on_a_part_is_as_good_as_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a few values far out decide: on an even sample without them the error of all would be a fifth larger."""
    x = torch.relu(torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)))
    inputs, block = Captured([Call((part,), {}) for part in x.split(16)]), Wide()
    monkeypatch.setattr("logart.grids.activations.SAMPLE", 2**12)
    monkeypatch.setattr("logart.grids.activations.LARGEST", 2**12)
    part = seen_by(block, block.quantizer, inputs, 16)
    every = Seen.of(x)
    best = even_error(every, choose_even_grid(every, 8, pow2=False))
    assert float(even_error(every, choose_even_grid(part, 8, pow2=False)) / best) < 1.02
    sample = Seen.of(x.flatten()[::33])
    assert float(even_error(every, choose_even_grid(sample, 8, pow2=False)) / best) > 1.2


@pytest.mark.parametrize("n_bits_a", [2, 3, 6])
def test_every_layer_is_given_at_most_2_to_the_n_values(n_bits_a: int) -> None:
    model = quantized(n_bits_a, input_bits_a=8)
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: args[0]}))
    model(IMAGES)
    assert len(seen) == 7
    counts = {name: len(x.unique()) for name, x in seen.items()}
    assert 2**n_bits_a < counts.pop("stem") <= 256
    assert all(1 < count <= 2**n_bits_a for count in counts.values())
    assert any(count == 2**n_bits_a for count in counts.values())


def test_the_weights_are_those_of_a_run_with_float_activations() -> None:
    without, _ = quantize_model(NETWORK, WEIGHTS, IMAGES)
    model, report = quantize_model(NETWORK, QuantConfig(**FAST, n_bits_a=8), IMAGES)  # type: ignore[arg-type]
    ours, theirs = model.state_dict(), without.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    extra = set(ours) - set(theirs)
    assert extra and all(".input_quantizer." in name for name in extra)
    assert not torch.equal(model(IMAGES), without(IMAGES))
    assert torch.allclose(model(IMAGES), without(IMAGES), atol=0.1)
    assert [one.name for one in report.activations] == [layer.name for layer in report.layers]
    assert [one.signed for one in report.activations] == [True] + 6 * [False]  # images, then what ReLU gives


def test_a_layer_is_calibrated_on_what_the_quantized_network_before_it_gives() -> None:
    model = quantized(3)
    layer = model.get_submodule("blocks.0.conv2")
    seen: list[Tensor] = []
    handle = layer.input_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    for images in IMAGES[:8].split(4):
        model(images)
    handle.remove()
    wanted = choose_even_grid(Seen.of(torch.cat([x.flatten() for x in seen])), 3, pow2=False)
    assert layer.input_quantizer.even_grid == wanted  # type: ignore[union-attr]


def test_measured_error_and_saturation_are_of_the_calibration_images() -> None:
    model = quantized(3)
    q = model.get_submodule("blocks.1.conv1").input_quantizer
    assert isinstance(q, ActivationQuantizer) and q.even_grid is not None and q.measured is not None
    seen: list[Tensor] = []
    q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for images in IMAGES[:8].split(4):
        model(images)
    x = torch.cat([each.flatten() for each in seen]).double().numpy()
    step, low, high = q.even_grid
    assert q.measured.error == pytest.approx(plain_error(x, step, low, high) / (np.abs(x) ** 2.4).sum(), rel=1e-4)
    beyond = np.mean((x > (high + 0.5) * step) | (x < (low - 0.5) * step))
    assert q.measured.saturated == pytest.approx(beyond, abs=1e-9) and beyond > 0


def test_with_a_hardware_approximation_steps_are_powers_of_two() -> None:
    assert QuantConfig(hardware_terms=2).actual_act_scale is ActScale.POW2
    assert QuantConfig().actual_act_scale is ActScale.FLOAT
    model = quantized(5, hardware_terms=2)
    steps = [q.even_grid.step for q in quantizers(model).values() if q.even_grid]
    assert len(steps) == 7 and all(np.frexp(step)[0] == 0.5 for step in steps)


def test_copies_states_files_and_plain_networks_answer_the_same(tmp_path: Path) -> None:
    model = quantized(4)
    wanted = model(IMAGES)
    assert torch.equal(copy.deepcopy(model)(IMAGES), wanted)
    assert torch.equal(to_float(model)(IMAGES), wanted)
    other = quantize_model(NETWORK, QuantConfig(**FAST, n_bits_a=8, n_bits=3), IMAGES)[0]  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES), wanted)
    for how in ("once", "on-the-fly"):
        save_packed(model, tmp_path / "net.safetensors")
        loaded = load_packed(tmp_path / "net.safetensors", NETWORK, dequantize=how)
        assert torch.equal(loaded(IMAGES), wanted)
        save_packed(loaded, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()
    traced = torch.jit.trace(model, IMAGES[:2])  # type: ignore[no-untyped-call]
    assert torch.equal(traced(IMAGES), wanted)


def test_levels_keep_their_type_when_the_network_is_moved() -> None:
    model = quantized(4)
    before = {name: q.tensors() for name, q in quantizers(model).items()}
    model.half().float()
    for name, q in quantizers(model).items():
        assert all(torch.equal(tensor, before[name][kind]) for kind, tensor in q.tensors().items())


def test_a_state_of_a_block_has_its_quantizers(tmp_path: Path) -> None:
    found = quantizers(quantized(4))
    save_state(tmp_path / "state", found, StageResult(2.0))
    fresh = {name: ActivationQuantizer(8, torch.device("cpu")) for name in found}
    assert load_state(tmp_path / "state", fresh).seconds == 2.0
    for name, q in found.items():
        assert fresh[name].n_bits == 4 and fresh[name].measured == q.measured and isinstance(q.measured, Measured)
        assert fresh[name].even_grid == q.even_grid
    with pytest.raises(PackedFileError, match="no state of"):
        load_state(tmp_path / "state", {"other": ActivationQuantizer(8, torch.device("cpu"))})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": torch.tensor(-1.0)}, "make no levels"),
        ({"limits": torch.tensor([0, 14], dtype=torch.int32)}, "make no levels"),
        ({"limits": None}, "make no levels"),
    ],
)
def test_damaged_levels_are_refused(change: dict[str, Tensor | None], said: str) -> None:
    q = ActivationQuantizer(4, torch.device("cpu"))
    q.set_even(EvenGrid(0.5, 0, 15))
    tensors = {name: tensor for name, tensor in {**q.tensors(), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=said):
        q.take(tensors)
    model = quantized(4)
    state = model.state_dict()
    for name, tensor in change.items():
        state.pop(f"stem.input_quantizer.{name}")
        if tensor is not None:
            state[f"stem.input_quantizer.{name}"] = tensor
    with pytest.raises(RuntimeError, match="stem.input_quantizer"):
        model.load_state_dict(state)


def test_a_file_whose_quantizer_belongs_to_no_layer_is_refused(tmp_path: Path) -> None:
    model = quantized(4)
    model.blocks[0].act = nn.Identity()  # type: ignore[index,union-attr]
    model.blocks[0].act.input_quantizer = model.stem.input_quantizer  # type: ignore[index,union-attr]
    save_packed(model, tmp_path / "net.safetensors", {})
    with pytest.raises(UserError, match=r"nothing that blocks\.0\.act\.input_quantizer"):
        load_packed(tmp_path / "net.safetensors", NETWORK)


@pytest.mark.parametrize("name", ["n_bits_a", "input_bits_a", "head_bits_a"])
def test_widths_out_of_range_are_refused(name: str) -> None:
    for bits in (0, 1, 17, 33):
        with pytest.raises(ValueError, match=f"{name} must be 2 to 16"):
            QuantConfig(**{name: bits})  # type: ignore[arg-type]


def test_inputs_and_heads_may_have_widths_of_their_own() -> None:
    model, report = quantize_model(
        NETWORK,
        QuantConfig(**FAST, n_bits_a=4, input_bits_a=8, head_bits_a=32),
        IMAGES,  # type: ignore[arg-type]
    )
    bits = {one.name: one.n_bits for one in report.activations}
    assert bits["stem"] == 8 and set(bits.values()) == {4, 8} and "head" not in bits
    settings = {"act_scale": "auto", "hardware_terms": 2, "n_bits_a": 4}
    shown = describe(QuantConfig(**FAST, **settings, input_bits_a=8))  # type: ignore[arg-type]
    assert "activations 4 bits (input 8 bits, powers of two)" in shown
    assert model.packed_info["activations"]["stem"]["bits"] == 8  # type: ignore[index,union-attr]
