"""Products of two activations between quantized operands, attention's say, and the log grids of what softmax gives."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from networks import small_vit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from logart import QuantConfig, load_packed, quantize_model, save_packed, to_float
from logart.grids.activations import Seen, choose_log_levels, quantize_log
from logart.grids.registry import GRIDS
from logart.quantization.activation_quantizer import ActivationQuantizer, quantizers
from logart.quantization.layers import runs_on_levels
from logart.quantization.product_quantizers import quantize_products
from logart.quantization.products import operand_name, operand_place

NETWORK, IMAGES = small_vit()
FAST: dict[str, Any] = {"rounding": "nearest", "calib_samples": 8, "batch_size": 4}


def quantized(**settings: Any) -> tuple[nn.Module, Any]:
    return quantize_model(NETWORK, QuantConfig(**{**FAST, "n_bits_a": 4, **settings}), IMAGES, block_types=["Block"])


def swin() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, patch_size=2, embed_dim=16, depths=(2, 2),
        num_heads=(2, 2), num_classes=5,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def small(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, num_classes=5, **kwargs)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # type: ignore[arg-type, union-attr]
    return model.eval().requires_grad_(False)


ATTENTION = ("q", "k", "attn", "v")
TWO = {"depth": 2, "embed_dim": 16, "patch_size": 8}
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[str, ...]]]] = {
    "vit": (lambda: NETWORK, dict.fromkeys(("blocks.0.attn", "blocks.1.attn"), ATTENTION)),
    "swin": (swin, {f"layers.{i}.blocks.{j}.attn": ATTENTION for i in (0, 1) for j in (0, 1)}),
    "beit": (
        lambda: small("beit_base_patch16_224", num_heads=2, **TWO),
        dict.fromkeys(("blocks.0.attn", "blocks.1.attn"), ATTENTION),
    ),
    "eva02": (
        lambda: small("eva02_tiny_patch14_224", num_heads=2, **TWO),
        dict.fromkeys(("blocks.0.attn", "blocks.1.attn"), ATTENTION),
    ),
    "cait, in whose heads other products lie between": (
        lambda: small("cait_xxs24_224", num_heads=2, **TWO),
        {
            **dict.fromkeys(("blocks.0.attn", "blocks.1.attn"), ("left0", "right0", "left1", "right1")),
            **dict.fromkeys(("blocks_token_only.0.attn", "blocks_token_only.1.attn"), ATTENTION),
        },
    ),
    "xcit, whose scores are of channels": (
        lambda: small("xcit_nano_12_p16_224", num_heads=2, depth=2, embed_dim=16),
        {f"{blocks}.{i}.attn": ATTENTION for blocks in ("blocks", "cls_attn_blocks") for i in (0, 1)},
    ),
    "torchvision's vit": (
        torchvision_vit,
        {f"encoder.layers.encoder_layer_{i}.self_attention": ATTENTION for i in (0, 1)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_networks_of_quantized_products_give_what_they_gave(kind: str) -> None:
    build, places = KINDS[kind]
    model = build()
    x = IMAGES if kind == "vit" else torch.randn(4, 3, 32, 32)
    ours = copy.deepcopy(model)
    assert quantize_products(ours, 4, [""], x[:2]) == []
    ran: list[str] = []
    for name, q in quantizers(ours).items():
        q.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert torch.allclose(ours(x), model(x), atol=1e-5)
    assert ran == [f"{name}.{own}_quantizer" for name, each in places.items() for own in each]
    model(x)  # is as it was
    assert not quantizers(model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operand_takes_at_most_2_to_the_n_values_and_files_bring_them_back(kind: str, tmp_path: Path) -> None:
    build, places = KINDS[kind]
    float_model = build()
    x = IMAGES if kind == "vit" else torch.randn(8, 3, 32, 32)
    model, report = quantize_model(float_model, QuantConfig(**{**FAST, "n_bits_a": 3}), x)
    assert report.float_products == []
    names = [one.name for one in report.activations]
    layers = {layer.name for layer in report.layers}
    operands = [f"{name}.{own}" for name, each in places.items() for own in each]
    assert len(names) == len(set(names)) == len(layers) + len(operands)  # of which some are called as layers are
    assert set(names) == layers | {f"{name}_quantizer" if name in layers else name for name in operands}
    with torch.no_grad(), Kernels(model) as kernels:
        wanted = model(x)
    assert len(kernels.seen) == 2 * sum(len(each) // 2 for each in places.values())
    counts = [len(operand.unique()) for operand in kernels.seen]
    assert max(counts) == 8 and sum(count > 4 for count in counts) >= len(counts) / 2  # small weights: even attention
    save_packed(model, tmp_path / "net.safetensors")
    for how in ("once", "on-the-fly"):
        with torch.no_grad():
            assert torch.equal(load_packed(tmp_path / "net.safetensors", float_model, dequantize=how)(x), wanted)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), wanted) and torch.equal(to_float(model)(x), wanted)


class Kernels(TorchDispatchMode):
    """The operands of products of two activations as the kernels are given them, below all that is Python's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self._fixed = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            if not any(x.untyped_storage().data_ptr() in self._fixed for x in args[-2:]):
                self.seen += [x.clone() for x in args[-2:]]
        return func(*args, **(kwargs or {}))


