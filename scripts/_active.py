"""Exit code 0 where this interpreter has the project and all that the extras named (comma-separated) need."""

from __future__ import annotations

import re
import sys
from importlib import metadata, util


def ready(extras: set[str]) -> bool:
    """Whether `import logart` works, with every requirement installed."""
    if not all(map(util.find_spec, ("logart", "torch", "timm"))):
        return False
    try:
        requirements = metadata.requires("logart") or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return not any(extras)
    for requirement in requirements:
        extra = re.search(r"extra == .([\w-]+)", requirement)
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        if extra is None or extra[1] in extras:
            try:
                metadata.version(name[0])
            except metadata.PackageNotFoundError:
                return False
    return True


if __name__ == "__main__":
    sys.path = [folder for folder in sys.path if folder != sys.path[0]]  # which is the scripts' own
    sys.exit(0 if ready(set(sys.argv[1].split(","))) else 1)
