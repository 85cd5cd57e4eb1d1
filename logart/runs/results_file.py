"""results.csv: where rows are read and appended; one header (`columns`), one row a run.

Rows are appended whole and under a lock, so that runs side by side can share one file. A file with a cut row
is refused, not repaired: a number cut to "9" still reads as a number, so only its owner can say what it was.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from logart.errors import UserError
from logart.files import real_place, write_atomically
from logart.runs.columns import NAMES, SETTINGS, Cell

RESULTS = "results.csv"  # unless --results says otherwise
LOCK_SECONDS = 60.0  # an append takes milliseconds: whoever holds the lock this long is stuck
REQUIRED = ("utc_time", "track", "arch", "bits", "Acc@1")  # columns of every version


class Table(NamedTuple):
    """A results file: its header, and of every row the line that it begins at and its cells; of a damaged row, any."""

    header: list[str]
    rows: list[tuple[int, list[str]]]


def settings_id(row: Mapping[str, Cell]) -> str:
    """What tells settings from others: hex digits, of the cells of `SETTINGS` that are not empty."""
    cells = [[name, text] for name in SETTINGS if (text := _text(row.get(name)))]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]


def new_run_id(row: Mapping[str, Cell]) -> str:
    """A `run_id` for a run of these settings, unlike that of any other run."""
    return f"{settings_id(row)}-{uuid.uuid4().hex[:8]}"


def check_results(path: str | Path) -> None:
    """Find out before long work whether `append_row` will be able to write; changes nothing on disk.

    Raises:
        UserError: as `append_row`.
    """
    path = real_place(path)
    with _named_errors(path):
        _refuse_place(path)
        there, lock_there = _is_there(path), _is_there(_lock_path(path))
        # A writer makes the lock file before it writes: where there is none, no row can be half-way.
        with _locked(path) if lock_there else nullcontext():
            if there:
                os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
                _whole(path)
        if not (there and lock_there):
            tempfile.TemporaryFile(dir=path.parent).close()


def read_table(path: str | Path) -> Table:
    """Read a results file of this version or another, damaged rows too; nothing is locked or made.

    A row that a quote left open runs into the next ones ends with its line, so that it takes no others with it.

    Returns:
        The table; a row is whole where it has as many cells as the header, and UTF-8 text then.

    Raises:
        UserError: there is no such file, or it lacks a column that every version has.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise _user_error(f"{str(path)!r} is {'a folder' if path.is_dir() else 'not there'}; expected a CSV file")
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise _user_error(f"cannot read {str(path)!r}: {error.strerror or error}; pass another path") from None
    lines = list(io.StringIO(text, newline=""))
    header, at = _cells(lines, 0)
    lacking = [name for name in REQUIRED if name not in header] if lines else []
    if lacking or len(set(header)) < len(header):
        problem = f"has no column {lacking[0]!r}" if lacking else "has two columns of one name"
        raise _user_error(f"{str(path)!r} {problem}; expected a results file; rename it or pass another path")
    rows = []
    while at < len(lines):
        cells, end = _cells(lines, at)
        if cells:
            rows.append((at + 1, cells))
        at = end if len(cells) == len(header) else at + 1
    return Table(header, rows)


def _cells(lines: list[str], start: int) -> tuple[list[str], int]:
    """The row that begins at a line, and where it ends; of one that is no CSV or no text, its line as the one cell."""
    reader = csv.reader((lines[at] for at in range(start, len(lines))), strict=True)
    try:
        cells = next(reader, [])
        "".join(cells).encode("utf-8")
    except (csv.Error, UnicodeEncodeError):
        return lines[start : start + 1], start + 1
    return cells, start + reader.line_num


