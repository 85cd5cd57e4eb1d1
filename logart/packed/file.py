"""The packed file: one safetensors file that holds a quantized network, and nothing that could be run.

Any reader of safetensors shows its tensors:

    LAYER.codes       uint8: the codes of the weight in its own order, n bits each (`grids.packing`)
    LAYER.INTEGER     one value per codebook: `top_half_step`, `n_base2`, ... (`grids.grid`), in the shortest type
    other names       everything else of the network's state, as PyTorch names it

One metadata entry, `logart`, is JSON, an object of

    version     of the format
    layers      by name, in the network's order: kind, shape, bits; dtype if not float32, terms of √2 if not 0
    info        what else is known of the network and its run

Reading checks all of it before anything is built on it: a file that is damaged, hostile or of another kind raises one
`PackedFileError`, and no size it claims is believed before bytes stand behind it. Equal networks give equal bytes.
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
from logart.packed.layer import PackedLayer

VERSION = 5
_METADATA = "logart"
_MAX_HEADER = 2**23  # bytes: names, shapes and metadata of some 50,000 tensors


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

    def to_bytes(self) -> bytes:
        """The file's content.

        Raises:
            ValueError: info that JSON cannot say, tensors that safetensors cannot hold, or more than is read.
        """
        tensors = {f"{name}.{part}": t for name, layer in self.layers.items() for part, t in layer.tensors().items()}
        twice = sorted(tensors.keys() & self.rest.keys())
        if twice:
            raise ValueError(f"the network's state has a tensor {twice[0]}, which is a packed layer's too")
        tensors |= self.rest
        content = {
            "version": VERSION,
            "layers": {name: layer.entry() for name, layer in self.layers.items()},
            "info": self.info,
        }
        try:
            text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII: names may be no UTF-8
        except (TypeError, ValueError) as error:
            raise ValueError(f"the file's info must be JSON: {one_line(error)}") from error
        try:
            # Copies: tensors that share memory are refused. One entry: several are written in no particular order.
            data: bytes = safetensors.torch.save(
                {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
                metadata={_METADATA: text},
            )
        except Exception as error:  # a sparse tensor, or a type that safetensors lacks
            raise ValueError(f"a tensor of the network's state cannot be saved: {one_line(error):.200}") from error
        if (length := int.from_bytes(data[:8], "little")) > _MAX_HEADER:
            raise ValueError(f"names and settings would take {length} bytes; at most {_MAX_HEADER} are read")
        return data

    def write(self, path: str | Path) -> int:
        """Write the file atomically, in place of any that is there; its size in bytes.

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
            PackedFileError: it is not there, damaged, of another kind or of another version of the format.
        """
        path = Path(path)
        try:
            if not path.is_file():
                raise PackedFileError("is a folder" if path.is_dir() else "does not exist")
            content, tensors = _read(path)
            layers, rest = _sorted_out(content["layers"], tensors)
        except (PackedFileError, OSError, MemoryError) as error:
            raise PackedFileError(f"{path}: {one_line(error)}; expected a packed network (.safetensors)") from None
        return cls(layers, rest, content["info"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata, its outer form checked, and all tensors; what is none of ours is not read whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            raise PackedFileError("is not a valid safetensors file (possibly truncated)")
        head = start + file.read(length)
        with _naming("header"):
            header = _parsed(head[8:])
        content = _content(header.get("__metadata__"))
        ends = [entry["data_offsets"][1] for entry in header.values() if _has_offsets(entry)]
        if size != len(head) + max(ends, default=0):
            raise PackedFileError("is damaged: its size is not what its header says")
        try:
            return content, safetensors.torch.load(head + file.read())
        except Exception as error:  # damaged bytes make the reader raise almost anything
            raise PackedFileError(f"is damaged ({one_line(error):.120})") from None


def _has_offsets(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(place) is int for place in offsets)


def _content(metadata: Any) -> dict[str, Any]:
    text = metadata.get(_METADATA) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise PackedFileError("is a safetensors file, but not one that LogART packed")
    with _naming("metadata"):
        content = _parsed(text)
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise PackedFileError(f"has metadata of another kind (version {version!r:.40})")
    if version != VERSION:
        what = "update LogART" if version > VERSION else "save the network again"
        raise PackedFileError(f"has format version {version}, and this LogART reads version {VERSION}; {what}")
    shapes = {name: type(value) for name, value in content.items()}
    if shapes != {"version": int, "layers": dict, "info": dict}:
        raise PackedFileError("has damaged metadata (expected a version and the objects layers and info, nothing else)")
    return content


def _sorted_out(
    entries: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, PackedLayer], dict[str, Tensor]]:
    """The layers that are listed, each checked, and the tensors of no layer."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in entries}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        if owner in parts and part != "bias":
            parts[owner][part] = tensor
        elif tensor.dtype == torch.bool and (tensor.view(torch.uint8) > 1).any():
            raise PackedFileError(f"has a damaged tensor {name:.80} (neither true nor false)")
        else:
            rest[name] = tensor
    layers = {}
    for name, entry in entries.items():
        with _naming(f"layer {name:.80}"):
            layers[name] = PackedLayer.from_entry(entry, parts[name])
    return layers, rest


@contextmanager
def _naming(part: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise PackedFileError(f"has a damaged {part} ({one_line(error):.160})") from None


def _parsed(text: bytes | str) -> dict[str, Any]:
    """A JSON object, in which no name appears twice and every number is one; ValueError for anything else."""

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
    except RecursionError as error:
        raise ValueError(one_line(error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"no object, but {value!r:.40}")
    return value
