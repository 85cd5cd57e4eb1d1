"""A packed network for other tools: `python -m logart.export FILE --out DIR` for hardware, `--onnx OUT.onnx` for ONNX.

The folder holds, for every quantized layer, codes, codebooks as shifts and adds, and golden vectors: integer inputs and
outputs of the layer, for chosen images. Its own README.md defines every bit of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn

from logart import surgery
from logart.checkpoint import load_packed
from logart.cli import FlagParser, refuse_idle, run_command
from logart.data import DIGITS, Preprocessing, open_images
from logart.grid import ROOT2_TEXT
from logart.hardware import (
    ACTIVATION_BITS,
    Array,
    Cost,
    ExactRoot2Error,
    FixedPoint,
    Geometry,
    HardwareLevels,
    IntegerLayer,
    signed_powers,
)
from logart.network import INTERPOLATIONS
from logart.packed_file import DTYPES, PackedFile, PackedFileError, PackedLayer
from logart.runtime import UserError
from logart.weights import file_sha256, one_line

FORMAT, VERSION = "logart-hardware", 1
DIGITS_IMAGES = 4  # of the built-in data's test images
_MAX_PIXELS = 2**26
_LINES_AT_ONCE = 2**18
_CHOICES = ", ".join(f"{terms} ({text})" for terms, text in ROOT2_TEXT.items())


@dataclass(frozen=True)
class _Layer:
    """A layer on its way out: `packed` with the √2 that `levels` has."""

    name: str
    folder: str
    packed: PackedLayer
    levels: HardwareLevels
    approximated: bool

    @property
    def codes(self) -> Array:
        return self.packed.unpacked().numpy()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Run:
    """What a layer did for some images: its input, how often its weights were used for one, and how."""

    input: Array
    positions: int
    geometry: Geometry | None


def export_hardware(
    path: str | Path,
    out: str | Path,
    *,
    terms: int | None = None,
    images: Tensor | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Write the hardware export of a packed file, a folder, whole or not at all.

    Args:
        path: the packed file.
        out: the folder; it must not be there yet, or be empty.
        terms: 2, 3 or 4, what stands for an exact √2.
        images: float [n, C, H, W], preprocessed: what the golden vectors are of; None writes none.
        model: as for `load_packed`, where the entry points did not build the network.

    Returns:
        The manifest.

    Raises:
        UserError: a linear grid, an exact √2 without `terms`, `terms` that cannot act, images the network does not
            take, a file that cannot be read, or a folder that cannot be written.
    """
    file = PackedFile.read(path)
    layers = _layers(file, terms)
    with _new_folder(Path(out)) as folder:
        return _write(Path(path), file, layers, images, model, folder)


