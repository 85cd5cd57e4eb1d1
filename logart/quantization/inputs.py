"""What a network of several inputs is given: calibration data for those that take more than one tensor."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map_only

from logart.errors import NetworkError


class Inputs:
    """The inputs of a network for n images, as it is called: `Inputs(image, mask=mask)` for `model(image, mask=mask)`.

    Each is a tensor with a row for every image, a tree of such tensors, or anything else, which is the same for all.
    It is handled like the tensor of a network that takes one: length, slices and the methods below are over images.

    Raises:
        NetworkError: no tensor, or tensors of different numbers of rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        rows = {len(t) if t.ndim else 0 for t in self.tensors}
        if len(rows) != 1:
            seen = " and ".join(str(list(t.shape)) for t in self.tensors) or "no tensor"
            raise NetworkError(f"the inputs of the network are {seen}; expected tensors with as many rows each")

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: slice) -> Inputs:
        return self.map(lambda t: t[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same of other tensors."""
        args, kwargs = tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Inputs(*args, **kwargs)

    def clone(self) -> Inputs:
        """The same of tensors of its own."""
        return self.map(torch.clone)

    def to(self, *args: Any, **kwargs: Any) -> Inputs:
        """The same elsewhere."""
        return self.map(lambda t: t.to(*args, **kwargs))

    def double(self) -> Inputs:
        """The same in float64; what is no floating point stays."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def requires_grad_(self) -> Inputs:
        """Itself, with gradients of what is floating point."""
        for tensor in self.tensors:
            if tensor.is_floating_point():
                tensor.requires_grad_()
        return self

    def flip(self, *dims: int) -> Inputs:
        """The same with dimensions reversed; tensors of one dimension have the first only."""
        return self.map(lambda t: t.flip(dims if t.ndim > 1 else 0))

    def __mul__(self, factor: float) -> Inputs:
        return self.map(lambda t: t * factor if t.is_floating_point() else t)

    def split(self, size: int) -> list[Inputs]:
        """So many images at a time."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    @property
    def shape(self) -> torch.Size:
        """Of the first tensor."""
        return self.tensors[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor that is floating point, or of the first."""
        return next((t.dtype for t in self.tensors if t.is_floating_point()), self.tensors[0].dtype)

    @property
    def device(self) -> torch.device:
        """Of the first tensor."""
        return self.tensors[0].device

    @staticmethod
    def joined(batches: Sequence[Inputs]) -> Inputs:
        """Batches of one form as one."""
        columns = iter(zip(*(batch.tensors for batch in batches), strict=True))
        return batches[0].map(lambda _: torch.cat(next(columns)))


register_pytree_node(
    Inputs,
    lambda inputs: ([inputs.args, inputs.kwargs], None),
    lambda children, _: _of(*children),
)


def _of(args: Any, kwargs: Any) -> Inputs:
    inputs = Inputs.__new__(Inputs)  # unchecked: children may be anything
    inputs.args, inputs.kwargs = args, kwargs
    return inputs


@contextmanager
def taking_inputs(*networks: nn.Module) -> Iterator[None]:
    """While the context lasts, each network takes `Inputs` as one argument, and whatever it took.

    For that long it is of a subclass of its own class, whose name it has.
    """
    with ExitStack() as stack:
        for network in networks:
            kind = getattr(type(network), "taken_of", type(network))  # a clone of such a network is one
            stack.callback(setattr, network, "__class__", kind)
            network.__class__ = types.new_class(kind.__name__, (kind,), exec_body=_taking(kind))
        yield


def _taking(kind: type[nn.Module]) -> Callable[[dict[str, Any]], None]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Inputs):
            args, kwargs = args[0].args, args[0].kwargs
        return kind.__call__(self, *args, **kwargs)

    return lambda namespace: namespace.update(__call__=call, taken_of=kind)
