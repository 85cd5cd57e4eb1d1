"""Weights that are computed from parameters alone, by a norm or pruning, become parameters of plain layers."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from logart.quantization.folding import replace_module, same_outputs
from logart.quantization.survey import is_plain

_OPERATIONS = {torch.conv2d: nn.Conv2d, F.linear: nn.Linear}
_COMPUTING_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


class _Watch(TorchFunctionMode):
    """The weight and bias that each module running now gives to a convolution or linear operation."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.weights: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OPERATIONS and self.inside:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self.weights.setdefault(self.inside[-1], []).append((weight.detach().clone(), bias))
        return func(*args, **kwargs)


@torch.no_grad()
def bake_weights(model: nn.Module, example: Tensor) -> list[str]:
    """Put plain layers in the place of convolutions and linear layers whose weight is computed from parameters alone.

    A layer is replaced where it runs once, uses one weight whatever the images, and the plain layer gives
    the same output; all are put back where the network's outputs differ. Costs nothing where there is no such layer.

    Args:
        model: in eval mode.
        example: a batch the model can run on.

    Returns:
        The names of the layers replaced.
    """
    candidates = {name: m for name, m in model.named_modules() if _may_compute(m)}
    if not candidates:
        return []
    watch, seen, output = _run(model, candidates, example)
    other, _, _ = _run(model, candidates, example.flip(0) * 0.5)
    replaced = []
    for name, module in candidates.items():
        weights = watch.weights.get(name, [])
        once = len(weights) == 1 == len(seen.get(name, []))
        if not once or not torch.equal(weights[0][0], other.weights[name][0][0]):
            continue
        x, y = seen[name][0]
        for kind in (nn.Linear,) if isinstance(module, nn.Linear) else (nn.Conv2d, Conv2dSame):
            plain = plain_layer(module, kind, *weights[0])
            if same_outputs(plain(x.clone()), y, torch.finfo(y.dtype).eps ** 0.5):
                replace_module(model, name, plain)
                replaced.append(name)
                break
    if replaced and not same_outputs(model(example.clone()), output, torch.finfo(example.dtype).eps ** 0.5):
        for name in replaced:
            replace_module(model, name, candidates[name])
        return []
    return replaced


def plain_layer(module: Any, kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of a plain type with the settings of `module`, and this weight and bias."""
    if kind is nn.Linear:
        plain: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        padding = 0 if kind is Conv2dSame else module.padding
        plain = kind(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, padding, module.dilation,
            module.groups, bias is not None,
        )  # fmt: skip
        plain.padding_mode = module.padding_mode
        plain._reversed_padding_repeated_twice = module._reversed_padding_repeated_twice
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain.eval()  # type: ignore[no-any-return]


def _may_compute(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d | nn.Linear) or is_plain(module) or module._forward_hooks:
        return False
    return all(isinstance(hook, _COMPUTING_HOOKS) for hook in module._forward_pre_hooks.values())


def _run(
    model: nn.Module, candidates: dict[str, nn.Module], x: Tensor
) -> tuple[_Watch, dict[str, list[tuple[Tensor, Tensor]]], Any]:
    """What the candidates gave to operations, their inputs and outputs by name, and the network's output."""
    watch = _Watch()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    inputs: list[Tensor] = []

    def enter(name: str, args: tuple[Any, ...]) -> None:
        watch.inside.append(name)
        inputs.append(args[0].clone() if args and isinstance(args[0], Tensor) else x)

    def leave(name: str, output: Any) -> None:
        watch.inside.pop()
        seen.setdefault(name, []).append((inputs.pop(), output.clone()))

    handles = []
    for name, module in candidates.items():
        handles += [
            module.register_forward_pre_hook(lambda m, args, name=name: enter(name, args)),
            module.register_forward_hook(lambda m, args, output, name=name: leave(name, output)),
        ]
    try:
        with watch:
            output = model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return watch, seen, output
