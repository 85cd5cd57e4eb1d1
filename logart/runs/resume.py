"""How a run's folder is begun, and how `--resume` goes on in it: only where nothing that decides the codes changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from logart.errors import Interrupted, UserError
from logart.files import write_atomically
from logart.networks.digits import DIGITS
from logart.networks.evaluate import Accuracy
from logart.networks.weights import tensor_bytes
from logart.quantization.config import QuantConfig
from logart.ranks import RankLost
from logart.runs.columns import SETTINGS, Cell, versions
from logart.runs.results_file import RESULTS
from logart.runs.run_folder import ACCURACIES, REPORT, RUN, RunFolder, read_json, write_json

# Flags that name files and folders.
PLACES = ("results", "save", "checkpoint", "config", "calib_list", "save_calib_list", "data_path", "dataset",
          "class_map", "calib_path")  # fmt: skip
# Columns that name files: what they hold counts, not where and how.
NAMED_FILES = ("checkpoint", "checkpoint_sha256", "config")


def fingerprint(
    config: QuantConfig,
    row: Mapping[str, Cell],
    model: nn.Module,
    images: Tensor,
    val_names: Sequence[str],
    device: torch.device,
) -> dict[str, Any]:
    """What decides the codes and the accuracies, by the name that a user knows it by; `row` has the settings' cells."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode("utf-8", "surrogatepass") + tensor_bytes(tensor))
    return {
        **{name: row[name] for name in SETTINGS if name not in NAMED_FILES},
        **config.as_dict(),
        "float weights": weights.hexdigest(),
        "calibration images": hashlib.sha256(tensor_bytes(images)).hexdigest(),
        "validation images": hashlib.sha256("\n".join(val_names).encode("utf-8", "surrogateescape")).hexdigest(),
        "device": device.type,
        **versions(),
    }


def flags_to_keep(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a run's folder keeps, by name, of those given; places as any working directory may name them."""
    kept = {"results": RESULTS} | {name: value for name, value in given.items() if name not in ("run_dir", "resume")}
    places = {name: value for name, value in kept.items() if name in PLACES and value != DIGITS}
    return kept | {name: os.path.abspath(value) for name, value in places.items()}


def stored_flags(folder: str) -> dict[str, Any]:
    """The flags that an interrupted run was begun with, by name.

    Raises:
        UserError: the folder holds no run, or one that is finished.
    """
    flags: dict[str, Any] = begun(folder)["flags"]
    if (Path(folder) / REPORT).exists():
        raise UserError(f"--resume: the run in {folder} is finished; expected one that was interrupted")
    return flags


def begun(folder: str) -> dict[str, Any]:
    """What a run's folder has kept since the run was begun: its `flags`, `row` (of settings) and `fingerprint`."""
    content = read_json(Path(folder) / RUN)
    for name in ("flags", "row", "fingerprint"):
        if not isinstance(content.get(name), dict):
            raise UserError(f"--resume: cannot read {Path(folder) / RUN} (no {name})")
    return content


@contextmanager
def opened(
    run_dir: str | None,
    resume: str | None,
    content: Mapping[str, Any],
    names: Sequence[str],
    started: float,
) -> Iterator[RunFolder | None]:
    """A run's folder, or None; held against other processes, with a log, while the context lasts.

    Args:
        run_dir: a new one.
        resume: that of a run to go on with, in place of `run_dir`.
        content: `flags`, `row` and `fingerprint`, which a new one keeps; the last must be as that of the run begun.
        names: of the calibration images.
        started: `time.perf_counter()` when the command began.

    Raises:
        UserError: the folder cannot be had, holds something else, is in use, or began with another fingerprint.
        Interrupted: after Ctrl-C.
    """
    place = run_dir if resume is None else resume
    if place is None:
        yield None
        return
    flag, folder = "--run_dir" if resume is None else "--resume", RunFolder(Path(place), started)
    with ExitStack() as stack:
        try:
            folder.path.mkdir(exist_ok=True)
            stack.enter_context(FileLock(folder.path / "lock").acquire(timeout=0))
            if resume is None:
                _begin(folder.path, content, names)
            (folder.path / "blocks").mkdir(exist_ok=True)
        except Timeout:
            raise UserError(f"{flag}: another process is running in {place}; expected one of this run's own") from None
        except OSError as error:
            reason = f"cannot write to {place} ({error.strerror})"
            raise UserError(f"{flag}: {reason}; expected a folder that takes files") from error
        if resume is not None:
            _take_over(folder, content["fingerprint"])
        try:
            with folder.logged():
                yield folder
        except KeyboardInterrupt:
            raise Interrupted(f"go on with --resume {place}") from None
        except RankLost as lost:
            raise RankLost(f"{lost}; go on with --resume {place}", lost.code) from None


def check_folder(run_dir: str) -> None:
    """Raise UserError where `--run_dir` could not be had; nothing is made."""
    path = Path(run_dir)
    # A run that was stopped before it was one may have left a lock.
    if path.is_dir() and any(entry.name != "lock" and entry.suffix != ".partial" for entry in path.iterdir()):
        hint = "go on with --resume, or pass a new one" if (path / RUN).exists() else "pass a new or empty one"
        raise UserError(f"--run_dir: the folder {path} is not empty; {hint}")
    if path.is_symlink() and not path.exists():
        raise UserError(f"--run_dir: {path} is a link to {os.readlink(path)}, which is not there; expected a folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"--run_dir: {path} is a file; expected a folder")
    if not path.parent.is_dir():
        raise UserError(f"--run_dir: no folder {path.parent}; make it or pass another path")


def _begin(path: Path, content: Mapping[str, Any], names: Sequence[str]) -> None:
    write_json(path / RUN, content)
    listed = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
    write_atomically(path / "calibration.txt", listed)


def _take_over(folder: RunFolder, now: Mapping[str, Any]) -> None:
    before = begun(str(folder.path))["fingerprint"]
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            what = _difference(name, str(before.get(name)), str(value))
            raise UserError(f"--resume: the run in {folder.path} began with another {what}")
    if (folder.path / ACCURACIES).exists():
        kept = read_json(folder.path / ACCURACIES)
        try:
            folder.earlier = float(kept["seconds"])
            folder.accuracies = {stage: Accuracy(**value) for stage, value in kept["accuracies"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"--resume: cannot read {folder.path / ACCURACIES} ({error})") from error


def _difference(name: str, before: str, now: str) -> str:
    if len(now) == 64:
        return f"set of {name}: SHA-256 {before[:12]}…, now {now[:12]}…"
    return f"{name}: {before}, now {now}"
