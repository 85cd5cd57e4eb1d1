"""A run's folder (`--run_dir`): all that a run has come to, so that none of it is lost and `--resume` goes on with it.

    run.json              the flags given and where, and what decides the codes: settings, network, data, versions
    calibration.txt       the names of the calibration images
    log.txt               what was printed, and warnings
    accuracies.json       of each stage that was measured
    blocks/STAGE-N        the state of each block that a stage is through with (`state`)
    packed.safetensors    the quantized network
    report.json           the results row, and what became of each layer and block
    row-DIGEST            while a row is being appended: which, and the results file

Every file is written whole or not at all.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from logart.errors import UserError
from logart.files import write_atomically
from logart.networks.evaluate import Accuracy
from logart.packed.block_state import load_state, save_state
from logart.packed.file import PackedFileError
from logart.quantization.layer_report import Report
from logart.quantization.layers import QuantizedLayer
from logart.quantization.state import StageResult, StageStore
from logart.runs.results import holds_row, row_digest
from logart.runs.results_schema import Cell

FORMAT = 1
RUN, REPORT, ACCURACIES, PACKED = "run.json", "report.json", "accuracies.json", "packed.safetensors"
ROW = "row-"


@dataclass
class RunFolder(StageStore):
    """A run's folder, locked by this process.

    Attributes:
        path: the folder.
        started: `time.perf_counter()` when the command began.
        earlier: seconds that the run took before it was interrupted.
        accuracies: of the stages that were measured, in this process or earlier.
    """

    path: Path
    started: float
    earlier: float = 0.0
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    _full: bool = False
    _log: TextIO = field(default_factory=io.StringIO)

    def restore(self, stage: str, index: int, layers: Mapping[str, QuantizedLayer]) -> StageResult | None:
        """See `StageStore`; a state that cannot be read is worked out again."""
        path = self._state(stage, index)
        if not path.exists():
            return None
        try:
            return load_state(path, layers)
        except PackedFileError as error:
            self.warn(f"{error}; the block is worked out again")
            return None

    def save(self, stage: str, index: int, layers: Mapping[str, QuantizedLayer], done: StageResult) -> None:
        """See `StageStore`; where there is no room, the run goes on without."""
        with self._room():
            save_state(self._state(stage, index), layers, done)
            self._write_json(ACCURACIES, self._progress())

    def measured(self, stage: str, value: Accuracy) -> None:
        """Keep an accuracy."""
        self.accuracies[stage] = value
        with self._room():
            self._write_json(ACCURACIES, self._progress())

    def finish(self, report: Report, row: Mapping[str, Cell], recorded: str | None) -> None:
        """Keep the report and the results row, and in which file the row is by now; OSError where that fails."""
        content = {"format": FORMAT, "recorded": recorded, "row": dict(row)} | asdict(report)
        write_atomically(self.path / REPORT, as_json(content))
        if recorded is not None:
            for note in self._announced():
                with suppress(OSError):  # it says nothing any more
                    note.unlink()

    def announce(self, row: Mapping[str, Cell], results: str) -> None:
        """Note that this row is about to be appended there, so that a resumed run can look whether it was.

        The note's name alone tells the row: a full disk still takes an empty file. OSError where not even that.
        """
        with open(self.path / f"{ROW}{row_digest(row)}", "wb") as file:
            with suppress(OSError):
                file.write(os.fsencode(os.path.abspath(results)))
                file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):  # Windows opens no folder
            folder = os.open(self.path, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def recorded_in(self, results: str) -> str | None:
        """The results file that has a row of this run already, this one or where one was to go; else None."""
        for note in self._announced():
            there = ""
            with suppress(OSError):
                there = os.fsdecode(note.read_bytes())
            for path in filter(None, (there, results)):
                if holds_row(path, (note.name.removeprefix(ROW),)):
                    return path
        return None

    def _announced(self) -> list[Path]:
        return sorted(self.path.glob(f"{ROW}*"))

    def warn(self, message: str) -> None:
        """See `StageStore`; the log has it too."""
        super().warn(message)
        self._note(message)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Keep what is printed in the log; a log that cannot be written stops nothing."""
        with self._room():
            self._log = open(self.path / "log.txt", "a", encoding="utf-8", errors="backslashreplace")
        try:
            with redirect_stdout(_Both(sys.stdout, self._log)):  # type: ignore[type-var]
                yield
        except UserError as error:
            self._note(str(error))
            raise
        finally:
            with suppress(OSError):  # of a full disk
                self._log.close()

    def _note(self, line: str) -> None:
        with suppress(OSError):
            print(line, file=self._log, flush=True)

    @property
    def seconds(self) -> float:
        """Of the whole run so far, interruptions not counted."""
        return self.earlier + time.perf_counter() - self.started

    def _state(self, stage: str, index: int) -> Path:
        return self.path / "blocks" / f"{stage}-{index:04d}.safetensors"

    def _progress(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "accuracies": {k: v._asdict() for k, v in self.accuracies.items()}}

    def _write_json(self, name: str, content: Any) -> None:
        write_atomically(self.path / name, as_json(content))

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._full:
                message = f"--run_dir: cannot write to {self.path} ({error.strerror})"
                self.warn(f"{message}; the run goes on, but cannot be resumed")
            self._full = True


def read_entries(path: Path, folder: str, **entries: type) -> dict[str, Any]:
    """A file of a run's folder that holds entries of these types; UserError where it is not there, or holds others."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format {content['format']}")
        for name, kind in entries.items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"no {name}")
        return content  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise UserError(f"--resume: {folder} holds no run ({path.name} is missing); expected a --run_dir") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--resume: cannot read {path} ({' '.join(str(error).split())})") from error


def as_json(content: Any) -> bytes:
    """What a file of a run's folder holds."""
    return (json.dumps(content, indent=1) + "\n").encode("ascii")


class _Both:
    """A stream whose text also goes to a log; a log that cannot be written is left alone."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._log.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._log.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
