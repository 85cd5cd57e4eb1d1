"""The description of a packed file as text: strict JSON, tables by columns, compressed with known words."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from logart.errors import one_line
from logart.packed.words import WORDS

MAX_TEXT = 2**22  # characters; a few bytes can expand to any number
MAX_ZIPPED = 2 * MAX_TEXT


def zipped(text: str) -> bytes:
    """ASCII text, compressed by zlib with `packed_words` as its preset dictionary."""
    packer = zlib.compressobj(9, zdict=WORDS)
    return packer.compress(text.encode("ascii")) + packer.flush()


def unzipped(data: Any) -> tuple[bytes, int]:
    """The text at the start of some bytes, and how many of them it took.

    Raises:
        ValueError: damaged, or longer than `MAX_TEXT`.
    """
    unzip = zlib.decompressobj(zdict=WORDS)
    try:
        text = unzip.decompress(data, MAX_TEXT)
    except zlib.error as error:
        raise ValueError(one_line(error)) from None
    if not unzip.eof:
        raise ValueError(f"cut short, or more than {MAX_TEXT} characters")
    return text, len(data) - len(unzip.unused_data)


def parsed(text: bytes | str) -> dict[str, Any]:
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


def to_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows that have the same names, by column: a name is said once, and what stands below each other is alike."""
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def to_rows(columns: Any, count: int) -> list[dict[str, Any]]:
    """The inverse of `to_columns`; ValueError where something else than columns of `count` values is given."""
    if not isinstance(columns, dict):
        raise ValueError(f"no columns, but {columns!r:.40}")
    for name, column in columns.items():
        if not isinstance(column, list) or len(column) != count:
            raise ValueError(f"column {name:.40} is no list of {count}")
    return [{name: column[row] for name, column in columns.items()} for row in range(count)]
