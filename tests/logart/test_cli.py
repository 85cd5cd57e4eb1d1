"""Flags in two spellings, errors of one line, flags that cannot act, exit codes."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from logart.cli import FlagParser, finite, flags_passed, key_values, refuse_without_effect, run_command
from logart.errors import UserError


@pytest.fixture
def parser() -> FlagParser:
    made = FlagParser(prog="tool")
    made.flag("--batch_size", type=int)
    made.flag("--rrweight", "--rounding-weight", type=float)
    made.flag("--calib_augment", action="store_true")
    made.flag("--channel-wise", action=argparse.BooleanOptionalAction)
    made.flag("--mode", choices=["a", "b"], dest="chosen")
    return made


def nothing(args: argparse.Namespace) -> None:
    """A command that does its work."""


def failing(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def command(args: argparse.Namespace) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--batch_size", "3"], "batch_size", 3),
        (["--batch-size=3"], "batch_size", 3),
        (["--rrweight", "2"], "rrweight", 2.0),
        (["--rounding_weight", "2"], "rrweight", 2.0),
        (["--rounding-weight", "2"], "rrweight", 2.0),
        (["--calib_augment"], "calib_augment", True),
        (["--calib-augment"], "calib_augment", True),
        (["--channel_wise"], "channel_wise", True),
        (["--channel-wise"], "channel_wise", True),
        (["--no-channel_wise"], "channel_wise", False),
        (["--no-channel-wise"], "channel_wise", False),
        (["--mode", "b"], "chosen", "b"),
    ],
)
def test_both_spellings_set_one_destination(parser: FlagParser, argv: list[str], name: str, value: object) -> None:
    args = vars(parser.parse_args(argv))
    assert args.pop(name) == value
    assert set(args.values()) == {None}  # a flag that was not given can be told from one given its default


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--batch", "; did you mean --batch_size?"),
        ("--rounding_weigth=3", "; did you mean --rrweight?"),  # of two spellings, the one that is shown
        ("--no-chanel-wise", "; did you mean --no-channel_wise?"),
        ("-mode", "; did you mean --mode?"),
        ("--other-one", "; ask the other command"),
        ("--xyz", ""),
        ("mode", ""),
    ],
)
def test_an_unknown_word_gets_a_hint(
    parser: FlagParser, word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser.elsewhere({"other_one": "ask the other command"})
    with pytest.raises(SystemExit):
        parser.parse_args([word])
    assert capsys.readouterr().err == f"tool: unrecognized arguments: {word}{hint}\n"


@pytest.mark.parametrize(("value", "hint"), [("A", "did you mean a?"), ("x", "expected one of a, b")])
def test_a_wrong_choice_gets_a_hint(
    parser: FlagParser, value: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--mode", value])
    assert capsys.readouterr().err == f"tool: --mode: invalid choice: {value!r}; {hint}\n"


def test_help_is_in_groups_that_show_one_spelling_and_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = FlagParser(["first", "second", "empty"], prog="tool")
    parser.flag("--late-one", "--later", group="second", default=7, help="b", type=int)
    parser.flag("--early", group="first", default="off", help="a", action="store_true")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "first: --early a (default: off) second: --late_one LATE_ONE b (default: 7)" in text
    assert "--later" not in text and "--late-one" not in text and "empty:" not in text
    assert vars(parser.parse_args([])) == {"early": None, "late_one": None}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_size", "x"], "--batch_size: invalid int value: 'x'"),
        (["--batch-size"], "--batch_size: expected one argument"),
        (["--batch", "3"], "unrecognized arguments: --batch 3; did you mean --batch_size?"),
        (["--quick"], "unrecognized arguments: --quick"),
        (["--mode", "c\nd"], "--mode: invalid choice: "),
    ],
)
def test_a_bad_flag_takes_one_line_and_code_2(
    parser: FlagParser, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(parser, nothing, argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith(f"tool: {message}") and err.count("\n") == 1


def test_help_goes_to_stdout_with_code_0(parser: FlagParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(parser, nothing, ["--help"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0 and err == ""
    assert "--batch_size" in out and "--no-channel_wise" in out


def test_a_command_gets_the_parsed_flags_and_its_end_is_code_0(parser: FlagParser) -> None:
    seen: list[argparse.Namespace] = []
    assert run_command(parser, seen.append, ["--batch_size", "3"]) == 0
    assert [args.batch_size for args in seen] == [3]


def test_without_arguments_the_process_s_own_are_read(parser: FlagParser, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(sys, "argv", ["tool", "--batch_size", "5"])
    run_command(parser, seen.append, None)
    assert seen[0].batch_size == 5


def test_a_user_s_mistake_takes_one_line_and_code_2(parser: FlagParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(parser, failing(UserError("--data_path: no\n folder")), [])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "tool: --data_path: no folder\n")


def test_an_interrupt_takes_one_line_and_code_130(parser: FlagParser, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(parser, failing(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr() == ("", "tool: interrupted; nothing was recorded\n")


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), OSError("ours"), KeyError("k")])
def test_our_own_mistakes_keep_their_traceback(parser: FlagParser, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_command(parser, failing(error), [])
    assert caught.value is error


def test_what_stdout_cannot_encode_does_not_end_the_run(parser: FlagParser, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run_command(parser, lambda args: print("√2 of w\udcff.pth"), []) == 0
    stdout.flush()
    assert stdout.buffer.getvalue() == b"\\u221a2 of w\\udcff.pth\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "1,5", "", "x"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' is not a finite number$"):
        finite(text)


def test_finite_numbers_pass() -> None:
    assert [finite(text) for text in ("1e-3", "-2", "0")] == [0.001, -2.0, 0.0]


def test_given_leaves_out_what_was_not_given(parser: FlagParser) -> None:
    args = parser.parse_args(["--no-channel_wise", "--rrweight", "0"])
    expected = {"channel_wise": False, "rrweight": 0.0}  # given, though false
    assert flags_passed(args, ["batch_size", "channel_wise", "rrweight"]) == expected


@pytest.mark.parametrize("argv", [["--rrweight", "0"], ["--no-channel-wise"], ["--rrweight=1", "--mode=a"]])
def test_idle_flags_are_refused_only_when_given_and_idle(parser: FlagParser, argv: list[str]) -> None:
    args = parser.parse_args(argv)
    flags = {"rrweight": "--rrweight", "channel_wise": "--channel_wise"}
    refuse_without_effect(args, flags, True, "never")
    refuse_without_effect(args, {"batch_size": "--batch_size"}, False, "not given")
    name = "--channel_wise" if "channel" in argv[0] else "--rrweight"
    with pytest.raises(UserError, match=f"^{name} has no effect here: nothing is learned$"):
        refuse_without_effect(args, flags, False, "nothing is learned")


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("k=1", 1),
        ("k=0.5", 0.5),
        ("k=True", True),
        ("k=None", None),
        ("k=(8,16)", (8, 16)),
        ("k='1'", "1"),
        ("k=relu", "relu"),
        ("k=a=b", "a=b"),
        ("k=", ""),
        ("k=1 2", "1 2"),
    ],
)
def test_values_are_literals_or_else_text(pair: str, value: Any) -> None:
    result = key_values([pair, "other=2"], "--model_kwargs")
    assert result == {"k": value, "other": 2} and type(result["k"]) is type(value)


@pytest.mark.parametrize("pair", ["k", "=1", "k-v=1", "1k=2", "", "k =1"])
def test_words_that_are_no_pairs_are_refused(pair: str) -> None:
    with pytest.raises(UserError, match="^--model_kwargs: .* is not of the form KEY=VALUE$"):
        key_values(["a=1", pair], "--model_kwargs")


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="^--model_kwargs: a is given twice$"):
        key_values(["a=1", "b=1", "a=1"], "--model_kwargs")


@pytest.mark.parametrize(("command", "unbuffered"), [("print('x' * 300)", ""), ("print('x' * 10**6)", "1")])
def test_a_reader_that_goes_away_ends_the_command_without_a_word(command: str, unbuffered: str) -> None:
    code = (
        "import sys; from logart.cli import FlagParser, run_command;"
        f"sys.exit(run_command(FlagParser(), lambda args: {command}, []))"
    )
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True, env=env)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_no_matter_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def command(args: argparse.Namespace) -> None:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        run_command(FlagParser(), command, [])
