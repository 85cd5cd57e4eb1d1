"""Quantize a vision transformer and measure it: `python -m logart_vit.main --help`. The work is in `command`."""

from __future__ import annotations

import sys

from logart.interrupt import run_entry


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_entry("logart-vit", "logart_vit.command", argv)


if __name__ == "__main__":
    sys.exit(main())
