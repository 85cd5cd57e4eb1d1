"""Changes to a network's structure: folding batch norms, replacing layers, finding the blocks to reconstruct."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from logart.errors import NetworkError
from logart.quantization.layers import QUANTIZED_TYPES, QuantizedLayer

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)  # timm's BatchNormAct2d is a BatchNorm2d


@dataclass(frozen=True)
class Block:
    """What is reconstructed as one: a block, or a layer outside every block.

    Attributes:
        name: its name in the network.
        layers: the names in the network of the quantized layers inside, in the order they run.
    """

    name: str
    layers: tuple[str, ...]


def clone_sharing(model: nn.Module) -> nn.Module:
    """A copy of the network's structure that shares the memory of every parameter and buffer with it.

    The parameters are objects of their own, without gradient: what is done to the copy (`to`, say) stays there.
    """
    shared: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)  # type: ignore[arg-type]


class _Uses(TorchFunctionMode):
    """Counts how often each watched tensor enters a torch function that computes a tensor, or changes one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}  # holding the tensor keeps its id its own
        self.count: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if result is None or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # None: y[...] = value
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.watched:
                    self.count[id(leaf)] += 1
        return result


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor) -> list[str]:
    """Fold every batch norm that directly follows a convolution or linear layer into it, in place.

    A norm is folded where it is seen, in one forward of `example`, to be the only one that uses the layer's output,
    whatever the order of definition; others are left as they are.

    Args:
        model: in eval mode; its parameters are not written to, folded layers get new ones.
        example: a batch the model can run on.

    Returns:
        The names of the norms folded.

    Raises:
        ValueError: two modules share one weight, which folding would part; the message names them.
    """
    _refuse_sharing(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    folded = []
    for norm, layer in _norms_after_layers(model, example).items():
        if _foldable(norm, layer):
            _fold(layer, norm)
            remains = _what_remains(norm)
            for name in names[norm]:
                _replace(model, name, remains)
            folded.append(names[norm][0])
    return folded


def _norms_after_layers(model: nn.Module, example: Tensor) -> dict[nn.Module, nn.Module]:
    """The layer whose output a batch norm uses, as the only one and once, for every norm where there is such."""
    produced: dict[int, nn.Module] = {}
    pairs: dict[nn.Module, tuple[nn.Module, int]] = {}
    runs: Counter[nn.Module] = Counter()
    uses = _Uses()

    def after_layer(layer: nn.Module, args: Any, output: Tensor) -> None:
        uses.watched[id(output)] = output
        produced[id(output)] = layer
        runs[layer] += 1

    def before_norm(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        runs[norm] += 1
        layer = produced.get(id(args[0])) if args else None
        # A linear layer's channels come last, a norm's second: the same only in [B, C].
        if isinstance(layer, nn.Conv2d) or (layer is not None and args[0].ndim == 2):
            pairs[norm] = (layer, id(args[0]))

    modules = list(model.modules())
    handles = [m.register_forward_hook(after_layer) for m in modules if type(m) in QUANTIZED_TYPES]
    handles += [m.register_forward_pre_hook(before_norm) for m in modules if isinstance(m, _BATCH_NORMS)]
    try:
        with uses:
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return {
        norm: layer
        for norm, (layer, output) in pairs.items()
        if uses.count[output] == 1 and runs[layer] == 1 and runs[norm] == 1
    }


def _foldable(norm: Any, layer: Any) -> bool:
    """Whether a norm's statistics are fixed, and the layer's output is normed over its channels."""
    channels = layer.weight.shape[0]
    return norm.running_mean is not None and not norm.training and norm.num_features == channels


def _fold(layer: Any, norm: Any) -> None:
    """y = γ(Wx + b - μ)/σ + β as one layer; computed in float64 and rounded once."""
    dtype = layer.weight.dtype
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double()
        shift = shift if norm.bias is None else shift + norm.bias.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


def _what_remains(norm: nn.Module) -> nn.Module:
    """timm's BatchNormAct2d keeps its activation; a plain norm leaves nothing."""
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity().eval()


def drop_batch_norms(model: nn.Module, keep: Callable[[str], bool]) -> None:
    """Put what folding leaves in the place of every batch norm with statistics whose name is not to be kept."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, _BATCH_NORMS) and module.running_mean is not None and not keep(name):
            _replace(model, name, _what_remains(module))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def replace_layers(
    model: nn.Module, bits: dict[str, int], channel_wise: bool, row_groups: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Put a quantized layer, sharing the float weight, in the place of every layer that `bits` names.

    Args:
        bits: bit width of each layer, by name.
        channel_wise: one codebook per output channel, or one per layer.
        row_groups: layers that get several even so, one for each group of rows: how many, by the last part of the
            layer's name. Where the rows cannot be split evenly, the layer gets one.
    """
    for name, n_bits in bits.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        groups = row_groups.get(name.rpartition(".")[2], 1)
        per_layer = groups if weight.shape[0] % groups == 0 else 1
        n_codebooks = weight.shape[0] if channel_wise else per_layer
        replace_layer(model, name, n_bits, n_codebooks)


@torch.no_grad()
def check_replaced(model: nn.Module, example: Tensor) -> None:
    """Raise NetworkError where a forward of `example` does not run every quantized layer, but a float one it kept."""
    ran = _count_runs(model, lambda module: isinstance(module, QuantizedLayer), example)
    for name in quantized_layers(model):
        if name not in ran:
            raise NetworkError(f"layer {name} is also held elsewhere, in a list for instance, and is run from there")


def replace_layer(model: nn.Module, name: str, n_bits: int, n_codebooks: int) -> QuantizedLayer:
    """Put a quantized layer, sharing the float weight, in the place of one layer."""
    layer = model.get_submodule(name)
    quantized: QuantizedLayer = QUANTIZED_TYPES[type(layer)].from_float(layer, n_bits, n_codebooks)
    _replace(model, name, quantized)
    return quantized


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


@torch.no_grad()
def layers_to_quantize(model: nn.Module, example: Tensor) -> tuple[list[str], list[tuple[str, str]]]:
    """The layers that can be quantized, in the order they run, and those with weights that cannot, with the reason.

    Raises:
        ValueError: a layer runs more than once in a forward, shares its weight with another module, or holds a
            weight or bias that is not finite; the message names it.
    """
    if _is_plain(model):
        raise NetworkError(f"the network is a single {type(model).__name__}; expected it inside nn.Sequential")
    runs = _count_runs(model, _is_plain, example)
    _refuse_sharing(model)
    for name, count in runs.items():
        if count > 1:
            raise NetworkError(f"layer {name} runs {count} times in one forward; a layer may run once")
        for kind, parameter in model.get_submodule(name).named_parameters(recurse=False):
            if not torch.isfinite(parameter).all():
                raise NetworkError(f"layer {name}: its {kind} holds NaN or infinite values")
    skipped = []
    for name, module in model.named_modules():
        if _is_plain(module) and name not in runs:
            skipped.append((name, "did not run in the forward pass"))
        elif type(module) in QUANTIZED_TYPES and not _is_plain(module):
            skipped.append((name, "its weight is computed from other tensors, by pruning or a norm"))
        elif type(module) not in QUANTIZED_TYPES and name and _holds_matrix(module):
            skipped.append((name, f"{type(module).__name__} is not one of the layer types that are quantized"))
    return list(runs), skipped


def _count_runs(model: nn.Module, which: Callable[[nn.Module], bool], example: Tensor) -> Counter[str]:
    """How often each of these modules, by name, runs in one forward, in the order they first do."""
    runs: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if which(module):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: runs.update([name])))
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a layer that can be quantized: of such a type, with a weight of its own."""
    return type(module) in QUANTIZED_TYPES and "weight" in module._parameters


def _holds_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def _refuse_sharing(model: nn.Module) -> None:
    """Raise where one weight belongs to two names: they could not be quantized apart."""
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                other = owner.setdefault(id(parameter), name)
                if other != name:
                    raise NetworkError(f"layers {other} and {name} share one weight; give each its own")


def find_blocks(model: nn.Module, layers: Sequence[str], block_types: Sequence[str]) -> list[Block]:
    """Group layers, given in the order they run, into blocks and single layers.

    Args:
        layers: names of the layers.
        block_types: class names of blocks; of nested blocks the outermost counts. Without any, each layer is one.

    Raises:
        ValueError: block types are given and the network has none of them.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in block_types and not any(_inside(name, block) for block in blocks):
            blocks.append(name)
    if block_types and not blocks:
        raise NetworkError(f"no module of type {', '.join(block_types)} in {type(model).__name__}")
    members: dict[str, list[str]] = {}
    for layer in layers:
        owner = next((block for block in blocks if _inside(layer, block)), layer)
        members.setdefault(owner, []).append(layer)
    return [Block(name, tuple(inside)) for name, inside in members.items()]


def _inside(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(block + ".")
