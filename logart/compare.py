"""Packed files and runs on the same images: `python -m logart.compare --help`. The work is in `report.compare`."""

from __future__ import annotations

import sys

from logart.interrupt import run_entry


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_entry("logart-compare", "logart.report.compare", argv)


if __name__ == "__main__":
    sys.exit(main())
