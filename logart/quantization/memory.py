"""How much memory a block takes while it is worked on, foreseen from two images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from logart.quantization.cache import MemoryEstimate
from logart.quantization.config import QuantConfig, ReconInput, SearchMethod
from logart.quantization.dbs import PROBES
from logart.quantization.surgery import Block

# Measured on the CPU, where a library's own copies count too (EXPERIMENTS.md).
_LEARNING = 26  # times a block's weights: α and Adam, the levels, the soft weight, the gradients, the start in float64
_COMPENSATING = 7  # times A [G, K, K] of float64: moments, centred moments, A, its inverse and factors
_STEP = 3  # times a batch of a block's inputs and outputs, beside what the backward saves
_RESIDUAL = (
    4  # times a layer's outputs of all search images: LW's residual, and a candidate's on their way to its error
)
_VJPS = 2 * (PROBES + 1) + 2  # likewise BW's pulls and probes, twice while batches are joined, and a candidate's
_PASS = 4  # times a batch of the largest of all inputs and outputs: running the network up to a block


@dataclass
class _Traffic:
    """Bytes per image that a block is given, gives, and saves for a backward pass."""

    inputs: int = 0
    outputs: int = 0
    saved: int = 0


def estimate_memory(
    reference: nn.Module, blocks: Sequence[Block], example: Tensor, config: QuantConfig
) -> dict[str, MemoryEstimate]:
    """What each block of a float network will need, by name.

    Args:
        reference: the float network.
        example: a few images [n, ...] on its device.
    """
    traffic = _traffic(reference, [block.name for block in blocks], example, saved=config.learns)
    prefixes = 2 if config.compensates or config.recon_input is ReconInput.MIXED else 1
    layers = [name for block in blocks for name in block.layers] if config.searches_data else []
    searched = _traffic(reference, layers, example, saved=False) if layers else {}
    snapshot = _VJPS if config.search_method is SearchMethod.BLOCK_WISE else _RESIDUAL
    largest = max(max(seen.inputs, seen.outputs) for seen in traffic.values())
    needs = {}
    for block in blocks:
        seen, working = traffic[block.name], 0
        if config.learns:
            activations = config.batch_size * (seen.saved + _STEP * (seen.inputs + seen.outputs))
            working = activations + _LEARNING * sum(_weight(reference, name).nbytes for name in block.layers)
        if config.compensates:
            working = max(working, *(_gram_bytes(reference, name) for name in block.layers))
        if config.searches_data:
            most = max(2 * searched[name].inputs + snapshot * searched[name].outputs for name in block.layers)
            working = max(working, config.search_samples * most)
        working = max(working, _PASS * config.batch_size * largest)
        needs[block.name] = MemoryEstimate(config.images_needed * (prefixes * seen.inputs + seen.outputs), working)
    return needs


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _gram_bytes(model: nn.Module, name: str) -> int:
    elements, groups = _weight(model, name)[0].numel(), int(getattr(model.get_submodule(name), "groups", 1))
    return _COMPENSATING * groups * elements**2 * torch.float64.itemsize


def _traffic(model: nn.Module, names: Sequence[str], example: Tensor, *, saved: bool) -> Mapping[str, _Traffic]:
    """Per image and module named; with `saved`, autograd itself says what it would save where weights are learned."""
    seen = {name: _Traffic() for name in names}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    inside: list[_Traffic] = []

    def enter(name: str, *_: object) -> None:
        inside.append(seen[name])

    def leave(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inside.pop()
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):  # capturing refuses all others
            seen[name].inputs, seen[name].outputs = args[0][0].nbytes, output[0].nbytes

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            inside[-1].saved += storage.nbytes() // len(example)
        return tensor

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(partial(enter, name)),
            module.register_forward_hook(partial(leave, name)),
        ]
    learned = [p for p in model.parameters() if saved and p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(True)
        with torch.set_grad_enabled(saved), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = model(example.clone())
            del output  # which kept all that was saved, so that no address came twice
    finally:
        for parameter in learned:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()
    return seen
