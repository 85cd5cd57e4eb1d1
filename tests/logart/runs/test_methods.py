"""What a run's method is called."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from logart.runs.methods import method_name

RESULTS = Path(__file__).parents[3] / "results.csv"


@pytest.mark.parametrize(
    ("budget", "rounding", "wide_gap", "name"),
    [
        ("", "compensated", "", "preset best"),
        ("2.5", "both", "True", "preset best"),
        ("3.5", "compensated", "", "preset best"),
        ("2.5", "compensated", "True", "preset best compensated"),
        ("3.5", "both", "True", "preset best + LLR, wide gap"),
    ],
)
def test_a_preset_under_a_budget_is_what_it_stands_for_at_so_many_bits(
    budget: str, rounding: str, wide_gap: str, name: str
) -> None:
    with RESULTS.open(newline="") as file:
        columns = csv.DictReader(file).fieldnames or ()
    own = {"preset": "best", "bits": "4", "bits_budget": budget, "rounding": rounding, "wide_gap": wide_gap}
    row = dict.fromkeys(columns, "") | {"scale_method": "dynamic", "scale_search": "grid", "channel_wise": "True"} | own
    assert method_name(row) == name
