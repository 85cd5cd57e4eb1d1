"""What a survey of a network shows: what stays float and why, input layers and heads, the share of the weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Graph, SmallResNet, hooks_of, small_vit, smooth_images
from torch import Tensor, nn
from torch.nn import functional as F

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.quantization.survey import survey

IMAGES = smooth_images(2, 3, 6).float()


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


class Functional(nn.Module):
    """A convolution's weight of its own, used without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kernel, self.idle = nn.Conv2d(3, 4, 1), param(2, 4, 1, 1), param(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.kernel)


class Unregistered(Functional):
    def __init__(self) -> None:
        super().__init__()
        del self.kernel, self.idle
        self.kept = [torch.randn(2, 4, 1, 1)]

    @property
    def kernel(self) -> Tensor:  # type: ignore[override]
        return self.kept[0]


class Holding(nn.Sequential):
    """A container with a weight of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1))
        self.kernel = param(2, 4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(super().forward(x), self.kernel)


@pytest.mark.parametrize(
    ("build", "names", "total"),
    [
        (Functional, ["idle"], 12 + 8 + 4),
        (lambda: nn.Sequential(Functional()), ["0.idle"], 12 + 8 + 4),
        (Unregistered, ["kept"], 12 + 8),
        (Holding, ["kernel"], 12 + 8),
    ],
)
def test_a_weight_is_listed_wherever_it_is_held(build: Callable[[], nn.Module], names: list[str], total: int) -> None:
    seen = survey(build(), IMAGES)
    assert [name for name, _ in seen.skipped] == names
    assert seen.n_weights == total
    reasons = dict(seen.skipped)
    assert "idle" not in names[-1] or "no operation with it was seen" in reasons[names[-1]]
    assert "no module holds it" in reasons.get("kept", "no module holds it")
    assert "a Holding itself holds it" in reasons.get("kernel", "a Holding itself holds it")


class WithAux(nn.Module):
    """Has a head that acts while training."""

    def __init__(self, aux: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(144, 4), aux

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.body(x))
        logits = self.head(x.flatten(1))
        return (logits, self.aux(x)) if self.training else logits


@pytest.mark.parametrize(
    ("aux", "layers"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4)), ["0", "3"]),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 2, 2), nn.ReLU()), ["0"]),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 2, 3)), ["1"]),
    ],
)
@pytest.mark.parametrize("rounding", ["nearest", "compensated", "learned"])
def test_layers_that_do_not_run_are_rounded_without_data(
    aux: Callable[[], nn.Module], layers: list[str], rounding: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, images = WithAux(aux()).eval(), torch.randn(8, 3, 8, 8)
    config = QuantConfig(rounding=rounding, calib_samples=8, iters=2)  # type: ignore[arg-type]
    quantized, report = quantize_model(model, config, images)
    assert report.blind == {f"aux.{name}": "no operation with it was seen in the forward pass" for name in layers}
    assert report.skipped == [] and report.quantized_share == 1
    assert [layer.name for layer in report.layers] == ["body", "head", *report.blind]
    save_packed(quantized, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", model)
    for name in layers:
        ours = quantized.get_submodule(f"aux.{name}").weight
        assert torch.equal(loaded.get_submodule(f"aux.{name}").weight, ours)  # type: ignore[arg-type]
        alone = nn.Sequential(copy.deepcopy(model.aux.get_submodule(name)))
        expected, _ = quantize_model(alone, QuantConfig(rounding="nearest"), inputs_of(model.aux, name))
        assert torch.equal(expected[0].weight, ours)  # type: ignore[index, arg-type]


def inputs_of(module: nn.Module, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    module(torch.randn(8, 4, 6, 6))
    handle.remove()
    return seen[0]


def test_a_layer_used_through_its_weight_alone_is_seen() -> None:
    model = Graph(
        lambda m, x: F.conv2d(m.a(x), m.b.weight),  # type: ignore[arg-type, union-attr]
        a=nn.Conv2d(3, 3, 1),
        b=nn.Conv2d(3, 3, 1),
        c=nn.Conv2d(3, 3, 1),
    )
    seen = survey(model, IMAGES)
    assert seen.layers == ["a", "b", "c"] and list(seen.blind) == ["c"]
    assert seen.places == {"a": ["a"], "b": [""]} and [use.bias for use in seen.uses.values()] == ["bias", None, "bias"]


def two_heads() -> nn.Module:
    layers = {name: nn.Linear(108, 108) for name in ("first", "second", "middle")}
    heads = {name: nn.Linear(108, 2) for name in ("one", "two")}

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = m.first(x) + m.second(x)  # type: ignore[operator]
        x = x + F.relu(m.middle(x))  # type: ignore[operator]
        return torch.stack([m.two(x), m.one(x)]).mean(0)  # type: ignore[operator]

    return Graph(forward, **heads, **layers)


def positions() -> nn.Module:
    """A small network of the positions, which no image enters, beside the images' own way."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embed(x.flatten(1)) + m.position(torch.ones(1, 2))  # type: ignore[operator]
        return m.head(x)  # type: ignore[operator, no-any-return]

    return Graph(forward, position=nn.Linear(2, 4), embed=nn.Linear(108, 4), head=nn.Linear(4, 2))


def headless() -> nn.Module:
    model, _ = small_vit()
    model.head = nn.Identity()  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("build", "images", "inputs", "heads"),
    [
        (SmallResNet, IMAGES, ["stem"], ["head"]),
        (two_heads, IMAGES, ["first", "second"], ["two", "one"]),
        (positions, IMAGES, ["embed"], ["head"]),
        (lambda: small_vit()[0], small_vit()[1], ["patch_embed.proj"], ["head"]),
        (headless, small_vit()[1], ["patch_embed.proj"], ["blocks.1.mlp.fc2"]),
    ],
)
def test_input_layers_and_heads_are_found(
    build: Callable[[], nn.Module], images: Tensor, inputs: list[str], heads: list[str]
) -> None:
    model = build().eval()
    seen = survey(model, images)
    assert (seen.inputs, seen.heads) == (inputs, heads)
    assert hooks_of(model) == 0


def test_the_coarsest_type_that_was_computed_in_is_seen() -> None:
    half = Graph(lambda m, x: m.a(x).bfloat16().float(), a=nn.Conv2d(3, 3, 1))
    assert survey(half, IMAGES).eps == torch.finfo(torch.bfloat16).eps
    assert survey(SmallResNet().eval(), IMAGES).eps == torch.finfo(torch.float32).eps
