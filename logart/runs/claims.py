"""Runs side by side, on several machines too, that share a results file without doing a row twice.

A run claims its settings by a file in `results.csv.claims/`, named by their hash, and touches it while it works; it
takes the claim away after its row is written. Whoever finds the row or the claim of a living owner leaves the run
alone. An owner is dead when its process is gone, which only its own machine can see, or when its claim was not
touched for some minutes. Results and claims are looked at and changed under the results file's lock, so that finding
neither and making a claim is one step.

Of a shared file system this assumes what appending rows assumes, that locks act between the machines; besides, that
making a file exclusively is atomic, and that touched files show their age to the others within the minutes above.
Clocks may differ: ages are differences of the file system's own times. Where locks do not act, two may take over the
same dead claim; the one whose claim is overwritten notices at its next sign of life and stops.
"""

from __future__ import annotations

import _thread
import contextlib
import hashlib
import json
import os
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from logart.errors import NothingToDo, UserError
from logart.files import real_place
from logart.runs.results import locked_results, recorded, settings_line
from logart.runs.results_schema import Cell

SILENT_MINUTES = 10.0  # far above the minute or so that network file systems keep a file's times in memory
BEAT_SECONDS = 30.0
CLAIMED_ELSEWHERE = 75  # exit code EX_TEMPFAIL: another call, later, may find it otherwise


@dataclass(frozen=True)
class Owner:
    """Who made a claim.

    Attributes:
        host: the machine's name, for people.
        machine: tells machines and containers apart whose processes have numbers of their own.
        pid: the process there.
        since: UTC, ISO 8601.
        token: of this claim alone.
        settings: of the run, as the results file would say them.
    """

    host: str
    machine: str
    pid: int
    since: str
    token: str
    settings: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def claims_folder(results: str | Path) -> Path:
    """Where the claims on rows of this results file lie, while there are any."""
    return Path(f"{real_place(results)}.claims")


def claim_path(results: str | Path, settings: Mapping[str, Cell]) -> Path:
    """The file that claims the run of these settings."""
    return claims_folder(results) / f"{hashlib.sha256(settings_line(settings)).hexdigest()[:32]}.json"


@contextlib.contextmanager
def claimed(results: str | Path, settings: Mapping[str, Cell], silent_minutes: float | None) -> Iterator[None]:
    """Hold the claim on a run, unless its row is there or another holds it.

    The claim is released at the end, after errors, Ctrl-C and SIGTERM too.

    Args:
        results: the results file.
        settings: the columns that decide the run, as the row will have them.
        silent_minutes: after so long without a sign of life an owner is dead; None claims nothing.

    Raises:
        NothingToDo: the row is there; another holds the claim; or, at any time, another took it over.
        UserError: the claim cannot be written.
    """
    if silent_minutes is None:
        yield
        return
    path, owner = claim_path(results, settings), _this_process(settings)
    _take(Path(results), path, owner, settings, silent_minutes)
    lost, stop = threading.Event(), threading.Event()
    beat = threading.Thread(target=_beat, args=(path, owner, silent_minutes, lost, stop), daemon=True)
    beat.start()
    try:
        with _ending_on_sigterm():
            yield
    except SystemExit:
        if lost.is_set():
            raise NothingToDo(f"{path}: taken over by {_owner(path) or 'another'}", CLAIMED_ELSEWHERE) from None
        raise
    finally:
        stop.set()
        beat.join()
        _release(Path(results), path, owner)


def _take(results: Path, path: Path, owner: Owner, settings: Mapping[str, Cell], silent_minutes: float) -> None:
    with locked_results(results):
        when = recorded(results, settings)
        if when is not None:
            raise NothingToDo(f"{results} has this row already, of {when}")
        path.parent.mkdir(exist_ok=True)
        holder, silent = _owner(path), _silent_seconds(path)
        if silent is not None:
            if _lives(holder, silent, silent_minutes):
                seen = f"{holder or 'an owner unknown yet'}, last seen {silent:.0f} s ago"
                raise NothingToDo(f"this row is being run by {seen}", CLAIMED_ELSEWHERE)
            print(f"taking over from {holder or 'an unknown owner'}, which ended without a row", flush=True)
            path.unlink()
        with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(asdict(owner), file, indent=1)


def _release(results: Path, path: Path, owner: Owner) -> None:
    # An error here must not hide the run's own; a claim left behind is taken over.
    with contextlib.suppress(UserError), locked_results(results):
        if _owner(path) == owner:
            path.unlink()
        with contextlib.suppress(OSError):  # others' claims are in it
            path.parent.rmdir()


def _beat(path: Path, owner: Owner, silent_minutes: float, lost: threading.Event, stop: threading.Event) -> None:
    """Touch the claim now and then; interrupt the run where it is another's."""
    while not stop.wait(min(BEAT_SECONDS, silent_minutes * 60 / 4)):
        try:
            holder = _owner(path)
            os.utime(path)
        except FileNotFoundError:
            lost.set()
        except OSError:  # a file system that stumbles; the next beat will tell
            continue
        else:
            if holder is not None and holder != owner:
                lost.set()
        if lost.is_set() and not stop.is_set():
            _thread.interrupt_main(signal.SIGTERM)  # unlike SIGINT, not ignored in a shell's background jobs
            return


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which schedulers end a job, unwind the program; the ones after it are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _this_process(settings: Mapping[str, Cell]) -> Owner:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    line = settings_line(settings).decode().rstrip()
    return Owner(socket.gethostname(), _machine(), os.getpid(), now, uuid.uuid4().hex, line)


def _machine() -> str:
    """The name and, on Linux, the boot and the namespace that process numbers belong to."""
    parts = [socket.gethostname()]
    more: tuple[Callable[[], str], ...] = (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    )
    for read in more:
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join(parts)


def _owner(path: Path) -> Owner | None:
    """Who claims; None where nobody does, or where the file was cut short."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return Owner(**{field.name: found[field.name] for field in fields(Owner)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _silent_seconds(path: Path) -> float | None:
    """How long ago the claim was touched, by the file system's clock; None where there is none."""
    with tempfile.NamedTemporaryFile(dir=path.parent) as now:
        try:
            return os.stat(now.name).st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return None


def _lives(owner: Owner | None, silent_seconds: float, silent_minutes: float) -> bool:
    if silent_seconds > silent_minutes * 60:
        return False
    if owner is None or owner.machine != _machine() or os.name == "nt":  # there, asking for a process may end it
        return True
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
