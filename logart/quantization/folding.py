"""Folding batch norms into the layers before them: only what is understood, and checked where it happens."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from logart.quantization.layers import LAYER_TYPES

# Exact types: a subclass may do in its forward what it likes.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, FrozenBatchNorm2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Folding(NamedTuple):
    """What `fold_batch_norms` did.

    Attributes:
        folded: names of the norms folded.
        unfolded: (name, reason) of every batch norm that was not.
    """

    folded: list[str]
    unfolded: list[tuple[str, str]]


def same_outputs(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Whether two outputs of a network, tensors in any nesting, differ by no more than a share of their norm."""
    pairs = [[leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)] for output in (ours, theirs)]
    if [leaf.shape for leaf in pairs[0]] != [leaf.shape for leaf in pairs[1]]:
        return False
    for a, b in zip(*pairs, strict=True):
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return False
        a, b = (torch.where(finite, t, 0).to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
        if (a - b).norm() > tolerance * b.norm():
            return False
    return True


class Watch(TorchFunctionMode):
    """Counts how often each watched tensor enters a torch function that computes a tensor, or changes one in place.

    Attributes:
        watched: the tensors by id; holding the tensor keeps its id its own.
        count: the uses by id.
        eps: of the coarsest floating type that was computed in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}
        self.count: Counter[int] = Counter()
        self.eps = 0.0
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if result is None or tensors:  # None: y[...] = value
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.watched:
                    self.count[id(leaf)] += 1
        self.eps = max([self.eps, *(torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point())])
        return result

    @property
    def tolerance(self) -> float:
        """How far outputs may differ by rounding alone, as a share of their norm: half of the type's digits."""
        return float(self.eps**0.5)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor, keep: Callable[[str], bool] = lambda name: False) -> Folding:
    """Fold every batch norm that directly follows a convolution or linear layer into it, in place.

    A norm is folded where its class is exactly known, nothing hooks into it or the layer, and one forward of `example`
    shows that it alone uses the layer's output, nothing else reads their parameters, and the folded layer gives what
    the norm gave. A second forward compares the network's outputs; where they differ, by more than `Watch.tolerance`,
    norms are unfolded until they agree.

    Args:
        model: in eval mode; its parameters are not written to, folded layers get new ones.
        example: a batch the model can run on.
        keep: whether the layer of this name is to stay as it is.
    """
    kept = {module for name, module in model.named_modules(remove_duplicate=False) if keep(name)}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*BATCH_NORMS, nn.modules.batchnorm._BatchNorm)):
            names.setdefault(module, []).append(name)
    seen = _look(model, example)
    folds = []
    reasons: dict[str, str] = {}
    for norm, (name, *_) in names.items():
        pair = seen.pairs.get(norm)
        reason = _why_not(norm, pair, seen)
        if reason is None and pair is not None and pair.layer in kept:
            reason = "the layer before it stays as it is"
        if reason is None:
            assert pair is not None
            folds.append(_Fold(model, names[norm], norm, pair.layer))
        else:
            reasons[name] = reason
    for name in _fold_checked(model, example, folds, seen):
        reasons[name] = "with it folded the network gave other outputs"
    return Folding(
        [fold.names[0] for fold in folds if fold.names[0] not in reasons],
        [(name, reasons[name]) for name, *_ in names.values() if name in reasons],
    )


@dataclass
class _Pair:
    """A layer whose output a norm was given, and whether the folded layer gives what the norm gave."""

    layer: nn.Module
    output: Tensor
    x: Tensor
    agrees: bool = False


@dataclass
class _Seen:
    """What one forward showed: the network's output, and which norm used the output of which layer."""

    output: Any
    pairs: dict[nn.Module, _Pair]
    runs: Counter[nn.Module]
    watch: Watch


