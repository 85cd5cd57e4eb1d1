"""Timing two ways of computing the same thing in one run: medians, taken in turn, so that drift hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def in_turn(first: Callable[[], object], second: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median seconds of each, `runs` runs in turn after one warm-up of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for function, taken in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            function()
            if run:
                taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
