"""The hardware export: a folder with codes, codebooks as shifts and adds, and golden vectors of every quantized
layer.

Golden vectors are integer inputs and outputs of the layer for chosen images. The folder's own README.md defines every
bit of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from logart.errors import UserError, one_line
from logart.export.hardware import (
    ACTIVATION_BITS,
    Array,
    Cost,
    FixedPoint,
    HardwareLevels,
    signed_powers,
)
from logart.export.hardware_readme import readme
from logart.export.hardware_run import LayerRun, run_layers
from logart.export.inputs import GoldenImages
from logart.export.integer_layer import IntegerLayer
from logart.grids.root2 import ROOT2_TEXT, ExactRoot2Error
from logart.networks.weights import file_sha256
from logart.packed.file import PackedFile
from logart.packed.layer import PackedLayer

FORMAT, VERSION = "logart-hardware", 1
_LINES_AT_ONCE = 2**18
CHOICES = ", ".join(f"{terms} ({text})" for terms, text in ROOT2_TEXT.items())


@dataclass(frozen=True)
class ExportLayer:
    """A layer on its way out: `packed` with the √2 that `levels` has."""

    name: str
    folder: str
    packed: PackedLayer
    levels: HardwareLevels
    approximated: bool

    @property
    def codes(self) -> Array:
        return self.packed.unpacked().numpy()  # type: ignore[no-any-return]


def export_hardware(
    path: str | Path,
    out: str | Path,
    *,
    terms: int | None = None,
    golden: GoldenImages | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Write the hardware export of a packed file, a folder, atomically.

    Args:
        path: the packed file.
        out: the folder; it must not be there yet, or be empty.
        terms: 2, 3 or 4, what stands for an exact √2.
        golden: what the golden vectors are of, and what formats are chosen from; None writes no golden vectors.
        model: as for `load_packed`, where the entry points did not build the network.

    Returns:
        The manifest.

    Raises:
        UserError: a linear grid, an exact √2 without `terms`, `terms` without effect, images the network does not
            take, a file that cannot be read, or a folder that cannot be written.
    """
    file = PackedFile.read(path)
    layers = exportable_layers(file, terms)
    with new_folder(Path(out)) as folder:
        return _write(Path(path), file, layers, golden, model, folder)


def exportable_layers(file: PackedFile, terms: int | None) -> list[ExportLayer]:
    """The layers with levels of shifts and adds."""
    layers = []
    for index, (name, packed) in enumerate(file.layers.items()):
        spec = packed.spec
        try:
            try:
                levels = HardwareLevels.of(spec, packed.n_bits, packed.dtype)
            except ExactRoot2Error as error:
                if terms is None:
                    raise UserError(f"--terms: {error}; say which sum stands for √2: {CHOICES}") from None
                spec = replace(spec, terms=terms)
                levels = HardwareLevels.of(spec, packed.n_bits, packed.dtype)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"layer {name!r:.80}: {error}") from None
        if terms is not None and spec.terms not in (0, terms):
            raise UserError(f"--terms: {terms}, but the file was made with √2 ≈ {ROOT2_TEXT[spec.terms]}")
        folder = f"layers/{index:03}_" + re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]  # a file may call a layer "../.."
        layers.append(ExportLayer(name, folder, replace(packed, spec=spec), levels, spec is not packed.spec))
    if terms is not None and all(layer.packed.spec.terms == 0 for layer in layers):
        raise UserError("--terms has no effect here: no level holds √2")
    return layers


