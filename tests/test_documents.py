"""The documents beside the README: the citation says what pyproject.toml says, and paths that are named exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]


def project(key: str) -> str:
    found = re.search(rf'^{key} = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert (cited["version"], cited["license"]) == (project("version"), project("license"))
    assert cited["title"].lower() == project("name") and cited["authors"] and cited["message"]
    (paper,) = cited["references"]
    sources = (ROOT / "logart" / "report" / "paper_results.csv").read_text("utf-8")
    assert f"{paper['title']}, ICLR {paper['year']}, {paper['url']}" in sources
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])


def test_pages_made_from_the_code_say_what_it_says() -> None:
    assert runpy.run_path(str(ROOT / "scripts" / "docs.py"))["main"](["--check"]) == 0


def test_what_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"(?:[\w.]+/)+[\w.]*|\b\w+\.(?:py|csv|md)\b", text)) - {"DIR/run.json", "DIR/log.txt"}
    assert len(named) > 15
    missing = {name for name in named if not any((folder / name).exists() for folder in (ROOT, ROOT / "tests"))}
    assert missing == set()


def test_the_readme_s_picture_shows_the_levels_of_three_grids(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    script = runpy.run_path(str(ROOT / "scripts" / "picture.py"))
    assert script["main"](["--out", str(tmp_path / "made.svg")]) == 0
    for svg in ((ROOT / "docs" / "grids.svg").read_text("utf-8"), (tmp_path / "made.svg").read_text("utf-8")):
        assert [svg.count(f">{name}</text>") for name in ("base 2", "base √2", "dynamic")] == [1, 1, 1]
    # by the definition of both bases: the top is the nearest power to the largest weight, in the log domain
    top = float(script["weights"]().abs().max())
    for name, base in (("base 2", 2.0), ("base √2", 2.0**0.5)):
        magnitudes = base ** (np.floor(np.log(top) / np.log(base) + 0.5) - np.arange(8))
        assert script["levels"]()[name] == pytest.approx([*-magnitudes, *magnitudes[::-1]])
    assert "![The weights" in (ROOT / "README.md").read_text("utf-8").partition("```bash")[0]
