"""Surgery: sharing clones, replacing layers; which layers are quantized, in which units; refusals by name."""

from collections.abc import Callable

import pytest
import torch
from networks import Graph, SmallResNet, hooks_of, smooth_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from logart.errors import NetworkError
from logart.grids.logarithmic import log_codebook
from logart.quantization.blocks import Block, blocks_of_types
from logart.quantization.clone import clone_sharing
from logart.quantization.folding import fold_batch_norms
from logart.quantization.surgery import (
    check_replaced,
    quantized_layers,
    replace_layers,
)
from logart.quantization.survey import survey

IMAGES = smooth_images(2, 3, 6)


class OtherConv(nn.Conv2d):
    pass


def test_a_forward_that_raises_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(1, 1)).eval()
    for look in (fold_batch_norms, survey):
        with pytest.raises(RuntimeError):
            look(model, IMAGES.float())
        assert hooks_of(model) == 0


def test_a_clone_shares_memory_but_not_state() -> None:
    model = SmallResNet()
    clone = clone_sharing(model)
    ours, theirs = model.state_dict(), clone.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    clone.eval().requires_grad_(False)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    clone.half()
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


def test_replacing_puts_quantized_layers_of_the_bits_asked_for() -> None:
    model = SmallResNet()
    clone = clone_sharing(model)
    replace_layers(clone, {"stem": 3, "head": 5, "blocks.1.down": 2}, channel_wise=False)
    layers = quantized_layers(clone)
    assert {name: (layer.n_bits, layer.n_codebooks) for name, layer in layers.items()} == {
        "stem": (3, 1),
        "blocks.1.down": (2, 1),
        "head": (5, 1),
    }
    assert isinstance(layers["stem"].module, nn.Conv2d) and isinstance(layers["head"].module, nn.Linear)
    assert layers["stem"].float_weight is not None
    assert layers["stem"].float_weight.data_ptr() == model.stem.weight.data_ptr()
    assert type(model.stem) is nn.Conv2d


def test_layers_come_in_the_order_they_run() -> None:
    model = Graph(lambda m, x: m.first(m.inner[0](m.inner[1](x))), first=nn.Conv2d(3, 3, 1), inner=nn.ModuleList())
    model.inner.extend([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])  # type: ignore[operator, union-attr]
    seen = survey(model, IMAGES.float())
    assert (seen.layers, seen.skipped) == (["inner.1", "inner.0", "first"], [])
    assert hooks_of(model) == 0


def test_what_is_skipped_is_listed_with_the_reason() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.up(m.other(m.conv(x))) + m.table(torch.zeros(1, dtype=torch.long)).sum()  # type: ignore[operator]

    model = Graph(
        forward,
        conv=nn.Conv2d(3, 3, 1),
        other=OtherConv(3, 3, 1),
        up=nn.ConvTranspose2d(3, 3, 2),
        table=nn.Embedding(2, 2),
        idle=nn.Linear(3, 3),
        norm=nn.BatchNorm2d(3),
    )
    seen = survey(model, IMAGES.float())
    layers, skipped = seen.layers, seen.skipped
    assert layers == ["conv", "other", "up", "idle"]
    assert [name for name, _ in skipped] == ["table"]  # a norm has no matrix to quantize
    assert "Embedding" in dict(skipped)["table"] and list(seen.blind) == ["idle"]


