"""Following a network's values through one forward: which weights enter linear operations, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from logart.quantization.layout import Layout
from logart.quantization.modes import autocast_now
from logart.quantization.multihead import attention
from logart.quantization.operations import Use, is_product, is_wrapped, use_of
from logart.quantization.watching import Places
from logart.quantization.weight_state import layer_name

_LINEAR = {
    F.linear, F.bilinear, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
_RECURRENT = (
    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
    torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell,
)  # fmt: skip
RUN_THEIR_CHILDREN = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # a quantized weight would be one of them
_IMAGES = ""  # what stands for the network's input among the names of layers


class Owner(NamedTuple):
    """A parameter of two dimensions and more, and where it is held first."""

    module: nn.Module
    name: str
    parameter: nn.Parameter


class Seen(NamedTuple):
    """A weight seen in an operation.

    Attributes:
        layout: of the parameter as a matrix; None where the operation takes only a part of it.
        groups: of the operation.
        bias: the tensor that it adds.
        running: the names of the modules running, the innermost last.
        own_forward: whether that one holds the weight.
        hidden: why what the weight is multiplied with cannot be seen; empty where it can.
    """

    layout: Layout | None
    groups: int
    bias: Tensor | None
    running: tuple[str, ...]
    own_forward: bool
    hidden: str = ""


def owners(model: nn.Module) -> dict[str, Owner]:
    """Every parameter that may be a weight, by its layer's name; one that is held several times once."""
    found: dict[tuple[Any, ...], tuple[str, Owner]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and parameter.is_floating_point() and not isinstance(module, RUN_THEIR_CHILDREN):
                found.setdefault(memory_of(parameter), (layer_name(name, own), Owner(module, own, parameter)))
    return dict(found.values())


def _second(args: Any, kwargs: Any) -> Any:
    return kwargs.get("weight", args[1] if len(args) > 1 else None)


def memory_of(parameter: Tensor) -> tuple[Any, ...]:
    """Equal for parameters that are one and the same."""
    address = parameter.data_ptr() if parameter.device.type != "meta" else 0
    return (address or id(parameter), *parameter.shape)


class Flow(TorchFunctionMode):
    """Follows, tensor by tensor, which layers the values last came through.

    Attributes:
        seen: by layer the operations that its weight enters, in the order layers are first used.
        used: ids of all tensors that entered an operation.
        entered: by id of a parameter of one dimension, how many functions it entered.
        unregistered: what was used in a weight's place, but is no parameter and is not computed, by id.
        computed: the same of what was computed, of no images.
        runs: how often each module runs, by name.
        autocast: the type of autocast that each module was entered under, by name.
        eps: of the coarsest floating type that was computed in.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.example = example.clone()  # an operation in place at the start must not reach the caller's images
        self.owners = owners(model)
        self.seen: dict[str, list[Seen]] = {}
        self.used: set[int] = set()
        self.runs: Counter[str] = Counter()
        self.entered: Counter[int] = Counter()
        self.unregistered: dict[int, Tensor] = {}
        self.computed: dict[int, Tensor] = {}
        self.autocast: dict[str, torch.dtype] = {}
        self.eps = 0.0
        self._registered = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._places = Places({name: owner.parameter for name, owner in self.owners.items()})
        self._running: list[tuple[str, nn.Module]] = [("", model)]
        self._inputs: list[str] = []
        self._followed: set[str] = set()  # layers whose output another layer was given
        self._through: Any = WeakIdKeyDictionary()
        for leaf in tree_leaves(self.example):
            if isinstance(leaf, Tensor):
                self._through[leaf] = frozenset([_IMAGES])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        noted: list[str] = []
        if func is F.multi_head_attention_forward:
            result = attention(partial(self._call, noted), self._is_weight, *args, **kwargs)
        else:
            result = self._call(noted, func, args, kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if result is None and operands:  # y[...] = value
            made = operands[:1]
        if made:
            entered = {id(tensor) for tensor in operands}
            self.used |= entered
            self.entered.update(entered & self._registered)
            if not noted and (func in _LINEAR or is_product(func)):
                self._look_for_weight(operands if is_product(func) else [_second(args, kwargs)])
            self._pass_on(operands, noted, made)
        return result

    def _call(self, noted: list[str], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function gives; `noted` gets the layers whose weights enter it."""
        use = use_of(func, args, kwargs, self._is_weight)
        result = func(*args, **kwargs)
        if use is not None:
            noted.append(self._note(use))
        elif func in _RECURRENT:
            weights = [leaf for leaf in tree_leaves((args, kwargs)) if self._is_weight(leaf)]
            noted += [self._note(weight) for weight in weights if weight.ndim > 1]
        return result

    def _note(self, use: Use | Tensor) -> str:
        weight = use.weight if isinstance(use, Use) else use
        name = self._places.name_of(weight)
        assert name is not None
        owner, running = self.owners[name], tuple(name for name, _ in self._running)
        if isinstance(use, Use) and is_wrapped(use.x):
            seen = Seen(None, 1, None, running, False, "is used under vmap or a transform like it")
        elif isinstance(use, Use):
            layout = Layout.of(weight, use.channel_dims, owner.parameter)
            seen = Seen(layout, use.groups, use.bias, running, self._running[-1][1] is owner.module)
        else:
            seen = Seen(None, 1, None, running, False, "is used inside of a recurrent operation")
        self.seen.setdefault(name, []).append(seen)
        return name

    def _pass_on(self, operands: Sequence[Tensor], layers: Sequence[str], made: Sequence[Tensor]) -> None:
        """Of several layers in one operation, attention's projections, the last gives the output."""
        came: frozenset[str] = frozenset().union(*(self._through.get(tensor, ()) for tensor in operands))
        if layers and came:
            first = layers[:-1] or layers
            self._inputs += [layer for layer in first if came == {_IMAGES} and layer not in self._inputs]
            self._followed |= came | set(layers[:-1])
            came = frozenset(layers[-1:])
        for tensor in made:
            if id(tensor) not in self._registered:
                self._through[tensor] = came
            if tensor.is_floating_point():
                self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)

    def _is_weight(self, tensor: Any) -> bool:
        return self._places.name_of(tensor) is not None

    def _look_for_weight(self, operands: Sequence[Any]) -> None:
        for weight in operands:
            if not isinstance(weight, Tensor) or weight.ndim < 2 or id(weight) in self._registered:
                continue
            if weight not in self._through:
                self.unregistered[id(weight)] = weight
            elif not self._through[weight]:
                self.computed[id(weight)] = weight

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note which modules run, and under which autocast each is entered."""
        device_type = self.example.device.type

        def enter(name: str, module: nn.Module, *_: object) -> None:
            self._running.append((name, module))
            self.runs[name] += 1
            dtype = autocast_now(device_type)
            if dtype is not None:
                self.autocast[name] = dtype

        def leave(*_: object) -> None:
            self._running.pop()

        handles = []
        for name, module in model.named_modules():
            if module is not model:
                handles.append(module.register_forward_pre_hook(partial(enter, name)))
                handles.append(module.register_forward_hook(leave))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def ends(self, output: Any) -> tuple[list[str], list[str]]:
        """The input layers and the heads; where the flow was lost, the first and the last layer to run."""
        layers = list(self.seen)
        reached: set[str] = set()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                reached |= self._through.get(leaf, frozenset())
        inputs = [name for name in layers if name in self._inputs]
        heads = [name for name in layers if name in reached - self._followed]
        return inputs or layers[:1], heads or layers[-1:]
