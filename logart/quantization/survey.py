"""What a network does, seen in one forward: which layers run, what stays float, its input layers and its heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from logart.errors import NetworkError
from logart.quantization.clone import attributes
from logart.quantization.layers import LAYER_TYPES
from logart.quantization.modes import autocast_now

_LINEAR = {
    F.linear, F.bilinear, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
_IMAGES = ""  # what stands for the network's input among the names of layers


@dataclass(frozen=True)
class Survey:
    """What one forward showed.

    Attributes:
        layers: names of the layers that can be quantized, in the order they run.
        skipped: (name, reason) of every weight that stays float: the layer's name, or the parameter's where it is not
            the `weight` of a layer.
        inputs: the layers that see the network's input before any other layer did.
        heads: the layers whose output reaches the network's without another layer between.
        n_weights: elements of all weights, which are the parameters of two dimensions and more, and whatever else
            enters a linear operation in a weight's place.
        output: the network's.
        autocast: the type of autocast that each module was entered under, by name; not those outside of autocast.
        eps: of the coarsest floating type that was computed in.
    """

    layers: list[str]
    skipped: list[tuple[str, str]]
    inputs: list[str]
    heads: list[str]
    n_weights: int
    output: Any
    autocast: dict[str, torch.dtype]
    eps: float


@torch.no_grad()
def survey(model: nn.Module, example: Tensor) -> Survey:
    """Look at a network in one forward of `example`.

    Raises:
        NetworkError: a layer runs more than once in a forward, shares its weight with another module, or holds a
            weight or bias that is not finite; the message names it.
    """
    if is_plain(model):
        raise NetworkError(f"the network is a single {type(model).__name__}; expected it inside nn.Sequential")
    _refuse_sharing(model)
    flow = _Flow(model, example)
    with flow, flow.watching_autocast(model):
        runs, output = count_runs(model, is_plain, flow.example)
    for name, count in runs.items():
        if count > 1:
            raise NetworkError(f"layer {name} runs {count} times in one forward; a layer may run once")
        for kind, parameter in model.get_submodule(name).named_parameters(recurse=False):
            if not torch.isfinite(parameter).all():
                raise NetworkError(f"layer {name}: its {kind} holds NaN or infinite values")
    skipped = list(_skipped(model, set(runs), flow))
    n_weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    n_weights += sum(t.numel() for t in flow.unregistered.values())
    layers = list(runs)
    return Survey(layers, skipped, *flow.ends(output, layers), n_weights, output, flow.autocast, flow.eps)


def count_runs(model: nn.Module, which: Any, example: Tensor) -> tuple[Counter[str], Any]:
    """How often each of these modules, by name, runs in one forward, in the order they first do; and its output."""
    runs: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if which(module):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: runs.update([name])))
    try:
        output = model(example)
    finally:
        for handle in handles:
            handle.remove()
    return runs, output


def is_plain(module: nn.Module) -> bool:
    """Whether it is a layer that can be quantized: of such a type, with a weight of its own."""
    return type(module) in LAYER_TYPES and "weight" in module._parameters


class _Flow(TorchFunctionMode):
    """Follows, tensor by tensor, which layers the values last came through."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.example = example.clone()  # an operation in place at the start must not reach the caller's images
        self.layer_of = {id(m.weight): name for name, m in model.named_modules() if is_plain(m)}
        self.registered = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.used: set[int] = set()
        self.unregistered: dict[int, Tensor] = {}
        self.autocast: dict[str, torch.dtype] = {}
        self.eps = 0.0
        self._inputs: list[str] = []
        self._followed: set[str] = set()  # layers whose output another layer was given
        self._through: Any = WeakIdKeyDictionary()
        for leaf in tree_leaves(self.example):
            if isinstance(leaf, Tensor):
                self._through[leaf] = frozenset([_IMAGES])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if result is None and given:  # y[...] = value
            made = given[:1]
        if not made:
            return result
        self.used |= {id(tensor) for tensor in given}
        self._look_for_weight(func, args, kwargs or {})
        came: frozenset[str] = frozenset().union(*(self._through.get(tensor, ()) for tensor in given))
        layers = {self.layer_of[id(tensor)] for tensor in given if id(tensor) in self.layer_of}
        if layers and any(t.is_floating_point() for t in made) and came:
            self._inputs += [layer for layer in layers if came == {_IMAGES} and layer not in self._inputs]
            self._followed |= came
            came = frozenset(layers)
        for tensor in made:
            if id(tensor) not in self.registered:
                self._through[tensor] = came
            if tensor.is_floating_point():
                self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)
        return result

    @contextmanager
    def watching_autocast(self, model: nn.Module) -> Iterator[None]:
        """Note under which autocast each module is entered."""
        device_type = self.example.device.type

        def enter(name: str, *_: object) -> None:
            dtype = autocast_now(device_type)
            if dtype is not None:
                self.autocast[name] = dtype

        handles = [m.register_forward_pre_hook(partial(enter, name)) for name, m in model.named_modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look_for_weight(self, func: Any, args: Any, kwargs: Any) -> None:
        if func in _LINEAR:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            if isinstance(weight, Tensor) and id(weight) not in self.registered and weight not in self._through:
                self.unregistered[id(weight)] = weight

    def ends(self, output: Any, layers: list[str]) -> tuple[list[str], list[str]]:
        """The input layers and the heads; where the flow was lost, the first and the last layer to run."""
        reached: set[str] = set()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                reached |= self._through.get(leaf, frozenset())
        inputs = [name for name in layers if name in self._inputs]
        heads = [name for name in layers if name in reached - self._followed]
        return inputs or layers[:1], heads or layers[-1:]


def _skipped(model: nn.Module, ran: set[str], flow: _Flow) -> Iterable[tuple[str, str]]:
    for name, module in model.named_modules():
        if name in ran:
            continue
        if is_plain(module):
            used = id(module.weight) in flow.used
            yield name, "is used but not run as a layer" if used else "did not run in the forward pass"
        elif type(module) in LAYER_TYPES:
            yield name, "its weight is computed from other tensors, by pruning or a norm"
        else:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    held = name if own == "weight" and name else _join(name, own)
                    what = f"{type(module).__name__} is not one of the layer types that are quantized"
                    yield held, what if id(parameter) in flow.used else "is not used in the forward pass"
    names = {id(t): _join(name, key) for name, key, value in attributes(model) for t in tree_leaves(value)}
    for identity in flow.unregistered:
        yield names.get(identity, "a tensor"), "is used as a weight, but no module holds it as a parameter or buffer"


def _join(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own


def _refuse_sharing(model: nn.Module) -> None:
    """Raise where one weight belongs to two names: they could not be quantized apart."""
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                other = owner.setdefault(id(parameter), name)
                if other != name:
                    raise NetworkError(f"layers {other} and {name} share one weight; give each its own")
