"""Quantized inputs of weights that functions use: every product sees the levels, whoever calls it, copied or loaded."""

import copy
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from functional_networks import IMAGES, NETWORKS, made
from networks import Graph
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from logart import QuantConfig, load_packed, quantize_model, save_packed, to_float
from logart.grids.activations import Seen, choose_even_grid
from logart.quantization.activation_quantizer import quantized_name, quantizers
from logart.quantization.input_quantized import InputQuantized
from logart.quantization.layer_report import Report
from logart.quantization.surgery import quantized_layers

FAST: dict[str, Any] = {"rounding": "nearest", "calib_samples": 8, "batch_size": 4, "n_bits_a": 3}
ATEN = torch.ops.aten


def quantized(
    model: nn.Module, block_types: Sequence[str] | None = None, **settings: Any
) -> tuple[nn.Module, Report]:
    return quantize_model(model, QuantConfig(**{**FAST, **settings}), IMAGES, block_types=block_types)


class Operands(TorchDispatchMode):
    """What the kernels multiply each weight with: below all that is Python's, so that nothing changes it any more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = quantized_layers(model)
        self.names = {layer.weight.untyped_storage().data_ptr(): name for name, layer in layers.items()}
        self.seen: dict[str, list[Tensor]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (ATEN.mm, ATEN.bmm, ATEN.addmm, ATEN.convolution):
            at = {ATEN.addmm: (1, 2)}.get(func.overloadpacket, (0, 1))
            for x, weight in ((args[at[0]], args[at[1]]), (args[at[1]], args[at[0]])):
                name = self.names.get(weight.untyped_storage().data_ptr())
                if name is not None:
                    self.seen[name].append(x.clone())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operands(model: nn.Module) -> dict[str, list[Tensor]]:
    with Operands(model) as seen:
        model(IMAGES)
    return seen.seen


@pytest.mark.parametrize("with_act", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_multiplied_with_at_most_2_to_the_n_values(name: str, with_act: bool) -> None:
    """Of the decoder's layers all but the transposed ones, whose kernels are given what lies in their memory."""
    model, report = quantized(made(name), calibrate_with_act=with_act, rounding="compensated")
    seen = operands(model)
    assert set(seen) == set(NETWORKS[name][1]) <= {one.name for one in report.activations}
    assert report.float_products == []
    for of_layer in seen.values():
        for x in of_layer:
            assert 1 < len(x.unique()) <= 8


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_copies_states_files_and_plain_networks_answer_the_same(name: str, tmp_path: Path) -> None:
    float_model = made(name)
    model, _ = quantized(float_model)
    wanted = model(IMAGES)
    assert not torch.equal(wanted, quantized(float_model, n_bits_a=32)[0](IMAGES))
    assert torch.equal(copy.deepcopy(model)(IMAGES), wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)(IMAGES), wanted)
    assert torch.equal(torch.jit.trace(model, IMAGES[:2])(IMAGES), wanted)  # type: ignore[no-untyped-call]
    plain = to_float(model)
    assert torch.equal(plain(IMAGES), wanted) and torch.equal(to_float(plain)(IMAGES), wanted)
    assert quantized_layers(plain) == {} and set(float_model.state_dict()) <= set(plain.state_dict())
    plain.load_state_dict({name: tensor * 2 for name, tensor in plain.named_parameters()}, strict=False)
    assert not torch.equal(plain(IMAGES), wanted)
    other, _ = quantized(float_model, n_bits_a=8, n_bits=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES), wanted)
    save_packed(model, tmp_path / "net.safetensors")
    for how in ("once", "on-the-fly"):
        loaded = load_packed(tmp_path / "net.safetensors", float_model, dequantize=how)
        assert torch.equal(loaded(IMAGES), wanted)
        save_packed(loaded, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def rows(x: Tensor) -> Tensor:
    return x.flatten(1)


class Inside(Graph):
    """Is a block."""


def in_parts() -> nn.Module:
    """One weight, sliced: of its two products the inputs differ."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = rows(x)
        return m.b(torch.cat([F.linear(x, m.a.weight[:4]), F.linear(x.abs(), m.a.weight[4:])], 1))  # type: ignore[no-any-return]

    return nn.Sequential(Inside(forward, a=nn.Linear(192, 6), b=nn.Linear(6, 6)))


def tied_in_a_block() -> nn.Module:
    layers = {"a": nn.Linear(192, 192), "b": nn.Linear(192, 192)}
    layers["b"].weight = layers["a"].weight
    return nn.Sequential(Inside(lambda m, x: m.b(F.relu(m.a(rows(x)))), **layers))


def tied() -> nn.Module:
    """In two blocks, of which no one can choose the levels."""
    blocks = [
        Inside(lambda m, x: F.relu(m.b(m.a(rows(x)))), a=nn.Linear(192, 192), b=nn.Linear(192, 192)) for _ in range(2)
    ]
    blocks[1].a.weight = blocks[0].a.weight  # type: ignore[assignment]
    return nn.Sequential(*blocks, nn.Linear(192, 4))


def layer_and_function() -> nn.Module:
    return Graph(lambda m, x: m.a(rows(x)) + rows(x).square() @ m.a.weight.t(), a=nn.Linear(192, 5))


def cross_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, kv = x.flatten(2), x.flatten(2).square()
        return m.a(q, kv, kv, need_weights=False)[0]  # type: ignore[no-any-return]

    return Graph(forward, a=nn.MultiheadAttention(64, 4, batch_first=True))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (in_parts, "0.a"),
        (tied, "0.a"),
        (tied_in_a_block, "0.a"),
        (layer_and_function, "a"),
        (cross_attention, "a.in_proj_weight"),
    ],
)
def test_a_weight_that_is_used_several_times_has_levels_for_all_that_it_is_multiplied_with(
    build: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    float_model = build().eval()
    model, report = quantized(float_model, block_types=["Inside"] if name == "0.a" else None)
    quantizer = next(q for path, q in quantizers(model).items() if quantized_name(path) == name)
    inputs: list[Tensor] = []
    with torch.no_grad():
        handle = quantizer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten()))
        for images in IMAGES[:8].split(4):
            model(images)
        handle.remove()
    assert quantizer.n_uses == len(inputs) // 2 == (3 if build is cross_attention else 2)
    if build not in (tied, tied_in_a_block):  # whose second input depends on the levels
        assert quantizer.even_grid == choose_even_grid(Seen.of(torch.cat(inputs)), 3, pow2=False)
    assert report.float_products == []
    wanted = model(IMAGES)
    save_packed(model, tmp_path / "net.safetensors")
    for how in ("once", "on-the-fly"):
        assert torch.equal(load_packed(tmp_path / "net.safetensors", float_model, dequantize=how)(IMAGES), wanted)
    assert torch.equal(copy.deepcopy(model)(IMAGES), wanted) and torch.equal(to_float(model)(IMAGES), wanted)


def test_learning_reaches_rounding_and_steps_through_a_function() -> None:
    float_model = made("projected")
    model, _ = quantized(
        float_model, rounding="learned", iters=6, iters_a=6, calibrate_with_act=True, recon_input="mixed", lr=0.1
    )
    without, _ = quantized(
        float_model, rounding="learned", iters=6, calibrate_with_act=True, recon_input="mixed", lr=0.1
    )
    names = [name for name in quantizers(model) if "qkv" in name]
    assert names == ["3.qkv.weight_input_quantizer", "4.qkv.weight_input_quantizer"]
    now, before = (quantizers(each) for each in (model, without))
    assert any(now[name].even_grid != before[name].even_grid for name in now)
    nearest = quantized_layers(quantized(float_model)[0])["3.qkv"].codes
    learned = quantized_layers(model)["3.qkv"].codes
    assert nearest is not None and learned is not None and not torch.equal(nearest, learned)


def in_vmap() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: F.linear(row, m.b.weight))(m.a(rows(x)))

    return nn.Sequential(Inside(forward, a=nn.Linear(192, 8), b=nn.Linear(8, 4)))


class Borrows(nn.Module):
    """Uses the weight of a layer that is none of its own."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__()
        self.own, self.lender = nn.Linear(8, 192), (lender,)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.own(x), self.lender[0].weight)