def read_export(folder: str | Path) -> dict[str, Tensor]:
    """The weights of an export by the names of the layers, rebuilt from its files alone.

    Raises:
        UserError: a folder that is no export, or a damaged one.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {manifest['format']!r}, version {manifest['version']!r}")
        return {layer["name"]: _read_weight(folder / layer["folder"], layer) for layer in manifest["layers"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder}: is no hardware export of version {VERSION} ({one_line(error)})") from error


def _read_weight(folder: Path, entry: dict[str, Any]) -> Tensor:
    codes, codebook = (np.load(folder / f"{part}.npy", allow_pickle=False) for part in ("codes", "codebook"))
    scale = np.load(folder / "scale.npy", allow_pickle=False) if entry["scale"] else None
    levels = HardwareLevels(codebook[..., 0], codebook[..., 1], codebook[..., 2:], scale)
    rows = codes.reshape(len(codes), -1)
    values = levels.values()[levels.codebook_of_row(len(codes))[:, None], rows]
    return torch.from_numpy(values).to(DTYPES[entry["dtype"]]).reshape(codes.shape)


def _layers(file: PackedFile, terms: int | None) -> list[_Layer]:
    """The layers with levels of shifts and adds."""
    layers = []
    for index, (name, packed) in enumerate(file.layers.items()):
        spec = packed.spec
        try:
            try:
                levels = HardwareLevels.of(spec, packed.n_bits, packed.dtype)
            except ExactRoot2Error as error:
                if terms is None:
                    raise UserError(f"--terms: {error}; say which sum stands for √2: {_CHOICES}") from None
                spec = replace(spec, terms=terms)
                levels = HardwareLevels.of(spec, packed.n_bits, packed.dtype)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"layer {name!r:.80}: {error}") from None
        if terms is not None and spec.terms not in (0, terms):
            raise UserError(f"--terms: {terms}, but the file was made with √2 ≈ {ROOT2_TEXT[spec.terms]}")
        folder = f"layers/{index:03}_" + re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]  # a file may call a layer "../.."
        layers.append(_Layer(name, folder, replace(packed, spec=spec), levels, spec is not packed.spec))
    if terms is not None and all(layer.packed.spec.terms == 0 for layer in layers):
        raise UserError("--terms has no effect here: no level holds √2")
    return layers


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, or goes."""
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} is there already; expected a new or an empty folder")
    if not out.parent.is_dir():
        raise UserError(f"--out: no folder {out.parent} to make {out.name} in")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out} ({one_line(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    path: Path, file: PackedFile, layers: list[_Layer], images: Tensor | None, model: nn.Module | None, folder: Path
) -> dict[str, Any]:
    runs, why = _run(path, file, layers, images, model)
    entries, costs = [], []
    for layer in layers:
        run = runs.get(layer.name)
        bias = file.rest.get(f"{layer.name}.bias")
        entry, cost = _write_layer(layer, run, bias, images is not None, folder / layer.folder)
        entries.append(entry)
        costs.append(cost)
    total = Cost.total(cost for cost in costs if cost is not None) if runs else None
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "source": {"file": path.name, "sha256": file_sha256(path), "info": file.info},
        "images": 0 if images is None else len(images),
        "not_run": why,
        "cost": None if total is None else asdict(total),
        "layers": entries,
    }
    text = json.dumps(manifest, indent=1) + "\n"
    manifest = json.loads(text)
    (folder / "manifest.json").write_text(text, "utf-8")
    (folder / "README.md").write_text(_readme(manifest), "utf-8")
    if images is not None:
        np.save(folder / "images.npy", images.numpy())
    return manifest


def _run(
    path: Path, file: PackedFile, layers: list[_Layer], images: Tensor | None, model: nn.Module | None
) -> tuple[dict[str, _Run], str | None]:
    """What each layer does in the network with the exported levels, or why nothing is known of it."""
    try:
        network = load_packed(path, model)
    except PackedFileError as error:
        if model is not None:
            raise
        if images is not None:
            raise UserError(f"--inputs: golden vectors need the network; {one_line(error)}") from error
        return {}, one_line(error)
    if images is None:
        preprocessing = _preprocessing(file.info)
        if preprocessing is None:
            return {}, "the file does not say which images the network takes"
        images = torch.zeros(1, *preprocessing.input_size)
    quantized = surgery.quantized_layers(network)
    runs: dict[str, _Run] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        geometry = _geometry(module, args[0]) if isinstance(module, nn.Conv2d) else None
        channels = output.shape[-1] if geometry is None else output.shape[1]
        runs[name] = _Run(args[0].double().numpy(), output.numel() // channels // len(images), geometry)

    handles = []
    try:
        for layer in layers:
            module = quantized[layer.name]
            module.hold_packed(layer.packed.codes, layer.packed.spec, expanded=True)
            handles.append(module.register_forward_hook(lambda m, a, o, name=layer.name: record(name, m, a, o)))
        with torch.no_grad():
            network(images.to(layers[0].packed.dtype))
    except RuntimeError as error:
        raise UserError(f"--inputs: the network does not take {list(images.shape)} ({one_line(error):.160})") from error
    finally:
        for handle in handles:
            handle.remove()
    return runs, None


def _geometry(module: nn.Conv2d, x: Tensor) -> Geometry:
    """Of a convolution on an input of this size, its padding as numbers."""
    kernel, stride, dilation = ((int(a), int(b)) for a, b in (module.kernel_size, module.stride, module.dilation))
    if isinstance(module, Conv2dSame):
        total = [get_same_padding(x.shape[2 + i], kernel[i], stride[i], dilation[i]) for i in (0, 1)]
    elif isinstance(module.padding, str):
        total = [d * (k - 1) if module.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    else:
        total = [2 * int(p) for p in module.padding]
    top, left = (t // 2 for t in total)
    padding = ((top, total[0] - top), (left, total[1] - left))
    return Geometry(kernel, stride, padding, dilation, module.groups, module.padding_mode)


def _write_layer(
    layer: _Layer, run: _Run | None, bias: Tensor | None, golden: bool, folder: Path
) -> tuple[dict[str, Any], Cost | None]:
    """The files of a layer; its entry in the manifest and what it costs, None where the network did not run."""
    folder.mkdir(parents=True)
    levels, codes, n_bits = layer.levels, layer.codes, layer.packed.n_bits
    _save(folder / "codes", codes, n_bits)
    codebook = np.concatenate([levels.signs[..., None], levels.shifts[..., None], levels.adds], axis=2)
    np.save(folder / "codebook.npy", codebook)
    _write_hex(folder / "codebook.hex", _words(levels), 16)
    scale: dict[str, Any] | None = None
    if levels.numerators is not None:
        _save(folder / "scale", levels.numerators.astype(np.uint8), 8)
        scale = {str(i): signed_powers(i) for i in np.unique(levels.numerators).tolist()}
    if bias is not None:
        np.save(folder / "bias.npy", bias.double().numpy())
    cost = None if run is None else Cost.of(levels, codes, n_bits, layer.packed.n_bytes[1], run.positions)
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
        "add_shifts": levels.adds[_odd(levels)][:1].ravel().tolist(),
        "scale": scale,
        "geometry": None if run is None or run.geometry is None else asdict(run.geometry),
        "golden": _write_golden(layer, run, bias, folder / "golden") if golden and run is not None else None,
        "cost": None if cost is None else asdict(cost),
    }
    return entry, cost


def _write_golden(layer: _Layer, run: _Run, bias: Tensor | None, folder: Path) -> dict[str, Any]:
    """Integer inputs, bias and outputs of a layer; their formats."""
    if not np.isfinite(run.input).all():
        raise UserError(f"--inputs: the input of layer {layer.name!r:.80} becomes NaN or infinite")
    folder.mkdir()
    reference = IntegerLayer.plan(
        layer.levels,
        layer.codes,
        FixedPoint.holding(run.input, ACTIVATION_BITS),
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
        "guard": reference.guard,
        "rounded_terms": int(reference.rounded_terms.sum()),
        "error_bound": float(reference.error_bound().max()),
    }


def _odd(levels: HardwareLevels) -> Array:
    """Which codes [G, L] have add-shifts."""
    odd: Array = np.count_nonzero(levels.adds, axis=2) > 0
    return odd


def _words(levels: HardwareLevels) -> Array:
    """The codebook as 16-bit words: zero, negative, odd, and 13 bits of shift."""
    flags = (levels.signs == 0).astype(np.int64) << 15 | (levels.signs < 0).astype(np.int64) << 14
    return flags | _odd(levels).astype(np.int64) << 13 | levels.shifts.astype(np.int64) & 0x1FFF


def _save(path: Path, values: Array, bits: int) -> None:
    """An array as `path`.npy and `path`.hex."""
    np.save(path.with_name(path.name + ".npy"), values)
    _write_hex(path.with_name(path.name + ".hex"), values, bits)


def _write_hex(path: Path, values: Array, bits: int) -> None:
    """For `$readmemh`: one number a line, row-major, two's complement in as many whole hex digits as `bits` need."""
    digits = -(-bits // 4)
    mask = (1 << 4 * digits) - 1
    flat = values.ravel()
    with path.open("w", encoding="ascii", newline="\n") as file:
        for start in range(0, flat.size, _LINES_AT_ONCE):
            part = flat[start : start + _LINES_AT_ONCE].tolist()
            file.write("".join(f"{value & mask:0{digits}x}\n" for value in part))


def cost_table(manifest: dict[str, Any]) -> str:
    """The counts of an export as a table of plain text, a line a layer and the total."""
    names = ("multiplications", "shifts", "adds", "storage_bits", "linear_storage_bits")
    head = ("layer", "shape", "bits", "mult. replaced", "shifts", "adds", "storage bits", "on a linear grid")
    rows: list[tuple[str, ...]] = [head]
    for layer in manifest["layers"]:
        shape = "×".join(map(str, layer["shape"]))
        cost = layer["cost"]
        counts = ["-"] * 5 if cost is None else [f"{cost[name]:,}" for name in names]
        rows.append((Path(layer["folder"]).name, shape, str(layer["bits"]), *counts))
    if manifest["cost"] is not None:
        rows.append(("total", "", "", *(f"{manifest['cost'][name]:,}" for name in names)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def approximation(manifest: dict[str, Any]) -> str:
    """Which sum stands for √2, and since when."""
    terms = max((layer["root2_terms"] for layer in manifest["layers"]), default=0)
    if terms == 0:
        return "No level holds √2: every level is a power of two."
    if any(layer["root2_approximated_by_export"] for layer in manifest["layers"]):
        return (
            f"The packed file holds an exact √2; this export has √2 ≈ {ROOT2_TEXT[terms]} (--terms {terms}).\n"
            "Its weights are not the file's, and accuracies that the file records are not of these weights."
        )
    return f"√2 ≈ {ROOT2_TEXT[terms]}, as in the packed file: these are its weights exactly."


def _readme(manifest: dict[str, Any]) -> str:
    why = manifest["not_run"]
    golden = (
        f"Golden vectors: of {manifest['images']} images, `images.npy`."
        if manifest["images"]
        else "This export has no golden vectors."
    )
    run = f" The network was not run ({why}): strides, paddings and counts are unknown." if why else ""
    return _README.format(
        version=VERSION,
        bits=ACTIVATION_BITS,
        file=json.dumps(manifest["source"]["file"]),
        sha256=manifest["source"]["sha256"],
        approximation=approximation(manifest),
        golden=golden + run,
        table=cost_table(manifest),
    )


_README = """\
# Weights of shifts and adds

Export version {version} of the packed network {file} (SHA-256 {sha256}).
{approximation}
{golden}

`manifest.json` lists the layers in the network's order: name, folder, kind, shape, bits, geometry, formats, counts.
Arrays are `.npy` and, beside it, `.hex` for `$readmemh`: one number a line, lowercase, no prefix, in row-major order
(the last axis runs fastest), as many hex digits as the bits need (4 bits: 1 digit; 5 to 8 bits: 2; 16 bits: 4).
Negative numbers are two's complement, sign-extended to whole digits. The most significant digit comes first.

## A layer's folder

| file | what | type | shape |
|---|---|---|---|
| `codes` | code of each weight, `bits` bits, unsigned | uint8 | the weight's: [C, C_in/groups, kh, kw] or [C, K] |
| `codebook.npy` | sign, shift, add-shifts of each code | int16 | [G, 2^bits, 2 + A] |
| `codebook.hex` | the same as 16-bit words, G·2^bits of them | | [G, 2^bits] |
| `scale` | numerator i of a channel's scale i/32; only where `scale` of the manifest is not null | uint8 | [G] |
| `bias.npy` | bias, only where the layer has one | float64 | [C] |
| `golden/input`, `golden/output` | activations and outputs, integers | int16, int64 | in the manifest |
| `golden/bias` | bias in output format | int64 | [C] |

The C rows of a weight share the G codebooks evenly, in order: row r has codebook r // (C / G).

## A level

    level = sign · 2^shift · (1 + Σ_j ±2^-|k_j|)

sign is -1, 0 or 1; a level of sign 0 is zero, and its weight adds nothing. k_j > 0 adds 2^-k_j, k_j < 0 subtracts
2^-|k_j|, k_j = 0 is no term. All levels with add-shifts in a layer have the same ones, `add_shifts` of the manifest.
A word of `codebook.hex`, bit 15 first: bit 15 zero level, bit 14 negative, bit 13 add-shifts apply, bits 12 to 0 shift
in two's complement.

A scale is no part of the level: the sum over a channel's inputs is multiplied by i/32 once per output, as shifts and
adds. `scale` of the manifest maps i to its terms [±1, e], i = Σ ±2^e. A weight is then level · i / 32, rounded to the
network's type (`dtype` of the manifest), which changes only levels at the very end of that type's range or precision.

## The integer reference

A number of a format (bits, fraction) is an integer of so many bits in two's complement times 2^-fraction.

1. Activations: `input` format, {bits} bits, the fraction chosen per layer so that the largest magnitude in the golden
   inputs fits. A real number is rounded to the nearest, ties to even; one out of range saturates to the end of it.
   None of the golden inputs does. Each layer's input is what the floating-point network with these levels feeds it.
2. Products: each term ±2^e of a weight (e = shift, or shift - |k_j|) gives the activation shifted left by e + guard,
   added or subtracted. Left shifts are exact. Where `rounded_terms` is 0 there is nothing else. Else so many terms have
   a negative e + guard: they shift right, to nearest, ties up: (x + 2^(s-1)) >> s with s = -(e + guard), one by one.
3. The sum: `accumulator` format; its fraction is the input's plus guard. Padding of a convolution is zero, or as
   `padding_mode` says; padding is given as [[top, bottom], [left, right]].
4. Scale, only where the layer has one: the sum times i by the terms of i. The fraction grows by 5, exactly.
5. Bias: rounded to `output` format (to nearest, ties to even) and added.

Overflow cannot happen: accumulator and output are as wide as the worst case over all inputs of the input format. In
between, two's complement may wrap without harm.
`error_bound` is the largest distance, over the outputs, to the layer in real numbers with the same levels and the
unrounded input, of inputs that do not saturate: Σ|weight| · half an input unit + rounded terms · scale · half an
accumulator unit + half an output unit for the bias, where a format's unit is 2^-fraction.

## Counts

For one image of the recorded size. They say nothing about silicon.

```
{table}
```

Replaced multiplications are those of a linear grid: one for each weight and output position, padding included; this
export has none. Shifts and adds: one of each for each term of a weight that is not zero, at each output position: 1 for
a power of two, 2 for √2 ≈ 1 + 1/2, 3 or 4 with more terms; the first sum starts from zero and counts. A scale adds one
shift for each term of i and one add fewer. Adding the bias is not counted, nor is it for the linear grid, which has as
many adds as multiplications. Storage bits: codes and the codebooks' packed integers (as in the packed file; the tables
here are expanded). On a linear grid: codes of as many bits, and a 32-bit scale and a zero point of `bits` bits a
channel.
"""


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="logart-export",
        description="Export a packed network: codes, shift-and-add codebooks and golden vectors for hardware (--out), "
        "or ONNX (--onnx).",
    )
    parser.add_argument("file", metavar="FILE", help="a packed network (.safetensors)")
    parser.flag("--out", metavar="DIR", help="write the hardware export there, a new or an empty folder")
    parser.flag("--terms", type=int, choices=list(ROOT2_TEXT),
                help=f"what stands for an exact √2: {_CHOICES}")  # fmt: skip
    parser.flag(
        "--inputs",
        metavar="PATH.npy|digits",
        help="what the golden vectors are of: preprocessed images, float32 [n, C, H, W], or the first "
        f"{DIGITS_IMAGES} test images of the built-in digits (default: those, for a network of digits)",
    )
    parser.flag("--onnx", metavar="OUT.onnx", help="write the network as ONNX there (extra [onnx])")
    parser.flag("--quiet", action="store_true", help="print nothing")
    return parser


def command(args: argparse.Namespace) -> None:
    """From flags to files."""
    if args.out is None and args.onnx is None:
        raise UserError("nothing to write: expected --out DIR or --onnx OUT.onnx")
    refuse_idle(args, {"terms": "--terms", "inputs": "--inputs"}, args.out is not None, "it acts on --out alone")
    if args.out is not None:
        images = _images(PackedFile.read(args.file).info, args.inputs)
        manifest = export_hardware(args.file, args.out, terms=args.terms, images=images)
        if not args.quiet:
            why = manifest["not_run"]
            print(cost_table(manifest))
            print(approximation(manifest))
            if why:
                print(f"The network was not run: {why}")
            print(f"golden vectors of {manifest['images']} images" if images is not None else "no golden vectors")
            print(f"exported to {args.out}")
    if args.onnx is not None:
        from logart.onnx_export import export_onnx  # its packages are an extra

        export_onnx(args.file, args.onnx)
        if not args.quiet:
            print(f"exported to {args.onnx}")


def _images(info: dict[str, Any], inputs: str | None) -> Tensor | None:
    """What --inputs asks for; without it the digits for a network of digits."""
    preprocessing = _preprocessing(info)
    source, network = info.get("source"), info.get("network")
    if inputs is None and isinstance(source, dict) and isinstance(network, dict) and preprocessing is not None:
        inputs = DIGITS if source.get("data") == DIGITS else None
    if inputs is None:
        return None
    if inputs == DIGITS:
        if preprocessing is None:
            raise UserError("--inputs: the file does not say which images the network takes; expected PATH.npy")
        images = open_images(DIGITS, preprocessing, 10, flag="--inputs").val
        return torch.stack([images[i][0] for i in range(DIGITS_IMAGES)])
    try:
        array = np.load(inputs, allow_pickle=False)
    except Exception as error:  # a damaged file makes NumPy raise almost anything
        why = one_line(error)
        raise UserError(f"--inputs: cannot read {inputs} ({why:.160}); expected {DIGITS} or PATH.npy") from error
    size = None if preprocessing is None else preprocessing.input_size
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 4 or not len(array):
        seen = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"--inputs: {inputs} holds {seen}; expected preprocessed images, float32 [n, C, H, W]")
    if size is not None and array.shape[1:] != size:
        raise UserError(f"--inputs: {inputs} has images {list(array.shape[1:])}; the network takes {list(size)}")
    if not np.isfinite(array).all():
        raise UserError(f"--inputs: {inputs} holds NaN or infinite values")
    return torch.from_numpy(array)


def _preprocessing(info: dict[str, Any]) -> Preprocessing | None:
    """What the file says of its images, where it says that in full."""
    try:
        p = info["preprocessing"]
        size, mean, std = (tuple(p[name]) for name in ("input_size", "mean", "std"))
        whole = len(size) == 3 and all(type(s) is int and s > 0 for s in size) and math.prod(size) <= _MAX_PIXELS
        numbers = all(math.isfinite(v) for v in mean) and all(0 < v < math.inf for v in std)
        fit = len(mean) == len(std) == size[0] and 0 < p["crop_pct"] <= 1 and p["interpolation"] in INTERPOLATIONS
        return Preprocessing(size, p["crop_pct"], p["interpolation"], mean, std) if whole and numbers and fit else None
    except (KeyError, TypeError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_command(build_parser(), command, None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
