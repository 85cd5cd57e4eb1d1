"""Where a file lies, and how it is written atomically; without torch, for what shall start at once."""

from __future__ import annotations

import os
from pathlib import Path


def real_place(path: str | Path) -> Path:
    """Where a file lies: behind a link, so that all who name it mean one file, and the link outlives its writing."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically, in place of any that is there or that a link there leads to.

    Raises:
        OSError: that failed.
    """
    path = real_place(path)
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}.partial")  # a long name has no room for more
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