def _look(model: nn.Module, example: Tensor) -> _Seen:
    watch, runs = Watch(), Counter[nn.Module]()
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: dict[nn.Module, _Pair] = {}

    def after_layer(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        runs[layer] += 1
        if len(args) == 1 and isinstance(output, Tensor):
            watch.watched[id(output)] = output
            made[id(output)] = layer, args[0]

    def before_norm(norm: nn.Module, args: tuple[Any, ...]) -> None:
        runs[norm] += 1
        if len(args) == 1 and id(args[0]) in made:
            pairs[norm] = _Pair(made[id(args[0])][0], args[0], made[id(args[0])][1])

    def after_norm(norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if norm in pairs and _why_unlike(norm, pairs[norm]) is None:
            watch.paused = True  # what is computed here is no use of the network's
            pairs[norm].agrees = same_outputs(_folded_output(norm, pairs[norm]), output, watch.tolerance)
            watch.paused = False

    handles = []
    for module in model.modules():
        if type(module) in LAYER_TYPES:
            handles.append(module.register_forward_hook(after_layer))
        elif type(module) in BATCH_NORMS:
            handles.append(module.register_forward_pre_hook(before_norm))
            handles.append(module.register_forward_hook(after_norm))
        if type(module) in LAYER_TYPES or type(module) in BATCH_NORMS:
            watch.watched |= {id(t): t for t in _tensors(module)}
    try:
        with watch:
            output = model(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(output, pairs, runs, watch)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _folded_output(norm: nn.Module, pair: _Pair) -> Tensor:
    layer = copy.copy(pair.layer)
    layer._parameters = dict(zip(("weight", "bias"), _folded(layer, norm), strict=True))
    return _what_remains(norm)(layer.forward(pair.x))  # type: ignore[no-any-return]


def _why_not(norm: nn.Module, pair: _Pair | None, seen: _Seen) -> str | None:
    """Why a norm is not folded; None where it is."""
    if type(norm) not in BATCH_NORMS:
        return f"{type(norm).__name__} is not a batch norm whose forward is known"
    if pair is None:
        return "it does not directly follow a layer that is quantized"
    unlike = _why_unlike(norm, pair)
    if unlike is not None:
        return unlike
    if seen.watch.count[id(pair.output)] != 1:
        return "it is not all that uses the layer's output"
    if seen.runs[norm] != 1 or seen.runs[pair.layer] != 1:
        return "it or the layer before it runs more than once"
    if any(seen.watch.count[id(t)] > 1 for t in (*_tensors(norm), *_tensors(pair.layer))):
        return "something else reads its parameters, or the layer's"
    if any(getattr(module, hooks) for module in (norm, pair.layer) for hooks in _HOOKS):
        return "it or the layer before it has hooks"
    return None if pair.agrees else "with it folded the layer gave other outputs"


def _why_unlike(norm: Any, pair: _Pair) -> str | None:
    """Why a norm cannot be folded into the layer, by what they hold."""
    if norm.running_mean is None or norm.training:
        return "it norms with the statistics of the batch"
    # A linear layer's channels come last, a norm's second: the same only in [B, C].
    if not isinstance(pair.layer, nn.Conv2d) and pair.output.ndim != 2:
        return "it does not norm the layer's channels"
    weight = pair.layer._parameters.get("weight")
    if weight is None:
        return "the layer's weight is computed"
    if len(norm.running_mean) != len(weight):
        return "it does not norm the layer's channels"
    return None


def _folded(layer: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of y = γ(Wx + b - μ)/σ + β as one layer; computed in float64 and rounded once."""
    dtype = layer.weight.dtype
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double()
        shift = shift if norm.bias is None else shift + norm.bias.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    return nn.Parameter(weight.to(dtype), requires_grad=False), nn.Parameter(shift.to(dtype), requires_grad=False)


@dataclass
class _Fold:
    """One norm folded into one layer, which can be taken back."""

    model: nn.Module
    names: list[str]
    norm: nn.Module
    layer: Any

    def apply(self) -> None:
        self._before = self.layer.weight, self.layer.bias
        self.layer.weight, self.layer.bias = _folded(self.layer, self.norm)
        self._place(_what_remains(self.norm))

    def undo(self) -> None:
        self.layer.weight, self.layer.bias = self._before
        self._place(self.norm)

    def _place(self, module: nn.Module) -> None:
        for name in self.names:
            replace_module(self.model, name, module)


def _fold_checked(model: nn.Module, example: Tensor, folds: list[_Fold], seen: _Seen) -> list[str]:
    """Fold; the names of those taken back because the network gave other outputs with them."""

    def agrees() -> bool:
        return same_outputs(model(example.clone()), seen.output, seen.watch.tolerance)

    for fold in folds:
        fold.apply()
    if not folds or agrees():
        return []
    for fold in reversed(folds):
        fold.undo()
    undone = []
    for fold in folds:
        fold.apply()
        if not agrees():
            fold.undo()
            undone.append(fold.names[0])
    return undone


def _what_remains(norm: nn.Module) -> nn.Module:
    """timm's BatchNormAct2d keeps its activation; a plain norm leaves nothing."""
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity().eval()


def drop_batch_norms(model: nn.Module, keep: Callable[[str], bool]) -> None:
    """Put what folding leaves in the place of every batch norm with statistics whose name is not to be kept."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) in BATCH_NORMS and module.running_mean is not None and not keep(name):
            replace_module(model, name, _what_remains(module))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
