"""What a row of the results file is called: one name for a method wherever it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from logart.grids.registry import GRIDS
from logart.grids.root2 import ROOT2_TEXT
from logart.quantization.config import PRESETS, QuantConfig, SearchMethod, preset
from logart.quantization.rounding_methods import METHODS

GRID_NAMES = {name: grid.label for name, grid in GRIDS.items()}
SEARCH_NAMES = {
    SearchMethod.TENSOR_WISE.value: "TW",
    SearchMethod.LAYER_WISE.value: "LW",
    SearchMethod.BLOCK_WISE.value: "BW",
}
ROUNDING_NAMES = {name: method.label for name, method in METHODS.items()}
OPTIONS = {"scale_search": "scale search", "asymmetric": "asymmetric codes", "zero_code": "zero code",
           "wide_gap": "wide gap"}  # fmt: skip
_WORDS = {
    "config": "config {}",
    "calib_samples": "{} images",
    "search_samples": "DBS on {} images",
    "iters_w": "{} steps",
    "bits": "{} bits",
    "first_last_bits": "first and last {} bits",
    "network_options": "{}",
    "device": "on {}",
}


def family(row: Mapping[str, str]) -> str:
    """What a method is first of all: its preset, or else its grid and search."""
    if row["preset"]:
        return f"preset {row['preset']}"
    grid = GRID_NAMES.get(row["scale_method"], row["scale_method"])
    search = SEARCH_NAMES.get(row["search_method"], row["search_method"])
    return f"{grid} {search}".strip() if search else grid


def method_name(row: Mapping[str, str]) -> str:
    """A method in a few words: its preset, if any, and what differs from it; else grid, search, options and rounding.

    Args:
        row: the columns that decide a run, as the results file holds them.
    """
    words = [family(row)]
    expected = QuantConfig(rounding="nearest")
    if row["preset"]:
        bits = float(row["bits_budget"] or row["bits"])
        known = preset(row["preset"], bits) if row["preset"] in PRESETS else {}
        expected = QuantConfig(n_bits=int(row["bits"]), **known)
        if row["scale_method"] != _text(expected.scale_method):
            words.append(GRID_NAMES.get(row["scale_method"], row["scale_method"]))
    for column, option in OPTIONS.items():
        usual, value = _text(getattr(expected, column)), _text(row[column])
        grid = GRIDS.get(row["scale_method"])
        if value != usual and (grid is None or column in grid.options):
            words.append(f"no {option}" if not value else f"{option}{f' ({value})' * (value not in ('True', 'grid'))}")
    if row["channel_wise"] == "False":
        words.append("a codebook per layer")
    if row["first_last_bits"] not in ("same", ""):
        words.append(difference_word("first_last_bits", row["first_last_bits"]))
    if row["hardware_approx"] not in ("False", ""):
        terms = ROOT2_TEXT.get(int(row["hardware_approx_terms"] or 0), "1 + 1/2")
        words.append(f"√2 ≈ {terms}{' at test' * (row['hardware_approx'] != 'True')}")
    if row.get("bits_a"):
        pow2 = ", powers of two" * (row.get("act_scale") == "pow2")
        levels = row.get("softmax_grid") or "uniform"
        softmax = f", softmax {GRID_NAMES.get(levels, levels)}" * (levels != "uniform")
        learned = ", learned" * (row.get("iters_a", "0") not in ("", "0"))
        seen = ", seen by the weights" * (row.get("calibrate_with_act") == "True")
        ends = {"input": row.get("input_bits_a"), "head": row.get("head_bits_a")}
        other = "".join(f", {end} {bits} bits" for end, bits in ends.items() if bits not in (None, "", row["bits_a"]))
        words.append(f"{row['bits_a']}-bit activations{other}{pow2}{softmax}{learned}{seen}")
    rounding = ROUNDING_NAMES.get(row["rounding"], row["rounding"])
    if not row["preset"]:
        words.append(rounding)
    elif row["rounding"] != expected.method.name:
        words[0] += " + LLR" if row["rounding"] == expected.method.with_steps else f" {rounding}"
    return ", ".join(words)


def difference_word(column: str, value: str) -> str:
    """A setting in words, for what two methods of one name differ in; empty for an empty cell."""
    if not value:
        return ""
    if column == "config":
        value = PurePath(value).stem
    return _WORDS.get(column, column.replace("_", " ") + " {}").format(value[:40])


def seed_acts(row: Mapping[str, str]) -> bool:
    """Whether a seed can change anything: without calibration images there is nothing to draw."""
    return bool(row["search_samples"] or row["calib_samples"])


def _text(value: object) -> str:
    text = str(getattr(value, "value", value))
    return "" if text in ("False", "none", "") else text
