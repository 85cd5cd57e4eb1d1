"""The packed file: one safetensors file that holds a quantized network, and nothing that could be run.

Few tensors, because every name costs bytes that small networks feel; all are one-dimensional:

    codes        uint8   the codes of the layers' weights (`packing`), layer after layer, each begun on a byte
    codebooks    uint8   the integers of their codebooks, row by row (`spec`), layer after layer
    DTYPE        itself  every parameter and buffer of that type (`float32`, say) that is not quantized, end to end
    description  uint8   JSON, ASCII, compressed by zlib with `packed_words` as its preset dictionary

The description is an object of `layers`, a list in the order of codes and codebooks (name, kind, shape, bits; dtype,
number of codebooks, terms of √2 and columns of the codebook where they are not the usual ones), `rest`, shapes by name
by DTYPE in the order of the elements, and `info`, what is known of the network and its run. One metadata entry,
`logart`, is JSON too: the format's name and version.

Reading checks all of it before anything is built on it: a file that is damaged, hostile or of another kind raises one
`PackedFileError`, and no size it claims is believed before bytes stand behind it. Equal networks give equal bytes as
long as zlib, which has several makers, packs equal texts alike.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from logart.errors import UserError
from logart.packed_layer import Flat, PackedLayer
from logart.packed_words import WORDS
from logart.runtime import write_whole
from logart.weights import one_line

FORMAT, VERSION = "logart-packed", 3
_METADATA = "logart"
_MAX_HEADER = 2**25
_MAX_TEXT = 2**22  # of a description; a few bytes can expand to any size
_MAX_TENSORS = 2**16


class PackedFileError(UserError):
    """A file that is not a packed network that this version reads; the message names the file and what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else "�" for c in message))  # it may quote the file


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

    def to_bytes(self) -> bytes:
        """The file's content.

        Raises:
            ValueError: info that JSON cannot say, or more than is read.
        """
        rest = _by_type(self.rest)
        tensors = {
            "codes": _joined(layer.codes for layer in self.layers.values()),
            "codebooks": _joined(layer.spec.to_bytes() for layer in self.layers.values()),
            **{dtype: _joined(named.values(), getattr(torch, dtype)) for dtype, named in rest.items()},
        }
        content = {
            "layers": [{"name": name, **layer.entry()} for name, layer in self.layers.items()],
            "rest": {dtype: {name: list(t.shape) for name, t in named.items()} for dtype, named in rest.items()},
            "info": self.info,
        }
        try:
            text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII: names may be no UTF-8
        except (TypeError, ValueError) as error:
            raise ValueError(f"the file's info must be JSON: {one_line(error)}") from error
        most = {"layers": _MAX_TENSORS, "tensors": _MAX_TENSORS, "characters": _MAX_TEXT}
        for what, count in zip(most, (len(self.layers), len(self.rest), len(text)), strict=True):
            if count > most[what]:
                raise ValueError(f"the file would describe {count} {what}; at most {most[what]} are read")
        zipped = zlib.compressobj(9, zdict=WORDS)
        described = bytearray(zipped.compress(text.encode()) + zipped.flush())
        tensors["description"] = torch.frombuffer(described, dtype=torch.uint8)
        # One entry, not several: safetensors writes them in no particular order.
        version = json.dumps({"format": FORMAT, "version": VERSION}, separators=(",", ":"))
        data: bytes = safetensors.torch.save(tensors, metadata={_METADATA: version})
        return data

    def write(self, path: str | Path) -> int:
        """Write the file whole or not at all, in place of any that is there; its size in bytes.

        Raises:
            OSError: no room, no permission; what was there before is still there.
        """
        data = self.to_bytes()
        write_whole(Path(path), data)
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
            tensors = _tensors(_read(path))
            content = _description(tensors.pop("description", None))
            layers = _layers(content["layers"], tensors.pop("codes", None), tensors.pop("codebooks", None))
            rest = _rest(content["rest"], tensors)
        except (PackedFileError, OSError, MemoryError) as error:
            raise PackedFileError(f"{path}: {one_line(error)}; expected a packed network (.safetensors)") from None
        return cls(layers, rest, content["info"])


