"""State is one truth: what a network answers, what its state dict says and what is saved agree, or are refused."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import small_resnet, small_vit
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn

from logart import QuantConfig, load_packed, quantize_model, save_packed, to_float
from logart.quantization.layers import hardware_approximation

IMAGES = small_resnet()[1]
CONFIG = QuantConfig(rounding="nearest", n_bits=4)
OTHER = QuantConfig(rounding="nearest", n_bits=3, scale_search="grid", zero_code=True, hardware_terms=2)  # type: ignore[arg-type]


def quantized(seed: int, config: QuantConfig = CONFIG) -> nn.Module:
    return quantize_model(small_resnet(seed)[0], config, IMAGES)[0]


def network(kind: str, seed: int, folder: Path, config: QuantConfig = CONFIG) -> nn.Module:
    """A network as `quantize_model` or `load_packed` gives it."""
    model = quantized(seed, config)
    if kind == "quantized":
        return model
    path = folder / f"{seed}.safetensors"
    save_packed(model, path)
    return load_packed(path, small_resnet(seed)[0], dequantize=kind)


KINDS = ("quantized", "once", "on-the-fly")


@pytest.mark.parametrize("config", [CONFIG, OTHER, QuantConfig(rounding="nearest", scale_method="linear_minmax")])
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("receiver", KINDS)
def test_a_loaded_state_is_what_the_network_answers_and_saves(
    receiver: str, source: str, config: QuantConfig, tmp_path: Path
) -> None:
    ours, theirs = network(receiver, 0, tmp_path), network(source, 1, tmp_path, config)
    wanted = theirs(IMAGES)
    assert not torch.equal(ours(IMAGES), wanted)
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=True), strict=receiver == source)
    assert torch.equal(ours(IMAGES), wanted)
    save_packed(ours, tmp_path / "again.safetensors", {})
    assert torch.equal(load_packed(tmp_path / "again.safetensors", small_resnet(0)[0])(IMAGES), wanted)
    assert list(ours.state_dict()) == list(theirs.state_dict())


EXTRA = "stem.quantized_weight._extra_state"


def without(state: dict[str, object], *ends: str) -> dict[str, object]:
    return {name: value for name, value in state.items() if not name.endswith(ends)}


def of_another_grid(said: torch.Tensor) -> torch.Tensor:
    text = bytes(said.tolist()).replace(b'"dynamic"', b'"unknown"')
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "_extra_state"), "layer stem: the state has codes, but not what their"),
        (
            lambda state: state | {"head.quantized_weight.codes": torch.zeros(2, 2, dtype=torch.uint8)},
            r"layer head: .*codes \[2, 2\]",
        ),
        (lambda state: small_resnet(1)[0].state_dict(), "layer stem: the state has a float weight"),
        (lambda state: state | {EXTRA: of_another_grid(state[EXTRA])}, "layer stem: "),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_says_a_part_is_refused(strict: bool, change: Callable[..., object], message: str) -> None:
    ours = quantized(0)
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict(change(dict(quantized(1).state_dict())), strict=strict)  # type: ignore[arg-type]


WRITES: tuple[Callable[[Tensor], object], ...] = (
    lambda w: w.mul_(0.5),
    lambda w: w.copy_(torch.ones_like(w)),
    lambda w: w[0].zero_(),
    lambda w: w.__setitem__((0, 0), 7),
    lambda w: w.data.add_(1),
    lambda w: w.detach().view(-1).fill_(3),
    lambda w: w.T.zero_(),
    nn.init.zeros_,
    nn.init.kaiming_uniform_,
)


@pytest.mark.parametrize("kind", ["quantized", "once"])
@pytest.mark.parametrize("write", WRITES)
def test_a_weight_that_was_written_to_acts_and_is_not_saved(
    write: Callable[[Tensor], object], kind: str, tmp_path: Path
) -> None:
    model = network(kind, 0, tmp_path)
    before = model(IMAGES)
    with torch.no_grad():
        write(model.head.weight)  # type: ignore[arg-type]
    answers = model(IMAGES)
    assert not torch.equal(answers, before)
    assert torch.equal(to_float(model)(IMAGES), answers)
    assert torch.allclose(copy.deepcopy(model).double()(IMAGES.double()).float(), answers, atol=1e-5)
    with pytest.raises(ValueError, match="its weight was written to"):
        save_packed(model, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="its weight was written to"):
        model.state_dict()
    with pytest.raises(ValueError, match="its weight was written to"), hardware_approximation(model, 2):
        pass
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("write", [*WRITES, lambda w: setattr(w, "data", torch.zeros(4, 12))])
def test_a_weight_that_is_read_on_the_fly_is_not_written_to(write: Callable[[Tensor], object], tmp_path: Path) -> None:
    model = network("on-the-fly", 0, tmp_path)
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be written to, its codes are all there is"):
        write(model.head.weight)  # type: ignore[arg-type]
    assert torch.equal(model(IMAGES), network("once", 0, tmp_path)(IMAGES))


def test_what_is_computed_of_a_weight_read_on_the_fly_is_a_plain_tensor(tmp_path: Path) -> None:
    model = network("on-the-fly", 0, tmp_path)
    weight, expected = model.head.weight, network("once", 0, tmp_path).head.weight  # type: ignore[union-attr]
    for plain in (weight.clone(), weight * 1, copy.deepcopy(weight), pickled(weight)):  # type: ignore[arg-type, operator, union-attr]
        assert type(plain) is Tensor and torch.equal(plain, expected)  # type: ignore[arg-type]
        plain.zero_()
    assert type(model(IMAGES)) is Tensor
    model.head.bias.requires_grad_()  # type: ignore[union-attr]
    model(IMAGES.clone().requires_grad_()).sum().backward()
    assert torch.equal(model.head.bias.grad, torch.full((4,), float(len(IMAGES))))  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_not_replaced_behind_its_codes(kind: str, tmp_path: Path) -> None:
    model = network(kind, 0, tmp_path)
    for weight in (torch.zeros(4, 12), nn.Parameter(torch.zeros(4, 12))):
        with pytest.raises((AttributeError, KeyError)):
            model.head.weight = weight  # type: ignore[union-attr, assignment]


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "trace": lambda model: torch.jit.trace(model, IMAGES),
    "export": lambda model: torch.export.export(model, (IMAGES,), strict=False).module(),
    "compile": lambda model: torch.compile(model, backend="eager"),
    "symbolic trace": torch.fx.symbolic_trace,
    "to_float": to_float,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_copies_traces_and_exports_give_the_same_logits(kind: str, how: str, tmp_path: Path) -> None:
    model = network(kind, 0, tmp_path)
    with torch.no_grad():
        assert torch.equal(COPIES[how](model)(IMAGES), model(IMAGES))


def test_a_network_on_the_fly_is_exported_with_its_codes_packed(tmp_path: Path) -> None:
    model = network("on-the-fly", 0, tmp_path)
    exported = torch.export.export(model, (IMAGES,), strict=False)
    packed = {name for name, _ in model.named_buffers() if name.endswith("packed_codes")}
    assert packed and packed == {name for name in exported.state_dict if name.endswith("packed_codes")}
    assert all(exported.state_dict[name].dtype == torch.uint8 for name in packed)
    largest = max(parameter.numel() for parameter in small_resnet(0)[0].parameters())
    assert all(constant.numel() < largest for constant in exported.constants.values())
    assert torch.equal(exported.module()(IMAGES), model(IMAGES))


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 does not say that it exports")
def test_a_strict_export_on_the_fly_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="expected strict=False, dequantize=.once., or to_float"):
        torch.export.export(network("on-the-fly", 0, tmp_path), (IMAGES,), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_network_has_the_quantized_weights_and_a_plain_state(kind: str, tmp_path: Path) -> None:
    model = network(kind, 0, tmp_path)
    plain = to_float(model)
    assert {type(m).__module__ for m in plain.modules()} <= {"networks", *(f"torch.nn.modules.{m}" for m in (
        "conv", "linear", "container", "activation"))}  # fmt: skip
    state = plain.state_dict()
    assert all(isinstance(tensor, Tensor) for tensor in state.values())
    fresh = small_resnet(2)[0]
    for name in [name for name, module in fresh.named_modules() if isinstance(module, nn.BatchNorm2d)]:
        fresh.set_submodule(name, nn.Identity())
    for module in fresh.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(len(module.weight)))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    assert torch.equal(model(IMAGES), network(kind, 0, tmp_path)(IMAGES))


def test_timms_own_linear_layers_are_quantized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), TimmLinear(192, 6), nn.ReLU(), TimmLinear(6, 4)).eval()
    for config in (CONFIG, QuantConfig(rounding="compensated", calib_samples=16)):
        network, report = quantize_model(model, config, IMAGES)
        assert [layer.name for layer in report.layers] == ["1", "3"] and report.skipped == []
        save_packed(network, tmp_path / "net.safetensors")
        assert torch.equal(load_packed(tmp_path / "net.safetensors", model)(IMAGES), network(IMAGES))
    assert type(to_float(network)[1]) is TimmLinear  # type: ignore[index]


def test_a_transformer_as_a_plain_network() -> None:
    model, images = small_vit()
    network, _ = quantize_model(model, CONFIG, images)
    plain = to_float(network)
    assert torch.equal(plain(images), network(images))
    assert list(plain.state_dict()) == list(model.state_dict())
