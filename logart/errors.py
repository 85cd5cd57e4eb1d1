"""The errors that reach a user; here alone, so that what names one need not wait for torch to load."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend: one line that names the flag, what was seen and what was expected.

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


def printable(text: object) -> str:
    """Text that may quote a file, with a sign in place of what would move a terminal's cursor or a page's marks."""
    return "".join(c if c.isprintable() else "�" for c in str(text))
