"""The packed file: one safetensors file that holds a quantized network, and nothing that could be run.

It has one tensor, `packed`, uint8 and one-dimensional, because every name in the header of a safetensors file costs
bytes that small networks feel. In it are, one after the other and each begun on a byte:

    the description
    layer after layer, its codes (`packing`) and the integers of its codebooks (`spec`)
    every parameter and buffer that is not quantized, its elements little-endian

The description is JSON, ASCII, compressed by zlib with `packed_words` as its preset dictionary: an object of

    layers      by column, in the order above: name, kind, shape, bits; and number of codebooks, dtype, terms of √2 and
                columns of the codebook where a layer's are not the usual ones, null for one whose are
    ranges      by name the range of a column of all codebooks: the least integer, and the bits of what lies above it
    rest        shapes by name by type (`float32`, say) of what is not quantized, in the order above
    report      where `info` has `layers`, an object by layer of objects alike: these by column, in the order above
    info        what else is known of the network and its run

One metadata entry, `logart`, is JSON too, and says the format's version.

Reading checks all of it before anything is built on it: a file that is damaged, hostile or of another kind raises one
`PackedFileError`, and no size it claims is believed before bytes stand behind it. Equal networks give equal bytes as
long as zlib, which has several makers, packs equal texts alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from logart.errors import UserError, one_line, printable
from logart.files import write_atomically
from logart.grids.spec import Ranges, column_ranges, read_ranges
from logart.packed.layer import ByteReader, PackedLayer
from logart.packed.text import MAX_TEXT, MAX_ZIPPED, parsed, to_columns, to_rows, unzipped, zipped

VERSION = 4
_METADATA, _TENSOR = "logart", "packed"
_MAX_HEADER = 2**25
_MAX_TENSORS = 2**16
_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint8,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip


class PackedFileError(UserError):
    """A file that is not a packed network that this version reads; the message names the file and what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may quote the file


@dataclass(frozen=True)
class PackedFile:
    """What a packed file says.

    Attributes:
        layers: by name, in the order of the network's modules.
        rest: every other tensor of the network's state.
        info: what is known of the network and its run, as JSON can say it.
    """

    layers: dict[str, PackedLayer]
    rest: dict[str, Tensor]
    info: dict[str, Any]

    @property
    def ranges(self) -> Ranges:
        """The ranges of the codebooks' integers, over all layers."""
        return column_ranges(layer.spec for layer in self.layers.values())

    def to_bytes(self) -> bytes:
        """The file's content.

        Raises:
            ValueError: info that JSON cannot say, or more than is read.
        """
        rest, ranges = _by_type(self.rest), self.ranges
        description = bytearray(zipped(self._description(rest, ranges)))
        parts = [torch.frombuffer(description, dtype=torch.uint8)]
        for layer in self.layers.values():
            parts += [layer.codes.cpu(), layer.spec.to_bytes(ranges)]
        for named in rest.values():
            parts += [tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in named.values()]
        # One entry, not several: safetensors writes them in no particular order.
        version = json.dumps({"version": VERSION}, separators=(",", ":"))
        data: bytes = safetensors.torch.save({_TENSOR: torch.cat(parts)}, metadata={_METADATA: version})
        return data

    def _description(self, rest: Mapping[str, Mapping[str, Tensor]], ranges: Ranges) -> str:
        layers = to_columns([{"name": name, **layer.entry(ranges)} for name, layer in self.layers.items()])
        report = _by_column(self.info.get("layers"), list(self.layers))
        content = {
            "layers": {key: values for key, values in layers.items() if any(value is not None for value in values)},
            "ranges": ranges,
            "rest": {dtype: {name: list(t.shape) for name, t in named.items()} for dtype, named in rest.items()},
            **({"report": report} if report else {}),
            "info": {key: value for key, value in self.info.items() if key != "layers" or not report},
        }
        try:
            text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII: names may be no UTF-8
        except (TypeError, ValueError) as error:
            raise ValueError(f"the file's info must be JSON: {one_line(error)}") from error
        most = {"layers": _MAX_TENSORS, "tensors": _MAX_TENSORS, "characters": MAX_TEXT}
        for what, count in zip(most, (len(self.layers), len(self.rest), len(text)), strict=True):
            if count > most[what]:
                raise ValueError(f"the file would describe {count} {what}; at most {most[what]} are read")
        return text

    def write(self, path: str | Path) -> int:
        """Write the file whole or not at all, in place of any that is there; its size in bytes.

        Raises:
            OSError: no room, no permission; what was there before is still there.
        """
        data = self.to_bytes()
        write_atomically(Path(path), data)
        return len(data)

    @classmethod
    def read(cls, path: str | Path) -> PackedFile:
        """Read and check a file.

        Raises:
            PackedFileError: it is not there, damaged, of another kind or of a newer version.
        """
        path = Path(path)
        try:
            if not path.is_file():
                raise PackedFileError("is a folder" if path.is_dir() else "does not exist")
            packed = ByteReader(_packed(_read(path)))
            with _naming("description"):
                content = _description(packed)
            layers = _layers(content, packed)
            rest = _rest(content["rest"], packed)
            info = _info(content, list(layers))
            if packed.left:
                raise PackedFileError(f"holds {packed.left} bytes that its description does not claim")
        except (PackedFileError, OSError, MemoryError) as error:
            raise PackedFileError(f"{path}: {one_line(error)}; expected a packed network (.safetensors)") from None
        return cls(layers, rest, info)