def borrowed() -> nn.Module:
    lender = nn.Linear(192, 4)
    return Graph(lambda m, x: m.b(m.a(rows(x))), a=nn.Linear(192, 8), b=Borrows(lender), lender=lender)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (in_vmap, ("0.b", "what it is multiplied with is not seen")),
        (borrowed, ("lender", "the block that uses it does not hold it")),
    ],
)
def test_what_cannot_be_quantized_is_named_with_its_reason(
    build: Callable[[], nn.Module], named: tuple[str, str]
) -> None:
    torch.manual_seed(1)
    model, report = quantized(build().eval(), block_types=["Borrows" if build is borrowed else "Inside"])
    assert report.float_products == [named]
    assert {one.name for one in report.activations} == {name for name in quantized_layers(model) if name != named[0]}
    assert all(quantizer.even_grid for quantizer in quantizers(model).values())


def test_only_products_with_the_weight_see_the_quantizer() -> None:
    """Elementwise use, a norm and a product with what is computed of it are as they are."""
    calls: list[Tensor] = []

    def quantize(x: Tensor) -> Tensor:
        calls.append(x)
        return x.round()

    weight, x = torch.randn(4, 6), torch.randn(3, 6)
    marked = InputQuantized.of(weight, quantize)
    for computed in (marked * x[0], x / marked.norm(), marked + weight, x @ (marked * x[:1]).t()):
        assert type(computed) is Tensor and not calls
    einsum = torch.einsum("bk,ck->bc", x, marked)
    for product in (x @ marked.t(), F.linear(x, marked), einsum, x @ marked.mT.double().float()):
        assert type(product) is Tensor
        assert torch.allclose(product, x.round() @ weight.t())
    assert len(calls) == 4 and marked.shape == weight.shape and marked.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("name", ["functional", "attention"])
def test_an_export_that_cannot_follow_is_refused_with_what_to_do(name: str) -> None:
    model, _ = quantized(made(name))
    with pytest.raises(Exception, match="expected strict=True"):
        torch.export.export(model, (IMAGES,), strict=False)
    exported = torch.export.export(model, (IMAGES,), strict=True).module()
    with torch.no_grad():
        assert torch.equal(exported(IMAGES), model(IMAGES))
        assert torch.equal(torch.compile(model, backend="eager")(IMAGES), model(IMAGES))
