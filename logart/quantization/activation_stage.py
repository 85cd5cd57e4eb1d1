"""Choosing the levels of activations, block by block, each from what the quantized network before it gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from logart import ranks
from logart.errors import NetworkError
from logart.grids import activations
from logart.grids.activations import ActScale, Seen, SoftmaxGrid, choose_even_grid, choose_log_levels
from logart.grids.registry import grid_named
from logart.quantization.activation_learning import learn_steps
from logart.quantization.activation_quantizer import (
    ActivationQuantizer,
    Measured,
    attach,
    block_quantizers,
    input_quantizer_of,
    quantized_name,
    quantizers,
    watching,
)
from logart.quantization.activations import Capture
from logart.quantization.cache import Captured
from logart.quantization.capture import Call, run_to
from logart.quantization.layers import is_layer
from logart.quantization.operations import Use, is_wrapped
from logart.quantization.product_quantizers import quantize_products
from logart.quantization.products import operand_place
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.rounding_methods import BlockSize, BlockTask, NetworkTask, Stage
from logart.quantization.settings import ReconInput, Settings
from logart.quantization.surgery import input_quantizers, quantized_layers, readers
from logart.quantization.watching import Watch


class Activations(Stage):
    """Every quantizer of a block gets its levels, in the order they run; then, where asked, their steps are learned."""

    title, event, changes_weights = "activations", "activations", False

    def __init__(self, *, learns_steps: bool = False) -> None:
        self._learn = LearnSteps() if learns_steps else None

    def result(self, config: Settings) -> str:
        return f"with {config.n_bits_a}-bit activations"

    def needs(self, config: Settings) -> frozenset[Capture]:
        return frozenset({Capture.INPUTS}) | (self._learn.needs(config) if self._learn else frozenset())

    def steps(self, config: Settings) -> int:
        return self._learn.steps(config) if self._learn else 1

    def working_bytes(self, size: BlockSize, config: Settings) -> int:
        """A batch's tensors, and of the values seen the levels, the error and its power."""
        return 2 * config.batch_size * size.activations + 24 * (activations.SAMPLE + activations.LARGEST)

    def prepare(self, task: NetworkTask) -> list[tuple[str, str]]:
        """Put quantizers before layers, beside weights that other functions use, and at the operands of products."""
        names = [block.name for block in task.blocks]
        left = quantize_products(task.quantized, task.config.n_bits_a, names, task.example)
        layers = quantized_layers(task.quantized)
        used, run_as_layers = _look(task, {name: layers[name] for name in task.bits_a})
        for name, n_bits in task.bits_a.items():
            held = readers(task.quantized, layers[name])
            prefixes = {_joined(block, "") for block in used[name] if block is not None}
            if not used[name]:
                left.append((name, "what it is multiplied with is not seen"))
            elif name not in task.apart and (len(used[name]) > 1 or not prefixes):
                left.append((name, "it is used outside of any one block"))
            elif name not in task.apart and not any(f"{path}.".startswith(tuple(prefixes)) for path, _, _ in held):
                left.append((name, "the block that uses it does not hold it"))
            elif name in run_as_layers:
                attach(layers[name].module, n_bits)
            else:
                quantizer = ActivationQuantizer(n_bits, layers[name].weight.device).train(task.quantized.training)
                quantizer.n_uses, quantizer.apart = layers[name].n_uses, name in task.apart
                for _, module, own in held:
                    module.add_module(input_quantizer_of(own), quantizer)
        return left

    def run(self, task: BlockTask) -> None:
        block = task.quantized.get_submodule(task.block.name)
        _choose(task, block, _in_order(block, task.captured[Capture.INPUTS]))
        if self._learn:
            self._learn.run(task)

    def run_whole(self, task: BlockTask) -> None:
        """Levels alone: of a step that several blocks share none of these can learn."""
        _choose(task, task.quantized, input_quantizers(task.quantized, task.block.layers))


