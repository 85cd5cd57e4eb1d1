"""Locks on rows: who gets them, who keeps them, and that whoever ends, however, leaves them free."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import logart
from logart.errors import NothingToDo, UserError
from logart.runs.claims import CLAIMED_ELSEWHERE, claimed, claims_folder
from logart.runs.columns import NAMES, SETTINGS
from logart.runs.results_file import append_row, locked_results, new_run_id, recorded, settings_id

ROW = {"track": "cnn", "arch": "a net", "bits": 4, "lr": 0.01, "seed": 0, "config": None}
ID = new_run_id(ROW)
# Does rows side by side with others: each takes what nobody has, and writes down what it did.
WORKER = """
import sys, time
from logart.runs.claims import claimed
from logart.runs.results_file import append_row, new_run_id
from logart.errors import NothingToDo
for bits in 2, 3, 4, 5, 6, 7:
    row = {"arch": "a net", "bits": bits}
    row["run_id"] = new_run_id(row)
    try:
        with claimed(sys.argv[1], row["run_id"]):
            time.sleep(0.05)
            append_row(sys.argv[1], row)
    except NothingToDo as end:
        assert end.code in (0, 75)
"""
HOLDER = """
import sys, time
from logart.runs.claims import claimed
with claimed(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


@contextlib.contextmanager
def holder(results: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock on ROW."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(results), ID], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def try_to_hold(results: Path) -> str | tuple[str, int]:
    """What happens to another run of ROW's settings: "held", or why not with the exit code."""
    try:
        with claimed(results, new_run_id(ROW)):
            return "held"
    except NothingToDo as end:
        return str(end), end.code


def test_a_row_is_found_by_its_settings_alone(results: Path) -> None:
    awkward = ROW | {"network_options": 'a="b, c"\n', "checkpoint": "\udc80.pth"}
    with locked_results(results):
        assert recorded(results, ID) is None
    append_row(results, ROW | {"utc_time": "one", "Acc@1": 90.0, "device": "cpu", "run_id": ID})
    append_row(results, awkward | {"utc_time": "two"})  # of a version without run_id: known by its cells
    with locked_results(results):
        assert recorded(results, new_run_id(ROW)) == "one"
        assert recorded(results, ID) is None  # its own row
        assert recorded(results, new_run_id(ROW | {"Acc@1": 1.0, "device": "H100"})) == "one"
        assert recorded(results, new_run_id(awkward)) == "two"
        for name in SETTINGS:
            assert recorded(results, new_run_id(ROW | {name: "another"})) is None, name


def test_a_run_s_id_is_of_its_settings_and_its_own() -> None:
    first, second = new_run_id(ROW), new_run_id(ROW)
    assert first != second and first.split("-")[0] == second.split("-")[0] == settings_id(ROW)
    written = {name: "" if cell is None else str(cell) for name, cell in ROW.items()}
    assert settings_id(written) == settings_id(ROW | {"Acc@1": 3.0})  # as it is read again
    # What is in two cells is not what is in one.
    assert settings_id({"arch": "a", "checkpoint": "b"}) != settings_id({"arch": "ab"})


def test_a_run_holds_its_row_while_it_works_and_leaves_nothing(results: Path) -> None:
    with claimed(results, ID):
        note, _ = sorted(claims_folder(results).iterdir())
        owner = json.loads(note.read_text())
        assert owner["pid"] == os.getpid() and owner["command"] == sys.argv and owner["host"] and owner["since"]
        text, code = try_to_hold(results)
        assert text.startswith(f"this row is being run by process {os.getpid()} on ")
        assert code == CLAIMED_ELSEWHERE == 75
        note.write_text("cut sh")
        assert try_to_hold(results)[0] == "this row is being run by another process"
        with claimed(results, new_run_id(ROW | {"seed": 1})):  # another row
            assert len(list(claims_folder(results).iterdir())) == 4
    assert not claims_folder(results).exists() and not results.exists()
    append_row(results, ROW | {"utc_time": "then", "run_id": ID})
    assert try_to_hold(results) == (f"{results} has this row already, of then", 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_and_interruption_free_the_row(results: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), claimed(results, ID):
        raise error
    assert not claims_folder(results).exists()


def test_a_killed_process_s_row_is_free_at_once(results: Path) -> None:
    with holder(results) as process:
        text, code = try_to_hold(results)
        assert code == CLAIMED_ELSEWHERE and text.startswith(f"this row is being run by process {process.pid} on ")
        process.kill()
        process.wait()
        assert claims_folder(results).exists() and try_to_hold(results) == "held"
    assert not claims_folder(results).exists()


def test_a_stopped_process_keeps_its_row(results: Path) -> None:
    with holder(results) as process:
        process.send_signal(19)  # SIGSTOP
        time.sleep(0.2)
        assert try_to_hold(results)[1] == CLAIMED_ELSEWHERE


def test_workers_at_once_do_each_row_once(results: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(results)]) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    done = [line.split(",")[NAMES.index("bits")] for line in results.read_text().splitlines()[1:]]
    assert sorted(done) == list("234567") and not claims_folder(results).exists()


def test_a_place_that_takes_no_locks_is_a_user_s_mistake(results: Path) -> None:
    claims_folder(results).write_text("a file")
    with pytest.raises(UserError, match="--results: cannot write"), claimed(results, ID):
        raise AssertionError


def test_rows_and_claims_do_without_torch() -> None:
    """And the package's public names, which need it, are there when asked for; test_packaging.py: in a new process."""
    code = "import sys, logart.runs.claims; assert 'torch' not in sys.modules; print(len(dir(logart)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{len(logart.__all__)}\n", done.stderr
    names: dict[str, object] = {}
    exec("from logart import *", names)
    assert str(names["load_packed"]).startswith("<function load_packed")
    assert all(getattr(logart, name) is not None for name in logart.__all__)
    assert dir(logart) == logart.__all__
    with pytest.raises(AttributeError, match="module 'logart' has no attribute 'quantise_model'"):
        logart.quantise_model  # noqa: B018
