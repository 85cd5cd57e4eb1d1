"""What every run needs from its surroundings: the user's-mistake error, seeds, the device, progress bars."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm


class UserError(ValueError):
    """A mistake the user can mend: one line that names the flag, what was seen and what was expected.

    The command lines print it on stderr without a traceback and exit with code 2.
    """


def seed_everything(seed: int) -> None:
    """Seed every source of randomness and ask for deterministic kernels, so that equal runs give equal codes."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU; anything else is torch's own name for a device.

    Raises:
        UserError: `name` is no device, or CUDA is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: no device {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: {name} asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {name!r} is not supported; expected auto, cpu, cuda or cuda:N")
    return device


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far, in MiB: of the GPU on CUDA, of the whole process (resident set) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # absent on Windows, where only this figure is missing
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextmanager
def progress_bar(total: int, title: str, quiet: bool) -> Iterator[tqdm]:  # type: ignore[type-arg]
    """A tqdm bar on stderr: what runs now, its loss, the time left. Nothing when quiet.

    Where stderr is no terminal a bar would leave a line per redraw, so it is redrawn only every 30 seconds.
    """
    import sys

    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, desc=title, disable=quiet, mininterval=interval, leave=False) as bar:
        yield bar
