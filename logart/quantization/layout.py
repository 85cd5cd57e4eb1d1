"""How a parameter lies as the matrix of output channels by inputs that codebooks, codes and second moments are of."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Layout(NamedTuple):
    """A parameter, its dimensions split as `view` and then in this `order`: channels first, [C, ...].

    A transposed convolution's [Cin, Cout/groups, h, w], say, has view (groups, Cin/groups, Cout/groups, h, w) and order
    (0, 2, 1, 3, 4), of which the first two are channels.
    """

    view: tuple[int, ...]
    order: tuple[int, ...]
    channel_dims: int = 1

    @classmethod
    def of(cls, weight: Tensor, channel_dims: int, parameter: Tensor) -> Layout | None:
        """That of a view [channels ..., inputs ...] of a parameter; None where it is not all of it."""
        if weight.numel() != parameter.numel():
            return None
        strides = _strides(weight, parameter)
        by_stride = sorted(range(weight.ndim), key=lambda d: -strides[d])
        view = tuple(weight.shape[d] for d in by_stride)
        plain = torch.empty(view, device="meta").stride()
        if any(strides[d] != s and weight.shape[d] > 1 for d, s in zip(by_stride, plain, strict=True)):
            return None
        return cls(view, tuple(by_stride.index(d) for d in range(weight.ndim)), channel_dims)

    @property
    def is_plain(self) -> bool:
        """Whether the parameter is that matrix as it lies."""
        return self.order == tuple(sorted(self.order))

    @property
    def shape(self) -> torch.Size:
        """[C, ...]."""
        sizes = [self.view[d] for d in self.order]
        return torch.Size((prod(sizes[: self.channel_dims]), *sizes[self.channel_dims :]))

    def channels_first(self, parameter: Tensor) -> Tensor:
        """[C, ...] of the parameter."""
        return parameter.reshape(self.view).permute(self.order).reshape(self.shape)

    def as_parameter(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """The parameter, of this shape, of a weight [C, ...]."""
        back = [self.order.index(d) for d in range(len(self.order))]
        sizes = [self.view[d] for d in self.order]
        return weight.reshape(sizes).permute(back).reshape(shape)


def _strides(weight: Tensor, parameter: Tensor) -> tuple[int, ...]:
    """Of a view of a parameter, as if the parameter were contiguous."""
    if parameter.is_contiguous():
        return weight.stride()
    index = torch.empty_strided(parameter.shape, parameter.stride(), dtype=torch.int64)
    index.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    seen = index.as_strided(weight.shape, weight.stride(), weight.storage_offset() - parameter.storage_offset())
    origin = (0,) * seen.ndim
    ones = [tuple(int(d == other) for other in range(seen.ndim)) for d in range(seen.ndim)]
    return tuple(int(seen[one] - seen[origin]) if seen.shape[d] > 1 else 1 for d, one in enumerate(ones))


@dataclass(frozen=True)
class WeightUse:
    """How a network uses a parameter as a weight.

    Attributes:
        layout: how it is a matrix of output channels by inputs.
        groups: of the operations it enters.
        n_uses: how many there are in a forward.
        bias: the name of a parameter of the same module that is added to the product, by this operation alone; None
            where there is none such, so that no bias can be corrected.
    """

    layout: Layout
    groups: int = 1
    n_uses: int = 1
    bias: str | None = None

    @classmethod
    def by_module(cls, module: nn.Module, name: str) -> WeightUse:
        """That of torch's own layers, whose `weight` is used once, with their `bias`."""
        shape = tuple(getattr(module, name).shape)
        bias = "bias" if name == "weight" and "bias" in module._parameters else None
        layout = Layout(shape, tuple(range(len(shape))))
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            view = (module.groups, shape[0] // module.groups, *shape[1:])
            layout = Layout(view, (0, 2, 1, *range(3, len(view))), channel_dims=2)
        return cls(layout, getattr(module, "groups", 1), bias=bias)