def test_the_report_names_operands_and_what_softmax_gives_has_no_sign() -> None:
    _, report = quantized(n_bits_a=3)
    by_name = {one.name: one for one in report.activations}
    assert {"blocks.0.attn.q", "blocks.0.attn.attn", "blocks.0.attn.qkv", "head"} <= by_name.keys()
    assert by_name["blocks.0.attn.q"].signed and not by_name["blocks.0.attn.attn"].signed


class Attends(nn.Module):
    """Products of what `multiply` makes of three thirds of a linear layer's output [B, N, 6]."""

    def __init__(self, multiply: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.multiply = nn.Linear(6, 18), multiply

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        return self.multiply(y[..., :6], y[..., 6:12], y[..., 12:])


def image_by_image(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([a.t() @ b + c.t() @ c for a, b, c in zip(q, k, v, strict=True)]).mT @ torch.ones(6, 6)


def with_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask, eye = torch.ones(len(q), len(q)).triu(1).bool(), torch.eye(6)
    args = (q, k, v, 6, 2, torch.cat([eye] * 3), None, None, None, False, 0.0, eye, None)
    return F.multi_head_attention_forward(*args, need_weights=False, attn_mask=mask)[0]


LEFT = {
    "a triple product": (
        lambda q, k, v: torch.einsum("bnd,bnd,bnd->bnd", q, k, v), "more than two activations are multiplied at once"
    ),
    "products that the batch decides on": (image_by_image, "how often it multiplies depends on the images"),
    "a mask": (with_a_mask, "attention is called with masks or groups that are not spelled out"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_products_that_stay_float_are_named(kind: str) -> None:
    multiply, why = LEFT[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Attends(multiply), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.randn(8, 3, 6)
    model(x)
    _, report = quantize_model(model, QuantConfig(**FAST, n_bits_a=8), x, block_types=["Attends"])
    assert report.float_products == [("1", why)]
    assert [one.name for one in report.activations] == ["0", "1.qkv", "3"]


def test_products_outside_of_blocks_are_named() -> None:
    known = copy.deepcopy(NETWORK)
    left = quantize_products(known, 4, ["patch_embed.proj"], IMAGES[:2])
    assert [name for name, _ in left] == ["blocks.0.attn", "blocks.1.attn"]
    assert {reason for _, reason in left} == {"it is in no block"} and not quantizers(known)


def test_what_gives_other_outputs_is_left_alone() -> None:
    model = nn.Sequential(Attends(partial(F.scaled_dot_product_attention, dropout_p=0.5)))
    assert quantize_products(model, 4, [""], torch.randn(2, 3, 6)) == [
        ("0", "with its products spelled out the network gave other outputs")
    ]
    assert type(model[0]) is Attends and not quantizers(model)


SDPA: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "biased": {"attn_mask": torch.randn(3, 3, generator=torch.Generator().manual_seed(0))},
    "masked": {"attn_mask": torch.ones(3, 3).tril().bool()},
}


@pytest.mark.parametrize("how", SDPA)
@torch.no_grad()
def test_fused_attention_as_two_products_is_what_it_is(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attends(partial(F.scaled_dot_product_attention, **SDPA[how]))), torch.randn(5, 3, 6)
    wanted = model(x)
    assert quantize_products(model, 4, [""], x[:2]) == [] and runs_on_levels(model[0])
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("batched", [True, False])
@torch.no_grad()
def test_an_attention_module_gives_what_it_gave(weights: dict[str, bool], batched: bool) -> None:
    torch.manual_seed(0)
    own = nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=6).eval()
    x = [torch.randn(*((4,) if batched else ()), n, width) for n, width in ((3, 8), (5, 4), (5, 6))]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = own

        def forward(self, images: Tensor) -> Any:
            return self.own(*x, **weights)

    model, wanted = Net(), own(*x, **weights)
    assert quantize_products(model, 4, [""], torch.zeros(2)) == [] and len(quantizers(model)) == 4
    for ours, theirs in zip(own(*x, **weights), wanted, strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, atol=1e-6)


def test_projections_and_products_of_an_attention_module_are_quantized() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mixed, self.head = (
                nn.Linear(6, 8),
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.Linear(8, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(self.mixed(x, x, x, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]

    model, report = quantize_model(Net().eval(), QuantConfig(**FAST, n_bits_a=8), torch.randn(8, 5, 6))
    names = {"first", "mixed.in_proj_weight", "mixed.out_proj", "head", *(f"mixed.{own}" for own in ATTENTION)}
    assert {one.name for one in report.activations} == names and report.float_products == []
    assert all(q.even_grid for q in quantizers(model).values())


@pytest.mark.parametrize("how", ["export", "strict export", "compile"])
@torch.no_grad()
def test_exports_have_the_levels(how: str) -> None:
    x = torch.randn(8, 3, 6)
    fused = nn.Sequential(Attends(F.scaled_dot_product_attention), Attends(lambda q, k, v: (q @ k.mT).softmax(-1) @ v))
    model, report = quantize_model(fused.eval(), QuantConfig(**FAST, n_bits_a=3), x, block_types=["Attends"])
    assert len(report.activations) == 10
    if how == "compile":
        follows = torch.compile(model, backend="eager")
    else:
        follows = torch.export.export(model, (x,), strict=how == "strict export").module()
    assert torch.equal(follows(x), model(x))


def test_a_trace_that_sees_no_products_is_refused() -> None:
    model = nn.Sequential(Attends(lambda q, k, v: q @ k.mT @ v))
    assert quantize_products(model, 4, [""], torch.randn(2, 3, 6)) == []
    with pytest.raises(ValueError, match="0 products of two tensors were seen; expected 2 to be quantized"):
        torch.fx.symbolic_trace(model)


def test_names_of_operands_are_read_back() -> None:
    for place in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (17, 1)]:
        for in_attention in (False, True):
            assert operand_place(operand_name(place, in_attention)) == place
    for name in ("q", "left0", "input_quantizer", "left_quantizer", "x_quantizer"):
        assert operand_place(name) is None


@pytest.mark.parametrize("name", ["log_2", "log_sqrt2"])
@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_a_log_grid_of_softmax_has_zero_and_powers(name: str, n_bits: int) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)).mul(3).softmax(0) * 40
    levels = choose_log_levels(Seen.of(x), GRIDS[name], n_bits)
    assert levels.shape == (2**n_bits,) and levels[0] == 0 and (levels.diff() > 0).all()
    half_steps = levels[1:].log2() * 2
    assert torch.allclose(half_steps, half_steps.round(), atol=1e-9)
    assert set(half_steps.round().diff().tolist()) <= {2.0 if name == "log_2" else 1.0}
    q = quantize_log(x, levels)
    ratio = (q / x)[(q > levels[1]) & (q < levels[-1])].log2().abs()
    assert ratio.max() <= (0.5 if name == "log_2" else 0.25) + 1e-6  # nearest in the log domain
    assert torch.equal(quantize_log(q, levels), q)
    assert quantize_log(torch.zeros(3), levels).tolist() == [0.0] * 3


def test_the_gradient_of_a_log_grid_passes_straight_through() -> None:
    x = torch.rand(20, requires_grad=True)
    y = quantize_log(x, torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    assert torch.equal(y, quantize_log(x.detach(), torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(20))


@pytest.mark.parametrize("grid", ["uniform", "log_2", "log_sqrt2"])
def test_states_and_files_of_transformers_answer_the_same(grid: str, tmp_path: Path) -> None:
    model, report = quantized(softmax_grid=grid)
    wanted = model(IMAGES)
    assert torch.equal(copy.deepcopy(model)(IMAGES), wanted)
    save_packed(model, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", NETWORK)
    assert torch.equal(loaded(IMAGES), wanted)
    other, _ = quantized(n_bits_a=8, n_bits=3, softmax_grid="log_2" if grid == "uniform" else "uniform")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES), wanted)
    softmax = model.blocks[0].attn.attn_quantizer  # type: ignore[index,union-attr]
    assert isinstance(softmax, ActivationQuantizer) and (softmax.levels is None) == (grid == "uniform")
    assert {one.step == 0 for one in report.activations if one.name.endswith("attn.attn")} == {grid != "uniform"}


def test_log_grids_take_8_bits_at_most() -> None:
    with pytest.raises(ValueError, match="n_bits_a must be 2 to 8 for softmax_grid log_2, got 9"):
        QuantConfig(n_bits_a=9, softmax_grid="log_2")  # type: ignore[arg-type]
