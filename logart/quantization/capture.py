"""Seeing inside a network: how one of its modules is called and what it gives.

Whatever is put into a network for this comes off again; a forward is cut short, once the module has been reached, by a
private exception.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from logart.errors import NetworkError
from logart.quantization.cache import is_stored
from logart.quantization.inputs import Inputs


class Call(NamedTuple):
    """What a module is called with: trees of tensors [n, ...] and of anything else."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(inputs: Tensor | Inputs) -> Call:
        """What a network is called with: one tensor, or several."""
        return Call(inputs.args, inputs.kwargs) if isinstance(inputs, Inputs) else Call((inputs,), {})

    def on(self, module: nn.Module) -> Any:
        """What the module gives; it may begin with an operation in place."""
        return module(*self.args, **self.kwargs)

    def copy(self) -> Call:
        """The same of tensors of its own."""
        return Call(*tree_map_only(Tensor, torch.clone, (self.args, self.kwargs)))

    def tensor(self, module: nn.Module) -> Tensor:
        """The one tensor that `module` is called with; NetworkError for any other call."""
        if len(self.args) != 1 or self.kwargs or not isinstance(self.args[0], Tensor):
            raise NetworkError(
                f"{type(module).__name__} was called with {len(self.args)} arguments and keywords "
                f"{sorted(self.kwargs)}; what is reconstructed must take one tensor"
            )
        return self.args[0]


def only_tensor(output: Any, module: nn.Module) -> Any:
    """The one tensor, wherever it lives, in what a module gives; NetworkError where there are none or several."""
    tensors = [leaf for leaf in tree_leaves(output) if is_stored(leaf)]
    if len(tensors) != 1:
        message = f"{type(module).__name__} gave a {type(output).__name__}"
        raise NetworkError(f"{message}; what is reconstructed must give one tensor")
    return tensors[0]


class _Reached(Exception):
    """Raised to end a forward that has gone as far as needed."""


@contextmanager
def intercepted(modules: Sequence[nn.Module], answer: Callable[[int, Call], Any]) -> Iterator[None]:
    """While the context lasts, calling `modules[i]` runs nothing of it, hooks included, but gives `answer(i, call)`.

    For that long each module is of a subclass of its own class: whatever else the network asks of it is as it was.
    """
    kinds = [type(module) for module in modules]

    def intercept(index: int, kind: type[nn.Module]) -> None:
        def call(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return answer(index, Call(args, kwargs))

        modules[index].__class__ = types.new_class(
            kind.__name__, (kind,), exec_body=lambda ns: ns.update(__call__=call)
        )

    try:
        for index, kind in enumerate(kinds):
            intercept(index, kind)
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind


def replay_to_last(
    model: nn.Module,
    modules: Sequence[nn.Module],
    inputs: Iterable[Tensor | Inputs],
    replay: Callable[[int, int], Any],
    take: Callable[[int, Call], None],
) -> None:
    """See how the last of some modules is called when a network runs on its inputs, without running any of them.

    Args:
        model: holds the modules, or is the only one.
        inputs: of the network, which runs no further than to the last module.
        replay: for (b, i), what `modules[i]` gives when the network runs on the b-th input.
        take: is given b and the call.

    Raises:
        NetworkError: the forward never reaches the module.
    """
    calls: list[Call] = []
    batch = 0

    def answer(index: int, call: Call) -> Any:
        if index < len(modules) - 1:
            return replay(batch, index)
        calls.append(call)
        raise _Reached

    with intercepted(modules, answer):
        for batch, x in enumerate(inputs):  # noqa: B007
            try:
                Call.of(x).copy().on(model)  # an in-place operation at the start must not reach the caller's images
            except _Reached:
                pass
            if not calls:
                raise NetworkError(f"the forward pass never reached {type(modules[-1]).__bases__[0].__name__}")
            take(batch, calls.pop())


def run_to(block: nn.Module, layer: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
    """What a layer is given and what it gives when a block that holds it, or is it, is called, and runs no further.

    Raises:
        NetworkError: the forward never reaches the layer, or the layer takes anything but one tensor.
    """
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(args, kwargs).tensor(layer))

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append(output)
        raise _Reached

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        call.copy().on(block)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise NetworkError(f"the forward pass never reached {type(layer).__name__}")
    operand, output = seen
    return operand, output
