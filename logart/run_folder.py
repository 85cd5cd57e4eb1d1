"""A run's folder (`--run_dir`): all that a run has come to, so that none of it is lost and `--resume` goes on with it.

    run.json              the flags given, and what decides the codes: settings, network, data, versions
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

import argparse
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from logart.config import QuantConfig
from logart.errors import Interrupted, UserError
from logart.evaluate import Accuracy
from logart.layers import QuantizedLayer
from logart.outcome import Report
from logart.packed_file import PackedFileError
from logart.results import Cell, environment, holds_row, row_digest
from logart.runtime import write_whole
from logart.state import Done, Keeper, load_state, save_state

FORMAT = 1
RUN, REPORT, ACCURACIES, PACKED = "run.json", "report.json", "accuracies.json", "packed.safetensors"
ROW = "row-"
# Flags that may differ when a run goes on: they decide where things go and how fast, not what comes out.
FREE_FLAGS = (
    "results",
    "quiet",
    "workers",
    "num_workers",
    "val_batch_size",
    "save",
    "cache",
    "once",
    "run_dir",
    "resume",
)


@dataclass
class RunFolder(Keeper):
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

    def restore(self, stage: str, index: int, layers: Mapping[str, QuantizedLayer]) -> Done | None:
        """See `Keeper`; a state that cannot be read is worked out again."""
        path = self._state(stage, index)
        if not path.exists():
            return None
        try:
            return load_state(path, layers)
        except PackedFileError as error:
            self.warn(f"{error}; the block is worked out again")
            return None

    def keep(self, stage: str, index: int, layers: Mapping[str, QuantizedLayer], done: Done) -> None:
        """See `Keeper`; where there is no room, the run goes on without."""
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
        write_whole(self.path / REPORT, _json(content))
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
        """See `Keeper`; the log has it too."""
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
        write_whole(self.path / name, _json(content))

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._full:
                told = f"--run_dir: cannot write to {self.path} ({error.strerror})"
                self.warn(f"{told}; the run goes on, but cannot be resumed")
            self._full = True


def identity(
    config: QuantConfig,
    columns: Mapping[str, Cell],
    model: nn.Module,
    images: Tensor,
    val_names: Sequence[str],
    device: torch.device,
) -> dict[str, Any]:
    """What decides the codes and the accuracies, by the name that a user knows it by."""
    versions = {name: value for name, value in environment().items() if name.endswith("_version")}
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode("utf-8", "surrogatepass") + _bytes(tensor))
    return {
        "settings": config.as_dict(),
        "network": {name: columns[name] for name in ("track", "arch", "network_options")},
        "checkpoint": weights.hexdigest(),
        "data set": columns["data"],
        "calibration images": hashlib.sha256(_bytes(images)).hexdigest(),
        "validation images": hashlib.sha256("\n".join(val_names).encode("utf-8", "surrogateescape")).hexdigest(),
        "device": device.type,
        "precision of captured tensors": columns["capture_precision"] or "full",
        "versions": versions,
    }


def stored_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of a run that `--resume` names, with those given now on top; other namespaces come back as they are.

    Raises:
        UserError: the folder holds no run, is finished, or a flag that decides the result differs.
    """
    if args.resume is None:
        return args
    if args.run_dir is not None:
        raise UserError(f"--run_dir: {args.run_dir} and --resume {args.resume} were both given; expected one of them")
    path = Path(args.resume)
    known = _read(path / RUN, args.resume, flags=dict)["flags"]
    if (path / REPORT).exists() and _read(path / REPORT, args.resume, row=dict).get("recorded") is not None:
        raise UserError(f"--resume: the run in {path} is finished; expected one that was interrupted")
    for name, value in vars(args).items():
        if name in FREE_FLAGS or value is None:
            continue
        if name not in known or known[name] != value:
            before = f"--{name} {_written(known[name])}" if name in known else f"without --{name}"
            raise UserError(f"--resume: the run in {path} began {before}; expected the same, got {_written(value)}")
    known = {name: value for name, value in known.items() if getattr(args, name, None) is None}
    return argparse.Namespace(**vars(args) | known)


