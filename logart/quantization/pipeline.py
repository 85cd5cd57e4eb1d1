"""quantize_model(): the one verb. It reads like DESIGN section 6."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from logart import ranks
from logart.errors import NetworkError, PartlyQuantized, one_line
from logart.quantization import surgery
from logart.quantization.activation_stage import activation_reports
from logart.quantization.baking import bake_weights
from logart.quantization.blocks import Block, blocks_of_types, find_blocks, in_order
from logart.quantization.cache import Cache
from logart.quantization.clone import clone_sharing
from logart.quantization.compensate import check_room
from logart.quantization.config import QuantConfig
from logart.quantization.dbs import round_without_data
from logart.quantization.fidelity import layer_output_errors
from logart.quantization.folding import fold_batch_norms
from logart.quantization.images import gather_images
from logart.quantization.inputs import Inputs, taking_inputs
from logart.quantization.layer_report import Report, layer_reports
from logart.quantization.modes import autocast_inside, own_modes
from logart.quantization.rows import BlockRows, trace_rows
from logart.quantization.sensitivity import budgeted_bits
from logart.quantization.state import StageStore
from logart.quantization.survey import Survey, survey
from logart.quantization.work import Work

NO_BLOCK = "is used in several places, which no one block holds"
NO_ROWS = "its block {} has its images elsewhere than in rows of the first dimension: {}"


def quantize_model(
    model: nn.Module,
    config: QuantConfig,
    calibration_images: Any,
    *,
    input_key: str | Sequence[str] | None = None,
    prepare: Callable[[Any], Any] | None = None,
    block_types: Sequence[str] | None = None,
    row_groups: Mapping[str, int] = MappingProxyType({}),
    held_out_images: Tensor | None = None,
    device: torch.device | str = "cpu",
    quiet: bool = True,
    on_stage_end: Callable[[str, nn.Module], None] = lambda stage, model: None,
    cache: Cache | None = None,
    stage_store: StageStore | None = None,
) -> tuple[nn.Module, Report]:
    """Quantize the convolutions and linear layers of a network onto the grid that `config` asks for.

    Args:
        model: any module that maps a batch of images to logits; it is not changed. What is quantized is every parameter
            that enters a linear operation, see `survey`.
        config: the settings.
        calibration_images: a tensor [n, C, H, W], or batches of images as data loaders give them, see
            `images.gather_images`, or `Inputs` for a network of several inputs or keywords; DBS uses the first
            `search_samples`, LLR the first `calib_samples`.
        input_key, prepare: where batches are dicts, or are to be made into images first; see there.
        block_types: class names of the blocks to reconstruct, in place of those found (see `blocks`); with an empty
            list each layer is its own block.
        row_groups: by the last part of a layer's name, into how many groups its rows fall that get a codebook each
            where grids are not channel-wise; {"qkv": 3} parts queries, keys and values, {"in_proj_weight": 3} those of
            `nn.MultiheadAttention`.
        held_out_images: other images [n, C, H, W]; layers' output errors are measured on them, for the report.
        device: where to compute, and where the result is.
        quiet: no progress bars.
        on_stage_end: called with ("float", folded float model), then with the event of each stage: ("searched", …)
            after DBS, ("rounded", …) after compensation and LLR, ("activations", …) once these are quantized; its time
            is not counted.
        cache: where the inputs and targets of a block are held; without it, on the device.
        stage_store: keeps what each block has come to, and gives it back in a later call with equal arguments, whose
            codes are then the same bit for bit; without it, nothing is kept.

    Returns:
        The quantized network in eval mode, with what `save_packed` keeps of this run as `packed_info`; and the report.

    Raises:
        ValueError: fewer images than the settings ask for, or no images; a network that does not run on them; a layer
            that cannot be quantized (named), non-finite weights, errors or losses, no block of the types given.

    The caller's modes do not matter: no_grad, inference_mode and autocast around it change nothing.
    """
    device = torch.device(device)
    with own_modes(device), ExitStack() as stack:
        images = _gather(calibration_images, config, input_key, prepare)
        several = isinstance(images, Inputs)
        example = images[:2].to(device, copy=True)  # some networks normalise in place
        reference = clone_sharing(model).eval().requires_grad_(False).to(device)
        if several:
            stack.enter_context(taking_inputs(reference))
        report = Report()
        seen = _look_at(reference, example, config, report)
        names = [name for name in seen.layers if name not in dict(report.skipped)]
        if not names:
            raise NetworkError(f"{type(model).__name__} has no layer that can be quantized")
        blocks, rows = _blocks_to_reconstruct(reference, seen, names, example, block_types, config, report)
        stage_store = stage_store or StageStore()
        bits = config.bits_of(names, [*seen.inputs, *seen.heads])
        if config.has_budget:
            named = dict.fromkeys(report.blind, config.n_bits) | config.named_bits(names, [*seen.inputs, *seen.heads])
            how = (images, config, row_groups, seen.uses, device)
            bits = stage_store.bits(lambda: budgeted_bits(reference, names, named, *how))
        on_stage_end("float", reference)
        quantized = clone_sharing(reference)
        if several:
            stack.enter_context(taking_inputs(quantized))
        surgery.replace_layers(quantized, bits, config.channel_wise, row_groups, seen.uses)
        surgery.check_replaced(quantized, example, seen)
        round_without_data([surgery.quantized_layers(quantized)[name] for name in report.blind], config)
        cache = Cache(device) if cache is None else cache
        bits_a = config.activation_bits(names, seen.inputs, seen.heads)
        items = in_order(blocks, report.apart, names)
        work = Work(
            reference, quantized, blocks, items, rows, images, config, device, quiet, cache, stage_store, bits_a,
            seen.uses,
        )  # fmt: skip
        autocast = {block.name: seen.autocast.get(block.name) for block in blocks}
        with autocast_inside((reference, quantized), autocast, device.type):
            _run_stages(work, example, report, on_stage_end)
        seen_images = images if config.images_needed else None
        output_errors = layer_output_errors(reference, quantized, seen_images, held_out_images, report.blind)
        report.layers = layer_reports(quantized, items, output_errors, report.blind)
        report.activations, report.float_products = activation_reports(quantized), work.float_products
    info = {"settings": config.as_dict(), **report.info(), "layers": report.as_dict()}
    quantized.packed_info = info  # type: ignore[assignment]
    if report.quantized_share < 0.99:
        warnings.warn(report.share_line(), PartlyQuantized, stacklevel=2)
    return quantized, report


def _gather(
    calibration_images: Any, config: QuantConfig, key: str | Sequence[str] | None, prepare: Callable[[Any], Any] | None
) -> Any:
    """The images that the stages look at, those of each rank enough; with mirror images where they are asked for."""
    images = gather_images(calibration_images, max(2, (1 + config.crops) * config.images_needed), key, prepare)
    if 0 < config.images_needed and min(stage.images(config)[0] for stage in config.method.stages) < ranks.size():
        raise NetworkError(f"{ranks.size()} ranks share the calibration images; expected one for each at least")
    if not config.mirror:
        return images
    if isinstance(images, Inputs):
        raise NetworkError("mirror: the network takes several inputs; expected one tensor of images")
    return torch.stack([images, images.flip(-1)], 1).flatten(0, 1)  # beside its own: on the same side of any split


def _look_at(reference: nn.Module, example: Tensor, config: QuantConfig, report: Report) -> Survey:
    """Fold what can be folded and see what the network does; the report says what stays as it is."""
    try:
        report.baked = bake_weights(reference, example)
        report.folded, report.unfolded = fold_batch_norms(reference, example, partial(_any_matches, config.skip))
    except (NetworkError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the network's own forward raises
        what = f"{type(reference).__name__} does not run on the calibration images, {list(example.shape)}"
        why = f"{example.dtype} ({one_line(error):.160}); expected one tensor that it takes"
        raise NetworkError(f"{what} {why}") from error
    seen = survey(reference, example)
    skipped = config.skipped(seen.layers)
    report.skipped = [*seen.skipped, *((name, f"skipped by {pattern!r}") for name, pattern in skipped.items())]
    report.n_weights = seen.n_weights
    return seen


def _blocks_to_reconstruct(
    reference: nn.Module,
    seen: Survey,
    names: Sequence[str],
    example: Tensor,
    block_types: Sequence[str] | None,
    config: QuantConfig,
    report: Report,
) -> tuple[list[Block], list[BlockRows]]:
    """The blocks to reconstruct, and where their tensors have their images; the report names layers in none."""
    seeing = [name for name in names if name not in seen.blind]
    if block_types is None:
        blocks = find_blocks(reference, seeing, example, seen.places)
    else:
        blocks = blocks_of_types(reference, seeing, block_types, seen.places)
    blocks, rows, reasons = _with_rows(reference, blocks, example, config)
    placed = {name for block in blocks for name in block.layers}
    report.blind = {name: seen.blind[name] for name in names if name in seen.blind}
    report.apart = {name: reasons.get(name, NO_BLOCK) for name in seeing if name not in placed}
    return blocks, rows


def _with_rows(
    reference: nn.Module, blocks: list[Block], example: Tensor, config: QuantConfig
) -> tuple[list[Block], list[BlockRows], dict[str, str]]:
    """The blocks whose tensors have their images in rows, these, and why the layers of the others are in no block."""
    if config.images_needed == 0:
        return blocks, [], {}
    seen = trace_rows(reference, {block.name: reference.get_submodule(block.name) for block in blocks}, example)
    torn = {b.name: NO_ROWS.format(b.name, of) for b, of in zip(blocks, seen, strict=True) if isinstance(of, str)}
    if torn and config.quantizes_activations:
        raise NetworkError(f"activations cannot be quantized: {next(iter(torn.values()))}")
    kept = [(block, rows) for block, rows in zip(blocks, seen, strict=True) if isinstance(rows, BlockRows)]
    reasons = {name: torn[block.name] for block in blocks if block.name in torn for name in block.layers}
    return [block for block, _ in kept], [rows for _, rows in kept], reasons


def _run_stages(work: Work, example: Tensor, report: Report, on_stage_end: Callable[[str, nn.Module], None]) -> None:
    """Every stage of all blocks, where there is room for each; the report says what came of it."""
    layers, config = surgery.quantized_layers(work.quantized), work.config
    for stage in config.stages:
        stage.check_room(layers)
    if config.method.learns:
        check_room({name: layers[name] for name in report.apart})
    report.rerun = work.prepare(example)
    for stage in config.stages:
        results = work.each(stage)
        report.seconds[stage.event] = sum(done.seconds for done in results)
        report.blocks += [done.report for done in results if done.report is not None]
        on_stage_end(stage.event, work.quantized)


def _any_matches(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
