"""Runs side by side, on several machines too, that share a results file without doing a row twice (`--once`).

While a run works it holds an operating system's lock on a file in `results.csv.claims/`, named by its settings; a JSON
file beside it says who. Whoever finds the row, or the lock held, leaves the run alone. When the owner ends, however it
does, the system frees the lock at once, and the next one takes the row. Rows and locks are looked at under the results
file's lock, so that finding neither and taking the lock is one step.

Of a shared file system this assumes what appending rows assumes, that locks act between the machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from logart.errors import NothingToDo, UserError
from logart.files import real_place
from logart.runs.columns import utc_now
from logart.runs.results_file import locked_results, recorded

CLAIMED_ELSEWHERE = 75  # exit code EX_TEMPFAIL: another call, later, may find it otherwise


def claims_folder(results: str | Path) -> Path:
    """Where the locks on rows of this results file lie, while there are any."""
    return Path(f"{real_place(results)}.claims")


@contextlib.contextmanager
def claimed(results: str | Path, run_id: str) -> Iterator[None]:
    """Hold the lock on a run, unless its row is there or another process holds it.

    Args:
        results: the results file.
        run_id: of the run; another run of the same settings is kept out too.

    Raises:
        NothingToDo: the row is there, or another process is at it.
        UserError: the lock's file cannot be written.
    """
    folder, settings = claims_folder(results), run_id.partition("-")[0]
    lock, note = FileLock(folder / f"{settings}.lock"), folder / f"{settings}.json"
    with locked_results(results):
        when = recorded(results, run_id)
        if when is not None:
            raise NothingToDo(f"{results} has this row already, of {when}")
        folder.mkdir(exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise NothingToDo(f"this row is being run by {_owner(note)}", CLAIMED_ELSEWHERE) from None
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": utc_now(), "command": sys.argv}
        note.write_text(json.dumps(owner, indent=1) + "\n", "ascii")
    try:
        yield
    finally:
        # An error here must not hide the run's own; files left behind keep nobody from the row.
        with contextlib.suppress(UserError), locked_results(results):
            note.unlink(missing_ok=True)
            Path(lock.lock_file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others' are in it
                folder.rmdir()
        lock.release()


def _owner(note: Path) -> str:
    try:
        owner = json.loads(note.read_text("ascii"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