@contextmanager
def new_folder(out: Path, flag: str = "--out") -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, or goes."""
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{flag}: {out} is there already; expected a new or an empty folder")
    if not out.parent.is_dir():
        raise UserError(f"{flag}: no folder {out.parent} to make {out.name} in")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{flag}: cannot write {out} ({one_line(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    path: Path,
    file: PackedFile,
    layers: list[ExportLayer],
    golden: GoldenImages | None,
    model: nn.Module | None,
    folder: Path,
) -> dict[str, Any]:
    network = run_layers(path, file, {layer.name: layer.packed for layer in layers}, golden, model)
    entries, costs = [], []
    for layer in layers:
        run = network.layers.get(layer.name)
        bias = file.rest.get(f"{layer.name}.bias")
        entry, cost = _write_layer(layer, run, bias, golden is not None, folder / layer.folder)
        entries.append(entry)
        costs.append(cost)
    total = Cost.total(cost for cost in costs if cost is not None) if network.layers else None
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "source": {"file": path.name, "sha256": file_sha256(path), "info": file.info},
        "images": 0 if golden is None else len(golden.images),
        "image_names": [] if golden is None else golden.names,
        "data": None if golden is None else golden.data,
        "calibration_images": 0 if golden is None else len(golden.calibration),
        "not_run": network.not_run,
        "float_operations": network.float_operations,
        "cost": None if total is None else asdict(total),
        "layers": entries,
    }
    text = json.dumps(manifest, indent=1) + "\n"
    manifest = json.loads(text)
    (folder / "manifest.json").write_text(text, "utf-8")
    (folder / "README.md").write_text(readme(manifest), "utf-8")
    if golden is not None:
        np.save(folder / "images.npy", golden.images.numpy())
    return manifest


def _write_layer(
    layer: ExportLayer, run: LayerRun | None, bias: Tensor | None, golden: bool, folder: Path
) -> tuple[dict[str, Any], Cost | None]:
    """The files of a layer; its entry in the manifest and what it costs, None where the network did not run."""
    write_codes(layer, folder)
    levels, codes, n_bits = layer.levels, layer.codes, layer.packed.n_bits
    write_hex(folder / "codebook.hex", _words(levels), 16)
    if _shared_add_shifts(levels) is None:
        _save(folder / "add_shifts", levels.adds.astype(np.int8), 8)
    scale: dict[str, Any] | None = None
    if levels.numerators is not None:
        _save(folder / "scale", levels.numerators.astype(np.uint8), 8)
        scale = {str(i): signed_powers(i) for i in np.unique(levels.numerators).tolist()}
    if bias is not None:
        np.save(folder / "bias.npy", bias.double().numpy())
    books = layer.packed.n_bytes()[1]
    cost = None if run is None else Cost.of(levels, codes, n_bits, books, run.positions)
    entry = {
        "name": layer.name,
        "folder": layer.folder,
        "kind": layer.packed.kind,
        "shape": list(codes.shape),
        "bits": n_bits,
        "dtype": str(layer.packed.dtype).removeprefix("torch."),
        "codebooks": len(levels.signs),
        "root2_terms": layer.packed.spec.terms,
        "root2_approximated_by_export": layer.approximated,
        "add_shifts": _shared_add_shifts(levels),
        "scale": scale,
        "geometry": None if run is None or run.geometry is None else asdict(run.geometry),
        "golden": _write_golden(layer, run, bias, folder / "golden") if golden and run is not None else None,
        "cost": None if cost is None else asdict(cost),
    }
    return entry, cost


def write_codes(layer: ExportLayer, folder: Path) -> None:
    """Codes and codebook of a layer, in a new folder."""
    folder.mkdir(parents=True)
    levels = layer.levels
    _save(folder / "codes", layer.codes, layer.packed.n_bits)
    codebook = np.concatenate([levels.signs[..., None], levels.shifts[..., None], levels.adds], axis=2)
    np.save(folder / "codebook.npy", codebook)


def _write_golden(layer: ExportLayer, run: LayerRun, bias: Tensor | None, folder: Path) -> dict[str, Any]:
    """Integer inputs, bias and outputs of a layer; their formats."""
    if not np.isfinite(run.input).all() or not np.isfinite(run.largest):
        raise UserError(f"--inputs: the input of layer {layer.name!r:.80} becomes NaN or infinite")
    folder.mkdir()
    reference = IntegerLayer.plan(
        layer.levels,
        layer.codes,
        FixedPoint.holding(np.array([run.largest]), ACTIVATION_BITS),
        geometry=run.geometry,
        bias=None if bias is None else bias.double().numpy(),
    )
    x = reference.input.quantize(run.input)
    y = reference.run(x)
    _save(folder / "input", x.astype(np.int16), reference.input.bits)
    _save(folder / "output", y, reference.output.bits)
    if reference.bias is not None:
        _save(folder / "bias", reference.bias, reference.output.bits)
    return {
        "input": {**asdict(reference.input), "shape": list(x.shape)},
        "accumulator": asdict(reference.accumulator),
        "output": {**asdict(reference.output), "shape": list(y.shape)},
        "saturated": reference.input.saturated(run.input),
        "guard": reference.guard,
        "rounded_terms": int(reference.rounded_terms.sum()),
        "error_bound": float(reference.error_bound().max()),
    }


def _odd(levels: HardwareLevels) -> Array:
    """Which codes [G, L] have add-shifts."""
    odd: Array = np.count_nonzero(levels.adds, axis=2) > 0
    return odd


def _shared_add_shifts(levels: HardwareLevels) -> list[int] | None:
    """The add-shifts of every level that has any, empty where none has; None where levels differ in them."""
    every = np.unique(levels.adds[_odd(levels)], axis=0)
    return None if len(every) > 1 else every.ravel().tolist()


def _words(levels: HardwareLevels) -> Array:
    """The codebook as 16-bit words: zero, negative, odd, and 13 bits of shift."""
    flags = (levels.signs == 0).astype(np.int64) << 15 | (levels.signs < 0).astype(np.int64) << 14
    return flags | _odd(levels).astype(np.int64) << 13 | levels.shifts.astype(np.int64) & 0x1FFF


def _save(path: Path, values: Array, bits: int) -> None:
    """An array as `path`.npy and `path`.hex."""
    np.save(path.with_name(path.name + ".npy"), values)
    write_hex(path.with_name(path.name + ".hex"), values, bits)


def write_hex(path: Path, values: Array, bits: int) -> None:
    """For `$readmemh`: one number a line, row-major, two's complement in as many whole hex digits as `bits` need."""
    digits = -(-bits // 4)
    mask = (1 << 4 * digits) - 1
    flat = values.ravel()
    with path.open("w", encoding="ascii", newline="\n") as file:
        for start in range(0, flat.size, _LINES_AT_ONCE):
            part = flat[start : start + _LINES_AT_ONCE].tolist()
            file.write("".join(f"{value & mask:0{digits}x}\n" for value in part))