@contextmanager
def opened(
    args: argparse.Namespace, who: Mapping[str, Any], names: Sequence[str], started: float
) -> Iterator[RunFolder | None]:
    """The folder that the flags name, or None; held against other processes, with a log, while the context lasts.

    Args:
        args: with `run_dir` and `resume`.
        who: the run's `identity`.
        names: of the calibration images.
        started: `time.perf_counter()` when the command began.

    Raises:
        UserError: the folder cannot be had, holds something else, is in use, or began with another `identity`.
        Interrupted: after Ctrl-C.
    """
    if args.run_dir is None and args.resume is None:
        yield None
        return
    flag, path = ("--resume", Path(args.resume)) if args.resume is not None else ("--run_dir", Path(args.run_dir))
    _make(flag, path)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path / "lock").acquire(timeout=0))
        except Timeout:
            raise UserError(f"{flag}: another process is running in {path}; expected one of this run's own") from None
        folder = RunFolder(path, started)
        if flag == "--resume":
            _take_over(folder, json.loads(json.dumps(dict(who))))
        else:
            _begin(folder, args, who, names)
        try:
            with folder.logged():
                yield folder
        except KeyboardInterrupt:
            raise Interrupted(f"go on with --resume {path}") from None


def check_folder(args: argparse.Namespace) -> None:
    """Raise UserError where `--run_dir` could not be had; nothing is made."""
    if args.run_dir is None:
        return
    path = Path(args.run_dir)
    begun = {"lock", "blocks", "calibration.txt"}  # by a run that was stopped before it was one
    if path.is_dir() and any(entry.name not in begun and entry.suffix != ".partial" for entry in path.iterdir()):
        hint = "go on with --resume, or pass a new one" if (path / RUN).exists() else "pass a new or empty one"
        raise UserError(f"--run_dir: the folder {path} is not empty; {hint}")
    if path.exists() and not path.is_dir():
        raise UserError(f"--run_dir: {path} is a file; expected a folder")
    if not path.parent.is_dir():
        raise UserError(f"--run_dir: no folder {path.parent}; make it or pass another path")


def _make(flag: str, path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
        (path / "blocks").mkdir(exist_ok=True)
        (path / "lock").touch()
    except OSError as error:
        raise UserError(
            f"{flag}: cannot write to {path} ({error.strerror}); expected a folder that takes files"
        ) from error


def _begin(folder: RunFolder, args: argparse.Namespace, who: Mapping[str, Any], names: Sequence[str]) -> None:
    flags = {name: value for name, value in vars(args).items() if value is not None and name != "run_dir"}
    content = {"format": FORMAT, "flags": flags, "identity": who}
    try:
        listed = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
        write_whole(folder.path / "calibration.txt", listed)
        write_whole(folder.path / RUN, _json(content))
    except OSError as error:
        raise UserError(f"--run_dir: cannot write to {folder.path} ({error.strerror})") from error


def _take_over(folder: RunFolder, who: Mapping[str, Any]) -> None:
    before = _read(folder.path / RUN, str(folder.path), identity=dict)["identity"]
    for name, value in who.items():
        if before.get(name) != value:
            raise UserError(
                f"--resume: the run in {folder.path} began with {_difference(name, before.get(name), value)}"
            )
    if (folder.path / ACCURACIES).exists():
        kept = _read(folder.path / ACCURACIES, str(folder.path), seconds=float, accuracies=dict)
        folder.earlier = kept["seconds"]
        try:
            folder.accuracies = {stage: Accuracy(**value) for stage, value in kept["accuracies"].items()}
        except TypeError as error:
            raise UserError(f"--resume: cannot read {folder.path / ACCURACIES} ({error})") from error


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            if before.get(key) != now[key]:
                return f"another {key} ({name}): {before.get(key)}, now {now[key]}"
    if isinstance(now, str) and len(now) == 64:
        return f"another {name.removesuffix('s')}: SHA-256 {str(before)[:12]}…, now {now[:12]}…"
    return f"another {name}: {before}, now {now}"


def _read(path: Path, folder: str, **entries: type) -> dict[str, Any]:
    """A file of the folder that holds entries of these types."""
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


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode("ascii")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


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
