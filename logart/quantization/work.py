"""The stages, block by block: what each is given, what is kept of it, and what becomes of one that has no room."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from logart import ranks
from logart.errors import NoRoomError, one_line
from logart.quantization import surgery
from logart.quantization.activation_quantizer import block_quantizers
from logart.quantization.activations import BothActivations, Capture
from logart.quantization.block_loss import BlockLosses, Loss
from logart.quantization.blocks import Block
from logart.quantization.cache import Cache, Captured, OffloadedTensor
from logart.quantization.capture import Call
from logart.quantization.config import QuantConfig
from logart.quantization.dataflow import Sources, trace_sources
from logart.quantization.layout import WeightUse
from logart.quantization.memory import estimate_memory
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.reconstruct import BlockReport
from logart.quantization.rounding_methods import BlockTask, NetworkTask, Stage
from logart.quantization.rows import BlockRows
from logart.quantization.state import StageResult, StageStore, Stored
from logart.runtime import progress_bar


@dataclass
class Work:
    """The stages, block by block in the order they run; what a stage has finished is kept, and found again later."""

    reference: nn.Module
    quantized: nn.Module
    blocks: list[Block]
    items: list[Block]
    rows: list[BlockRows]
    images: Tensor
    config: QuantConfig
    device: torch.device
    quiet: bool
    cache: Cache
    stage_store: StageStore
    bits_a: Mapping[str, int]
    uses: Mapping[str, WeightUse]
    float_products: list[tuple[str, str]] = field(default_factory=list)
    _sources: list[Sources | None] = field(default_factory=list)

    def prepare(self, example: Tensor) -> list[str]:
        """Find out what the inputs of each block are made of, estimate what it needs, decide where that is held.

        Returns:
            The names of the blocks that are reached from the images on.
        """
        if self.config.images_needed == 0 or not self.blocks:
            return []
        modules = {block.name: self.reference.get_submodule(block.name) for block in self.blocks}
        self._sources = trace_sources(self.reference, list(modules.values()), example)
        needs = estimate_memory(self.reference, self.blocks, self._sources, example, self.config, self.uses)
        message = self.cache.choose(needs)
        if not self.quiet:
            print(message, flush=True)
        return [block.name for block, sources in zip(self.blocks, self._sources, strict=True) if sources is None]

    def each(self, stage: Stage) -> list[StageResult]:
        """One stage of all blocks: what was kept is taken over, the rest is worked out and kept."""
        steps, (count, batch_size) = stage.steps(self.config), stage.images(self.config)
        networks = (self.reference, self.quantized, self.blocks)
        images = self.images[: self.config.views * count]
        activations = BothActivations(*networks, self._sources, images, batch_size, self.cache, self.rows)
        example = self.images[:2].to(self.device, copy=True)
        apart = [name for item in self.items if item.whole for name in item.layers]
        whole = NetworkTask(self.quantized, self.blocks, apart, self.bits_a, self.config, example)
        self.float_products += stage.prepare(whole)
        results: list[StageResult] = []
        with progress_bar(len(self.items) * steps, stage.title, self.quiet) as bar:
            for index, block in enumerate(self.items):
                bar.set_description(f"{stage.title} {block.layers[0] if block.whole else block.name}")

                def show(done: int, loss: float, before: int = index * steps) -> None:
                    bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
                    bar.update(before + done - bar.n)

                own = self._own(block, stage)
                done = self.stage_store.restore(stage.title, index, own)
                if done is None:
                    start = time.perf_counter()
                    step = partial(self._run, stage, activations, block, show)
                    report = self._with_room(own.values(), activations, step)
                    done = StageResult(time.perf_counter() - start, report)
                    self.stage_store.save(stage.title, index, own, done)
                results.append(done)
                bar.update((index + 1) * steps - bar.n)
        return results

    def _run(
        self, stage: Stage, activations: BothActivations, block: Block, show: Callable[[int, float], None]
    ) -> BlockReport | None:
        start, loss = time.perf_counter(), partial(self._loss, block)
        if block.whole:
            needs = (Capture.FLOAT_INPUTS, Capture.INPUTS) if stage.needs(self.config) else ()
            calls = dict.fromkeys(needs, self._calls(stage))
            stage.run_whole(BlockTask(block, self.reference, self.quantized, calls, self.config, loss, show))
            return None
        captured = activations.capture(self.blocks.index(block), stage.needs(self.config))
        seconds = time.perf_counter() - start
        report = stage.run(BlockTask(block, self.reference, self.quantized, captured, self.config, loss, show))
        return report and replace(report, capture_seconds=report.capture_seconds + seconds)

    def _calls(self, stage: Stage) -> Captured:
        """What the whole network is called with, in both networks the same."""
        count, batch_size = stage.images(self.config)
        images = self.images[: self.config.views * count]
        own = ranks.own_batches(len(images), batch_size)
        batches = [
            tree_map_only(Tensor, lambda t: OffloadedTensor(t, t.dtype, self.device), Call.of(images[o.start : o.stop]))
            for o in own
        ]
        return Captured(batches, images=[image for of_batch in own for image in of_batch], total=len(images))

    def _own(self, block: Block, stage: Stage) -> dict[str, Stored]:
        """What a stage may change of a block, by name."""
        own: dict[str, Stored] = {name: self._layers[name] for name in block.layers if stage.changes_weights}
        if block.whole:
            own.update(surgery.input_quantizers(self.quantized, block.layers))
        else:
            own.update(block_quantizers(self.quantized.get_submodule(block.name), block.name))
        return own

    def _with_room(
        self,
        own: Iterable[Stored],
        activations: BothActivations,
        step: Callable[[], BlockReport | None],
    ) -> BlockReport | None:
        """Work on a block; where the GPU runs out of memory, again from the start with captured tensors elsewhere."""
        while True:
            undo = [each.snapshot() for each in own]
            try:
                return step()
            except torch.cuda.OutOfMemoryError as error:
                place, self.cache.place = self.cache.place, self.cache.fall_back()
                if self.cache.place is None or ranks.size() > 1:  # the other ranks have not stopped
                    raise NoRoomError(f"out of memory on {self.device} ({one_line(error)})") from error
                message = f"out of memory on {self.device}: captured tensors go"
                self.stage_store.warn(f"{message} from {place} to {self.cache.place}")
            for restore in undo:
                restore()
            activations.move()
            torch.cuda.empty_cache()

    @cached_property
    def _layers(self) -> dict[str, QuantizedWeight]:
        return surgery.quantized_layers(self.quantized)

    def _loss(self, block: Block, shape: torch.Size) -> Loss:
        return self._losses.of(block, shape, self._layers[block.layers[-1]].shape[0])

    @cached_property
    def _losses(self) -> BlockLosses:
        images = self.images[: self.config.views * self.config.calib_samples]
        return BlockLosses(self.reference, self.blocks, images, self.config, self.device)
