"""The documents beside the README: the citation says what pyproject.toml says, and paths that are named exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

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
    sources = (ROOT / "logart" / "paper_results.csv").read_text("utf-8")
    assert f"{paper['title']}, ICLR {paper['year']}, {paper['url']}" in sources
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert project("license") == "Apache-2.0" and "Apache License" in text and "Version 2.0, January 2004" in text
    assert re.findall(r"^   (\d+)\. [A-Z]", text, re.MULTILINE) == [str(number) for number in range(1, 10)]
    assert "END OF TERMS AND CONDITIONS" in text


def test_what_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"(?:[\w.]+/)+[\w.]*|\b\w+\.(?:py|csv|md)\b", text)) - {"DIR/run.json", "DIR/log.txt"}
    assert len(named) > 15
    missing = {name for name in named if not any((folder / name).exists() for folder in (ROOT, ROOT / "tests"))}
    assert missing == set()


def test_the_picture_is_drawn_by_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes depend on matplotlib's release; what is written in it does not."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    picture = importlib.import_module("picture")
    assert picture.main(["--out", str(tmp_path / "grids.svg")]) == 0
    drawn, shipped = (path.read_text("utf-8") for path in (tmp_path / "grids.svg", ROOT / "docs" / "grids.svg"))
    for text in ("base 2", "base √2", "dynamic", "and its 16 levels on 4-bit grids", "are powers of 2"):
        assert text in drawn and text in shipped
    assert "docs/grids.svg" in (ROOT / "README.md").read_text("utf-8")
