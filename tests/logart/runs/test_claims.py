"""Claims on rows: who gets them, who keeps them, and when they are taken over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import logart
from logart.errors import NothingToDo, UserError
from logart.runs import claims
from logart.runs.claims import CLAIMED_ELSEWHERE, claim_path, claimed, claims_folder
from logart.runs.results import append_row, locked_results, recorded, settings_line
from logart.runs.results_schema import NAMES, SETTINGS

ROW = {"track": "cnn", "arch": "a net", "bits": 4, "lr": 0.01, "seed": 0, "config": None}
# Does rows side by side with others: each takes what nobody has, and writes down what it did.
WORKER = """
import sys, time
from logart.runs.claims import claimed
from logart.runs.results import append_row
from logart.errors import NothingToDo
for bits in 2, 3, 4, 5, 6, 7:
    row = {"arch": "a net", "bits": bits}
    try:
        with claimed(sys.argv[1], row, 10):
            time.sleep(0.05)
            append_row(sys.argv[1], row)
    except NothingToDo as end:
        assert end.code in (0, 75)
"""
HOLDER = """
import sys, time
from logart.runs.claims import claimed
with claimed(sys.argv[1], {"track": "cnn", "arch": "a net", "bits": 4, "lr": 0.01, "seed": 0}, float(sys.argv[2])):
    print("held", flush=True)
    for _ in range(600):
        time.sleep(0.1)
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


@contextlib.contextmanager
def holder(results: Path, minutes: float = 10) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim on ROW."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(results), str(minutes)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def try_to_hold(results: Path, minutes: float = 10) -> str | tuple[str, int]:
    """What happens to one who wants ROW: "held", or why not with the exit code."""
    try:
        with claimed(results, ROW, minutes):
            return "held"
    except NothingToDo as end:
        return str(end), end.code


def foreign(results: Path, seconds: float, text: str | None = None) -> Path:
    """A claim of another machine, last touched so long ago."""
    path = claim_path(results, ROW)
    path.parent.mkdir()
    owner = {"host": "far", "machine": "far 1", "pid": os.getpid(), "since": "then", "token": "t", "settings": "s"}
    path.write_text(json.dumps(owner) if text is None else text)
    os.utime(path, (time.time() - seconds, time.time() - seconds))
    return path


def test_the_settings_are_the_columns_known_before_a_run() -> None:
    after = """val_images Acc@1 Acc@5 float_Acc@1 float_Acc@5 search_Acc@1 search_Acc@5 approx_Acc@1 approx_Acc@5
        search_seconds reconstruction_seconds total_seconds peak_memory_mb device torch_version timm_version
        project_version""".split()
    assert list(NAMES) == ["utc_time", *SETTINGS, *after]


def test_a_row_is_found_by_its_settings_alone(results: Path) -> None:
    awkward = ROW | {"network_options": 'a="b, c"\n', "checkpoint": "\udc80.pth"}
    with locked_results(results):
        assert recorded(results, ROW) is None
    append_row(results, ROW | {"utc_time": "one", "Acc@1": 90.0, "device": "cpu", "torch_version": "2"})
    append_row(results, awkward | {"utc_time": "two"})
    with locked_results(results):
        assert recorded(results, ROW) == recorded(results, ROW | {"Acc@1": 1.0, "device": "H100"}) == "one"
        assert recorded(results, awkward) == "two"
        for name in SETTINGS:
            assert recorded(results, ROW | {name: "another"}) is None, name


def test_a_run_claims_while_it_works_and_leaves_nothing(results: Path) -> None:
    with claimed(results, ROW, 10):
        (path,) = claims_folder(results).iterdir()
        owner = json.loads(path.read_text())
        assert owner["pid"] == os.getpid() and owner["settings"] == settings_line(ROW).decode().strip()
        text, code = try_to_hold(results)
        assert f"process {os.getpid()} on " in text and code == CLAIMED_ELSEWHERE == 75
        with claimed(results, ROW | {"seed": 1}, 10):  # another row
            assert len(list(claims_folder(results).iterdir())) == 2
    assert not claims_folder(results).exists() and not results.exists()
    append_row(results, ROW | {"utc_time": "then"})
    assert try_to_hold(results) == (f"{results} has this row already, of then", 0)
    with claimed(results, ROW, None):  # who does not ask is not kept from anything
        assert not claims_folder(results).exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_and_interruption_release_the_claim(results: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), claimed(results, ROW, 10):
        raise error
    assert not claims_folder(results).exists()


def test_sigterm_releases_the_claim(results: Path) -> None:
    with holder(results) as process:
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    assert not claims_folder(results).exists()
    before = signal.getsignal(signal.SIGTERM)
    assert try_to_hold(results) == "held" and signal.getsignal(signal.SIGTERM) is before


def test_a_killed_process_s_row_is_taken_over(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(results) as process:
        assert try_to_hold(results)[1] == CLAIMED_ELSEWHERE
        process.kill()
        process.wait()
        assert claim_path(results, ROW).exists() and try_to_hold(results) == "held"
        assert f"taking over from process {process.pid} on " in capsys.readouterr().out


def test_a_stopped_process_loses_its_row_and_ends_when_it_wakes(results: Path) -> None:
    with holder(results, minutes=0.02) as process:  # 1.2 s; it shows life every 0.3 s
        time.sleep(2)
        assert try_to_hold(results, 0.02)[1] == CLAIMED_ELSEWHERE  # so it lives still
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.6)
        with claimed(results, ROW, 0.02):
            process.send_signal(signal.SIGCONT)
            assert process.wait(10) != 0
            assert json.loads(claim_path(results, ROW).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("text", "seconds", "held"),
    [(None, 500, False), (None, 700, True), ("", 500, False), ("", 700, True), ("[1", 700, True), ("[]", 500, False)],
)
def test_another_machine_s_claim_is_taken_over_once_it_is_silent_for_long(
    results: Path, text: str | None, seconds: float, held: bool
) -> None:
    path = foreign(results, seconds, text)
    before = path.read_bytes()
    answer = try_to_hold(results, minutes=10)
    assert (answer == "held") == held and path.exists() == (not held)
    if not held:
        assert answer[1] == CLAIMED_ELSEWHERE and "last seen 50" in answer[0] and path.read_bytes() == before


def test_a_claim_shows_life(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    with claimed(results, ROW, 10):
        path = claim_path(results, ROW)
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert path.stat().st_mtime > time.time() - 60


def test_who_loses_a_claim_ends_without_touching_the_new_one(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    path = claim_path(results, ROW)
    taken = pytest.raises(NothingToDo, match="taken over by process 1 on far since then")
    with taken as end, claimed(results, ROW, 10):
        owner = json.loads(path.read_text()) | {"token": "t", "host": "far", "pid": 1, "since": "then"}
        path.write_text(json.dumps(owner))
        for _ in range(100):
            time.sleep(0.1)
        raise AssertionError("still running")
    assert end.value.code == CLAIMED_ELSEWHERE and json.loads(path.read_text()) == owner


def test_workers_at_once_do_each_row_once(results: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(results)]) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    done = [line.split(",")[NAMES.index("bits")] for line in results.read_text().splitlines()[1:]]
    assert sorted(done) == list("234567") and not claims_folder(results).exists()


def test_a_place_that_takes_no_claims_is_a_user_s_mistake(results: Path) -> None:
    claims_folder(results).write_text("a file")
    with pytest.raises(UserError, match="--results: cannot write"), claimed(results, ROW, 10):
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
