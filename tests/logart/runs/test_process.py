"""Commands in processes of their own, forked from one that has imported what they need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import multiprocessing, os, signal, sys
print("imported by", os.getppid(), flush=True)
def main(argv):
    print("run by", os.getpid(), multiprocessing.get_start_method(), flush=True)
    if argv == ["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(argv[0])
"""
CALLER = """
import multiprocessing, os
from logart.runs.process import run_in_subprocess as run
print("asked by", os.getpid(), multiprocessing.get_start_method(), flush=True)
print("codes", run(["command", "0"]), run(["command", "3"]), run(["command", "die"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start processes otherwise")
def test_each_run_has_its_own_process_and_the_imports_are_done_once(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CALLER], env=environment, capture_output=True, text=True, timeout=60)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and lines[-1] == ["codes", "0", "3", "-9"], done.stderr
    (asked,), runs = ([line for line in lines if line[:2] == [how, "by"]] for how in ("asked", "run"))
    assert [line for line in lines if line[0] == "imported"] == [["imported", "by", asked[2]]]
    assert len({line[2] for line in [asked, *runs]}) == 4
    assert {line[3] for line in runs} == {asked[3]}  # processes that they start are begun as they are elsewhere
