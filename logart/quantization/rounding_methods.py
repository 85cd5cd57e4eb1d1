"""The rounding methods: how the codes of a block are found. A new one is a class here and a line in `METHODS`.

A method is one or two stages, each of which goes through the whole network block by block. A `Stage` says what it looks
at, how much memory it works in and what it is called, and does one block at a time. The pipeline runs the stages, the
flags and the results ask the method what acts; none of them knows which one it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from logart.quantization.activations import Capture
from logart.quantization.block_loss import Loss
from logart.quantization.blocks import Block
from logart.quantization.cache import Captured
from logart.quantization.compensate import MATRICES, check_room, compensate_block
from logart.quantization.dbs import PROBES, search_block
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.reconstruct import BlockReport, learn_rounding
from logart.quantization.settings import ReconInput, SearchMethod, Settings
from logart.quantization.surgery import quantized_layers

HELD_OUT = 1 / 8  # of the images, neither compensated nor learned with, where LLR follows the closed form


@dataclass(frozen=True)
class BlockTask:
    """One block on its way through a stage.

    Attributes:
        block: which it is.
        reference, quantized: the float network and the one being quantized.
        captured: what the stage asked for.
        config: the settings.
        loss: of the block's outputs, by their shape.
        show: to be called after each step with the steps done and the loss.
    """

    block: Block
    reference: nn.Module
    quantized: nn.Module
    captured: Mapping[Capture, Captured]
    config: Settings
    loss: Callable[[torch.Size], Loss]
    show: Callable[[int, float], None] = lambda done, loss: None

    @property
    def both_inputs(self) -> tuple[Captured, Captured]:
        """The inputs of the block in the float network and behind the quantized prefix."""
        return self.captured[Capture.FLOAT_INPUTS], self.captured[Capture.INPUTS]

    def split(self, share: float) -> tuple[BlockTask, Mapping[Capture, Captured] | None]:
        """The task with all images but the last ones, and what was captured of these: a share of all, at least one.

        Of a single image nothing is held out.
        """
        count = self.captured[Capture.TARGETS].total
        views = self.config.views  # of one image stay together
        kept = count - views * max(1, int(share * count / views))
        if kept < 1:
            return self, None
        seen, held_out = (
            {what: each.part(images) for what, each in self.captured.items()}
            for images in (range(kept), range(kept, count))
        )
        return replace(self, captured=seen), held_out

    @property
    def layers(self) -> list[QuantizedWeight]:
        """The block's quantized layers, in the order they run."""
        layers = quantized_layers(self.quantized)
        return [layers[name] for name in self.block.layers]


@dataclass(frozen=True)
class NetworkTask:
    """The whole network before a stage.

    Attributes:
        quantized: the network being quantized.
        blocks: of it, in the order they run.
        apart: the layers that are used in no one of them.
        bits_a: the bits of each layer's input, by the layer's name; none of those that stay float.
        config: the settings.
        example: two images on its device.
    """

    quantized: nn.Module
    blocks: Sequence[Block]
    apart: Sequence[str]
    bits_a: Mapping[str, int]
    config: Settings
    example: Tensor


class BlockSize(NamedTuple):
    """Bytes of a float block: per image what it is given, what it gives, the sum and the largest of all tensors made
    inside; its weights; and, of the layer where it is most, one float64 matrix [groups, K, K].
    """

    inputs: int
    outputs: int
    activations: int
    largest: int
    weights: int
    gram: int


class Stage:
    """One way through the network, block by block.

    Attributes:
        title: in the progress bar and in the names of kept states.
        event: what `on_stage_end` is called with after it, "searched" or "rounded".
        learns: the settings of LLR act.
        changes_weights: a block's layers hold other codes behind it.
    """

    title = ""
    event = "rounded"
    learns = False
    changes_weights = True

    def result(self, config: Settings) -> str:
        """What a network is called behind this stage: "after LLR"."""
        raise NotImplementedError

    def describe(self, config: Settings) -> str:
        """What the stage does with these settings, in a few words; empty where the grid says it all."""
        return ""

    def needs(self, config: Settings) -> frozenset[Capture]:
        """Which tensors of a block it looks at."""
        raise NotImplementedError

    def images(self, config: Settings) -> tuple[int, int]:
        """How many calibration images it looks at, and how many at a time."""
        return config.calib_samples, config.batch_size

    def steps(self, config: Settings) -> int:
        """Steps of the progress bar per block."""
        return 1

    def working_bytes(self, size: BlockSize, config: Settings) -> int:
        """A bound of what it holds on the computing device beside a block's captured tensors."""
        raise NotImplementedError

    def check_room(self, layers: Mapping[str, QuantizedWeight]) -> None:
        """Raise NoRoomError where a layer is too large for it; asked before any work is done."""
        return

    def prepare(self, task: NetworkTask) -> list[tuple[str, str]]:
        """Put into the network what the stage needs there; (name, reason) of what it cannot quantize."""
        return []

    def run(self, task: BlockTask) -> BlockReport | None:
        """Give the block's layers their codes, and codebooks and biases where it decides them."""
        raise NotImplementedError

    def run_whole(self, task: BlockTask) -> None:
        """The same of a layer that is used in no one block: the task's block is the whole network."""


