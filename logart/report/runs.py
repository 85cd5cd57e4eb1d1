"""What a report shows of one run: a packed file, or a run folder with the run's own account beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logart.errors import UserError, one_line
from logart.grids.logarithmic import base_mix
from logart.packed.file import PackedFile, PackedLayer
from logart.quantization.fidelity import KINDS
from logart.quantization.layer_report import HISTOGRAM_BINS, HISTOGRAM_RANGE
from logart.runs.run_folder import FORMAT, PACKED, REPORT


@dataclass(frozen=True)
class RunLayer:
    """What became of a layer; errors and `n_changed_codes` are None where nobody said.

    Attributes:
        output_errors: of the layer in the whole network, in the order of `fidelity.KINDS`; may be empty.
        histogram: counts in equal bins on ±`reach` of its codebook's largest magnitude.
        levels: of a channel of the most common base mix, else of the first, in the same unit.
    """

    name: str
    shape: tuple[int, ...]
    n_bits: int
    block: str
    base_mix: dict[int, int]
    error_nearest: float | None
    error: float | None
    n_changed_codes: int | None
    histogram: list[int]
    reach: float
    levels: list[float]
    more: dict[str, float] = field(default_factory=dict)
    output_errors: tuple[float | None, ...] = ()

    @property
    def weights(self) -> int:
        """How many."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class RunBlock:
    """What LLR did to a block; `more` are the other errors that the run has measured, by name."""

    name: str
    error_before: float
    error_learned: float
    kept: str
    losses: list[float]
    more: dict[str, float] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """Whether what LLR came to is in the network."""
        return "kept" if self.kept == "learned" else "reverted: no improvement"


@dataclass(frozen=True)
class RunActivation:
    """A quantized tensor; `step` is 0 on a log grid, error and saturation are those on calibration images."""

    bits: int
    signed: bool
    step: float
    error: float
    saturated: float


@dataclass(frozen=True)
class Run:
    """A run to show.

    Attributes:
        floats: whether the histograms are of the float weights, and not of their codes' levels.
        n_bytes: of the packed file.
        rest: how many numbers in it are not quantized.
        activations: of each quantized tensor what its levels are and how it did, by name; of those known.
    """

    name: str
    row: dict[str, Any]
    layers: list[RunLayer]
    blocks: list[RunBlock]
    skipped: list[tuple[str, str]]
    floats: bool
    n_bytes: int
    rest: int
    activations: dict[str, RunActivation] = field(default_factory=dict)


