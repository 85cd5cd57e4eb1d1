"""Seeds, devices, memory, and progress that can be read in a terminal and in a log."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from logart.errors import UserError
from logart.runtime import peak_memory_mb, progress_bar, resolve_device, seed_everything


@pytest.fixture(autouse=True)
def generators_as_before() -> Iterator[None]:
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        yield
    np.random.set_state(numpy_state)
    random.setstate(python_state)


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.random(), torch.rand(()).item()


def test_a_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)


def test_a_seed_decides_every_generator() -> None:
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("available", [True, False])
def test_auto_is_cuda_where_there_is_one(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto") == torch.device("cuda" if available else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


def test_cuda_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="^--device: cuda:2 asked for, but torch sees 2 CUDA devices$"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="^--device: cuda asked for, but torch sees 0 CUDA devices$"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["", "gpu", "mps", "meta", "cuda:", "cuda:-1", "CPU", "0"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^--device: .*expected auto, cpu, cuda or cuda:N$"):
        resolve_device(name)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process holds now from /proc")
def test_peak_memory_is_in_mebibytes_and_at_least_what_is_held_now() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert 0.99 * held < peak_memory_mb(torch.device("cpu")) < 100 * held


def test_in_a_log_progress_is_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(30, "LLR", quiet=False) as bar:
        bar.mininterval = 0
        for step in range(3):
            bar.set_description(f"LLR block{step}", refresh=False)
            bar.set_postfix(loss=f"{step}.5", refresh=False)
            bar.update(10)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and "\x1b" not in err and err.endswith("\n")
    assert len(lines) >= 3 and all(lines)
    for step, line in enumerate(lines[-3:]):
        assert f"LLR block{step}" in line and f"{10 * step + 10}/30" in line
        assert f"loss={step}.5" in line and "left" in line


def test_in_a_log_quick_work_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(1000, "evaluate", quiet=False) as bar:
        for _ in range(1000):
            bar.update()
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_one_line_is_redrawn_and_wiped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(2, "LLR", quiet=False) as bar:
        bar.mininterval = 0
        bar.update(2)
    err = capsys.readouterr().err
    assert "LLR" in err and "2/2" in err and "\n" not in err
    assert err.count("\r") > 1 and err.endswith("\r")
    assert not err.rstrip("\r").rpartition("\r")[2].strip()


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_prints_nothing(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar(2, "LLR", quiet=True) as bar:
        bar.set_description("LLR block")
        bar.set_postfix(loss="1")
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_closed_when_its_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress_bar(2, "LLR", quiet=False) as bar:
        raise KeyError
    assert bar.disable  # what tqdm sets on closing
