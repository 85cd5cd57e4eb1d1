"""Ctrl-C at any moment: one line, exit code 130. The whole process group gets it, as from a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands in for torch: says that its import has begun, and lasts as long as the process that waits for it.
SLOW_IMPORT = """
import os, sys, time
print("reached", flush=True)
parent = os.getppid()
while os.getppid() == parent:
    try:
        time.sleep(0.02)
    except BaseException:  # as a library may that tries whether it can import something
        pass
sys.exit(0)
"""
ROW = """
import os, sys, time
def main(argv):
    print("reached", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.02)
    print("a row outlived its sweep", flush=True)
    return 0
"""
SWEEP = """
from logart.interrupt import guarded
from logart.runs.process import run_in_subprocess
raise SystemExit(guarded("sweep", lambda argv: run_in_subprocess(["row"])))
"""
COMMAND = """
import argparse, sys
from logart.cli import FlagParser, run_command
from logart.networks.data import ImageSource, Preprocessing, Split
from logart.networks.loader import validation_batches
def load(name):
    print("reached", flush=True)
    while True:
        pass
def command(args):
    split = Split(["a"] * 8, [0] * 8, load, Preprocessing((1, 8, 8), 1.0, "bilinear", (0.5,), (0.5,)))
    list(validation_batches(ImageSource("data", ("a",), split, split), 2, workers=2))
raise SystemExit(run_command(FlagParser(prog="command"), command, []))
"""
MOMENTS = {
    "the CNN track imports": (["-m", "logart_cnn.main"], "logart-cnn: interrupted; nothing was recorded"),
    "the transformer track imports": (["-m", "logart_vit.main"], "logart-vit: interrupted; nothing was recorded"),
    "inspect imports": (["-m", "logart.inspect"], "logart-inspect: interrupted; nothing was recorded"),
    "export imports": (["-m", "logart.export"], "logart-export: interrupted; nothing was recorded"),
    "report imports": (["-m", "logart.report"], "logart-report: interrupted; nothing was recorded"),
    "compare imports": (["-m", "logart.compare"], "logart-compare: interrupted; nothing was recorded"),
    "a sweep's first row imports": (
        [str(ROOT / "scripts" / "ablation.py"), "cnn"],
        "ablation: interrupted; the same call goes on with the rows that are missing",
    ),
    "the demo's first row imports": (
        [str(ROOT / "scripts" / "demo.py")],
        "demo: interrupted; the rows of finished runs are in demo.csv",
    ),
    "a row runs": (["-c", SWEEP], "sweep: interrupted; nothing was recorded"),
    "workers read images": (["-c", COMMAND], "command: interrupted; nothing was recorded"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start processes otherwise")
def heed_interrupts() -> None:
    """A shell's background job, as tests may run in, ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_takes_one_line(moment: str, tmp_path: Path) -> None:
    words, line = MOMENTS[moment]
    if "import" in moment:
        (tmp_path / "torch.py").write_text(SLOW_IMPORT)
    (tmp_path / "row.py").write_text(ROW)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert process.stdout is not None
    for text in process.stdout:
        if text == "reached\n":
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, line + "\n")
    assert "outlived" not in out
