"""quantize_model(): the one verb. It reads like DESIGN section 6."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from logart.errors import NetworkError, NoRoomError, one_line
from logart.grids.losses import absolute_error, kl_divergence, squared_error
from logart.quantization import capture, surgery
from logart.quantization.cache import Cache, Captured
from logart.quantization.clone import clone_sharing
from logart.quantization.compensate import compensate_block
from logart.quantization.config import QuantConfig, ReconInput, ReconMetric
from logart.quantization.dbs import search_block
from logart.quantization.folding import fold_batch_norms
from logart.quantization.importance import IMPORTANCE_IMAGES, PerturbationImportance
from logart.quantization.layer_report import Report, layer_reports
from logart.quantization.layers import QuantizedLayer
from logart.quantization.memory import estimate_memory
from logart.quantization.reconstruct import BlockReport, Loss, learn_rounding
from logart.quantization.state import StageResult, StageStore
from logart.quantization.surgery import Block
from logart.quantization.survey import survey
from logart.runtime import progress_bar


def quantize_model(
    model: nn.Module,
    config: QuantConfig,
    calibration_images: Tensor | Iterable[Tensor],
    *,
    block_types: Sequence[str] = (),
    row_groups: Mapping[str, int] = MappingProxyType({}),
    device: torch.device | str = "cpu",
    quiet: bool = True,
    on_stage_end: Callable[[str, nn.Module], None] = lambda stage, model: None,
    cache: Cache | None = None,
    stage_store: StageStore | None = None,
) -> tuple[nn.Module, Report]:
    """Quantize the convolutions and linear layers of a network onto the grid that `config` asks for.

    Args:
        model: any module of Conv2d and Linear layers that maps a batch of images to logits. It is not changed.
        config: the settings.
        calibration_images: a tensor [n, C, H, W], or batches of images; DBS uses the first `search_samples`, LLR the
            first `calib_samples`.
        block_types: class names of the blocks to reconstruct; without any, each layer is its own block.
        row_groups: by the last part of a layer's name, into how many groups its rows fall that get a codebook each
            where grids are not channel-wise; {"qkv": 3} parts queries, keys and values.
        device: where to compute, and where the result is.
        quiet: no progress bars.
        on_stage_end: called with ("float", folded float model), ("searched", …) after DBS, unless rounding is
            compensated,
            and ("rounded", …) after compensation and LLR; the time it takes is not counted.
        cache: where the inputs and targets of a block are held; without it, on the device.
        stage_store: keeps what each block has come to, and gives it back in a later call with equal arguments, whose
            codes are then the same bit for bit; without it, nothing is kept.

    Returns:
        The quantized network in eval mode, with what `save_packed` keeps of this run as `packed_info`; and the report.

    Raises:
        ValueError: fewer images than the settings ask for, a layer that cannot be quantized (named), non-finite
            weights or losses, no block of the types given.
    """
    device = torch.device(device)
    images = gather_images(calibration_images, max(2, config.images_needed))  # tracing takes an example
    report = Report()
    reference = clone_sharing(model).eval().requires_grad_(False).to(device)
    example = images[:2].to(device, copy=True)  # some networks normalise in place
    report.folded, report.unfolded = fold_batch_norms(reference, example)
    seen = survey(reference, example)
    report.skipped, report.n_weights = seen.skipped, seen.n_weights
    if not seen.layers:
        raise NetworkError(f"{type(model).__name__} has no layer that can be quantized")
    blocks = surgery.find_blocks(reference, seen.layers, block_types)
    on_stage_end("float", reference)

    quantized = clone_sharing(reference)
    surgery.replace_layers(quantized, config.bits_of(seen.layers), config.channel_wise, row_groups)
    surgery.check_replaced(quantized, example, seen)
    cache = Cache(device) if cache is None else cache
    work = _Work(reference, quantized, blocks, images, config, device, quiet, cache, stage_store or StageStore())
    work.choose_cache(example)
    if not config.compensates:  # which searches each layer's grid itself
        report.search_seconds = sum(done.seconds for done in work.each("DBS", work.search))
        on_stage_end("searched", quantized)
    if config.learns or config.compensates:
        title, step = ("LLR", work.learn) if config.learns else ("compensate", work.compensate)
        results = work.each(title, step)
        report.reconstruction_seconds = sum(done.seconds for done in results)
        report.blocks = [done.report for done in results if done.report is not None]
        on_stage_end("rounded", quantized)
    report.layers = layer_reports(quantized, blocks)
    quantized.packed_info = {"settings": config.as_dict(), "layers": report.as_dict()}  # type: ignore[assignment]
    return quantized, report


def gather_images(images: Tensor | Iterable[Tensor], count: int) -> Tensor:
    """The first `count` images of a tensor or of batches, as one tensor; ValueError when there are fewer."""
    if isinstance(images, Tensor):
        gathered = images[:count]
    else:
        batches: list[Tensor] = []
        for batch in images:
            batches.append(batch)
            if sum(map(len, batches)) >= count:
                break
        gathered = torch.cat(batches)[:count] if batches else torch.empty(0)
    if len(gathered) < count:
        raise NetworkError(f"the settings ask for {count} calibration images, got {len(gathered)}")
    if not torch.isfinite(gathered).all():
        raise NetworkError("the calibration images hold NaN or infinite values")
    return gathered


@dataclass
class _Work:
    """The stages, block by block in the order they run; what a stage has finished is kept, and found again later."""

    reference: nn.Module
    quantized: nn.Module
    blocks: list[Block]
    images: Tensor
    config: QuantConfig
    device: torch.device
    quiet: bool
    cache: Cache
    stage_store: StageStore

    def choose_cache(self, example: Tensor) -> None:
        """Foresee what each block needs, and decide where captured tensors live."""
        if self.config.images_needed == 0:
            return
        message = self.cache.choose(estimate_memory(self.reference, self.blocks, example, self.config))
        if not self.quiet:
            print(message, flush=True)

    def each(
        self, stage: str, step: Callable[[Block, Callable[[int, float], None]], BlockReport | None]
    ) -> list[StageResult]:
        """One stage of all units: what was kept is taken over, the rest is worked out and kept."""
        layers = surgery.quantized_layers(self.quantized)
        steps = self.config.iters if stage == "LLR" else 1
        results: list[StageResult] = []
        with progress_bar(len(self.blocks) * steps, stage, self.quiet) as bar:
            for index, block in enumerate(self.blocks):
                bar.set_description(f"{stage} {block.name}")

                def show(done: int, loss: float, before: int = index * steps) -> None:
                    bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
                    bar.update(before + done - bar.n)

                own = {name: layers[name] for name in block.layers}
                done = self.stage_store.restore(stage, index, own)
                if done is None:
                    start = time.perf_counter()
                    report = self._with_room(own.values(), partial(step, block, show))
                    done = StageResult(time.perf_counter() - start, report)
                    self.stage_store.save(stage, index, own, done)
                results.append(done)
                bar.update((index + 1) * steps - bar.n)
        return results

    def _with_room(
        self, layers: Iterable[QuantizedLayer], step: Callable[[], BlockReport | None]
    ) -> BlockReport | None:
        """Work on a block; where the GPU runs out of memory, again from the start with captured tensors elsewhere."""
        while True:
            undo = [layer.snapshot() for layer in layers]
            try:
                return step()
            except torch.cuda.OutOfMemoryError as error:
                place, self.cache.place = self.cache.place, self.cache.fall_back()
                if self.cache.place is None:
                    raise NoRoomError(f"out of memory on {self.device} ({one_line(error)})") from error
                message = f"out of memory on {self.device}: captured tensors go"
                self.stage_store.warn(f"{message} from {place} to {self.cache.place}")
            for restore in undo:
                restore()
            torch.cuda.empty_cache()

    def search(self, block: Block, show: Callable[[int, float], None]) -> None:
        """DBS of a block; every layer then holds its codebook and codes of plain rounding."""
        data = None
        if self.config.searches_data:
            how = (self.images[: self.config.search_samples], self.config.search_batch_size, self.cache)
            data = tuple(capture.inputs(net, block.name, *how) for net in (self.reference, self.quantized))
        search_block(self.reference, self.quantized, block, data, self.config)

    def compensate(self, block: Block, show: Callable[[int, float], None]) -> None:
        """Compensated rounding of a block, with the search for each layer's grid."""
        self._compensate(block)

    def _compensate(self, block: Block) -> list[Tensor]:
        """The targets of the block's layers, from which LLR may go on."""
        data = capture.inputs(self.reference, *self._how(block)), capture.inputs(self.quantized, *self._how(block))
        return compensate_block(self.reference, self.quantized, block, data, self.config)

    def learn(self, block: Block, show: Callable[[int, float], None]) -> BlockReport:
        """LLR of a block: quantized, float or mixed prefix in, float target out."""
        start = time.perf_counter()
        starts = self._compensate(block) if self.config.compensates else None
        inputs, float_inputs, targets = self._capture(block)
        loss = self._losses.of(block, targets)
        captured = time.perf_counter()
        module = self.quantized.get_submodule(block.name)
        layers = [surgery.quantized_layers(self.quantized)[name] for name in block.layers]
        report = learn_rounding(
            block.name, module, layers, inputs, targets, self.config, loss, show, float_inputs, starts
        )
        learning = time.perf_counter() - captured
        return replace(report, capture_seconds=captured - start, learning_seconds=learning)

    def _capture(self, block: Block) -> tuple[Captured, Captured | None, Captured]:
        """What the block is fed, what the float one is if inputs are mixed, and what it gives: two passes at most."""
        how = self._how(block)
        if self.config.recon_input is ReconInput.QUANTIZED:
            return capture.inputs(self.quantized, *how), None, capture.outputs(self.reference, *how)
        float_inputs, targets = capture.inputs_and_outputs(self.reference, *how)
        if self.config.recon_input is ReconInput.FLOAT:
            return float_inputs, None, targets
        return capture.inputs(self.quantized, *how), float_inputs, targets

    def _how(self, block: Block) -> tuple[str, Tensor, int, Cache]:
        return block.name, self.images[: self.config.calib_samples], self.config.batch_size, self.cache

    @cached_property
    def _losses(self) -> _Losses:
        images = self.images[: self.config.calib_samples]
        return _Losses(self.reference, self.quantized, self.blocks, images, self.config, self.device)


