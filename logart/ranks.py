"""One run on several devices: what the ranks that torchrun started say to each other.

Every rank runs the whole command, on its own share of the images (`own_batches`). A sum over images ends in `all_sum`,
and what only the first rank knows comes by `from_first`; the first rank alone prints and writes. A rank that ends early
leaves word of why; the others, which wait for it sooner or later, end too, and one of them prints the one line. In a
single process none of this does anything.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from logart.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = timedelta(minutes=10)  # that a rank waits for the others: they have equal work
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by which torchrun says who is who


class RankLost(BaseException):
    """Another rank has ended, or torchrun ends this one; the message is the line for the user.

    Like an interrupt it passes whatever catches errors. `code` is set where the first rank ended as it should.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class _Group:
    """The ranks: of this process, how many there are, the same of this machine, and where all can leave word."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: Any


_group: _Group | None = None


def rank() -> int:
    """Of this process; 0 where it is alone."""
    return 0 if _group is None else _group.rank


def size() -> int:
    """How many ranks share the run."""
    return 1 if _group is None else _group.size


def is_first() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def local_rank() -> int:
    """Of this process among those of its machine."""
    return 0 if _group is None else _group.local_rank


def local_size() -> int:
    """How many ranks share this machine."""
    return 1 if _group is None else _group.local_size


def own_batches(count: int, batch_size: int) -> list[range]:
    """This rank's batches of `count` images, in order: every `size()`-th of those that a single process would have.

    Where there are fewer than ranks, each is divided into equal parts first.
    """
    whole = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    for parts in range(1, batch_size + 1):
        batches = [part for batch in whole for part in _divided(batch, parts)]
        if len(batches) >= size():
            break
    return batches[rank() :: size()]


def _divided(whole: range, parts: int) -> list[range]:
    ends = [len(whole) * i // parts for i in range(parts + 1)]
    return [whole[a:b] for a, b in zip(ends, ends[1:], strict=False) if a < b]


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in its place; all ranks get the same bits."""
    if _group is not None:
        import torch
        import torch.distributed as dist

        with _listening():
            if tensor.device.type == "cuda":  # NCCL would wait for a rank that is gone; gloo notices
                dist.all_reduce(torch.zeros(1))
            dist.all_reduce(tensor)
    return tensor


def from_first(value: Any) -> Any:
    """What the first rank has; anything that can be pickled."""
    if _group is None:
        return value
    import torch.distributed as dist

    values = [value]
    with _listening():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """What every rank has, by rank."""
    if _group is None:
        return [value]
    import torch.distributed as dist

    values = [None] * _group.size
    with _listening():
        dist.all_gather_object(values, value)
    return values


def all_rows(tensor: Tensor) -> Tensor:
    """Every rank's rows, by rank."""
    if _group is None:
        return tensor
    import torch

    return torch.cat(gather(tensor.cpu())).to(tensor.device)


@contextmanager
def joined(prog: str, argv: Sequence[str] | None = None) -> Iterator[None]:
    """While the context lasts, the processes that torchrun started are the ranks of one run.

    Args:
        prog: what the line of a run that fails begins with.
        argv: the flags, which must be those of every rank; None for the process's own.

    Raises:
        SystemExit: the ranks do not find each other or have different flags, or one of them has ended.
    """
    global _group
    if not _started_by_torchrun(os.environ):
        yield
        return
    import torch.distributed as dist

    before = signal.signal(signal.SIGTERM, _ended)  # by which torchrun ends the ranks that are left
    try:
        _group = _meet(prog)
        with _silent_unless_first(), warnings.catch_warnings():
            if _group.rank:
                warnings.simplefilter("ignore")
            _check_flags(prog, list(sys.argv[1:] if argv is None else argv))
            yield
    except RankLost as lost:
        if lost.code is None:
            _say_once(f"{prog}: {lost}")
        raise SystemExit(1 if lost.code is None else lost.code) from None
    except Exception as error:  # of ours, which keeps its traceback
        _leave_word(f"{type(error).__name__}: {one_line(error)}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        _group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def say(prog: str, message: object) -> None:
    """Print the line with which a command ends on stderr; of a rank that is not the first, the first prints it."""
    if _group is not None and _group.rank:
        _leave_word(str(message))
    else:
        _say_once(f"{prog}: {message}")


def end(code: int) -> None:
    """Let all ranks end with this code, without a word; the first has said it."""
    if _group is not None:
        _group.store.set("code", str(code))


def _started_by_torchrun(environment: Mapping[str, str]) -> bool:
    return all(name in environment for name in VARIABLES) and environment["WORLD_SIZE"] != "1"


def _meet(prog: str) -> _Group:
    """Wait for all ranks."""
    import torch
    import torch.distributed as dist

    environment = os.environ
    try:
        store, number, count = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        print(f"{prog}: torchrun's ranks do not find each other ({one_line(error):.200})", file=sys.stderr)
        raise SystemExit(1) from None
    local = int(environment.get("LOCAL_RANK", number)), int(environment.get("LOCAL_WORLD_SIZE", count))
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives the ranks
    return _Group(number, count, *local, dist.PrefixStore(f"logart/{attempt}", store))


def _check_flags(prog: str, flags: list[str]) -> None:
    others = [number for number, theirs in enumerate(gather(flags)) if theirs != from_first(flags)]
    if others:
        say(prog, f"torchrun's rank {others[0]} was given other flags than rank 0; expected the same for all of a run")
        raise SystemExit(2)


@contextmanager
def _silent_unless_first() -> Iterator[None]:
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _listening() -> Iterator[None]:
    """What goes wrong while ranks talk is that one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(f"one of {size()} ranks has ended ({one_line(error):.80})") from error


def _ended(number: int, frame: Any) -> NoReturn:
    raise _lost(f"ended, or one of {size()} ranks was killed (SIGTERM)")


def _lost(message: str) -> RankLost:
    """What to raise, with the word that another rank has left, if any."""
    assert _group is not None
    try:
        if _group.store.check(["code"]):
            return RankLost("", int(_group.store.get("code")))
        return RankLost(_group.store.get("word").decode() if _group.store.check(["word"]) else message)
    except RuntimeError:  # the store went with its rank
        return RankLost(message)


def _leave_word(message: str) -> None:
    assert _group is not None
    with suppress(RuntimeError):
        _group.store.set("word", f"rank {_group.rank}: {message}")


def _say_once(line: str) -> None:
    """Print a line on stderr, unless another rank has printed one."""
    if _group is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the line is on its way
        with suppress(RuntimeError):
            if _group.store.add("said", 1) > 1:
                return
    print(line, file=sys.stderr, flush=True)
