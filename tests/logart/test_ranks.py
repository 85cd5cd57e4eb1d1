"""Two ranks on this machine, started by torchrun: the same codes as one process, and an end that is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pinned_runs import SURROUNDINGS
from small_runs import rows
from test_pinned_codes import PINNED, torch_release

from logart import ranks
from logart.errors import UserError
from logart.runtime import resolve_device
from logart_cnn.main import main

ROOT = Path(__file__).parents[2]
FLAGS = ["--rounding", "compensated", "--calib_samples", "64", "--workers", "0", "--val_batch_size", "100"]


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests", timeout=120)


def both_ranks(*words: list[str], **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """What torchrun would start on one machine, without torchrun's own process: each rank with words of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank, own in enumerate(words):
        named = {"RANK": str(rank), "WORLD_SIZE": str(len(words)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        named |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *own]
        started.append(subprocess.Popen(command, env={**os.environ, **named}, cwd=ROOT / "tests", **pipes))
    ends = [process.communicate(timeout=120) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *end)
        for process, end in zip(started, ends, strict=True)
    ]


def own_lines(text: str) -> list[str]:
    """The lines of ours, among all that torchrun says."""
    return [line for line in text.splitlines() if line.startswith("logart-cnn: ")]


@pytest.mark.parametrize("count, batch_size, size", [(64, 32, 2), (70, 32, 2), (32, 32, 3), (33, 32, 4), (3, 32, 3)])
def test_every_image_is_one_rank_s_and_every_rank_has_one(
    count: int, batch_size: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks.own_batches(count, batch_size) == [range(i, min(i + batch_size, count))
                                                    for i in range(0, count, batch_size)]  # fmt: skip
    shares = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "_group", ranks._Group(rank, size, rank, size, None))
        batches = ranks.own_batches(count, batch_size)
        # No batch reaches over the borders of a single process's batches.
        assert all(0 < len(b) <= batch_size and b.start // batch_size == (b.stop - 1) // batch_size for b in batches)
        shares.append([image for batch in batches for image in batch])
        assert shares[-1] and shares[-1] == sorted(shares[-1])
    assert sorted(image for share in shares for image in share) == list(range(count))


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(ranks, "_group", ranks._Group(3, 4, 1, 2, None))  # the second of the second machine
    assert [str(resolve_device(name)) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(UserError, match="--device: cuda:0 for 2 ranks"):
        resolve_device("cuda:0")
    monkeypatch.setattr(ranks, "_group", ranks._Group(3, 4, 3, 4, None))
    with pytest.raises(UserError, match="--device: cuda for 4 ranks, and torch sees 2 CUDA devices"):
        resolve_device("auto")


def test_ranks_of_other_flags_are_refused_in_one_line() -> None:
    program = "import sys; from logart.ranks import joined\nwith joined('logart-cnn', sys.argv[1:]): print('ran')"
    ended = both_ranks(["-c", program, "--bits", "3"], ["-c", program, "--bits", "4"])
    assert [rank.returncode for rank in ended] == [2, 2] and [rank.stdout for rank in ended] == ["", ""]
    assert own_lines(ended[0].stderr + ended[1].stderr) == [
        "logart-cnn: torchrun's rank 1 was given other flags than rank 0; expected the same for all of a run"
    ]


@pytest.mark.skipif(torch_release() != PINNED["torch"], reason="pinned with another torch")
def test_two_ranks_find_the_codes_of_one_process() -> None:
    labels = "(nearest|compensated) dynamic 3$|_wise 4$|learned perturbation|learned mae"
    words = ["pinned_runs.py", "digits_resnet,digits_vit", labels]
    first, second = both_ranks(words, words, **SURROUNDINGS)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    seen = json.loads(first.stdout)
    assert len(seen) == 9 and seen == {label: PINNED[label.split()[0]][label] for label in seen}


def test_a_rank_that_is_killed_ends_the_run_with_one_line_and_any_number_of_ranks_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone, run, results = tmp_path / "alone", tmp_path / "run", tmp_path / "results.csv"
    argv = [*FLAGS, "--results", str(results)]
    assert main([*argv, "--run_dir", str(alone)]) == 0
    result = torchrun("rank_ends.py", "killed", "blocks.2", *argv, "--run_dir", str(run))
    assert result.returncode == 1
    (line,) = own_lines(result.stderr)
    assert re.fullmatch(
        rf"logart-cnn: (one of 2 ranks has ended|ended, or one of 2 ranks).*; go on with --resume {run}", line
    )
    printed = [line for line in result.stdout.splitlines() if line.startswith("float ")]
    assert len(printed) == len(rows(results)) == 1  # the first rank printed, nobody wrote a row
    kept = sorted(path.name for path in (run / "blocks").iterdir())
    assert len(kept) == 3
    again = tmp_path / "again"
    shutil.copytree(run, again)
    assert main(["--resume", str(again)]) == 0
    other = tmp_path / "other.csv"
    result = torchrun("-m", "logart_cnn.main", "--resume", str(run), "--results", str(other))
    assert result.returncode == 0 and own_lines(result.stderr) == [], result.stderr
    found = rows(results) + rows(other)
    assert [row["device"] for row in found] == ["cpu", "cpu", "2 × cpu"]
    assert len({row["Acc@1"] for row in found}) == 1
    packed = [(folder / "packed.safetensors").read_bytes() for folder in (alone, again, run)]
    assert packed[0] == packed[1] == packed[2]


def test_the_error_of_one_rank_is_the_run_s_line(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    result = torchrun("rank_ends.py", "refuses", "blocks.1", *FLAGS, "--results", str(results))
    assert result.returncode == 1 and not results.exists()
    (line,) = own_lines(result.stderr)
    assert line.startswith("logart-cnn: rank 1: --arch, --checkpoint: image 1 is not finite (")