class Search(Stage):
    """DBS: every layer gets its codebook and is rounded to nearest."""

    title, event = "DBS", "searched"

    def result(self, config: Settings) -> str:
        return "after DBS" if config.searches else "after rounding"

    def needs(self, config: Settings) -> frozenset[Capture]:
        looks = config.searches and config.search_method is not SearchMethod.TENSOR_WISE
        return frozenset({Capture.FLOAT_INPUTS, Capture.INPUTS} if looks else ())

    def images(self, config: Settings) -> tuple[int, int]:
        return config.search_samples, config.search_batch_size

    def working_bytes(self, size: BlockSize, config: Settings) -> int:
        """Of a layer, its inputs of all search images twice, and 4 times its outputs (LW: residual, a candidate's
        outputs, their difference, its square) or 2·probes + 4 times (BW: vjps of residual and probes, twice while
        batches are joined, a candidate's outputs and products).
        """
        if not self.needs(config):
            return 0
        copies = 2 * PROBES + 4 if config.search_method is SearchMethod.BLOCK_WISE else 4
        return config.views * config.search_samples * (2 + copies) * size.largest

    def run(self, task: BlockTask) -> None:
        search_block(
            task.reference, task.quantized, task.block, task.both_inputs if task.captured else None, task.config
        )

    run_whole = run


class Compensate(Stage):
    """GPTQ-style compensated rounding, which searches each layer's grid in the metric of the layer's inputs."""

    title = "compensate"

    def result(self, config: Settings) -> str:
        return "after compensated rounding"

    def describe(self, config: Settings) -> str:
        more = f", {config.crops} further crops of each" * (config.crops > 0) + " and mirror images" * config.mirror
        return f"compensated rounding, {config.calib_samples} images{more}, damping {config.damping}"

    def needs(self, config: Settings) -> frozenset[Capture]:
        return frozenset({Capture.FLOAT_INPUTS, Capture.INPUTS})

    def working_bytes(self, size: BlockSize, config: Settings) -> int:
        """The matrices [groups, K, K] of `compensate.MATRICES`, and a batch's tensors."""
        return MATRICES * size.gram + 2 * config.batch_size * size.activations

    def check_room(self, layers: Mapping[str, QuantizedWeight]) -> None:
        check_room(layers)

    def run(self, task: BlockTask) -> None:
        self.compensate(task)

    run_whole = run

    def compensate(self, task: BlockTask) -> list[Tensor]:
        """The real weights that the layers' codes were found for, from which LLR may go on."""
        return compensate_block(task.reference, task.quantized, task.block, task.both_inputs, task.config)


