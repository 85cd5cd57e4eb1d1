"""The products of attention between quantized operands, and the log grids of what softmax gives."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import small_vit
from torch import Tensor, nn
from torch.nn import functional as F

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.grids.activations import Seen, choose_log_levels, quantize_log
from logart.grids.registry import GRIDS
from logart.quantization.activation_quantizer import ActivationQuantizer, quantizers
from logart.quantization.attention import OPERANDS, QuantAttention, QuantWindowAttention, quantize_products

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


@pytest.mark.parametrize("kind", ["vit", "swin"])
@torch.no_grad()
def test_the_products_spelled_out_give_what_timm_s_attention_gives(kind: str) -> None:
    model, x = (NETWORK, IMAGES) if kind == "vit" else (swin(), torch.randn(4, 3, 32, 32))
    ours = copy.deepcopy(model)
    assert quantize_products(ours, 4, [""], x[:2]) == []
    ran: set[str] = set()
    for name, q in quantizers(ours).items():
        q.register_forward_hook(lambda *_, name=name: ran.add(name))
    assert torch.allclose(ours(x), model(x), atol=1e-5)
    attentions = [name for name, m in ours.named_modules() if isinstance(m, QuantAttention | QuantWindowAttention)]
    assert len(attentions) >= 2 and ran == {f"{name}.{own}" for name in attentions for own in OPERANDS}
    model(x)  # is as it was
    assert not quantizers(model)


def test_every_operand_takes_at_most_2_to_the_n_values_and_the_report_names_it() -> None:
    model, report = quantized(n_bits_a=3)
    seen: dict[str, int] = {}
    for name, q in quantizers(model).items():
        q.register_forward_hook(lambda _, args, y, name=name: seen.update({name: len(y.unique())}))
    model(IMAGES)
    operands = {name for name in seen if name.endswith(OPERANDS)}
    assert len(operands) == 4 * len(model.blocks)  # type: ignore[arg-type]
    assert all(1 < count <= 8 for count in seen.values())
    by_name = {one.name: one for one in report.activations}
    assert {"blocks.0.attn.q", "blocks.0.attn.attn", "blocks.0.attn.qkv", "head"} <= by_name.keys()
    assert by_name["blocks.0.attn.q"].signed and not by_name["blocks.0.attn.attn"].signed
    assert report.float_products == []


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.table = nn.Linear(6, 18), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ self.table.T).expand(x.shape).split(6, -1)[0], *self.qkv(x).split(6, -1)[:2]
        return F.scaled_dot_product_attention(q, k, v)


def test_products_of_other_modules_stay_float_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 6), OwnAttention(), nn.Flatten(), nn.Linear(18, 3)).eval()
    _, report = quantize_model(model, QuantConfig(**FAST, n_bits_a=8), torch.randn(8, 3, 6))
    assert report.float_products == [("1", "OwnAttention is none of the known attention modules")]
    assert [one.name for one in report.activations] == ["0", "1.qkv", "1.table", "3"]
    known = copy.deepcopy(NETWORK)
    left = quantize_products(known, 4, ["patch_embed.proj"], IMAGES[:2])
    assert left and {reason for _, reason in left} == {"it is in no block"} and not quantizers(known)


def test_projections_of_an_attention_module_have_quantized_inputs() -> None:
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
    names = {"first", "mixed.in_proj_weight", "mixed.out_proj", "head"}
    assert {one.name for one in report.activations} == names
    assert all(q.even_grid for q in quantizers(model).values())
    assert "mixed" in dict(report.float_products)


def test_attention_whose_forward_differs_is_left_alone() -> None:
    model = copy.deepcopy(NETWORK)
    attention = model.blocks[0].attn  # type: ignore[index,union-attr]
    attention.scale = 0.0  # type: ignore[union-attr,assignment] # which the fused kernel does not read
    attention.fused_attn = True  # type: ignore[union-attr,assignment]
    wanted = model(IMAGES)
    left = quantize_products(model, 4, [""], IMAGES[:2])
    assert left == [("blocks.0.attn", "with its products spelled out the network gave other outputs")]
    assert torch.allclose(model(IMAGES), wanted, atol=1e-5)
    assert type(attention) is not QuantAttention and not quantizers(attention)  # type: ignore[arg-type]


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
