"""Quantized layers: torch's own forward on the weight of the codes; soft weights; state, sharing, approximation."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from codebooks import reassign, same_spec, scaled
from networks import quantized_twin
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from logart.grids.grid import Codebook, Spacing
from logart.grids.linear import linear_codebook
from logart.grids.logarithmic import log_codebook
from logart.grids.rounding import lower_neighbour, nearest, soft_round
from logart.quantization.clone import clone_sharing
from logart.quantization.layers import hardware_approximation
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.soft_rounding import SoftRounding
from logart.quantization.surgery import quantized_layers, replace_layers

CONVS: dict[str, Callable[[], nn.Conv2d]] = {
    "zeros": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(2, 1)),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", bias=False),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
    "replicate": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", dilation=2),
    "same": lambda: nn.Conv2d(4, 6, (4, 3), padding="same"),
    "timm same": lambda: Conv2dSame(4, 6, 3, stride=2),
}


def quantize(layer: nn.Module, n_bits: int = 4, k: int = 3, n_codebooks: int | None = None) -> QuantizedWeight:
    """A quantized layer, rounded to nearest on the mix k."""
    layer.requires_grad_(False)
    quantized = quantized_twin(layer, n_bits, n_codebooks)
    rows = quantized.rows
    quantized.set_codebook(log_codebook(rows.abs().amax(1), n_bits, k, dtype=rows.dtype))
    return quantized


def dequantized(layer: QuantizedWeight) -> Tensor:
    """The weight, element by element from codes and levels."""
    assert layer.codes is not None and layer.levels is not None
    flat = layer.codes.reshape(layer.n_codebooks, -1).tolist()
    levels = layer.levels.tolist()
    return torch.tensor([[levels[g][code] for code in row] for g, row in enumerate(flat)]).reshape(layer.codes.shape)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("n_codebooks", [None, 1])
def test_a_convolution_runs_on_the_levels_of_its_codes(name: str, n_codebooks: int | None) -> None:
    torch.manual_seed(0)
    layer = CONVS[name]()
    x = torch.randn(2, 4, 7, 8)
    float_output = layer(x)
    quantized = quantize(layer, n_codebooks=n_codebooks)
    weight = dequantized(quantized)
    assert torch.equal(quantized.weight, weight)
    if name == "timm same":
        padded, padding = pad_same(x, [3, 3], [2, 2]), 0
    elif layer.padding_mode == "zeros":
        padded, padding = x, layer.padding  # type: ignore[assignment]
    else:
        padded, padding = F.pad(x, [layer.padding[0]] * 4, layer.padding_mode), 0  # type: ignore[list-item]
    expected = F.conv2d(padded, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
    assert torch.equal(quantized.module(x), expected)
    assert not torch.allclose(quantized.module(x), float_output, rtol=1e-3)
    assert isinstance(quantized.module, type(layer))


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_a_linear_layer_runs_on_the_levels_of_its_codes(shape: tuple[int, ...]) -> None:
    quantized = quantize(nn.Linear(8, 3))
    x = torch.randn(shape)
    assert torch.equal(quantized.module(x), F.linear(x, dequantized(quantized), quantized.bias))  # type: ignore[arg-type]


def test_before_rounding_it_is_the_float_layer() -> None:
    layer = nn.Conv2d(4, 6, 3)
    quantized = quantized_twin(layer, 4)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(quantized.module(x), layer(x))
    assert type(layer) is nn.Conv2d and "weight" in layer._parameters
    assert quantized.codes is None and quantized.levels is None


def test_parameters_are_shared_not_copied() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    clone = clone_sharing(model)
    replace_layers(clone, {"0": 4, "2": 4}, channel_wise=True)
    for name in ("0", "2"):
        quantized = quantized_layers(clone)[name]
        assert quantized.float_weight is not None
        assert quantized.float_weight.data_ptr() == model.get_submodule(name).weight.data_ptr()  # type: ignore[operator, union-attr]
        assert quantized.bias is not None and quantized.bias.data_ptr() == model.get_submodule(name).bias.data_ptr()  # type: ignore[operator, union-attr]
        quantized.set_codebook(log_codebook(quantized.rows.abs().amax(1), 4, 2))
    assert len({id(m) for m in (*model.modules(), *clone.modules())}) == 10  # no module is in both


def test_the_state_dict_holds_codes_and_levels_and_nothing_twice() -> None:
    quantized = quantize(nn.Conv2d(4, 6, 3), n_bits=3)
    state = quantized.state_dict()
    extra = json.loads(bytes(state.pop("_extra_state").tolist()))
    assert {name: extra[name] for name in ("n_bits", "n_codebooks", "dtype")} == {
        "n_bits": 3,
        "n_codebooks": 6,
        "dtype": "float32",
    }
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "float_weight": ((6, 4, 3, 3), torch.float32),
        "codes": ((6, 4, 3, 3), torch.uint8),
        "levels": ((6, 8), torch.float64),
    }
    x = torch.randn(2, 4, 5, 5)
    before = quantized.module(x)
    quantized.discard_float_weight()
    assert "float_weight" not in quantized.state_dict()
    assert torch.equal(quantized.module(x), before)
    assert torch.equal(dequantized(quantized), quantized.weight)


def test_a_linear_codebook_comes_back_linear() -> None:
    quantized = quantize(nn.Linear(8, 3))
    quantized.set_codebook(linear_codebook(quantized.rows.amin(1), quantized.rows.amax(1), 4))
    assert quantized.codebook.spacing is Spacing.LINEAR
    assert torch.equal(dequantized(quantized), quantized.weight)


def test_the_codebook_comes_back_as_it_was_set() -> None:
    quantized = quantized_twin(nn.Linear(8, 3), 4)
    codebook = log_codebook(quantized.rows.abs().amax(1), 4, torch.tensor([0, 8, 3]), terms=2)
    quantized.set_codebook(codebook)
    back = quantized.codebook
    assert torch.equal(back.levels, codebook.levels) and back.spacing is Spacing.LOG
    assert same_spec(back.spec, codebook.spec)
    assert torch.equal(quantized.codes.flatten(1), nearest(quantized.rows, codebook))


def test_given_codes_are_taken() -> None:
    quantized = quantize(nn.Linear(8, 3))
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    quantized.set_codebook(quantized.codebook, codes)
    assert quantized.codes is not None and torch.equal(quantized.codes, codes)
    assert torch.equal(quantized.weight, quantized.codebook.levels.gather(1, codes.long()).float())


# ---------------------------------------------------------------- learning


def codebooks() -> dict[str, Codebook]:
    absmax = torch.tensor([1.0, 3.0], dtype=torch.float64)
    return {
        "log_2": log_codebook(absmax, 4, 8, dtype=torch.float64),
        "mixed": log_codebook(absmax, 4, 3, dtype=torch.float64),
        "approximated": log_codebook(absmax, 4, 0, terms=2, dtype=torch.float64),
        "2 bits": log_codebook(absmax, 2, 1, dtype=torch.float64),
        "linear": linear_codebook(-absmax, absmax / 2, 4),
    }


@pytest.mark.parametrize("name", codebooks())
def test_soft_weights_start_as_the_float_ones_within_the_range(name: str) -> None:
    codebook = codebooks()[name]
    torch.manual_seed(0)
    w = torch.cat([torch.randn(2, 500, dtype=torch.float64), 0.01 * torch.randn(2, 100, dtype=torch.float64)], 1)
    w = torch.cat([w, codebook.levels, torch.zeros(2, 1)], 1)
    soft, penalty = SoftRounding(w, codebook)()
    lowest, highest = codebook.levels[:, :1], codebook.levels[:, -1:]
    clipped = w.clamp(lowest, highest)
    within = torch.ones_like(w, dtype=torch.bool)
    if codebook.spacing is Spacing.LOG:
        smallest = codebook.levels.abs().amin(1, keepdim=True)
        within = w.abs() >= smallest
        # Below the smallest magnitude there is no level to start at: near the one of its own sign, and free to move.
        below = soft[~within] / smallest.expand_as(w)[~within]
        assert bool((below.sign() == torch.where(w[~within] < 0, -1, 1)).all())
        assert bool(((below.abs() > 0.7) & (below.abs() < 1)).all())
        assert int((~within).sum()) > 3
    torch.testing.assert_close(soft[within], clipped[within], rtol=1e-9, atol=1e-12)
    assert float(penalty.detach()) == 0


def plain_soft_round(alpha: Tensor, lo: Tensor, hi: Tensor, log: bool, beta: float | None) -> tuple[Tensor, Tensor]:
    """DESIGN section 4 as it is written."""
    h = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
    geometric = lo.sign() * lo.abs() ** (1 - h) * hi.abs() ** h
    soft = torch.where((lo * hi > 0) & log, geometric, lo * (1 - h) + hi * h)
    return soft, alpha.new_zeros(()) if beta is None else (1 - (2 * h - 1).abs() ** beta).sum()


@pytest.mark.parametrize("name", codebooks())
@pytest.mark.parametrize("beta", [None, 20.0, 2.0, 3.7])
def test_the_written_out_gradient_is_the_one_of_the_formula(name: str, beta: float | None) -> None:
    codebook = codebooks()[name]
    torch.manual_seed(1)
    w = torch.randn(2, 200, dtype=torch.float64) * torch.logspace(-2, 0, 200).double()
    soft_rounding = SoftRounding(w, codebook)
    alpha = 2.5 * torch.randn(w.shape, dtype=torch.float64)  # some clipped at either end
    lower = lower_neighbour(w, codebook).long()
    lo, hi = codebook.levels.gather(1, lower), codebook.levels.gather(1, lower + 1)
    vjp = torch.randn_like(w)
    gradients = []
    for plainly in (True, False):
        leaf = alpha.clone().requires_grad_()
        if plainly:
            soft, penalty = plain_soft_round(leaf, lo, hi, codebook.spacing is Spacing.LOG, beta)
        else:
            soft, penalty = soft_round(leaf, soft_rounding.lo, soft_rounding.a, soft_rounding.b, beta)
        ((soft * vjp).sum() + 0.3 * penalty).backward()
        assert leaf.grad is not None
        gradients.append((soft.detach(), penalty.detach(), leaf.grad))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    clipped = (gradients[0][2] == 0).double().mean()
    assert 0 < float(clipped) < 0.8


def test_the_penalty_alone_and_the_soft_weight_alone_have_gradients() -> None:
    """Where only one of the two outputs enters the loss."""
    codebook = codebooks()["mixed"]
    w = torch.randn(2, 20, dtype=torch.float64)
    for pick in (0, 1):
        soft_rounding = SoftRounding(w, codebook)
        soft_rounding(4.0)[pick].sum().backward()
        assert soft_rounding.alpha.grad is not None and bool((soft_rounding.alpha.grad != 0).any())


def test_halfway_between_two_levels_learning_ends_on_the_upper_one() -> None:
    quantized = quantize(nn.Conv2d(4, 6, 3))
    soft_rounding = quantized.start_learning()
    lower = lower_neighbour(quantized.rows, quantized.codebook)
    torch.nn.init.zeros_(soft_rounding.alpha)  # h = 1/2
    assert torch.equal(soft_rounding.codes(), lower + 1)
    torch.nn.init.constant_(soft_rounding.alpha, -1e-6)
    assert torch.equal(soft_rounding.codes(), lower)


def test_learning_ends_on_a_neighbour_of_every_weight() -> None:
    torch.manual_seed(0)
    quantized = quantize(nn.Conv2d(4, 6, 3))
    soft_rounding = quantized.start_learning()
    torch.nn.init.normal_(soft_rounding.alpha, 0, 3)
    up = torch.sigmoid(soft_rounding.alpha.detach()) * 1.2 - 0.1 >= 0.5
    lower = lower_neighbour(quantized.rows, quantized.codebook)
    quantized.finish_learning()
    assert quantized.codes is not None
    assert torch.equal(quantized.codes.flatten(1), lower + up.to(torch.uint8))
    assert quantized.soft is None and "soft.alpha" not in quantized.state_dict()
    assert torch.equal(quantized.weight, dequantized(quantized))


def test_forward_uses_soft_weights_while_learning() -> None:
    torch.manual_seed(0)
    quantized = quantize(nn.Linear(8, 3))
    x = torch.randn(5, 8)
    soft_rounding = quantized.start_learning()
    torch.nn.init.normal_(soft_rounding.alpha, 0, 1)
    penalty = quantized.update_soft_weight(3.0)
    soft, expected_penalty = soft_rounding(3.0)
    assert torch.equal(quantized.module(x), F.linear(x, soft, quantized.bias))  # type: ignore[arg-type]
    assert torch.equal(penalty, expected_penalty)
    quantized.module(x).sum().backward()
    assert soft_rounding.alpha.grad is not None


def test_learning_from_codes_ends_at_them_or_one_level_towards_the_target() -> None:
    torch.manual_seed(0)
    quantized = quantize(nn.Conv2d(4, 6, 3), k=0)
    codes = torch.randint(1, 15, quantized.rows.shape, dtype=torch.uint8)
    quantized.set_codes(codes)
    target = 2 * torch.randn(quantized.shape)
    quantized.start_learning(target)
    quantized.finish_learning()
    assert quantized.codes is not None and torch.equal(quantized.codes.flatten(1), codes)
    soft_rounding = quantized.start_learning(target)
    towards = torch.where(target.flatten(1).double() < quantized.codebook.levels.gather(1, codes.long()), -1, 1)
    with torch.no_grad():
        soft_rounding.alpha.copy_(3.0 * towards)
    quantized.finish_learning()
    assert torch.equal(quantized.codes.flatten(1).long(), codes.long() + towards)
    assert 0 < int((towards > 0).sum()) < towards.numel()


@pytest.mark.parametrize("codebooks_of", [6, 1])
def test_a_codebook_with_every_option_comes_back_as_it_was_set(codebooks_of: int) -> None:
    torch.manual_seed(0)
    quantized = quantized_twin(nn.Linear(8, 6), 3, codebooks_of)
    scale = torch.linspace(0.4, 1.25, codebooks_of, dtype=torch.float64)
    plain = scaled(log_codebook(quantized.rows.abs().amax(1), 3, 2, terms=3), scale)
    codebook = reassign(plain, quantized.rows, asymmetric=True, zero_code=True)
    quantized.set_codebook(codebook)
    back = quantized.codebook
    assert torch.equal(back.levels, codebook.levels) and same_spec(back.spec, codebook.spec)
    exact = quantized.weight.clone()
    with hardware_approximation(quantized, 2):
        assert torch.equal(quantized.codebook.levels, codebook.with_terms(2).levels)
        assert torch.equal((quantized.weight == 0), exact == 0) and not torch.equal(quantized.weight, exact)
    assert torch.equal(quantized.weight, exact)


# ---------------------------------------------------------------- approximation at test time


@pytest.mark.parametrize("terms", [2, 3, 4])
def test_the_approximation_keeps_codes_and_goes_away(terms: int) -> None:
    torch.manual_seed(0)
    first, second = quantize(nn.Conv2d(4, 6, 3)), quantize(nn.Linear(8, 3), k=0)
    linear = quantize(nn.Linear(8, 3))
    linear.set_codebook(linear_codebook(linear.rows.amin(1), linear.rows.amax(1), 4))
    model = nn.ModuleList([layer.module for layer in (first, second, linear)])
    before = copy.deepcopy(model.state_dict())
    exact = [layer.weight.clone() for layer in (first, second, linear)]
    factor = {2: 1.5, 3: 1.4375, 4: 1.421875}[terms] / 2**0.5
    with pytest.raises(KeyError), hardware_approximation(model, terms):
        for layer, weight in zip((first, second), exact, strict=False):
            ratio = (layer.weight / weight).double()
            odd = (ratio - 1).abs() > 1e-6
            torch.testing.assert_close(ratio[odd], torch.full_like(ratio[odd], factor), rtol=1e-6, atol=0)
            assert 0 < int(odd.sum()) < odd.numel()
            index = 0 if layer is first else 1
            assert layer.codes is not None
            assert torch.equal(layer.codes, before[f"{index}.quantized_weight.codes"])
        assert torch.equal(linear.weight, exact[2])
        raise KeyError
    after = model.state_dict()
    assert list(after) == list(before)
    tensors = [name for name, value in before.items() if isinstance(value, Tensor)]
    assert len(tensors) > 6 and all(torch.equal(after[name], before[name]) for name in tensors)
    assert all(torch.equal(m.weight, w) for m, w in zip(model, exact, strict=True))  # type: ignore[arg-type]


def test_the_approximation_needs_no_float_weight() -> None:
    quantized = quantize(nn.Linear(8, 3), k=0)
    quantized.discard_float_weight()
    exact = quantized.weight.clone()
    with hardware_approximation(quantized, 2):
        assert not torch.equal(quantized.weight, exact)
    assert torch.equal(quantized.weight, exact)