class Learn(Stage):
    """LLR: quantized, float or mixed prefix in, float target out."""

    title, learns = "LLR", True

    def result(self, config: Settings) -> str:
        return "after LLR"

    def describe(self, config: Settings) -> str:
        mix = f" {config.drop_prob:g}" if config.recon_input is ReconInput.MIXED else ""
        how = f"{config.recon_metric.value}, {config.recon_input.value}{mix} input"
        return f"LLR {config.iters} steps a block ({how}, lr {config.lr:g}, λ {config.rrweight:g})"

    def needs(self, config: Settings) -> frozenset[Capture]:
        source = {
            ReconInput.QUANTIZED: {Capture.INPUTS},
            ReconInput.FLOAT: {Capture.FLOAT_INPUTS},
            ReconInput.MIXED: {Capture.INPUTS, Capture.FLOAT_INPUTS},
        }
        return frozenset({*source[config.recon_input], Capture.TARGETS})

    def steps(self, config: Settings) -> int:
        return config.iters

    def working_bytes(self, size: BlockSize, config: Settings) -> int:
        """A batch's activations and their gradients, and 26 times the weights: α and Adam's moments, the levels on
        either side, the soft weight, the gradients, and what was float64 at the start.
        """
        return 2 * config.batch_size * size.activations + 26 * size.weights

    def run(self, task: BlockTask) -> BlockReport:
        return self.learn(task, None)

    def run_whole(self, task: BlockTask) -> None:
        """Compensated rounding, behind the prefix as it is now."""
        for layer in task.layers:
            layer.hold_float()
        Compensate().compensate(task)

    def learn(
        self, task: BlockTask, starts: list[Tensor] | None, held_out: Mapping[Capture, Captured] | None = None
    ) -> BlockReport:
        """LLR from the soft weights that equal the float ones, or from the layers' codes towards `starts`.

        What was captured of images held out, if any, decides which learned codes and biases stand.
        """
        config, captured = task.config, task.captured
        source = Capture.FLOAT_INPUTS if config.recon_input is ReconInput.FLOAT else Capture.INPUTS
        inputs = captured[source]
        float_inputs = captured[Capture.FLOAT_INPUTS] if config.recon_input is ReconInput.MIXED else None
        judge = None if held_out is None else (held_out[source], held_out[Capture.TARGETS])
        began = time.perf_counter()
        loss = task.loss(captured[Capture.TARGETS].shape)
        ready = time.perf_counter()
        module = task.quantized.get_submodule(task.block.name)
        arguments = (task.block.name, module, task.layers, inputs, captured[Capture.TARGETS], config, loss, task.show)
        report = learn_rounding(*arguments, float_inputs, starts, judge)
        return replace(report, capture_seconds=ready - began, learning_seconds=time.perf_counter() - ready)


class CompensateAndLearn(Learn):
    """Compensated rounding of a block, then LLR from there, which stands where images that neither saw agree."""

    _closed = Compensate()

    def describe(self, config: Settings) -> str:
        return f"{self._closed.describe(config)}, {super().describe(config)}"

    def needs(self, config: Settings) -> frozenset[Capture]:
        return self._closed.needs(config) | super().needs(config)

    def working_bytes(self, size: BlockSize, config: Settings) -> int:
        return max(self._closed.working_bytes(size, config), super().working_bytes(size, config))

    def check_room(self, layers: Mapping[str, QuantizedWeight]) -> None:
        self._closed.check_room(layers)

    def run(self, task: BlockTask) -> BlockReport:
        seen, held_out = task.split(HELD_OUT)
        return self.learn(seen, self._closed.compensate(seen), held_out)


@dataclass(frozen=True)
class RoundingMethod:
    """How codes are found once the grid is.

    Attributes:
        name: the value of `--rounding` and of the results column.
        label: what a report calls it.
        stages: what runs, in this order.
        without_steps: the name of the method that it comes to where LLR has no steps.
        with_steps: the name of the method that is this one and LLR.
    """

    name: str
    label: str
    stages: tuple[Stage, ...]
    without_steps: str
    with_steps: str

    @property
    def uses_dbs(self) -> bool:
        """Whether DBS finds each layer's codebook, so that its settings act; otherwise the method does it itself."""
        return isinstance(self.stages[0], Search)

    @property
    def learns(self) -> bool:
        """Whether the settings of LLR act."""
        return any(stage.learns for stage in self.stages)

    @property
    def calibrates(self) -> bool:
        """Whether `calib_samples` and `batch_size` act."""
        return any(stage.event == "rounded" for stage in self.stages)

    def describe(self, config: Settings) -> str:
        """What rounds, in a few words."""
        return ", ".join(filter(None, (stage.describe(config) for stage in self.stages))) or "plain rounding"


METHODS: Mapping[str, RoundingMethod] = MappingProxyType({
    method.name: method
    for method in (
        RoundingMethod("nearest", "RTN", (Search(),), without_steps="nearest", with_steps="learned"),
        RoundingMethod("compensated", "compensated", (Compensate(),), without_steps="compensated", with_steps="both"),
        RoundingMethod("learned", "LLR", (Search(), Learn()), without_steps="nearest", with_steps="learned"),
        RoundingMethod("both", "compensated + LLR", (CompensateAndLearn(),), without_steps="compensated",
                       with_steps="both"),
    )
})  # fmt: skip


def method_named(name: str) -> RoundingMethod:
    """The method of a results row; one that this version does not know counts as rounding to nearest."""
    return METHODS.get(name, METHODS["nearest"])
