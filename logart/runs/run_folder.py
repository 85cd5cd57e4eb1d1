"""A run's folder (`--run_dir`): all that a run has come to, so that none of it is lost and `--resume` goes on from it.

    run.json              the flags given, the settings' cells and `run_id` of its row, and the fingerprint of what
                          decides the codes
    calibration.txt       the names of the calibration images
    log.txt               what was printed, and warnings
    accuracies.json       of each stage that was measured
    blocks/STAGE-N        the state of each block that a stage is through with (`block_state`)
    packed.safetensors    the quantized network
    report.json           the results row, and what became of each layer and block; written last

Every file but the log is written atomically.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from logart.errors import UserError, one_line
from logart.files import write_atomically
from logart.networks.evaluate import Accuracy
from logart.packed.block_state import load_state, save_state
from logart.packed.file import PackedFileError
from logart.quantization.layer_report import Report
from logart.quantization.state import StageResult, StageStore, Stored
from logart.runs.columns import Cell

FORMAT = 2
RUN, REPORT, ACCURACIES, PACKED = "run.json", "report.json", "accuracies.json", "packed.safetensors"
BITS = "bits.json"  # of each layer, where a budget decided


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

    def bits(self, allocate: Callable[[], dict[str, int]]) -> dict[str, int]:
        """See `StageStore`."""
        path = self.path / BITS
        if path.exists():
            kept: dict[str, int] = read_json(path)["bits"]
            return kept
        bits = allocate()
        with self._room():
            write_json(path, {"bits": bits})
        return bits

    def restore(self, stage: str, index: int, own: Mapping[str, Stored]) -> StageResult | None:
        """See `StageStore`; a state that cannot be read is recomputed."""
        path = self._state(stage, index)
        if not path.exists():
            return None
        try:
            return load_state(path, own)
        except PackedFileError as error:
            self.warn(f"{error}; the block is recomputed")
            return None

    def save(self, stage: str, index: int, own: Mapping[str, Stored], done: StageResult) -> None:
        """See `StageStore`; where there is no room, the run goes on without."""
        with self._room():
            save_state(self._state(stage, index), own, done)
            self._write_progress()

    def measured(self, stage: str, value: Accuracy) -> None:
        """Keep an accuracy."""
        self.accuracies[stage] = value
        with self._room():
            self._write_progress()

    def finish(self, report: Report, row: Mapping[str, Cell]) -> None:
        """Keep the report and the results row, which is in its file: the run is finished. OSError where that fails."""
        write_json(self.path / REPORT, {"row": dict(row)} | asdict(report))

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

    def _write_progress(self) -> None:
        accuracies = {stage: value._asdict() for stage, value in self.accuracies.items()}
        write_json(self.path / ACCURACIES, {"seconds": self.seconds, "accuracies": accuracies})

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._full:
                message = f"--run_dir: cannot write to {self.path} ({error.strerror})"
                self.warn(f"{message}; the run goes on, but cannot be resumed")
            self._full = True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of a run's folder."""
    write_atomically(path, (json.dumps({"format": FORMAT, **content}, indent=1) + "\n").encode("ascii"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a run's folder.

    Raises:
        UserError: it is not there, or another program's or version's.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        return content
    except FileNotFoundError:
        reason = f"{path.parent} holds no run ({path.name} is missing)"
        raise UserError(f"--resume: {reason}; expected a --run_dir") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: cannot read {path} ({one_line(error)})") from error


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