def _read(path: Path) -> bytes:
    """All bytes of a file; what is none of ours, or larger than it says, is not read whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            raise PackedFileError("is no safetensors file, or cut short")
        head = start + file.read(length)
        with _naming("header"):
            header = parsed(head[8:])
        _check_version(header.get("__metadata__"))
        ends = [entry["data_offsets"][1] for entry in header.values() if _has_offsets(entry)]
        if size != len(head) + max(ends, default=0):
            raise PackedFileError("is damaged: its size is not what its header says")
        return head + file.read()


def _has_offsets(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(place) is int for place in offsets)


def _check_version(metadata: Any) -> None:
    text = metadata.get(_METADATA) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise PackedFileError("is a safetensors file, but not one that LogART packed")
    with _naming("metadata"):
        version = parsed(text).get("version")
    if type(version) is not int or version < 1:
        raise PackedFileError(f"has metadata of another kind (version {version!r:.40})")
    if version > VERSION:
        raise PackedFileError(f"has format version {version}, and this LogART reads up to {VERSION}; update it")
    if version < VERSION:
        raise PackedFileError(f"has format version {version}, and this LogART reads {VERSION} alone; save it again")


def _description(packed: ByteReader) -> dict[str, Any]:
    """The checked outer form of the description, which is taken; ValueError where it is damaged."""
    text, size = unzipped(packed.peek(MAX_ZIPPED).numpy())
    packed.take(size)
    content = parsed(text)
    names = ("layers", "ranges", "rest", "info")
    if any(not isinstance(content.get(name), dict) for name in names):
        raise ValueError(f"it lacks one of {', '.join(names)}")
    return content


def _packed(data: bytes) -> Tensor:
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # damaged bytes make the reader raise almost anything
        raise PackedFileError(f"is damaged ({one_line(error):.120})") from None
    packed = tensors.pop(_TENSOR, None)
    if packed is None or packed.ndim != 1 or packed.dtype != torch.uint8 or tensors:
        raise PackedFileError(f"holds other tensors than {_TENSOR}, a row of bytes")
    return packed


def _layers(content: Mapping[str, Any], packed: ByteReader) -> dict[str, PackedLayer]:
    """The layers that are listed, each checked."""
    layers: dict[str, PackedLayer] = {}
    with _naming("list of layers"):
        names = content["layers"].get("name", [])
        count = len(names) if isinstance(names, list) else 0
        _check_count(count)
        entries = to_rows(content["layers"], count)
    with _naming("list of ranges"):
        ranges = read_ranges(content["ranges"])
    for entry in entries:
        name = entry["name"]
        if not isinstance(name, str) or name in layers:
            raise PackedFileError(f"lists a layer without a name, or twice ({name!r:.80})")
        with _naming(f"layer {name:.80}"):
            layers[name] = PackedLayer.from_entry(entry, ranges, packed)
    return layers


def _info(content: Mapping[str, Any], layers: list[str]) -> dict[str, Any]:
    """What is known, with the report of each layer back in its place."""
    info: dict[str, Any] = content["info"]
    if "report" not in content:
        return info
    with _naming("report"):
        return {**info, "layers": dict(zip(layers, to_rows(content["report"], len(layers)), strict=True))}


def _rest(shapes: Mapping[str, Any], packed: ByteReader) -> dict[str, Tensor]:
    """The tensors that are not quantized, by their own names."""
    rest: dict[str, Tensor] = {}
    _check_count(sum(len(named) for named in shapes.values() if isinstance(named, dict)))
    for dtype, named in shapes.items():
        if dtype not in _TYPES or not isinstance(named, dict):
            raise PackedFileError(f"has a damaged list of {dtype:.40}")
        for name, shape in named.items():
            with _naming(f"tensor {name:.80}"):
                if name in rest or not _is_shape(shape):
                    raise ValueError(f"shape {shape!r:.40}")
                data = packed.take(math.prod(shape) * _TYPES[dtype].itemsize)
                if dtype == "bool" and (data > 1).any():
                    raise ValueError("neither true nor false")
                rest[name] = data.view(_TYPES[dtype]).reshape(shape)
    return rest


def _is_shape(shape: Any) -> bool:
    sized = isinstance(shape, list) and len(shape) <= 16 and all(type(size) is int and size >= 0 for size in shape)
    return sized and math.prod(max(1, size) for size in shape) < 2**40


def _check_count(count: int) -> None:
    if count > _MAX_TENSORS:
        raise PackedFileError(f"lists {count} layers or tensors; at most {_MAX_TENSORS} are read")


@contextmanager
def _naming(part: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise PackedFileError(f"has a damaged {part} ({one_line(error):.160})") from None


def _by_type(rest: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by name by their type, as the file calls it; ValueError for a type that no file holds."""
    types: dict[str, dict[str, Tensor]] = {}
    for name, tensor in rest.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _TYPES:
            raise ValueError(f"{name} is {dtype}, which a packed file does not hold")
        types.setdefault(dtype, {})[name] = tensor
    return types


def _by_column(report: Any, layers: list[str]) -> dict[str, list[Any]]:
    """What is known of each layer, by column; empty where it is not of all layers in their order, or not alike."""
    rows = list(report.values()) if isinstance(report, dict) and list(report) == layers else []
    alike = all(isinstance(row, dict) and list(row) == list(rows[0]) for row in rows)
    return to_columns(rows) if alike else {}