def read_run(path: str) -> Run:
    """Read a packed file or a run folder.

    Raises:
        UserError: it is neither, or damaged.
    """
    place = Path(path)
    name = place.name or str(place)
    if not place.exists():
        raise UserError(f"--run: {place}: does not exist; expected a packed file or a run folder")
    try:
        if not place.is_dir():
            return _packed_run(name, PackedFile.read(place), place.stat().st_size)
        text = _account_text(place)
        file = PackedFile.read(place / PACKED)
        account = json.loads(text, parse_constant=_refuse)
        if not isinstance(account, dict) or account.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        return _account_run(name, account, file, (place / PACKED).stat().st_size)
    except UserError as error:
        raise UserError(f"--run: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{one_line(error):.80}"
        raise UserError(f"--run: {place / REPORT} is not a run's report ({reason}); expected a run folder") from None


def _account_text(place: Path) -> str:
    try:
        return (place / REPORT).read_text("utf-8")
    except OSError as error:
        raise UserError(f"{place} has no readable {REPORT} ({error.strerror}); expected a run folder "
                        "or a packed file") from None  # fmt: skip


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _packed_run(name: str, file: PackedFile, size: int) -> Run:
    message = file.info.get("layers")
    layers = []
    for layer_name, layer in file.layers.items():
        info = message.get(layer_name) if isinstance(message, dict) else None
        known = info if isinstance(info, dict) else {}
        n_changed_codes = known.get("n_changed_codes")
        layers.append(
            RunLayer(
                layer_name,
                tuple(layer.shape),
                layer.n_bits,
                str(known.get("block", "")),
                base_mix(layer.spec),
                _error(known.get("error_nearest")),
                _error(known.get("error")),
                n_changed_codes if type(n_changed_codes) is int and n_changed_codes >= 0 else None,
                *code_histogram(layer),
                common_levels(layer),
                output_errors=_output_errors(known),
            )
        )
    return Run(name, _measured(file.info), layers, [], [], False, size, _rest(file), _activations(file.info))


def _account_run(name: str, account: Mapping[str, Any], file: PackedFile, size: int) -> Run:
    layers = [
        RunLayer(
            str(entry["name"]),
            tuple(int(size) for size in entry["shape"]),
            int(entry["n_bits"]),
            str(entry["block"]),
            _mix(entry["base_mix"]),
            _error(entry["error_nearest"]),
            _error(entry["error"]),
            int(entry["n_changed_codes"]),
            _counts(entry["histogram"]),
            HISTOGRAM_RANGE,
            common_levels(file.layers[entry["name"]]),
            _more(entry),
            _output_errors(entry),
        )
        for entry in account["layers"]
    ]
    blocks = [
        RunBlock(
            str(entry["name"]),
            _finite(entry["error_before"]),
            _finite(entry["error_learned"]),
            str(entry["kept"]),
            [_finite(loss) for loss in entry["losses"]],
            _more(entry),
        )
        for entry in account["blocks"]
    ]
    skipped = [(str(layer), str(reason)) for layer, reason in account["skipped"]]
    return Run(
        name, dict(account["row"].items()), layers, blocks, skipped, True, size, _rest(file), _activations(file.info)
    )


def _activations(info: Mapping[str, Any]) -> dict[str, RunActivation]:
    """The quantized tensors that a packed file's info tells of; entries that tell nothing are left out."""
    known = info.get("activations")
    found = {}
    for name, entry in known.items() if isinstance(known, dict) else ():
        figures = [_error(entry.get(what)) for what in ("bits", "step", "error", "saturated")] if isinstance(
            entry, dict) else [None]  # fmt: skip
        if None not in figures:
            bits, step, error, saturated = (figure or 0.0 for figure in figures)
            found[str(name)] = RunActivation(int(bits), bool(entry.get("signed")), step, error, saturated)
    return found


def _measured(info: Mapping[str, Any]) -> dict[str, Any]:
    """The results columns that a packed file's info has, as far as it has them."""
    stages = info.get("accuracy")
    stages = stages if isinstance(stages, dict) else {}
    found = {stage: value for stage, value in stages.items() if isinstance(value, dict)}
    final = ([value for stage, value in found.items() if stage not in ("float", "approximated")] or [{}])[-1]
    row = {"val_images": final.get("images"), "Acc@1": final.get("top1"),
           "float_Acc@1": found.get("float", {}).get("top1")}  # fmt: skip
    return {name: value for name, value in row.items() if _error(value) is not None}


def _rest(file: PackedFile) -> int:
    return sum(tensor.numel() for tensor in file.rest.values())


def _more(entry: Mapping[str, Any]) -> dict[str, float]:
    """Errors that a run's report has beside those that every one has."""
    known = ("error", "error_nearest", "error_before", "error_learned", "output_errors")
    found = {name: _error(value) for name, value in entry.items() if "error" in name and name not in known}
    return {name: value for name, value in found.items() if value is not None}


def _output_errors(entry: Mapping[str, Any]) -> tuple[float | None, ...]:
    """In the order of `fidelity.KINDS`; empty where a run has none."""
    values = entry.get("output_errors")
    return tuple(map(_error, values)) if isinstance(values, list) and len(values) == len(KINDS) else ()


def _mix(values: Mapping[str, Any]) -> dict[int, int]:
    mix = {int(k): int(count) for k, count in values.items()}
    if any(k < 0 or count < 1 for k, count in mix.items()):
        raise ValueError("a base mix without channels")
    return mix


def _counts(values: Any) -> list[int]:
    counts = [int(count) for count in values]
    if len(counts) != HISTOGRAM_BINS or min(counts) < 0:
        raise ValueError(f"a histogram without {HISTOGRAM_BINS} counts")
    return counts


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no finite number")
    return float(value)


def _error(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def common_levels(layer: PackedLayer) -> list[float]:
    """The levels of a channel of the most common base mix, else of the first, over their largest magnitude."""
    mix = base_mix(layer.spec)
    first = 0
    if mix:
        common = max(mix, key=lambda k: mix[k])
        first = layer.spec.columns["n_base2"].tolist().index(common)
    levels = layer.spec.select(slice(first, first + 1)).codebook(layer.n_bits, torch.float64).levels[0]
    top = float(levels.abs().max())
    return sorted({level / top for level in levels.tolist()}) if top > 0 else [0.0]


def code_histogram(layer: PackedLayer) -> tuple[list[int], float]:
    """Counts of the layer's weights, as levels over the largest magnitude of their codebook, and the histogram's reach.

    One bin more than for float weights, and half a bin wider, so that no level falls on a border between bins.
    """
    levels = layer.spec.codebook(layer.n_bits, torch.float64).levels
    top = levels.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    reach = HISTOGRAM_RANGE * (HISTOGRAM_BINS + 1) / HISTOGRAM_BINS
    counts = np.zeros(HISTOGRAM_BINS + 1, dtype=np.int64)
    codes = layer.unpacked().reshape(layer.spec.channels, -1)
    for channel, row in enumerate(codes):
        uses = np.bincount(row.numpy(), minlength=levels.shape[1])
        relative = (levels[channel] / top[channel]).numpy()
        counts += np.histogram(relative, HISTOGRAM_BINS + 1, (-reach, reach), weights=uses)[0].astype(np.int64)
    return counts.tolist(), reach
