"""The packed file: one safetensors file that holds a quantized network, and nothing that could be run.

Tensors, all of them uint8 but the last:

    codes:LAYER      [bytes]         the codes of a layer's weight, row by row (`packing`)
    codebook:LAYER   [C, width]      the integers of its codebooks (`spec`)
    NAME             as it is        every parameter and buffer that is not quantized, by its name in the network

One metadata entry, `logart`, is JSON: the format's name and version, a list of the layers (name, kind, shape, bits;
dtype, terms of √2 and columns of the codebook where they are not the usual ones) and `info`, what is known of the
network and its run. Reading checks all of it before anything is built on it: a file that is damaged, hostile or of
another kind raises one `PackedFileError`, and no size it claims is believed before bytes stand behind it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from logart.grid import MAX_BITS, MIN_BITS
from logart.packing import packed_bytes, unpack
from logart.runtime import UserError, write_whole
from logart.spec import LOG_COLUMNS, CodebookSpec, expand
from logart.weights import one_line

FORMAT, VERSION = "logart-packed", 1
KINDS = {"Conv2d": 4, "Linear": 2, "Conv2dSame": 4}  # class of the float layer: dimensions of its weight
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
_USUAL = {"dtype": "float32", "terms": 0, "columns": list(LOG_COLUMNS[:3])}  # what an entry need not say
_METADATA = "logart"
_CODES, _CODEBOOK = "codes:", "codebook:"
_MAX_HEADER = 2**25


class PackedFileError(UserError):
    """A file that is not a packed network that this version reads; the message names the file and what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else "�" for c in message))  # it may quote the file


