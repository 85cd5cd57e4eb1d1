"""Linear operations that a weight enters, one class for each family: what DBS and compensated rounding need of them.

An operation is seen as it is called, by a function mode: whichever module or function calls it, `Use` tells which of
its tensors is the weight, how that is a matrix of output channels, and what the weight is multiplied with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by vmap or a transform like it


class Use:
    """One call of a linear operation.

    Attributes:
        weight: the tensor in the weight's place, as a view [channels ..., inputs ...]; the first `channel_dims`
            dimensions, `groups` the outermost of them, are channels.
        given: the argument that it is multiplied with.
        x: that as [B, ...].
        y: what the operation gave; set once it has run.
        bias: what is added, if anything.
    """

    channel_dims = 1
    groups = 1
    y: Tensor

    def __init__(self, given: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.given, self.x, self.weight, self.bias = given, x, weight, bias

    @property
    def channels(self) -> int:
        """Rows of the weight as a matrix."""
        return prod(self.weight.shape[: self.channel_dims])

    @property
    def elements(self) -> int:
        """Its columns."""
        return prod(self.weight.shape[self.channel_dims :])

    def rows(self, x: Tensor) -> Tensor:
        """The rows [groups, n, elements] that the weight is multiplied with, n = B·positions, for an x like its own."""
        raise NotImplementedError

    def positions_last(self, y: Tensor) -> Tensor:
        """An output [B, C, positions]."""
        raise NotImplementedError

    def apply(self, x: Tensor, delta: Tensor) -> Tensor:
        """X̂δ: the output [B, C, positions] for another weight δ [C, K] and no bias."""
        raise NotImplementedError


class Linear(Use):
    """y = x Wᵀ + b of x [B, ..., K] and W [C, K]."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(x, _batched(x, 2), weight, bias)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, x.shape[-1])

    def positions_last(self, y: Tensor) -> Tensor:
        y = _batched(y, 2)
        return y.reshape(len(y), -1, y.shape[-1]).mT

    def apply(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.positions_last(F.linear(x, delta.reshape(self.weight.shape)))


class Convolution(Use):
    """A convolution over one to three dimensions, of W [C, Cin/groups, *kernel]."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> None:
        super().__init__(x, _batched(x, weight.ndim), weight, bias)
        dims = self._dims = weight.ndim - 2
        self.groups, self.stride, self.dilation = groups, _each(stride, dims), _each(dilation, dims)
        self.kernel = tuple(weight.shape[2:])
        if padding == "same":  # what is odd goes to the end, as torch has it
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            self.padding = [(t // 2, t - t // 2) for t in total]
        else:
            self.padding = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]

    def rows(self, x: Tensor) -> Tensor:
        return _unfold(self._padded(x), self.kernel, self.stride, self.dilation, self.groups)

    def positions_last(self, y: Tensor) -> Tensor:
        return _batched(y, 2 + len(self.kernel)).flatten(2)

    def apply(self, x: Tensor, delta: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self._dims - 1]
        delta = delta.reshape(self.weight.shape)
        y = convolve(self._padded(x), delta, None, self.stride, 0, self.dilation, self.groups)
        return self.positions_last(y)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, [p for ends in reversed(self.padding) for p in ends])


class TransposedConvolution(Use):
    """A transposed convolution: one of stride 1 over x with zeros between, its kernel turned around."""

    channel_dims = 2

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        output_padding: Any,
        groups: int,
        dilation: Any,
    ) -> None:
        view = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # [groups, Cout/groups, Cin/groups, *kernel]
        super().__init__(x, _batched(x, weight.ndim), view, bias)
        dims = weight.ndim - 2
        self.groups, self.kernel = groups, tuple(weight.shape[2:])
        self.stride, self.padding, self.dilation = (_each(size, dims) for size in (stride, padding, dilation))
        self.output_padding = _each(output_padding, dims)

    def rows(self, x: Tensor) -> Tensor:
        dims = len(self.kernel)
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], self.stride, strict=True)))
        every = (slice(None), slice(None), *(slice(None, None, step) for step in self.stride))
        spread[every] = x
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        ends = [(r - p, r - p + o) for r, p, o in zip(reach, self.padding, self.output_padding, strict=True)]
        padded = F.pad(spread, [p for pair in reversed(ends) for p in pair])
        rows = _unfold(padded, self.kernel, (1,) * dims, self.dilation, self.groups)
        turned = rows.unflatten(2, (-1, *self.kernel)).flip(tuple(range(-dims, 0)))
        return turned.flatten(2)

    def positions_last(self, y: Tensor) -> Tensor:
        return _batched(y, 2 + len(self.kernel)).flatten(2)

    def apply(self, x: Tensor, delta: Tensor) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.kernel) - 1]
        weight = delta.reshape(self.weight.shape).transpose(1, 2).flatten(0, 1)
        y = convolve(x, weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return self.positions_last(y)


class Product(Use):
    """Any other product of two tensors, by the letters of einsum; x is held as [B, groups, positions, K]."""

    def __init__(self, x: Tensor, weight: Tensor, letters: tuple[str, str, str]) -> None:
        of_x, of_weight, of_y = letters
        groups = [c for c in of_weight if c in of_x and c in of_y]
        inputs = [c for c in of_weight if c in of_x and c not in of_y]
        outputs = [c for c in of_weight if c not in of_x]
        positions = [c for c in of_x if c not in of_weight]
        self._batch = positions[:1] if positions and of_x[0] == positions[0] else []
        self._of_x = [*self._batch, *groups, *positions[len(self._batch) :], *inputs]
        self._of_y = [*self._batch, *groups, *outputs, *positions[len(self._batch) :]]
        self._letters, self._n_groups = of_y, len(groups)
        self.channel_dims = len(groups) + len(outputs)
        sizes = dict(zip(of_weight, weight.shape, strict=True))
        self.groups = prod(sizes[c] for c in groups)
        view = weight.permute([of_weight.index(c) for c in (*groups, *outputs, *inputs)])
        super().__init__(x, self._canonical(x.permute([of_x.index(c) for c in self._of_x]), view), view, None)

    def _canonical(self, x: Tensor, view: Tensor) -> Tensor:
        batch = x.shape[0] if self._batch else 1
        return x.reshape(batch, self.groups, -1, prod(view.shape[self.channel_dims :]))

    def rows(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2)

    def positions_last(self, y: Tensor) -> Tensor:
        y = y.permute([self._letters.index(c) for c in self._of_y])
        return y.reshape(y.shape[0] if self._batch else 1, self.channels, -1)

    def apply(self, x: Tensor, delta: Tensor) -> Tensor:
        weight = delta.reshape(self.groups, -1, self.elements)
        return (weight @ x.mT).flatten(1, 2)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _unfold(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """The patches [groups, B·positions, Cin/groups·kernel] of a padded input [B, Cin, *size]."""
    x = x.contiguous()
    images, channels, *size = x.shape
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    positions = [(n - r - 1) // s + 1 for n, r, s in zip(size, reach, stride, strict=True)]
    of_image, of_channel, *steps = x.stride()
    windows = x.as_strided(
        (channels, *kernel, images, *positions),
        (of_channel, *(d * step for d, step in zip(dilation, steps, strict=True)), of_image)
        + tuple(s * step for s, step in zip(stride, steps, strict=True)),
        x.storage_offset(),
    )
    return windows.reshape(groups, channels // groups * prod(kernel), -1).mT


# ---------------------------------------------------------------- which function is which


IsWeight = Callable[[Any], bool]


def use_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_weight: IsWeight) -> Use | None:
    """The use of a weight that a call of a torch function is; None where it is none that is understood.

    Args:
        is_weight: whether an argument is, or lies within, a weight that is looked for.
    """
    read = _READERS.get(func)
    return None if read is None else read(is_weight, *args, **kwargs)


def is_product(func: Any) -> bool:
    """Whether it is a product of any two tensors."""
    return _READERS.get(func) in (_matmul, _einsum, _addmm)


def _linear(is_weight: IsWeight, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    return Linear(input, weight, bias) if is_weight(weight) and weight.ndim == 2 else None


def _convolution(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    if not is_weight(weight):
        return None
    return Convolution(input, weight, bias, stride, padding, dilation, groups)


def _transposed(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Use | None:
    if not is_weight(weight):
        return None
    return TransposedConvolution(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _matmul(is_weight: IsWeight, input: Tensor, other: Tensor, **_: Any) -> Use | None:
    if is_weight(other) and other.ndim == 2:
        return Linear(input, other.mT, None)
    weight, x, of_weight, of_x = other, input, "kc", "pk"
    if is_weight(input):
        weight, x, of_weight, of_x = input, other, "ck", "kp"
    if not is_weight(weight) or min(x.ndim, weight.ndim) < 2 or weight.ndim > x.ndim:
        return None
    leading = "abdefghij"[: x.ndim - 2]
    own = leading[x.ndim - weight.ndim :]
    if x.shape[:-2][x.ndim - weight.ndim :] != weight.shape[:-2]:
        return None  # sizes of 1 that are spread out
    of_y = "cp" if is_weight(input) else "pc"
    return Product(x, weight, (leading + of_x, own + of_weight, leading + of_y))


def _addmm(is_weight: IsWeight, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if not is_weight(mat2) or (beta, alpha) != (1, 1):
        return None
    return Linear(mat1, mat2.mT, input if input.ndim == 1 else None)


def _einsum(is_weight: IsWeight, equation: Any, *operands: Any) -> Use | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "..." in equation or "->" not in equation:
        return None
    of_operands, of_y = equation.replace(" ", "").split("->")
    letters = dict(zip(of_operands.split(","), operands, strict=True)) if of_operands.count(",") == 1 else {}
    pairs = tuple(letters.items())
    for (of_x, x), (of_weight, weight) in (pairs, pairs[::-1]) if len(pairs) == 2 else ():
        if is_weight(weight):
            once = all(len(set(each)) == len(each) for each in (of_x, of_weight, of_y))
            kept = set(of_y) <= set(of_x) | set(of_weight)
            lost = [c for c in of_x + of_weight if c not in of_y and not (c in of_x and c in of_weight)]
            summed = any(c in of_x and c not in of_y for c in of_weight)
            return Product(x, weight, (of_x, of_weight, of_y)) if once and kept and not lost and summed else None
    return None


def _batched(x: Tensor, ndim: int) -> Tensor:
    return x if x.ndim >= ndim else x[None]


_READERS: dict[Any, Callable[..., Use | None]] = {
    F.linear: _linear,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.conv_transpose1d: _transposed,
    torch.conv_transpose2d: _transposed,
    torch.conv_transpose3d: _transposed,
    torch.addmm: _addmm,
    torch.einsum: _einsum,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, operator.matmul),
        _matmul,  # the last: what torch.compile sees in the place of the one before
    ),
}
