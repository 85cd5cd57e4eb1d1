"""The flags of both command lines: groups, spellings, defaults, and the other track's names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

import pytest

import logart_cnn.command
import logart_vit.command
from logart.cli import FlagParser
from logart.quantization.config import QuantConfig
from logart.runs.flag_groups import GROUPS, NAMES
from logart.runs.flags import network_arguments
from logart_vit.settings import Config

BUILD = {"cnn": logart_cnn.command.build_parser, "vit": logart_vit.command.build_parser}
SIDES = [("cnn", "vit"), ("vit", "cnn")]
# A flag's value, and what that is; other flags take the first of their choices, a number or a word.
SAMPLES: dict[str, tuple[list[str], object]] = {
    "scale_method": (["log_dynamic"], "dynamic"),
    "mean": (["1", "2"], [1.0, 2.0]),
    "std": (["1", "2"], [1.0, 2.0]),
    "model_kwargs": (["a=1"], ["a=1"]),
    "input_size": (["32"], 32),
    "scale_search": ([], "grid"),
}


def flags(parser: FlagParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def sample(action: argparse.Action) -> tuple[list[str], object]:
    if action.dest in SAMPLES:
        return SAMPLES[action.dest]
    if action.nargs == 0:
        return [], True
    if action.choices is not None:
        first = next(iter(action.choices))
        return [str(first)], first
    words, value = (["3"], 3) if action.type is not None else (["word"], "word")
    return words, [value] if action.nargs == "+" else value


@pytest.mark.parametrize("track", BUILD)
def test_every_spelling_sets_the_flag_that_is_shown(track: str) -> None:
    parser = BUILD[track]()
    for dest, action in flags(parser).items():
        words, value = sample(action)
        spellings = [dest, NAMES.get(dest), *(own for own, other in NAMES.items() if other == dest)]
        for spelling in filter(None, spellings):
            for flag in {f"--{spelling}", f"--{spelling.replace('_', '-')}"}:
                assert vars(parser.parse_args([flag, *words]))[dest] == value, flag
            if len(words) == 1:
                assert vars(parser.parse_args([f"--{spelling.replace('_', '-')}={words[0]}"]))[dest] == value
        assert [o for o in action.option_strings if not o.startswith("--no-")] == [f"--{dest}"]  # help shows one
    for flag in ("asymmetric", "channel-wise", "zero_code", "wide-gap"):
        assert vars(parser.parse_args([f"--no-{flag}"]))[flag.replace("-", "_")] is False


@pytest.mark.parametrize(("words", "value"), [("--weight 2", 2.0), ("--rrweight 2", 2.0)])
@pytest.mark.parametrize("track", BUILD)
def test_older_names(track: str, words: str, value: float) -> None:
    assert BUILD[track]().parse_args(words.split()).rrweight == value


@pytest.mark.parametrize("words", ["--input-size 32", "--img-size 32", "--img_size 32 32", "--input_size=32"])
@pytest.mark.parametrize("track", BUILD)
def test_timm_s_spellings_of_the_size(track: str, words: str) -> None:
    assert BUILD[track]().parse_args(words.split()).input_size == 32
    assert BUILD[track]().parse_args(["--input-size", "3", "32", "32"]).input_size == [3, 32, 32]
    assert network_arguments(BUILD[track]().parse_args(["--input-size", "3", "32", "48"]))["input_size"] == (32, 48)


@pytest.mark.parametrize(("track", "other"), SIDES)
def test_the_other_track_s_flags_are_taken_or_explained(
    track: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, same = BUILD[track](), {**NAMES, **{other: own for own, other in NAMES.items()}}
    own = flags(parser)
    for dest, action in flags(BUILD[other]()).items():
        words = [f"--{dest}", *sample(action)[0]]
        if {dest, same.get(dest)} & own.keys():
            if dest not in ("recon_input", "optim_mode"):
                parser.parse_args(words)
            continue
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert re.search(r"; (only logart-(cnn|vit)|did you mean --)", capsys.readouterr().err), dest


@pytest.mark.parametrize(("name", "other"), [("quantized", "qinp"), ("float", "rinp"), ("mixed", "qdrop")])
def test_values_of_llr_s_input_by_either_track_s_name(name: str, other: str) -> None:
    cnn, vit = BUILD["cnn"](), BUILD["vit"]()
    for flag in ("--recon_input", "--optim-mode"):
        assert {vit.parse_args([flag, word]).optim_mode for word in (name, other)} == {other}
        if name != "mixed":
            assert {cnn.parse_args([flag, word]).recon_input for word in (name, other)} == {name}


@pytest.mark.parametrize("track", BUILD)
def test_help_has_the_groups_in_order_and_every_default(track: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = BUILD[track]()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["options", *GROUPS]
    for dest, action in flags(parser).items():
        assert re.search(r" \(default: [^()]+\)$", action.help or ""), dest
        assert action.default is None, dest
    assert not re.search(r"--[a-z]+-[a-z]", text.replace("--no-", "--")), "a second spelling is shown"


def test_the_defaults_shown_are_those_that_act() -> None:
    cnn, vit = flags(BUILD["cnn"]()), flags(BUILD["vit"]())
    for shown, fields, defaults in (
        (cnn, logart_cnn.command.FIELDS, vars(QuantConfig())),
        (vit, {name: name for name in logart_vit.command.FIELDS}, vars(Config)),
    ):
        for dest, field in fields.items():
            value = defaults[field]
            if isinstance(value, bool | Mapping | tuple) or value is None or dest == "rounding":
                continue
            assert (shown[dest].help or "").endswith(f"(default: {getattr(value, 'value', value)})"), dest
