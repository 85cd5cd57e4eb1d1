"""What a packed file holds: `python -m logart.inspect FILE`. Nothing is built or run; the file is read and checked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from logart.cli import FlagParser, run_command
from logart.errors import UserError, printable
from logart.grids.logarithmic import base_mix
from logart.packed.file import PackedFile
from logart.packed.layer import PackedLayer
from logart.text import shape_text, table

_CHUNK_SIZE = 2**16  # levels, or weights


def describe_layer(layer: PackedLayer, info: Any) -> dict[str, Any]:
    """A layer in a few figures, as JSON can say them.

    Args:
        layer: as read.
        info: what the file says became of it; anything, a file need not know.
    """
    codes, codebooks = layer.n_bytes()
    known = info if isinstance(info, dict) else {}
    return {
        "kind": layer.kind,
        "shape": list(layer.shape),
        "bits": layer.n_bits,
        "grid": layer.spec.grid.name,
        "codebooks": layer.spec.channels,
        "base_mix": base_mix(layer.spec),
        "root2_terms": layer.spec.terms,
        "scaled": "scale" in layer.spec.columns,
        "lowered": int((layer.spec.columns.get("lowered", torch.zeros(1)) > 0).sum()),
        "bytes": codes + codebooks,
        "float_bytes": layer.shape.numel() * layer.dtype.itemsize,
        "error": known.get("error"),
        "error_nearest": known.get("error_nearest"),
        "n_changed_codes": known.get("n_changed_codes"),
    }


def describe_codebooks(layer: PackedLayer) -> Iterator[dict[str, Any]]:
    """Each codebook of a layer: its integers, its levels in the order of the codes, and how often each is used."""
    n_levels = 2**layer.n_bits
    codes = layer.unpacked().reshape(layer.spec.channels, -1)
    size = max(1, _CHUNK_SIZE // max(n_levels, codes.shape[1]))
    for start in range(0, len(codes), size):
        spec, rows = layer.spec.select(slice(start, start + size)), codes[start : start + size].long()
        levels = spec.codebook(layer.n_bits, layer.dtype).levels.tolist()
        places = rows + n_levels * torch.arange(len(rows))[:, None]
        uses = places.reshape(-1).bincount(minlength=n_levels * len(rows)).reshape(len(rows), n_levels).tolist()
        integers = zip(*(column.tolist() for column in spec.columns.values()), strict=True)
        for values, row_levels, row_uses in zip(integers, levels, uses, strict=True):
            yield dict(zip(spec.columns, values, strict=True)) | {"levels": row_levels, "uses": row_uses}


def describe(file: PackedFile) -> dict[str, Any]:
    """The whole file in figures, as JSON can say them."""
    message = file.info.get("layers")
    message = message if isinstance(message, dict) else {}
    layers = {name: describe_layer(layer, message.get(name)) for name, layer in file.layers.items()}
    rest = {name: {"shape": list(t.shape), "bytes": t.nbytes} for name, t in file.rest.items()}
    info = {name: value for name, value in file.info.items() if name != "layers"}
    return {"info": info, "layers": layers, "rest": rest}


def layer_table(layers: dict[str, dict[str, Any]]) -> str:
    """The layers as a table."""
    head = ("layer", "shape", "bits", "grid", "bytes", "ratio", "error", "channels per n_base2")
    rows = [
        (
            name,
            shape_text(layer["shape"]),
            layer["bits"],
            layer["grid"],
            layer["bytes"],
            f"{layer['float_bytes'] / layer['bytes']:.1f}×",
            f"{layer['error']:.5f}" if isinstance(layer["error"], float) else None,
            " ".join(f"{k}:{count}" for k, count in layer["base_mix"].items()),
        )
        for name, layer in layers.items()
    ]
    return table(head, rows, text=("layer", "shape", "grid", "channels per n_base2"))


def activation_table(activations: Mapping[str, Any]) -> str:
    """The quantized activations as a table; `activations` as the file's info has them, of which anything may be."""
    head = ("activations read by", "bits", "signed", "step", "error", "saturated")
    kept = {name: entry for name, entry in activations.items() if isinstance(entry, dict)}
    rows = [(printable(name)[:80], *(_short(entry.get(what)) for what in head[1:])) for name, entry in kept.items()]
    return table(head, rows, text=("activations read by",))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value)[:20])


def codebook_lines(books: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One layer's codebooks, a channel a line: its integers, then code by code the level and how often it is used."""
    for channel, book in enumerate(books):
        integers = " ".join(f"{name} {value:g}" for name, value in book.items() if name not in ("levels", "uses"))
        levels = " ".join(f"{level:.6g}({uses})" for level, uses in zip(book["levels"], book["uses"], strict=True))
        yield f"{channel}: {integers}: {levels}"


def command(args: argparse.Namespace) -> None:
    """Print what was asked for."""
    file = PackedFile.read(args.file)
    if args.layer is not None and args.layer not in file.layers:
        raise UserError(f"--layer: {args.layer!r} is none of its layers; expected one of {', '.join(file.layers):.300}")
    if args.layer is not None:
        _print_layer(args.layer, describe_codebooks(file.layers[args.layer]), as_json=args.json)
        return
    content = describe(file)
    if args.json:
        print(json.dumps(content))
        return
    for name, value in content["info"].items():
        if name == "activations" and isinstance(value, dict):
            continue  # a table of its own, below
        text = ", ".join(map(str, value)) if isinstance(value, list) else _pairs(value)
        print(printable(f"{name}: {text[:400]}{'…' * (len(text) > 400)}"))
    rest = sum(entry["bytes"] for entry in content["rest"].values())
    print(f"\n{layer_table(content['layers'])}\n")
    activations = content["info"].get("activations")
    if isinstance(activations, dict) and activations:
        print(f"{activation_table(activations)}\n")
    size = Path(args.file).stat().st_size
    print(f"{len(content['rest'])} other tensors: {rest} bytes; the whole file: {size} bytes")


def _print_layer(name: str, books: Iterator[dict[str, Any]], *, as_json: bool) -> None:
    """One codebook after another: a layer may have tens of thousands, of hundreds of levels each."""
    if not as_json:
        print(printable(f"{name}: each codebook's integers, then level(uses) by code"))
        for line in codebook_lines(books):
            print(line)
        return
    for index, book in enumerate(books):
        print(", " if index else "[", json.dumps(book), sep="", end="")
    print("]")


def _pairs(value: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(prog="logart-inspect", description=__doc__.splitlines()[0].partition(":")[0])
    parser.add_argument("file", help="a packed file, as --save writes it")
    parser.flag("--layer", metavar="NAME", help="one layer's codebooks in place of the table")
    parser.flag("--json", action="store_true", help="JSON in place of text")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_command(build_parser(), command, argv)
