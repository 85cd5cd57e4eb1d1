"""The report's page in a real browser: `scripts/test_browser.sh`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from results_rows import write_csv

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra [report], is not installed")
    with playwright.sync_playwright() as driver:
        known = [os.environ.get("CHROMIUM"), driver.chromium.executable_path, shutil.which("chromium")]
        paths = [path for path in known if path and Path(path).exists()]
        if not paths:
            pytest.skip("no Chromium: neither playwright's nor `chromium` on PATH, nor one named by CHROMIUM")
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        opened = driver.chromium.launch(executable_path=paths[0], args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    from logart.report.__main__ import main

    out = tmp_path_factory.mktemp("report")
    assert main([str(ROOT / "results.csv"), "--out", str(out)]) == 0
    return (out / "report.html").as_uri()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    context = browser.new_context(**getattr(request, "param", {}))
    opened = context.new_page()
    opened.said = []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or opened.said.append(asked.url))
    opened.goto(address)
    yield opened
    assert opened.said == []  # no error, no warning, nothing asked of a network
    context.close()


SCREENS = [
    {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    for width in (375, 1200)
    for scheme in ("light", "dark")
]


@pytest.mark.parametrize("page", SCREENS, indirect=True, ids=lambda s: f"{s['viewport']['width']}-{s['color_scheme']}")
def test_every_image_is_drawn_and_the_page_fits(page: Any, request: pytest.FixtureRequest) -> None:
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) >= 9 and min(widths) > 100
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    paper, ink = (
        [int(part) for part in re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3]]
        for name in ("backgroundColor", "color")
    )
    dark = "dark" in request.node.name
    assert (sum(paper) < sum(ink)) == dark and abs(sum(paper) - sum(ink)) > 400


def column(page: Any, place: int) -> list[str]:
    cells = page.locator(f"table >> nth=0 >> css=tbody tr > :nth-child({place + 1})")
    return [text.split("\n")[0].split(" ±")[0] for text in cells.all_inner_texts()]


def test_a_click_on_a_header_sorts(page: Any) -> None:
    heads = page.locator("table >> nth=0 >> css=th button")
    place = [name.strip() for name in heads.all_inner_texts()].index("4 bits")
    before = column(page, place)
    filled = [text for text in before if text]
    assert 2 < len(filled) < len(before)  # a cell without a run stays last, whichever way
    for reverse in (False, True):
        heads.nth(place).click()
        assert column(page, place) == sorted(filled, key=float, reverse=reverse) + [""] * before.count("")
        assert page.locator(f"th[aria-sort={'descending' if reverse else 'ascending'}]").count() == 1
    assert column(page, place) != before
    heads.nth(0).focus()
    page.keyboard.press("Enter")
    names = column(page, 0)
    assert names[-1] == "linear_mse" and names[0].startswith("base") and page.locator("th[aria-sort]").count() == 1
    page.keyboard.press("Enter")
    assert column(page, 0) == names[::-1]


HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


def test_a_hostile_file_runs_nothing(browser: Any, tmp_path: Path) -> None:
    from logart.report.__main__ import main

    path = write_csv(tmp_path / "results.csv", arch=HOSTILE)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    opened = browser.new_page()
    opened.goto((tmp_path / "out" / "report.html").as_uri())
    assert opened.title() == "LogART report"
    assert "<script>document.title=2</script>" in opened.locator("h2").first.inner_text()
    assert opened.locator("main script, img[src=x]").count() == 0
    opened.close()
