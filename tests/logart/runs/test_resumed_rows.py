"""A resumed run's row: in the results file once, wherever the run was killed and whatever its folder could take."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import disk_with, quiet_main, rows

import logart.runs.run
from logart.runs.run_folder import RunFolder
from logart_cnn.main import main

ARGV = "--iters_w 0 --workers 0 --device cpu --quiet".split()
# What the process does last: the owner of a function, its name, and the call of it that is the last.
MOMENTS = {
    "the network is kept": (logart.runs.run, "save_packed", 1),
    "the network is saved": (logart.runs.run, "save_packed", 2),
    "the row is appended": (logart.runs.run, "append_row", 1),
    "the run is finished": (RunFolder, "finish", 1),
}


def killed_after(moment: str, argv: list[str], folder: Path) -> None:
    """A process that kills itself there."""
    os.chdir(folder)
    owner, name, calls = MOMENTS[moment]
    original, seen = getattr(owner, name), []

    def last(*args: Any) -> Any:
        result = original(*args)
        seen.append(name)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, last)
    quiet_main(main, argv)


def kill(moment: str, argv: list[str], folder: Path = Path()) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["logart_cnn.command", "logart_vit.command", "sklearn.datasets"])
    process = context.Process(target=killed_after, args=(moment, argv, folder.absolute()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_around_its_row_has_it_once(
    moment: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, results, saved = tmp_path / "run", tmp_path / "results.csv", tmp_path / "net.safetensors"
    kill(moment, [*ARGV, "--once", "--run_dir", str(run), "--results", str(results), "--save", str(saved)])
    written = [(row["utc_time"], row["total_seconds"]) for row in rows(results)] if results.exists() else []
    assert len(written) == (moment in ("the row is appended", "the run is finished"))
    if moment == "the run is finished":
        assert saved.exists() and (run / "report.json").exists()
        return
    for _ in range(2):  # killed again, and then left to its end
        if not written:
            kill(moment, ["--resume", str(run)])
    assert main(["--resume", str(run)]) == 0
    assert saved.read_bytes() == (run / "packed.safetensors").read_bytes()
    (row,) = rows(results)
    assert not written or written == [(row["utc_time"], row["total_seconds"])]
    assert json.loads((run / "report.json").read_text())["row"]["run_id"] == row["run_id"]
    with pytest.raises(SystemExit):
        main(["--resume", str(run)])
    assert f"--resume: the run in {run} is finished" in capfd.readouterr().err


def test_a_folder_that_filled_up_knows_that_its_row_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither report nor packed file fits; the row has room elsewhere."""
    run, results = tmp_path / "run", tmp_path / "results.csv"
    argv = [*ARGV, "--run_dir", str(run), "--results", str(results)]
    with disk_with(4096), pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and len(rows(results)) == 1
    *_, line = capfd.readouterr().err.splitlines()
    assert line == (f"logart-cnn: --run_dir: cannot write to {run} (File too large); the row is in {results}; "
                    f"--resume {run} writes the rest when it can")  # fmt: skip
    before = results.read_bytes()
    assert main(["--resume", str(run), "--quiet"]) == 0
    assert results.read_bytes() == before
    assert (run / "packed.safetensors").exists() and (run / "report.json").exists()