class LearnSteps(Stage):
    """Steps of a block's quantizers are learned by the error of its output, and reverted where it is not less."""

    title, event, changes_weights = "activation steps", "steps", False

    def result(self, config: Settings) -> str:
        return f"with learned {config.n_bits_a}-bit scales"

    def needs(self, config: Settings) -> frozenset[Capture]:
        mixed = {Capture.FLOAT_INPUTS} if config.recon_input is ReconInput.MIXED else set()
        return frozenset({Capture.INPUTS, Capture.TARGETS, *mixed})

    def steps(self, config: Settings) -> int:
        return config.iters_a

    def working_bytes(self, size: BlockSize, config: Settings) -> int:
        """A batch's tensors, their gradients, and of each quantizer what its gradient needs."""
        return 6 * config.batch_size * size.activations

    def run(self, task: BlockTask) -> None:
        block, captured = task.quantized.get_submodule(task.block.name), task.captured
        inputs, targets = captured[Capture.INPUTS], captured[Capture.TARGETS]
        float_inputs = captured.get(Capture.FLOAT_INPUTS)
        loss = task.loss(targets.shape)
        if learn_steps(block, inputs, targets, task.config, loss, task.show, float_inputs):
            for quantizer in block_quantizers(block).values():
                measure(quantizer, seen_by(block, quantizer, inputs, task.config.batch_size))


@torch.no_grad()
def _look(task: NetworkTask, layers: Mapping[str, QuantizedWeight]) -> tuple[dict[str, set[str | None]], set[str]]:
    """In which blocks each weight is multiplied, None for outside; and whose layers run and do nothing else with it."""
    names, inside = list(layers), list[str | None]([None])
    used: dict[str, set[str | None]] = {name: set() for name in names}
    ran: set[str] = set()

    def see(name: str, use: Use) -> None:
        if not is_wrapped(use.given):
            used[name].add(inside[-1])

    def enter(name: str, *_: object) -> None:
        inside.append(name)

    def leave(*_: object) -> None:
        inside.pop()

    handles = []
    for block in task.blocks:
        module = task.quantized.get_submodule(block.name)
        handles.append(module.register_forward_pre_hook(partial(enter, block.name)))
        handles.append(module.register_forward_hook(leave))
    modules = [layer.module for layer in layers.values()]
    try:
        weights = {name: layer.weight for name, layer in layers.items()}
        with watching(modules, lambda index, _: ran.add(names[index])), Watch(weights, see):
            task.quantized(task.example.clone())
    finally:
        for handle in handles:
            handle.remove()
    return used, {name for name in ran if layers[name].n_uses == 1 and is_layer(layers[name].module)}


def _choose(task: BlockTask, block: nn.Module, found: Mapping[str, ActivationQuantizer]) -> None:
    for name, quantizer in found.items():
        seen = seen_by(block, quantizer, task.captured[Capture.INPUTS], task.config.batch_size)
        if not all(map(math.isfinite, seen.extremes)):
            raise NetworkError(f"{_joined(task.block.name, name)}: what it is given is not finite")
        choose_levels(quantizer, seen, task.config)


def _joined(block: str, name: str) -> str:
    return f"{block}.{name}" if block else name


@torch.no_grad()
def _in_order(block: nn.Module, inputs: Captured) -> dict[str, ActivationQuantizer]:
    """The quantizers in a block, in the order they first run."""
    found = block_quantizers(block)
    names = list(found)
    ran: list[str] = []
    with watching(list(found.values()), lambda index, _: ran.append(names[index])):
        inputs[:1].copy().on(block)
    return {name: found[name] for name in ran}


