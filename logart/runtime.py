"""What every run needs from its surroundings: seeds, the device, whole files, progress bars."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from logart import ranks
from logart.errors import UserError


def seed_everything(seed: int) -> None:
    """Seed every source of randomness and ask for deterministic kernels, so that equal runs give equal codes."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # matrix products have float32's mantissa already, convolutions had not
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # the gradients of this attention kernel vary from run to run


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU; anything else is torch's own name for a device.

    Of several ranks on a machine each has its own GPU.

    Raises:
        UserError: `name` is no device, or CUDA is asked for where there is none.
    """
    if name == "auto":
        return _of_rank(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: no device {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: {name} asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {name!r} is not supported; expected auto, cpu, cuda or cuda:N")
    return _of_rank(device)


def _of_rank(device: torch.device) -> torch.device:
    if device.type != "cuda" or ranks.size() == 1:
        return device
    if device.index is not None or ranks.local_size() > torch.cuda.device_count():
        seen = f"{device} for {ranks.local_size()} ranks, and torch sees {torch.cuda.device_count()} CUDA devices"
        raise UserError(f"--device: {seen}; expected auto or cuda, and a device for each rank")
    return torch.device("cuda", ranks.local_rank())


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far, in MiB: of the GPU on CUDA, of the whole process (resident set) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # absent on Windows, where only this figure is missing

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class _Lines(tqdm):  # type: ignore[type-arg]
    """A bar for logs and pipes, where redrawing in place would leave control characters: a plain line at a time."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            print(str(self), file=sys.stderr, flush=True)


@contextmanager
def progress_bar(total: int, title: str, quiet: bool) -> Iterator[tqdm]:  # type: ignore[type-arg]
    """A tqdm bar on stderr: what runs now, its loss, the time left; a line every 30 s where stderr is no terminal."""
    if sys.stderr.isatty():
        bar = tqdm(total=total, desc=title, disable=quiet, leave=False)
    else:
        form = "{desc} {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
        bar = _Lines(total=total, desc=title, disable=quiet, leave=False, mininterval=30.0, delay=1e-9, bar_format=form)
    with bar:
        yield bar
