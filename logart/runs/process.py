"""A command in a process of its own, without its seconds of imports: for scripts that run several."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from typing import Any

from logart.interrupt import INTERRUPTED, processes_without_interrupt


def run_in_subprocess(words: Sequence[str], *also: str) -> int:
    """Run a command in a process of its own, so that memory and seeds are fresh.

    Args:
        words: the module of an entry point, with a `main`, and its flags.
        also: other modules that it will ask for; those of the first call are the ones that count.

    Ctrl-C ends the process, which prints nothing then: the one line is the caller's.

    Returns:
        Its exit code; negative for the signal that ended it.
    """
    # A fork of a process that has imported all and done nothing: torch takes seconds to import, a row that is there
    # a tenth of one. Not of this process, which may have asked for GPUs.
    known = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    process = context.Process(target=_main, args=(words, multiprocessing.get_start_method()))
    with processes_without_interrupt():
        if hasattr(context, "set_forkserver_preload"):
            context.set_forkserver_preload([words[0], *also])
            forkserver.ensure_running()
        else:
            process.start()
    try:
        if process.ident is None:
            process.start()  # may wait for the server's imports, which Ctrl-C need not
        process.join()
    except BaseException:  # Ctrl-C and SIGTERM
        if process.ident is not None:
            process.terminate()  # the system frees the lock on its row
            process.join()
        raise
    code: int = process.exitcode
    return code


def _main(words: Sequence[str], start_method: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # interrupted while it waited for the imports
        sys.exit(INTERRUPTED)
    # A forked process would start its own, those that read images, by a server too, which imports all over again.
    multiprocessing.set_start_method(start_method, force=True)
    sys.exit(importlib.import_module(words[0]).main(list(words[1:])))
