"""results.csv: one header (`results_schema`), one row a run.

Rows are appended whole and under a lock, so that runs side by side can share one file. A file with a cut row
is refused, not repaired: a number cut to "9" still reads as a number, so only its owner can say what it was.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock

from logart.errors import UserError
from logart.files import real_place
from logart.runs.results_schema import NAMES, SETTINGS, Cell

RESULTS = "results.csv"  # unless --results says otherwise
LOCK_SECONDS = 60.0  # an append takes milliseconds: whoever holds the lock this long is stuck


def environment() -> dict[str, str]:
    """The columns that the surroundings decide: the time now and the versions ("" where not installed)."""
    packages = {"torch_version": "torch", "timm_version": "timm", "project_version": "logart"}
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"utc_time": now} | {column: _version(package) for column, package in packages.items()}


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
                _refuse_content(path)
        if not (there and lock_there):
            tempfile.TemporaryFile(dir=path.parent).close()


def read_lines(path: str | Path) -> list[tuple[int, list[str]]]:
    """Every row of a results file, whole or not, for those who only look; nothing is locked or made.

    A row that a quote left open runs into the next ones ends with its line, so that it takes no others with it.

    Returns:
        The line that each row begins at, and its cells: as many as `NAMES` has if it is whole, and UTF-8 text then.

    Raises:
        UserError: there is no such file, or it has another header.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise _user_error(f"{str(path)!r} is {'a folder' if path.is_dir() else 'not there'}; expected a CSV file")
        lines = list(io.StringIO(path.read_bytes().decode("utf-8", "surrogateescape"), newline=""))
    except OSError as error:
        raise _user_error(f"cannot read {str(path)!r}: {error.strerror or error}; pass another path") from None
    header, at = _cells(lines, 0)
    if lines and tuple(header) != NAMES:
        raise _user_error(f"{_difference(path, header)}; rename it or pass another path")
    rows = []
    while at < len(lines):
        cells, end = _cells(lines, at)
        if cells:
            rows.append((at + 1, cells))
        at = end if len(cells) == len(NAMES) else at + 1
    return rows


def _cells(lines: list[str], start: int) -> tuple[list[str], int]:
    """The row that begins at a line, and where it ends; of one that is no CSV or no text, its line as the one cell."""
    reader = csv.reader(lines[start:], strict=True)
    try:
        cells = next(reader, [])
        "".join(cells).encode("utf-8")
    except (csv.Error, UnicodeEncodeError):
        return lines[start : start + 1], start + 1
    return cells, start + reader.line_num


def append_row(path: str | Path, row: Mapping[str, Cell]) -> None:
    """Append one run to the results file, made with its header when it is new or empty.

    Args:
        path: the CSV file; its folder must exist.
        row: column name to value; columns that do not apply may be left out or None and stay empty.

    Raises:
        ValueError: the row has a column that the schema does not know.
        UserError: the file cannot be written, has another header or holds a cut row; nothing is written then.
    """
    unknown = sorted(set(row) - set(NAMES))
    if unknown:
        raise ValueError(f"results row has unknown columns {unknown}; the schema is logart.runs.results_schema.COLUMNS")
    path = real_place(path)
    with _named_errors(path):
        _refuse_place(path)
        with _locked(path):
            if _is_there(path):
                _refuse_content(path)
            _write_whole(path, _csv_line(row.get(name) for name in NAMES))


def row_digest(row: Mapping[str, Cell]) -> str:
    """What tells this very row, with its times, from every other: hex digits, the same before and after writing."""
    return hashlib.sha256(_csv_line(row.get(name) for name in NAMES)).hexdigest()[:32]


def holds_row(path: str | Path, digests: Collection[str]) -> bool:
    """Whether one of these rows is in a file; a file that is not there, or is none of ours, holds none of them.

    Args:
        path: the CSV file.
        digests: of the rows, as `row_digest` gives them.
    """
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return any(row_digest(dict(zip(NAMES, cells, strict=False))) in digests for cells in csv.reader(file))
    except (OSError, csv.Error):
        return False


@contextmanager
def locked_results(path: str | Path) -> Iterator[None]:
    """Keep every other process from appending; UserError as `append_row`, for errors of the body's files too."""
    path = real_place(path)
    with _named_errors(path):
        _refuse_place(path)
        with _locked(path):
            yield


def settings_line(row: Mapping[str, Cell]) -> bytes:
    """The cells of the columns in `SETTINGS` as the file would hold them; equal for equal settings only."""
    return _csv_line(row.get(name) for name in SETTINGS)


def recorded(path: str | Path, settings: Mapping[str, Cell]) -> str | None:
    """When a run of these settings was appended, its `utc_time`; None where the file has none.

    Args:
        path: the CSV file, or where it will be; to be called with `locked_results`.
        settings: as `append_row` would get them; columns left out are empty.

    Raises:
        UserError: the file has another header or holds a cut row.
    """
    path, line = real_place(path), settings_line(settings)
    if not _is_there(path):
        return None
    _refuse_content(path)
    with open(path, encoding="utf-8", newline="") as file:
        return next((row["utc_time"] for row in csv.DictReader(file) if settings_line(row) == line), None)


def _write_whole(path: Path, line: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        data = line if size else _csv_line(NAMES) + line
        try:
            if file.write(data) != len(data):
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


def _refuse_place(path: Path) -> None:
    # filelock would make the missing folder, and so hide a misspelt path.
    if not path.parent.is_dir():
        raise _user_error(f"no folder {str(path.parent)!r}; make it or pass another path")
    if path.is_dir() or (path.exists() and not path.is_file()):
        kind = "a folder" if path.is_dir() else "no regular file"
        raise _user_error(f"{str(path)!r} is {kind}; expected the path of a CSV file")


def _refuse_content(path: Path) -> None:
    """Raise UserError unless the file is empty or holds our header and whole rows only."""
    hint = "mend or delete that row, or pass another path"
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, None)
        except (csv.Error, UnicodeDecodeError):
            header = []
        if header is None:
            return
        if tuple(header) != NAMES:
            raise _user_error(f"{_difference(path, header)}; rename it or pass another path")
        try:
            whole = all(len(row) in (0, len(NAMES)) for row in rows)
        except (csv.Error, UnicodeDecodeError):
            whole = False
    if not whole:
        raise _user_error(f"{str(path)!r} has a cut row at line {rows.line_num}; {hint}")
    if not _ends_a_line(path):
        raise _user_error(f"{str(path)!r} has no line end after its last row, which may be cut; {hint}")


def _difference(path: Path, header: list[str]) -> str:
    for index, name in enumerate(NAMES):
        seen = header[index] if index < len(header) else ""
        if seen != name:
            return f"{str(path)!r} has another header: column {index + 1} is {seen[:40]!r}, expected {name!r}"
    return f"{str(path)!r} has another header: {len(header)} columns, expected {len(NAMES)}"


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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
