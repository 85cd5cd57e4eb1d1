"""The errors that reach a user; here alone, so that what names one need not wait for torch to load."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake the user can fix: one line that names the flag, what was seen and what was expected.

    The command lines print it on stderr without a traceback and exit with code 2.
    """


class NothingToDo(Exception):
    """The run ends here, and that is no mistake; the message says why, `code` is the command's exit code."""

    def __init__(self, why: str, code: int = 0) -> None:
        super().__init__(why)
        self.code = code


class NetworkError(ValueError):
    """The network, as it is, cannot be quantized or evaluated; the message names the layer, block or batch.

    In Python it is a ValueError; the command lines, where the network came from a flag, turn it into a `UserError`.
    """


class SettingError(NetworkError):
    """A setting that does not fit the network; the message begins with the setting's name."""


class PartlyQuantized(UserWarning):
    """Much of the network stays float."""


class NoRoomError(NetworkError):
    """The device, host memory or the disk is too small for the run; the message says which and for what."""


class NonFiniteError(NetworkError):
    """An image makes the network give NaN or infinite values; `image` is its index among the calibration images."""

    def __init__(self, message: str, image: int) -> None:
        super().__init__(message)
        self.image = image


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run that can go on; the message says how."""


def one_line(error: BaseException) -> str:
    """What an error of a library says, fit for a message of one line."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the known name which this one resembles; empty where none does."""
    known = list(known)
    near = get_close_matches(name, known, n=1) or get_close_matches(name.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def near_or_all(name: str, known: Iterable[str], more: str = "") -> str:
    """The end of an error about an unknown name: the known one that it resembles, else all of them, and `more`."""
    known = list(known)
    return did_you_mean(name, known) or f"expected one of {', '.join(known)}{more}"


def printable(text: object) -> str:
    """Text that may quote a file, with a sign in place of what would move a terminal's cursor or a page's marks."""
    return "".join(c if c.isprintable() else "�" for c in str(text))
