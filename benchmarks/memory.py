"""The memory of this process, in MiB, and its peak since a moment of one's choice (Linux)."""

from __future__ import annotations

import ctypes
from pathlib import Path


def reset_peak() -> None:
    """Let the peak begin anew from what is resident now, once freed memory has been given back."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most that was resident since the last reset."""
    return _status("VmHWM")


def resident_mib() -> float:
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
