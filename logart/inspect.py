"""What a packed file holds: `python -m logart.inspect --help`. The work is in `packed.inspect`."""

from __future__ import annotations

import sys

from logart.interrupt import run_entry


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_entry("logart-inspect", "logart.packed.inspect", argv)


if __name__ == "__main__":
    sys.exit(main())
