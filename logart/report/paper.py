"""The paper's own figures, `paper_results.csv`, beside a report's."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from logart.quantization.rounding_methods import method_named
from logart.report.groups import Group, Row, signed
from logart.report.page import Block, Heading, Paragraph

KEYS = (
    "arch bits channel_wise scale_method search_method scale_search asymmetric hardware_approx hardware_approx_terms"
).split()


class Sources:
    """The paper's figures, and which of their sources were shown.

    Args:
        figures: as `paper_figures` gives them; none: nothing is shown.
    """

    def __init__(self, figures: Sequence[Row]) -> None:
        self.figures = figures
        self.shown: dict[str, int] = {}

    def number(self, source: str) -> int:
        """The number by which a source is cited; it is listed from now on."""
        return self.shown.setdefault(source, len(self.shown) + 1)

    def notes(self, group: Group) -> tuple[str, ...]:
        """The lines of a cell that give the paper's figures for it, with their drop from the paper's float network."""
        return tuple(f"paper {self.text(row)} [{self.number(row['source'])}]" for row in matching(group, self.figures))

    def text(self, row: Row) -> str:
        """One of the paper's figures, with its drop where the source gives the float network's accuracy."""
        drop = f" (drop {signed(float(row['float_Acc@1']) - float(row['Acc@1']))})" if row["float_Acc@1"] else ""
        return row["Acc@1"] + drop

    def blocks(self) -> list[Block]:
        """Where the figures come from."""
        if not self.shown:
            return []
        said = "The paper's figures, by number, with the drop from its own float network where the source gives it. "
        said += "They are top-1 accuracies on ImageNet's 50,000 validation images; settings that a source does not "
        said += "state, such as the bits of first and last layer, are not compared."
        lines = (Paragraph("; ".join([f"[{n}] {text}", *self._settings(text)])) for text, n in self.shown.items())
        return [Heading(2, "Sources"), Paragraph(said), *lines]

    def _settings(self, source: str) -> list[str]:
        message = (
            ("DBS on {} images", "search_samples"),
            ("LLR on {} images", "calib_samples"),
            ("{} steps", "iters_w"),
        )
        rows = [row for row in self.figures if row["source"] == source]
        seen = [(text, sorted({row[name] for row in rows if row[name]})) for text, name in message]
        return [text.format(" or ".join(values)) for text, values in seen if values]


def paper_figures() -> list[Row]:
    """The paper's own results, each with its source; the rows of `paper_results.csv`."""
    with open(Path(__file__).with_name("paper_results.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def matching(group: Group, figures: Iterable[Row]) -> list[Row]:
    """The paper's figures of a group's network, bits and method; what a source does not state is not compared."""
    ours = dict(group.row)
    if not method_named(ours["rounding"]).uses_dbs or ours["network_options"]:
        return []
    if "True" in (ours["zero_code"], ours["wide_gap"]):
        return []
    if ours["scale_search"] != "none":
        ours["scale_search"] = "grid"
    return [row for row in figures if all(row[k] == ours[k] for k in (*KEYS, "rounding"))]
