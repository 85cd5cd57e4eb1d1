"""What a survey of a network shows: what stays float and why, input layers and heads, the share of the weights."""

from collections.abc import Callable

import pytest
import torch
from networks import Graph, SmallResNet, hooks_of, small_vit, smooth_images
from torch import Tensor, nn
from torch.nn import functional as F

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


@pytest.mark.parametrize(
    ("build", "names", "total"),
    [
        (Functional, ["idle"], 12 + 8 + 4),
        (lambda: nn.Sequential(Functional()), ["0.idle"], 12 + 8 + 4),
        (Unregistered, ["kept"], 12 + 8),
    ],
)
def test_a_weight_is_listed_wherever_it_is_held(build: Callable[[], nn.Module], names: list[str], total: int) -> None:
    seen = survey(build(), IMAGES)
    assert [name for name, _ in seen.skipped] == names
    assert seen.n_weights == total
    reasons = dict(seen.skipped)
    assert "idle" not in names[-1] or "did not run" in reasons[names[-1]]
    assert "no module holds it" in reasons.get("kept", "no module holds it")


def test_a_layer_used_through_its_weight_alone_is_seen() -> None:
    model = Graph(
        lambda m, x: F.conv2d(m.a(x), m.b.weight),  # type: ignore[arg-type, union-attr]
        a=nn.Conv2d(3, 3, 1),
        b=nn.Conv2d(3, 3, 1),
        c=nn.Conv2d(3, 3, 1),
    )
    seen = survey(model, IMAGES)
    assert seen.layers == ["a", "b"] and seen.modules == ["a"] and list(dict(seen.skipped)) == ["c"]
    assert seen.places == {"a": ["a"], "b": [""]} and [use.bias for use in seen.uses.values()] == ["bias", None]


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
