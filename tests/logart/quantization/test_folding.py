"""Folding batch norms: the function is kept, and what must not be folded is left alone."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from networks import Graph, ResidualBlock, SmallResNet, hooks_of, settle, smooth_images
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from logart.quantization.clone import clone_sharing
from logart.quantization.folding import fold_batch_norms

IMAGES = smooth_images(8, 3, 6)
TOKENS = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def folding(model: nn.Module, x: Tensor) -> tuple[list[str], nn.Module, float]:
    """What was folded, the folded copy, and how far its output is from the model's, which must not change."""
    settle(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(x)
        folded = clone_sharing(model)
        names = fold_batch_norms(folded, x[:2]).folded
        distance = float((folded(x) - wanted).abs().max())
        assert torch.equal(model(x), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hooks_of(folded) == hooks_of(model) == 0
    return names, folded, distance


FOLDED: dict[str, tuple[nn.Module, Tensor, list[str]]] = {
    "no bias": (nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)), IMAGES, ["1"]),
    "bias": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(True)), IMAGES, ["1"]),
    "grouped": (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6, eps=0.1)), IMAGES, ["1"]),
    "padded": (nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)), IMAGES, ["1"]),
    "timm same": (nn.Sequential(Conv2dSame(3, 5, 3, stride=2), nn.BatchNorm2d(5)), IMAGES, ["1"]),
    "not affine": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)), IMAGES, ["1"]),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.BatchNorm1d(5)), IMAGES, ["2"]),
    "activation": (nn.Sequential(nn.Conv2d(3, 5, 3), BatchNormAct2d(5)), IMAGES, ["1"]),
    "identity between": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.Identity(), nn.BatchNorm2d(5)), IMAGES, ["2"]),
    "residual": (ResidualBlock(3, 5, 2), IMAGES, ["bn1", "bn2"]),
    "network": (SmallResNet(), IMAGES, ["bn", *(f"blocks.{b}.bn{i}" for b in (0, 1) for i in (1, 2))]),
    "defined in another order": (
        Graph(lambda m, x: m.norm(m.conv(x)), norm=nn.BatchNorm2d(5), conv=nn.Conv2d(3, 5, 3)),
        IMAGES,
        ["norm"],
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_keeps_the_function(name: str) -> None:
    model, x, norms = FOLDED[name]
    names, folded, distance = folding(model, x)
    assert names == norms
    assert distance <= 1e-9
    assert not any(type(folded.get_submodule(norm)) is type(model.get_submodule(norm)) for norm in norms)


def test_folded_weights_are_rounded_once() -> None:
    """Of a float32 network: the float32 numbers nearest to the exact ones, which float32 arithmetic misses."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16))
    conv, norm = model
    for tensor, low, high in ((norm.weight, 0.5, 2), (norm.running_var, 0.1, 3), (norm.bias, -1, 1),
                              (norm.running_mean, -1, 1)):  # fmt: skip
        nn.init.uniform_(tensor, low, high)  # type: ignore[arg-type]
    folded = clone_sharing(model.eval().requires_grad_(False))
    fold_batch_norms(folded, IMAGES[:2].float())
    weight, gamma, beta, mean, var = (
        t.detach().numpy().astype("longdouble")
        for t in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)  # type: ignore[union-attr]
    )
    scale = gamma / (var + norm.eps) ** 0.5  # type: ignore[operator]
    found = folded.get_submodule("0")
    assert (found.weight.numpy() == (weight * scale[:, None, None, None]).astype("float32")).all()  # type: ignore[operator, union-attr]
    assert (found.bias.numpy() == (beta - mean * scale).astype("float32")).all()  # type: ignore[operator, union-attr]


def test_folding_a_norm_without_shift() -> None:
    """Newer releases of torch know affine norms without a bias; with older ones this makes one."""
    norm = nn.BatchNorm2d(5)
    norm.register_parameter("bias", None)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    norm.running_mean = torch.randn(5, dtype=torch.float64)
    norm.running_var = torch.rand(5, dtype=torch.float64) + 0.5
    folded = clone_sharing(model.eval().requires_grad_(False))
    assert fold_batch_norms(folded, IMAGES[:2]).folded == ["1"]
    assert float((folded(IMAGES) - model(IMAGES)).abs().max()) <= 1e-9


def test_the_activation_of_a_norm_stays() -> None:
    _, folded, _ = folding(nn.Sequential(nn.Conv2d(3, 5, 3), BatchNormAct2d(5)), IMAGES)
    assert isinstance(folded.get_submodule("1"), nn.ReLU)
    assert float(folded(IMAGES).min()) == 0  # type: ignore[arg-type]


class OtherConv(nn.Conv2d):
    pass


def first_zero(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


NOT_FOLDED: dict[str, tuple[nn.Module, Tensor]] = {
    "norm before the convolution": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)), IMAGES),
    "pre-activation": (
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)),
        IMAGES,
    ),
    "ReLU in place between": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(5)), IMAGES),
    "output used again": (
        Graph(lambda m, x: m.b(y := m.a(x)) + y, a=nn.Conv2d(3, 5, 3), b=nn.BatchNorm2d(5)),
        IMAGES,
    ),
    "output used before": (
        Graph(lambda m, x: (y := m.a(x)).mean() + m.b(y), a=nn.Conv2d(3, 5, 3), b=nn.BatchNorm2d(5)),
        IMAGES,
    ),
    "output changed in place": (
        Graph(lambda m, x: m.b(m.a(x).mul_(2)), a=nn.Conv2d(3, 5, 3), b=nn.BatchNorm2d(5)),
        IMAGES,
    ),
    "output written to": (
        Graph(lambda m, x: m.b(first_zero(m.a(x))), a=nn.Conv2d(3, 5, 3), b=nn.BatchNorm2d(5)),
        IMAGES,
    ),
    "convolution run twice": (
        Graph(lambda m, x: m.b(m.a(m.a(x))), a=nn.Conv2d(3, 3, 3, padding=1), b=nn.BatchNorm2d(3)),
        IMAGES,
    ),
    "norm run twice": (
        Graph(lambda m, x: m.n(m.b(m.n(m.a(x)))), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3)),
        IMAGES,
    ),
    "two norms of one output": (
        Graph(lambda m, x: m.n(y := m.a(x)) + m.o(y), a=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3), o=nn.BatchNorm2d(3)),
        IMAGES,
    ),
    "statistics of the batch": (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)),
        IMAGES[:2],
    ),
    "norm over tokens, as many as channels": (nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), TOKENS),
    "called by keyword": (
        Graph(lambda m, x: m.b(input=m.a(x)), a=nn.Conv2d(3, 5, 3), b=nn.BatchNorm2d(5)),
        IMAGES,
    ),
    "a convolution of another type": (nn.Sequential(OtherConv(3, 5, 3), nn.BatchNorm2d(5)), IMAGES),
    "a concatenation between": (
        Graph(lambda m, x: m.b(torch.cat([m.a(x)], 1)), a=nn.Conv2d(3, 5, 3), b=nn.BatchNorm2d(5)),
        IMAGES,
    ),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_cannot_be_folded_is_left_alone(name: str) -> None:
    names, _, distance = folding(*NOT_FOLDED[name])
    assert names == []
    assert distance == 0


def test_a_norm_under_two_names_is_folded_under_both() -> None:
    norm = nn.BatchNorm2d(5)
    model = Graph(lambda m, x: m.norms[0](m.conv(x)), conv=nn.Conv2d(3, 5, 3), norm=norm, norms=nn.ModuleList([norm]))
    names, _, distance = folding(model, IMAGES)
    assert names == ["norm"]
    assert distance <= 1e-9


class NormGain(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class NormReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NormOf(nn.BatchNorm2d):
    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:  # type: ignore[override]
        return gain * super().forward(x)


def hooked(place: str, hook: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    getattr(model.get_submodule(place), f"register_{hook}")(lambda *_: None)
    return model


CONV, NORM = {"a": nn.Conv2d(3, 5, 3)}, {"n": nn.BatchNorm2d(5)}
UNFOLDED: dict[str, tuple[Any, str]] = {
    "a gain in the forward": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), NormGain(5)), "NormGain is not a batch norm"),
    "a ReLU in the forward": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), NormReLU(5)), "NormReLU is not a batch norm"),
    "an argument": (lambda: Graph(lambda m, x: m.n(m.a(x), 2.0), a=nn.Conv2d(3, 5, 3), n=NormOf(5)), "NormOf is not"),
    "a hook on the norm": (lambda: hooked("1", "forward_hook"), "has hooks"),
    "a hook before the norm": (lambda: hooked("1", "forward_pre_hook"), "has hooks"),
    "a hook on the layer": (lambda: hooked("0", "forward_hook"), "has hooks"),
    "the norm's weight read": (
        lambda: Graph(lambda m, x: m.n(m.a(x)) * m.n.weight.view(1, -1, 1, 1), **deepcopy(CONV | NORM)),
        "something else reads",
    ),
    "the norm's statistics read": (
        lambda: Graph(lambda m, x: m.n(m.a(x)) + m.n.running_mean.sum(), **deepcopy(CONV | NORM)),
        "something else reads",
    ),
    "the layer's weight read": (
        lambda: Graph(lambda m, x: m.n(m.a(x)) + F.conv2d(x, m.a.weight), **deepcopy(CONV | NORM)),
        "something else reads",
    ),
    "the layer's bias read": (
        lambda: Graph(lambda m, x: m.n(m.a(x)) + m.a.bias.norm(), **deepcopy(CONV | NORM)),
        "something else reads",
    ),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_what_is_not_folded_is_reported_with_the_reason(name: str) -> None:
    build, reason = UNFOLDED[name]
    model = settle(build(), IMAGES)
    with torch.no_grad():
        wanted = model(IMAGES)
        clone = clone_sharing(model)
        folded, unfolded = fold_batch_norms(clone, IMAGES[:2])
        assert torch.equal(clone(IMAGES), wanted)
    assert folded == [] and len(unfolded) == 1 and reason in unfolded[0][1]


def seen_from_elsewhere() -> nn.Module:
    """Its second norm's output depends on whether the first one is there, which no use of a tensor shows."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.n(m.a(x))  # type: ignore[operator]
        return m.o(m.b(x)) * (2.0 if isinstance(m.n, nn.Identity) else 1.0)  # type: ignore[operator, no-any-return]

    return Graph(forward, a=nn.Conv2d(3, 5, 3), n=nn.BatchNorm2d(5), b=nn.Conv2d(5, 4, 1), o=nn.BatchNorm2d(4))


def test_folding_is_taken_back_norm_by_norm_where_the_outputs_change() -> None:
    model = settle(seen_from_elsewhere(), IMAGES)
    clone = clone_sharing(model)
    assert fold_batch_norms(clone, IMAGES[:2]) == (["o"], [("n", "with it folded the network gave other outputs")])
    assert type(clone.n) is nn.BatchNorm2d
    assert float((clone(IMAGES) - model(IMAGES)).abs().max()) <= 1e-9


def test_a_check_costs_two_forwards_of_the_example() -> None:
    model, batches = settle(SmallResNet(), IMAGES), []
    model.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    fold_batch_norms(clone_sharing(model), IMAGES[:2])
    assert batches == [2, 2]


@pytest.mark.parametrize(
    "norm", [nn.SyncBatchNorm(5), FrozenBatchNorm2d(5), BatchNormAct2d(5, act_layer=nn.SiLU), nn.BatchNorm2d(5)]
)
def test_every_known_norm_is_folded(norm: nn.Module) -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), IMAGES)
    norm.load_state_dict(model[1].state_dict(), strict=False)  # type: ignore[index]
    model[1] = norm.double().eval()  # type: ignore[index, operator]
    clone = clone_sharing(model)
    assert fold_batch_norms(clone, IMAGES[:2]).folded == ["1"]
    assert float((clone(IMAGES) - model(IMAGES)).abs().max()) <= 1e-9