def append_row(path: str | Path, row: Mapping[str, Cell]) -> bool:
    """Append one run to the results file, unless its row is there.

    A new or empty file gets the header; a file of an older version, in one atomic step with the row, the columns that
    it lacks.

    Args:
        path: the CSV file; its folder must exist.
        row: column name to value; columns that do not apply may be left out or None and stay empty.

    Returns:
        False where the file has a row of this `run_id` already, and is left as it is.

    Raises:
        KeyError: the row has a column that `columns.COLUMNS` lacks.
        UserError: the file cannot be written, is no results file or holds a cut row; nothing is written then.
    """
    unknown = sorted(set(row) - set(NAMES))
    if unknown:
        raise KeyError(f"results row has unknown columns {unknown}; the list of columns is logart.runs.columns")
    path = real_place(path)
    with _named_errors(path):
        _refuse_place(path)
        with _locked(path):
            table = _whole(path)
            if any(there.get("run_id") == row.get("run_id", "") != "" for there in _named(table)):
                return False
            header = [*table.header, *(name for name in NAMES if name not in table.header)]
            line = _csv_line(row.get(name) for name in header)
            if header == table.header:
                _append(path, line)
            else:
                empty = [""] * (len(header) - len(table.header))
                write_atomically(path, b"".join(map(_csv_line, [header, *(c + empty for _, c in table.rows)])) + line)
    return True


def recorded(path: str | Path, run_id: str) -> str | None:
    """When another run of the same settings was appended, its `utc_time`; None where the file has none.

    Args:
        path: the CSV file, or where it will be; to be called with `locked_results`.
        run_id: of the run that asks; a row of its own, before it was interrupted, is no reason not to end it.

    Raises:
        UserError: the file is no results file or holds a cut row.
    """
    settings = run_id.partition("-")[0]
    for row in _named(_whole(real_place(path))):
        # A row of a version without `run_id` is known by its cells.
        there = row.get("run_id") or settings_id(row)
        if there.partition("-")[0] == settings and there != run_id:
            return row["utc_time"]
    return None


@contextmanager
def locked_results(path: str | Path) -> Iterator[None]:
    """Keep every other process from appending; UserError as `append_row`, for errors of the body's files too."""
    path = real_place(path)
    with _named_errors(path):
        _refuse_place(path)
        with _locked(path):
            yield


def _whole(path: Path) -> Table:
    """The table of a file that may be appended to; an empty one where there is none yet.

    Raises:
        UserError: it is no results file, or a row may be cut.
    """
    if not _is_there(path) or not path.stat().st_size:
        return Table([], [])
    table = read_table(path)
    hint = "correct or delete that row, or pass another path"
    for line, cells in table.rows:
        if len(cells) != len(table.header):
            raise _user_error(f"{str(path)!r} has a cut row at line {line}; {hint}")
    if not _ends_a_line(path):
        raise _user_error(f"{str(path)!r} has no line end after its last row, which may be cut; {hint}")
    return table


def _named(table: Table) -> Iterator[dict[str, str]]:
    return (dict(zip(table.header, cells, strict=True)) for _, cells in table.rows)


def _append(path: Path, line: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)  # a full disk takes part of a row
            raise


def _csv_line(cells: Iterable[Cell]) -> bytes:
    text = io.StringIO()
    # Older csv modules quote a line break in a value only where the terminator has it; a row ends in "\n".
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return (text.getvalue().removesuffix("\r\n") + "\n").encode("utf-8", "backslashreplace")


def _text(cell: Cell) -> str:
    """A cell as the file gives it back."""
    return "" if cell is None else str(cell).encode("utf-8", "backslashreplace").decode()


def _refuse_place(path: Path) -> None:
    # filelock would make the missing folder, and so hide a misspelt path.
    if not path.parent.is_dir():
        raise _user_error(f"no folder {str(path.parent)!r}; make it or pass another path")
    if path.is_dir() or (path.exists() and not path.is_file()):
        kind = "a folder" if path.is_dir() else "no regular file"
        raise _user_error(f"{str(path)!r} is {kind}; expected the path of a CSV file")


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _is_there(path: Path) -> bool:
    # Path.exists() hides, on some versions of Python, a name that is too long to be written later.
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _locked(path: Path) -> AbstractContextManager[object]:
    return FileLock(_lock_path(path)).acquire(timeout=LOCK_SECONDS, poll_interval=0.01)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise _user_error(f"cannot write {str(path)!r}: {reason}; pass another path") from None


def _user_error(message: str) -> UserError:
    return UserError(f"--results: {message}")