@torch.no_grad()
def seen_by(block: nn.Module, quantizer: ActivationQuantizer, inputs: Captured, batch_size: int) -> Seen:
    """What a quantizer in a block is given on all ranks: all values, or some that stand for them.

    Args:
        inputs: the block's calls for n images.
        batch_size: images at a time.
    """
    parts: list[Tensor] = []
    ends: list[Tensor] = []
    stride, first, count = 1, 0, 0
    largest = torch.empty(0, device=inputs.device)
    for start in range(0, len(inputs), batch_size):
        x = _given(block, quantizer, inputs[start : start + batch_size])
        if start == 0:
            total = x.numel() * inputs.total // min(batch_size, len(inputs))
            stride = activations.sampling_stride(total, x.numel())
        if stride > 1:
            more = x if len(largest) < activations.LARGEST else x[x.abs() > largest.abs().min()]
            largest = activations.largest(torch.cat([largest, more]))
        ends += x.aminmax()
        parts.append(x[first::stride].clone())
        first = (first - x.numel()) % stride
        count += x.numel()
    extremes = ranks.all_rows(torch.stack([min(ends), max(ends)]))
    low, high = float(extremes.min()), float(extremes.max())
    values = ranks.all_rows(torch.cat(parts))
    if stride == 1:
        return Seen(values, 1.0, (low, high))
    total = int(ranks.all_rows(torch.tensor([count])).sum())
    return Seen.weighted(values, activations.largest(ranks.all_rows(largest)), total, (low, high))


def _given(block: nn.Module, quantizer: ActivationQuantizer, call: Call) -> Tensor:
    """What a quantizer is given when its block is called, as one row; the block runs no further than it must."""
    if quantizer.n_uses == 1:
        return run_to(block, quantizer, call)[0].flatten()
    seen: list[Tensor] = []
    with watching([quantizer], lambda _, x: seen.append(x.flatten().clone())):
        call.copy().on(block)
    return torch.cat(seen)


def choose_levels(quantizer: ActivationQuantizer, x: Seen, config: Settings) -> None:
    """Give a quantizer the levels of least error on what it is given."""
    if quantizer.after_softmax and config.softmax_grid is not SoftmaxGrid.UNIFORM:
        grid = grid_named(config.softmax_grid.value)
        quantizer.set_log(choose_log_levels(x, grid, quantizer.n_bits, config.hardware_terms))
    else:
        pow2 = config.actual_act_scale is ActScale.POW2
        quantizer.set_even(choose_even_grid(x, quantizer.n_bits, pow2=pow2))
    measure(quantizer, x)


@torch.no_grad()
def measure(quantizer: ActivationQuantizer, x: Seen) -> None:
    """Note how a quantizer does on what it is given."""
    low, high = quantizer.ends()
    values, counts = x.values, torch.as_tensor(x.counts, device=x.values.device).expand(x.values.shape).double()
    error, energy = float(x.error(quantizer(values) - values)), float(x.error(values))
    outside = float((counts * ((values < low) | (values > high))).sum() / counts.sum())
    quantizer.measured = Measured(error / energy if energy > 0 else 0.0, outside)


@dataclass(frozen=True)
class ActivationReport:
    """How one tensor of the network was quantized.

    Attributes:
        name: of the layer that reads it, or of the operand of a product.
        n_bits: of a code.
        signed: whether codes have a sign.
        step: of an even grid; 0 on a log grid.
        error: on calibration images, Σ|x - q|^2.4 / Σ|x|^2.4.
        saturated: share of the values there beyond the end levels by more than half a step.
    """

    name: str
    n_bits: int
    signed: bool
    step: float
    error: float
    saturated: float

    def as_dict(self) -> dict[str, Any]:
        """All but the name, as JSON can say it."""
        short = {name: float(f"{getattr(self, name):.4g}") for name in ("error", "saturated")}
        return {"bits": self.n_bits, "signed": self.signed, "step": self.step, **short}


def activation_reports(model: nn.Module) -> list[ActivationReport]:
    """The report of every quantizer of a network, by the name of the layer or operand that it belongs to.

    An operand that a layer has the name of, q of an attention module with a layer q, goes by its quantizer's.
    """
    reports = []
    layers = {name for name, module in model.named_modules() if not isinstance(module, ActivationQuantizer)}
    for name, quantizer in quantizers(model).items():
        is_operand = operand_place(name.rpartition(".")[2]) is not None
        grid, measured = quantizer.even_grid, quantizer.measured or Measured(math.nan, math.nan)
        reports.append(
            ActivationReport(
                name=name if is_operand and quantized_name(name) in layers else quantized_name(name),
                n_bits=quantizer.n_bits,
                signed=grid is not None and grid.low < 0,
                step=0.0 if grid is None else grid.step,
                error=measured.error,
                saturated=measured.saturated,
            )
        )
    return reports
