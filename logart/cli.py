"""What both command lines share: flags in two spellings, one-line errors, flags without effect.

Only the entry points import this; the core never reads a command line.
"""

from __future__ import annotations

import argparse
import ast
import errno
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from logart import ranks
from logart.errors import Interrupted, NothingToDo, UserError, near_or_all, printable
from logart.interrupt import interrupted


class FlagParser(argparse.ArgumentParser):
    """An argument parser for flags with several spellings, of which help and errors show one; errors take one line.

    Args:
        groups: the titles of the help's groups, in order.
    """

    def __init__(self, groups: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self._titled = {title: self.add_argument_group(title) for title in groups}
        self._shown: dict[str, str] = {}  # a spelling with _, without dashes -> the flag
        self._elsewhere: dict[str, str] = {}

    def flag(
        self, name: str, *others: str, group: str | None = None, default: object = None, help: str = "", **kwargs: Any
    ) -> None:
        """Add a flag that is None unless given; each spelling may be written with - or _.

        Args:
            name: the spelling that is shown.
            others: those that are accepted too.
            group: the title of its group in the help.
            default: what the help says of it; None says nothing.
            help: what the flag is for.
            kwargs: as for `add_argument`.
        """
        shown = "--" + name[2:].replace("-", "_")
        help = help if default is None else f"{help} (default: {getattr(default, 'value', default)})"
        kwargs.setdefault("dest", shown[2:])
        to = self if group is None else self._titled[group]
        action = to.add_argument(shown, default=None, help=help, **kwargs)
        for option in action.option_strings:
            for spelling in (shown, *others):
                key = option.replace(shown[2:], spelling[2:])  # of --no-..., too
                self._shown[key[2:].replace("-", "_")] = option

    def elsewhere(self, flags: Mapping[str, str]) -> None:
        """Say what to do about flags, written with _ and without dashes, that another command has."""
        self._elsewhere |= flags

    def accepts(self, flag: str) -> bool:
        """Whether a flag, in any spelling, is one of these."""
        return self._in_one_spelling([flag])[0] in self._option_string_actions

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the parent's, of flags in any spelling."""
        return super().parse_known_args(self._in_one_spelling(sys.argv[1:] if args is None else args), namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the parent's; an unknown flag gets a hint."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
            hint = self._elsewhere.get(name, "")
            close = get_close_matches(name, self._shown, n=1)
            if not hint and close and unknown[0].startswith("-"):
                hint = f"did you mean {self._shown[close[0]]}?"
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + f"; {hint}" * bool(hint))
        return found

    def _in_one_spelling(self, words: Sequence[str]) -> list[str]:
        result: list[str] = []
        for index, word in enumerate(words):
            if word == "--":
                return result + list(words[index:])
            name, equals, value = word.partition("=")
            shown = self._shown.get(name[2:].replace("-", "_")) if name.startswith("--") else None
            result.append(word if shown is None else shown + equals + value)
        return result

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {near_or_all(str(value), choices)}")

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        message = " ".join(message.split()).removeprefix("argument ")
        message = printable(message)  # it may quote a file
        ranks.say(self.prog, message)
        raise SystemExit(2)


def run_command(parser: FlagParser, command: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse and run; a user's mistake becomes one line and exit code 2, ours keeps its traceback.

    Where the reader of stdout has gone (`| head`), the command ends without a word, with the code that a shell gives
    for it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks √, or a file name that is not UTF-8, must not end a run of hours.
        sys.stdout.reconfigure(errors="backslashreplace")
    args = argparse.Namespace()
    try:
        parser.parse_args(argv, args)
        command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 128 + 13  # SIGPIPE
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        flag = _flag_of(error, args, parser)
        if flag is None:
            raise
        parser.error(f"{flag}: cannot look at {error.filename} ({error.strerror}); expected a place that can be used")
    except NothingToDo as end:
        print(f"{parser.prog}: {end}", flush=True)
        ranks.end(end.code)
        return end.code
    except KeyboardInterrupt as error:
        return interrupted(parser.prog, *([error] if isinstance(error, Interrupted) else []))
    return 0


def _flag_of(error: OSError, args: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """The flag that named the place which the system refuses to look at; None for other errors and other places."""
    refused = error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
    if not refused or not isinstance(error.filename, (str, bytes, os.PathLike)):
        return None
    place = os.path.abspath(os.fsdecode(error.filename))
    named = {}
    for action in parser._actions:
        values = getattr(args, action.dest, None)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and Path(place).is_relative_to(os.path.abspath(value)):
                named[os.path.abspath(value)] = action.option_strings[0] if action.option_strings else action.dest
    return named[max(named, key=len)] if named else None


def _reader_is_gone() -> bool:
    """Whether it was stdout's pipe that broke; what is left to print goes nowhere then, as Python flushes at exit."""
    try:
        print(flush=True)  # what could not be written before may be forgotten, and would break nothing
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def finite(text: str) -> float:
    """A flag's number, as argparse's `type`; nan and inf are refused."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def flags_passed(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those flags among `names` (destinations) that the user gave."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def default_if_none(value: Any, default: Any) -> Any:
    """A flag's value, or the default where it was not given; an empty text is a value, and a mistake to be named."""
    return default if value is None else value


def refuse_without_effect(args: argparse.Namespace, flags: Mapping[str, str], acts: bool, why: str) -> None:
    """Raise UserError when a flag was given that has no effect.

    Args:
        flags: destination -> the flag as written in messages.
        acts: whether they act in this combination.
        why: what would have to be otherwise.
    """
    if acts:
        return
    for name, flag in flags.items():
        if getattr(args, name) is not None:
            raise UserError(f"{flag} has no effect here: {why}")


def key_values(pairs: Iterable[str], flag: str) -> dict[str, Any]:
    """`KEY=VALUE` words as a dictionary; values are Python literals where they look like one, else text.

    Raises:
        UserError: a word of another form, or a key given twice.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise UserError(f"{flag}: {pair!r} is not of the form KEY=VALUE")
        if key in result:
            raise UserError(f"{flag}: {key} is given twice")
        try:
            result[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[key] = value
    return result