class _Losses:
    """The reconstruction loss of each block."""

    def __init__(
        self,
        reference: nn.Module,
        quantized: nn.Module,
        blocks: list[Block],
        images: Tensor,
        config: QuantConfig,
        device: torch.device,
    ) -> None:
        self._config, self._head = config, blocks[-1].name
        layers = surgery.quantized_layers(quantized)
        self._channels = {block.name: layers[block.layers[-1]].shape[0] for block in blocks}
        if config.recon_metric is ReconMetric.HESSIAN_PERTURB:
            self._importance = PerturbationImportance(
                reference, images[:IMPORTANCE_IMAGES], config.temperature, config.batch_size, device, config.seed
            )

    def of(self, block: Block, targets: Captured) -> Loss:
        """The loss of one block, whose float outputs are `targets`."""
        if self._config.head_kl and block.name == self._head:
            return kl_divergence
        dim = channel_dim(targets.shape, self._channels[block.name])
        if self._config.recon_metric is ReconMetric.MAE:
            return partial(absolute_error, channel_dim=dim)
        if self._config.recon_metric is ReconMetric.MSE:
            return partial(squared_error, channel_dim=dim)
        return partial(squared_error, channel_dim=dim, importance=self._importance.of(block.name))


def channel_dim(shape: torch.Size, channels: int) -> int:
    """Where an output has its channels: dimension 1, unless only the last has as many as the block's last layer."""
    return -1 if shape[-1] == channels != shape[1] else 1
