"""Small networks whose weights are held and used in many ways, and the names of these weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


class Functional(nn.Module):
    """Parameters of its own and another layer's weight, all used through functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.kernel, self.head = parameter(16, 4, 3, 3), parameter(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.relu(self.first(x)), self.other.weight)
        return F.relu(F.conv2d(F.relu(x), self.kernel)).flatten(1) @ self.head  # type: ignore[no-any-return]


class Projected(nn.Module):
    """Attention that reads the weight of its linear layer, as BEiT, EVA and Swin do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.bias, torch.zeros(16), self.bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))  # type: ignore[no-any-return]


def functional() -> nn.Module:
    return Functional()


def projected() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.Flatten(2), Turned(), Projected(), Projected(), nn.Flatten())


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def attention() -> nn.Module:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.Flatten(2), Turned(), *layers, nn.Flatten(), nn.Linear(256, 10))


def one_attention() -> nn.Module:
    """Attention that lies in no block is called by itself, with one tensor as query, key and value."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.Flatten(2), Turned(), layer, nn.Flatten(), nn.Linear(256, 10))


class PlusOne(nn.Conv2d):
    """Does more than its operation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def more_than_a_layer() -> nn.Module:
    return nn.Sequential(PlusOne(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def decoder() -> nn.Module:
    up = nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, groups=2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), up, nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, bias=False))


def one_dimension() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(496, 4))


def three_dimensions() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(588, 4))


class Lists(nn.Module):
    """Weights in a list and in a dict of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ParameterList([parameter(24, 192), parameter(24, 24)])
        self.heads = nn.ParameterDict({"a": parameter(4, 24), "b": parameter(24, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for weight in self.steps:
            x = F.relu(F.linear(x, weight))
        return F.linear(x, self.heads["a"]) + x @ self.heads["b"]


def alone() -> nn.Module:
    return nn.Linear(8, 5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "functional": (functional, ["first", "other", "kernel", "head"]),
    "projected": (projected, ["0", "3.qkv", "3.out", "4.qkv", "4.out"]),
    "attention": (attention, ["0", *(f"{i}.{name}" for i in (3, 4) for name in (
        "self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")), "6"]),
    "one attention": (one_attention, ["0", *(f"3.{name}" for name in (
        "self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")), "5"]),
    "more than a layer": (more_than_a_layer, ["0", "3"]),
    "decoder": (decoder, ["0", "2", "4"]),
    "1d": (one_dimension, ["1", "4"]),
    "3d": (three_dimensions, ["1", "4"]),
    "lists": (Lists, ["steps.0", "steps.1", "heads.a", "heads.b"]),
    "alone": (alone, ["weight"]),
}  # fmt: skip


def made(name: str) -> nn.Module:
    """One of them, in eval mode."""
    torch.manual_seed(1)
    return NETWORKS[name][0]().eval()