def test_a_weight_that_is_computed_is_skipped_with_the_reason() -> None:
    pruned, normed = nn.Conv2d(3, 3, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    seen = survey(nn.Sequential(nn.Conv2d(3, 3, 1), pruned, normed), IMAGES.float())
    layers, skipped = seen.layers, seen.skipped
    assert layers == ["0"] and [name for name, _ in skipped][:1] == ["1"]
    assert "pruning or a norm" in dict(skipped)["1"] and len(skipped) >= 2


def test_a_layer_that_is_run_from_a_list_is_quantized_there() -> None:
    layer = nn.Conv2d(3, 3, 1)
    model = Graph(lambda m, x: m.snapshot[0](x), conv=layer)  # type: ignore[index]
    model.snapshot = [layer]  # type: ignore[assignment]
    clone = clone_sharing(model)
    replace_layers(clone, {"conv": 3}, channel_wise=True)
    check_replaced(clone, IMAGES.float(), survey(model, IMAGES.float()))
    quantized = quantized_layers(clone)["conv"]
    quantized.set_codebook(log_codebook(quantized.rows.abs().amax(1), 3, 2))
    with pytest.raises(NetworkError, match="other outputs"):
        check_replaced(clone, IMAGES.float(), survey(model, IMAGES.float()))
    assert hooks_of(clone) == 0 and hooks_of(model) == 0


def spoilt(kind: str, value: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1)))
    with torch.no_grad():
        getattr(model.get_submodule("1.0"), kind).view(-1)[1] = value
    return model


def bad_statistics() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model.get_buffer("1.running_var")[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: spoilt("weight", torch.nan), "layer 1.0: its weight holds NaN"),
        (lambda: spoilt("weight", -torch.inf), "layer 1.0: its weight holds NaN"),
        (lambda: spoilt("bias", torch.inf), "layer 1.0: its bias holds NaN"),
        (bad_statistics, "layer 0: its weight holds NaN"),
    ],
)
def test_layers_that_cannot_be_quantized_are_refused_by_name(build: Callable[[], nn.Module], message: str) -> None:
    model = build().eval()
    with pytest.raises(ValueError, match=message):
        fold_batch_norms(model, IMAGES.float())
        survey(model, IMAGES.float())


class Outer(nn.Sequential):
    pass


class Inner(nn.Sequential):
    pass


def nested() -> nn.Module:
    conv = lambda: nn.Conv2d(3, 3, 1)  # noqa: E731
    return nn.Sequential(
        conv(), Outer(conv(), Inner(conv(), conv())), Inner(conv()), Outer(nn.ReLU()), nn.Flatten(), nn.Linear(108, 2)
    )


@pytest.mark.parametrize(
    ("types", "blocks"),
    [
        ([], ["0", "1.0", "1.1.0", "1.1.1", "2.0", "5"]),
        (["Inner"], ["0", "1.0", "1.1:1.1.0+1.1.1", "2:2.0", "5"]),
        (["Inner", "Outer"], ["0", "1:1.0+1.1.0+1.1.1", "2:2.0", "5"]),
        (["Sequential"], [":0+1.0+1.1.0+1.1.1+2.0+5"]),
        (["Linear"], ["0", "1.0", "1.1.0", "1.1.1", "2.0", "5:5"]),
    ],
)
def test_units_group_layers_in_the_order_they_run(types: list[str], blocks: list[str]) -> None:
    model = nested()
    layers = survey(model, IMAGES.float()).layers
    expected = []
    for block in blocks:
        name, _, inside = block.partition(":")
        expected.append(Block(name, tuple(inside.split("+")) if inside else (name,)))
    assert blocks_of_types(model, layers, types) == expected


def test_units_follow_the_forward_not_the_definition() -> None:
    a, b = Inner(nn.Conv2d(3, 3, 1)), Inner(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model = Graph(lambda m, x: F.relu(m.a(m.b(x))), a=a, b=b)
    layers = survey(model, IMAGES.float()).layers
    assert blocks_of_types(model, layers, ["Inner"]) == [Block("b", ("b.0", "b.1")), Block("a", ("a.0",))]


def test_names_that_begin_alike_are_not_inside() -> None:
    convs = {f"b{i}": nn.Conv2d(3, 3, 1) for i in ("1", "10")}
    model = nn.Sequential()
    model.add_module("b1", Inner(convs["b1"]))
    model.add_module("b10", convs["b10"])
    assert blocks_of_types(model, ["b1.0", "b10"], ["Inner"]) == [Block("b1", ("b1.0",)), Block("b10", ("b10",))]


def test_unknown_block_types_are_refused() -> None:
    with pytest.raises(ValueError, match="no module of type Bottleneck, Nothing in Sequential"):
        blocks_of_types(nested(), ["0"], ["Bottleneck", "Nothing"])