@dataclass(frozen=True)
class PackedLayer:
    """A quantized layer as the file holds it.

    Attributes:
        kind: the class of the float layer, one of `KINDS`.
        shape: the weight's.
        n_bits: of a code.
        dtype: of the weight.
        codes: [bytes] uint8.
        spec: of the codebooks, which share the weight's rows evenly, in order.
    """

    kind: str
    shape: torch.Size
    n_bits: int
    dtype: torch.dtype
    codes: Tensor
    spec: CodebookSpec

    def unpacked(self) -> Tensor:
        """The codes [*shape] uint8."""
        return unpack(self.codes, self.n_bits, self.shape.numel()).reshape(self.shape)

    def weight(self) -> Tensor:
        """The weight that the codes stand for."""
        return expand(self.codes, self.spec, self.shape, self.n_bits, self.dtype)

    @property
    def n_bytes(self) -> tuple[int, int]:
        """Of the codes and of the codebooks."""
        return self.codes.numel(), self.spec.to_bytes().numel()


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
            ValueError: a name that the format keeps for itself, or info that JSON cannot say.
        """
        tensors = {}
        for name, tensor in self.rest.items():
            if name.startswith((_CODES, _CODEBOOK)):
                raise ValueError(f"a parameter cannot be called {name}")
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        entries = []
        for name, layer in self.layers.items():
            tensors[_CODES + name] = layer.codes.cpu()
            tensors[_CODEBOOK + name] = layer.spec.to_bytes()
            entry = {
                "name": name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "bits": layer.n_bits,
                "dtype": str(layer.dtype).removeprefix("torch."),
                "terms": layer.spec.terms,
                "columns": list(layer.spec.columns),
            }
            entries.append({key: value for key, value in entry.items() if _USUAL.get(key) != value})
        content = {"format": FORMAT, "version": VERSION, "layers": entries, "info": self.info}
        try:
            text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII: names may be no UTF-8
        except (TypeError, ValueError) as error:
            raise ValueError(f"the file's info must be JSON: {one_line(error)}") from error
        # One entry, not several: safetensors writes them in no particular order, and equal networks give equal files.
        data: bytes = safetensors.torch.save(tensors, metadata={_METADATA: text})
        _metadata(data[: 8 + _header_length(data[:8])])  # what is written can be read
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
            content, data = _read(path)
            tensors = _tensors(data)
            layers = _layers(content["layers"], tensors)
        except (PackedFileError, OSError, MemoryError) as error:
            raise PackedFileError(f"{path}: {one_line(error)}; expected a packed network (.safetensors)") from None
        return cls(layers, tensors, content["info"])


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The metadata and all bytes of a file; what is none of ours, or larger than it says, is not read whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = _header_length(start)
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            raise PackedFileError("is no safetensors file, or cut short")
        head = start + file.read(length)
        content = _metadata(head)
        ends = [entry["data_offsets"][1] for entry in _json(head[8:], "header").values() if _has_offsets(entry)]
        if size != len(head) + max(ends, default=0):
            raise PackedFileError("is damaged: its size is not what its header says")
        return content, head + file.read()


def _header_length(start: bytes) -> int:
    return int.from_bytes(start, "little")


def _has_offsets(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(place) is int for place in offsets)


def _metadata(head: bytes) -> dict[str, Any]:
    """The checked outer form of the JSON; ours is read here because safetensors lets a name appear twice."""
    if len(head) > _MAX_HEADER:
        raise PackedFileError("has a header larger than is read")
    header = _json(head[8:], "header")
    metadata = header.get("__metadata__")
    text = metadata.get(_METADATA) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise PackedFileError("is a safetensors file, but not one that LogART packed")
    content = _json(text, "metadata")
    version = content.get("version")
    if content.get("format") != FORMAT or type(version) is not int or version < 1:
        raise PackedFileError(f"has metadata of another kind (format {content.get('format')!r:.40})")
    if version > VERSION:
        raise PackedFileError(f"has format version {version}, and this LogART reads up to {VERSION}; update it")
    if not isinstance(content.get("layers"), list) or not isinstance(content.get("info"), dict):
        raise PackedFileError("lacks its list of layers or its info")
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


def _layers(entries: list[Any], tensors: dict[str, Tensor]) -> dict[str, PackedLayer]:
    """The layers of the list, each checked; their tensors are taken out of `tensors`."""
    layers: dict[str, PackedLayer] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in layers:
            raise PackedFileError(f"lists a layer without a name, or twice ({name!r:.80})")
        try:
            layers[name] = _layer(
                {**_USUAL, **entry}, tensors.pop(_CODES + name, None), tensors.pop(_CODEBOOK + name, None)
            )
        except ValueError as error:
            raise PackedFileError(f"has a damaged layer {name:.80} ({one_line(error):.160})") from None
    stray = [name for name in tensors if name.startswith((_CODES, _CODEBOOK))]
    if stray:
        raise PackedFileError(f"holds {stray[0]:.80}, which no layer in its list claims")
    return layers


def _layer(entry: Mapping[str, Any], codes: Tensor | None, codebook: Tensor | None) -> PackedLayer:
    if codes is None or codebook is None:
        raise ValueError("its tensors are missing")
    kind, shape, n_bits = entry.get("kind"), entry.get("shape"), entry.get("bits")
    dtype, terms, columns = entry.get("dtype"), entry.get("terms"), entry.get("columns")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind {kind!r:.40}")
    if not isinstance(shape, list) or len(shape) != KINDS[kind] or not all(_positive(size) for size in shape):
        raise ValueError(f"shape {shape!r:.40}")
    if type(n_bits) is not int or not MIN_BITS <= n_bits <= MAX_BITS:
        raise ValueError(f"bits {n_bits!r:.40}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.40}")
    if type(terms) is not int or terms not in (0, 2, 3, 4):
        raise ValueError(f"terms {terms!r:.40}")
    if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
        raise ValueError(f"columns {columns!r:.40}")
    count = math.prod(shape)
    if codes.dtype != torch.uint8 or codes.shape != (packed_bytes(count, n_bits),):
        raise ValueError(f"{count} codes of {n_bits} bits cannot be {codes.dtype} {list(codes.shape)}")
    if count * n_bits % 8 and int(codes[-1]) >> count * n_bits % 8:
        raise ValueError("bits after the last code")
    spec = CodebookSpec.from_bytes(codebook, columns, terms, n_bits, DTYPES[dtype])
    if not spec.channels or shape[0] % spec.channels:
        raise ValueError(f"{spec.channels} codebooks for {shape[0]} rows")
    return PackedLayer(kind, torch.Size(shape), n_bits, DTYPES[dtype], codes, spec)


def _positive(size: Any) -> bool:
    return type(size) is int and 0 < size < 2**40