def _read(path: Path) -> bytes:
    """All bytes of a file; what is none of ours, or larger than it says, is not read whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            raise PackedFileError("is no safetensors file, or cut short")
        head = start + file.read(length)
        header = _json(head[8:], "header")
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
    content = _json(text, "metadata")
    version = content.get("version")
    if content.get("format") != FORMAT or type(version) is not int or version < 1:
        raise PackedFileError(f"has metadata of another kind (format {content.get('format')!r:.40})")
    if version > VERSION:
        raise PackedFileError(f"has format version {version}, and this LogART reads up to {VERSION}; update it")
    if version < VERSION:
        raise PackedFileError(f"has format version {version}, and this LogART reads {VERSION} alone; save it again")


def _description(packed: Tensor | None) -> dict[str, Any]:
    """The checked outer form of the description."""
    try:
        flat = Flat(packed, torch.uint8)
        unzip = zlib.decompressobj(zdict=WORDS)
        text = unzip.decompress(flat.take(flat.left).numpy().tobytes(), _MAX_TEXT)
    except (ValueError, zlib.error) as error:
        raise PackedFileError(f"has a damaged description ({one_line(error):.80})") from None
    if not unzip.eof or unzip.unused_data:
        raise PackedFileError(f"has a damaged description, or one of more than {_MAX_TEXT} characters")
    content = _json(text, "description")
    if [type(content.get(name)) for name in ("layers", "rest", "info")] != [list, dict, dict]:
        raise PackedFileError("lacks its list of layers, its other tensors or its info")
    return content


def _json(text: bytes | str, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name appears twice")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text:.20} is out of range")
        return value

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"has a damaged {what} ({one_line(error):.80})") from None
    if not isinstance(value, dict):
        raise PackedFileError(f"has a damaged {what}")
    return value


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # damaged bytes make the reader raise almost anything
        raise PackedFileError(f"is damaged ({one_line(error):.120})") from None


def _layers(entries: list[Any], codes: Tensor | None, codebooks: Tensor | None) -> dict[str, PackedLayer]:
    """The layers of the list, each checked."""
    layers: dict[str, PackedLayer] = {}
    _check_count(len(entries))
    with _naming("codes or codebooks"):
        parts = [Flat(tensor, torch.uint8) for tensor in (codes, codebooks)]
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in layers:
            raise PackedFileError(f"lists a layer without a name, or twice ({name!r:.80})")
        with _naming(f"layer {name:.80}"):
            layers[name] = PackedLayer.from_entry(entry, *parts)
    if any(part.left for part in parts):
        raise PackedFileError("holds codes or codebooks that no layer in its list claims")
    return layers


def _rest(shapes: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are not quantized, by their own names; they are cut out of `tensors`, one of each type."""
    rest: dict[str, Tensor] = {}
    _check_count(sum(len(named) for named in shapes.values() if isinstance(named, dict)))
    for dtype, named in shapes.items():
        with _naming(f"list of {dtype:.40}"):
            tensor = tensors.pop(dtype, None)
            if tensor is None or str(tensor.dtype) != f"torch.{dtype}" or not isinstance(named, dict):
                raise ValueError("there are none")
            flat = Flat(tensor, tensor.dtype)
        for name, shape in named.items():
            with _naming(f"tensor {name:.80}"):
                if name in rest or not _is_shape(shape):
                    raise ValueError(f"shape {shape!r:.40}")
                rest[name] = flat.take(math.prod(shape)).reshape(shape)
        if flat.left:
            raise PackedFileError(f"holds {flat.left} elements of {dtype:.40} without a name")
    if tensors:
        raise PackedFileError(f"holds {next(iter(tensors)):.80}, which its description does not list")
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


def _joined(tensors: Iterable[Tensor], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(tensor.detach().cpu().reshape(-1) for tensor in tensors)])


def _by_type(rest: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by name by their type, as the file calls it."""
    types: dict[str, dict[str, Tensor]] = {}
    for name, tensor in rest.items():
        types.setdefault(str(tensor.dtype).removeprefix("torch."), {})[name] = tensor
    return types
