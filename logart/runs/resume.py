"""How a run's folder is begun, and gone on with: only where nothing that decides the codes has changed."""

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
from logart.networks.data import DIGITS
from logart.networks.evaluate import Accuracy
from logart.quantization.config import QuantConfig
from logart.runs.folder import ACCURACIES, FORMAT, REPORT, RUN, RunFolder, as_json, read_entries
from logart.runs.results import RESULTS, environment
from logart.runs.results_schema import Cell

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
# Flags that name files and folders, which are looked for from where the run was begun.
PLACES = ("results", "save", "checkpoint", "config", "calib_list", "save_calib_list", "data_path", "dataset")


def fingerprint(
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


def stored_flags(folder: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of an interrupted run.

    Args:
        folder: as `--resume` names it.
        given: the flags given now, by name.

    Returns:
        Those that the run was begun with, by name, unless they are given now.

    Raises:
        UserError: the folder holds no run, is finished, or a flag that decides the result differs.
    """
    path, here = Path(folder), _here()
    kept = read_entries(path / RUN, str(path), flags=dict)
    known: dict[str, Any] = {"results": RESULTS} | kept["flags"]
    if (path / REPORT).exists() and read_entries(path / REPORT, str(path), row=dict).get("recorded") is not None:
        raise UserError(f"--resume: the run in {path} is finished; expected one that was interrupted")
    begun = kept.get("directory")
    if not isinstance(begun, str) or not os.path.isdir(begun):  # moved to another machine, say
        begun = here
    for name, value in given.items():
        if name in FREE_FLAGS:
            continue
        if name not in known or not _same(_place(name, known[name], begun), _place(name, value, here)):
            before = f"--{name} {_written(known[name])}" if name in known else f"without --{name}"
            raise UserError(f"--resume: the run in {path} began {before}; expected the same, got {_written(value)}")
    left = {name: value for name, value in known.items() if name not in given}
    return left if begun == here else {name: _place(name, value, begun) for name, value in left.items()}


def begun_with(folder: str, name: str) -> Any:
    """A flag of the run in `folder` as it was written when the run was begun, or None."""
    return read_entries(Path(folder) / RUN, folder, flags=dict)["flags"].get(name)


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _place(name: str, value: Any, directory: str | None) -> Any:
    """A flag's value; of a file or folder named from `directory`, as any working directory may name it."""
    if name not in PLACES or not isinstance(value, str) or directory is None:
        return value
    return value if name in ("data_path", "dataset") and value == DIGITS else os.path.join(directory, value)


def _same(before: Any, now: Any) -> bool:
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return bool(before == now)
    return os.path.isabs(before) and os.path.isabs(now) and os.path.realpath(before) == os.path.realpath(now)


@contextmanager
def opened(
    run_dir: str | None,
    resume: str | None,
    flags: Mapping[str, Any],
    who: Mapping[str, Any],
    names: Sequence[str],
    started: float,
) -> Iterator[RunFolder | None]:
    """A run's folder, or None; held against other processes, with a log, while the context lasts.

    Args:
        run_dir: a new one.
        resume: that of a run to go on with, in place of `run_dir`.
        flags: what a new one keeps of the flags that began the run.
        who: the run's `fingerprint`.
        names: of the calibration images.
        started: `time.perf_counter()` when the command began.

    Raises:
        UserError: the folder cannot be had, holds something else, is in use, or began with another `fingerprint`.
        Interrupted: after Ctrl-C.
    """
    place = run_dir if resume is None else resume
    if place is None:
        yield None
        return
    flag, path = "--run_dir" if resume is None else "--resume", Path(place)
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
            _begin(folder, flags, who, names)
        try:
            with folder.logged():
                yield folder
        except KeyboardInterrupt:
            raise Interrupted(f"go on with --resume {path}") from None


def check_folder(run_dir: str) -> None:
    """Raise UserError where `--run_dir` could not be had; nothing is made."""
    path = Path(run_dir)
    begun = {"lock", "blocks", "calibration.txt"}  # by a run that was stopped before it was one
    if path.is_dir() and any(entry.name not in begun and entry.suffix != ".partial" for entry in path.iterdir()):
        hint = "go on with --resume, or pass a new one" if (path / RUN).exists() else "pass a new or empty one"
        raise UserError(f"--run_dir: the folder {path} is not empty; {hint}")
    if path.is_symlink() and not path.exists():
        raise UserError(f"--run_dir: {path} is a link to {os.readlink(path)}, which is not there; expected a folder")
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


def _begin(folder: RunFolder, flags: Mapping[str, Any], who: Mapping[str, Any], names: Sequence[str]) -> None:
    content = {"format": FORMAT, "directory": _here(), "flags": dict(flags), "fingerprint": who}
    try:
        listed = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
        write_atomically(folder.path / "calibration.txt", listed)
        write_atomically(folder.path / RUN, as_json(content))
    except OSError as error:
        raise UserError(f"--run_dir: cannot write to {folder.path} ({error.strerror})") from error


def _take_over(folder: RunFolder, who: Mapping[str, Any]) -> None:
    before = read_entries(folder.path / RUN, str(folder.path), fingerprint=dict)["fingerprint"]
    for name, value in who.items():
        if before.get(name) != value:
            raise UserError(
                f"--resume: the run in {folder.path} began with {_difference(name, before.get(name), value)}"
            )
    if (folder.path / ACCURACIES).exists():
        kept = read_entries(folder.path / ACCURACIES, str(folder.path), seconds=float, accuracies=dict)
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


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
