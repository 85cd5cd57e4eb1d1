"""A packed network for other tools: `python -m logart.export --help`. The work is in `command`."""

from __future__ import annotations

import sys

from logart.interrupt import run_entry


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_entry("logart-export", "logart.export.command", argv)


if __name__ == "__main__":
    sys.exit(main())
