"""Ctrl-C: one line and exit code 130 at any moment of a command, also while it imports what takes seconds."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from logart import ranks

INTERRUPTED = 130  # the exit code that a shell gives for SIGINT


def run_entry(prog: str, module: str, argv: list[str] | None) -> int:
    """Run the `main` of a module that takes seconds to import; arguments as for `guarded`."""

    def imported(argv: list[str] | None) -> int:
        with leaving_at_once(prog):
            main = import_module(module).main
        return main(argv)  # type: ignore[no-any-return]

    return guarded(prog, imported, argv)


def guarded(prog: str, main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """The exit code of `main`, whenever Ctrl-C comes.

    Args:
        prog: what the line after Ctrl-C begins with.
        main: from the arguments to the exit code.
        argv: None for the process's own, which ends with this call: a Ctrl-C after its last word changes nothing.
    """
    try:
        code = main(argv)
        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        return interrupted(prog)
    return code


def interrupted(prog: str, how: object = "nothing was recorded") -> int:
    """Print the line and return the exit code."""
    ranks.say(prog, f"interrupted; {how}")
    return INTERRUPTED


@contextmanager
def leaving_at_once(prog: str) -> Iterator[None]:
    """While modules are imported: end the process at Ctrl-C without an exception, which might be taken for theirs."""

    def leave(number: int, frame: Any) -> NoReturn:
        os.write(2, f"{prog}: interrupted; nothing was recorded\n".encode())
        os._exit(INTERRUPTED)

    acts = signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread()
    if acts:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if acts:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def processes_without_interrupt() -> Iterator[None]:
    """Processes started meanwhile never see the terminal's Ctrl-C: who started them ends them, and has the one word.

    Nothing is lost: an interrupt that comes meanwhile is acted on at the end.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # its start would lift what is held back here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
