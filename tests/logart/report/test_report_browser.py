"""The report's page in a real browser: `scripts/test_browser.sh`."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from results_rows import row, write_csv

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[3]
WIDTHS = (360, 390, 768, 1440, 1920)
# Elements that are wider than the room they are given, or whose text is; what scrolls inside itself may be.
OVERFLOWS = """() => {
  const name = e => `${e.tagName}.${e.getAttribute('class') ?? ''} ${e.textContent.trim().slice(0, 40)}`;
  const scrolls = e => e && (getComputedStyle(e).overflowX !== 'visible' || scrolls(e.parentElement));
  const found = [];
  for (const e of document.querySelectorAll('body *:not(svg *):not(script):not(style)')) {
    const box = e.getBoundingClientRect(), parent = e.parentElement;
    if (!box.width || !box.height) continue;
    const hidden = /hidden|clip/.test(getComputedStyle(e).overflowX);
    if (hidden && e.scrollWidth > e.clientWidth + 1) found.push(`clipped: ${name(e)}`);
    if (scrolls(parent)) continue;
    const room = parent.getBoundingClientRect();
    if (box.right > room.right + 1 || box.left < room.left - 1) found.push(`overflows: ${name(e)}`);
  }
  for (const e of document.querySelectorAll('td, th, th *, td *')) {
    const range = document.createRange(); range.selectNodeContents(e);
    const text = range.getBoundingClientRect(), box = e.closest('td, th').getBoundingClientRect();
    const out = text.right > box.right + 1 || text.left < box.left - 1;
    if (text.width && out) found.push(`leaves its cell: ${name(e)}`);
  }
  for (const e of document.querySelectorAll('.panel svg text')) {
    const text = e.getBoundingClientRect(), box = e.closest('.panel').getBoundingClientRect();
    const out = text.right > box.right + 2 || text.left < box.left - 2;
    if (text.width && out) found.push(`leaves its plot: ${name(e)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("vl_convert", reason="vl-convert-python, of the extra [report], is not installed")
    with playwright.sync_playwright() as driver:
        known = [os.environ.get("CHROMIUM"), driver.chromium.executable_path, shutil.which("chromium")]
        paths = [path for path in known if path and Path(path).exists()]
        if not paths:
            pytest.skip("no Chromium: neither playwright's nor `chromium` on PATH, nor one named by CHROMIUM")
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        opened = driver.chromium.launch(executable_path=paths[0], args=flags)
        yield opened
        opened.close()


def made_up(path: Path) -> Path:
    """200 rows of settings that nobody ran."""
    draw = random.Random(0)
    grids, configs = ["dynamic", "log_2", "log_sqrt2", "linear_mse", "other"], ["", "a/rather_long_name_of_a_file.py"]
    rows = [
        row(
            arch=draw.choice(["net", "timm:a_network_with_a_long_name_patch16_224.some_training_in22k_ft_in1k"]),
            bits=draw.randint(2, 8), scale_method=draw.choice(grids), config=draw.choice(configs),
            search_method=draw.choice(["tensor_wise", "layer_wise"]), search_samples=draw.choice(["", 32, 64]),
            rounding=draw.choice(["nearest", "learned", "compensated", "both"]), lr=draw.choice([0.01, 0.1]),
            preset=draw.choice(["", "best", "fast"]), calib_samples=draw.choice([128, 1024]), seed=draw.randint(0, 2),
            zero_code=draw.choice(["True", "False"]), Acc_at_1=draw.uniform(0, 90),
            search_seconds=draw.uniform(0, 9000), peak_memory_mb=draw.randint(99, 99999),
        )
        for _ in range(200)
    ]  # fmt: skip
    return write_csv(path, *rows)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The address of a page by what it is of, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("pages"), {}

    def words(name: str) -> list[str]:
        if name == "results":
            return [str(ROOT / "results.csv")]
        if name == "made up":
            return [str(made_up(folder / "made_up.csv"))]
        from logart_cnn.main import main as run

        argv = "--rounding learned --iters_w 20 --calib_samples 64 --device cpu --workers 0 --quiet --run_dir".split()
        assert run([*argv, str(folder / "run"), "--results", str(folder / "run.csv")]) == 0
        return ["--run", str(folder / "run")]

    def address(name: str) -> str:
        from logart.report.command import main

        if name not in made:
            out = folder / f"report of {name}"
            assert main([*words(name), "--out", str(out)]) == 0
            made[name] = (out / "report.html").as_uri()
        return made[name]

    return address


@pytest.fixture
def look(browser: Any, pages: Callable[[str], str]) -> Iterator[Callable[..., Any]]:
    """Opens a page, with every plot drawn; nothing may be said on the console or asked of a network."""
    contexts, said = [], []

    def opened(name: str, width: int = 1440, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or said.append(asked.url))
        page.goto(pages(name))
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        for panel in page.locator(".panel").all():
            panel.scroll_into_view_if_needed()
        page.wait_for_function("[...document.querySelectorAll('.panel')].every(panel => panel.querySelector('svg'))")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["results", "run", "made up"])
def test_nothing_overflows_and_no_text_is_clipped(name: str, width: int, look: Callable[..., Any]) -> None:
    page = look(name, width, "dark" if width == 390 else "light")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate(OVERFLOWS) == []
    assert page.locator("table").count() >= 2 and page.locator(".panel svg").count() >= 2
    for table in page.locator(".scroll").all():  # the names of the rows stay, and leave room for a figure
        reach, left, stays, share = table.evaluate(
            "e => { e.scrollLeft = 1e6; const first = e.querySelector('tbody th').getBoundingClientRect(),"
            " box = e.getBoundingClientRect();"
            " return [e.scrollLeft, first.left - box.left, first.right > box.left, first.width / box.width]; }"
        )
        assert stays and abs(left) < 2 and (not reach or share < 0.6)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_and_text_can_be_read_in_both_schemes(scheme: str, look: Callable[..., Any]) -> None:
    page = look("results", 1440, scheme)

    def brightness(selector: str, name: str) -> int:
        seen = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}")
        return sum(int(part) for part in re.findall(r"\d+", seen)[:3])

    paper = brightness("body", "backgroundColor")
    assert (paper < 200) == (scheme == "dark")
    for selector, name in (("body", "color"), (".panel .role-axis-label text", "fill"), ("caption, .caption", "color")):
        assert abs(paper - brightness(selector, name)) > 250
    assert page.locator(".panel svg > rect[fill=white], figure img:visible").count() == 0  # no white cards


def test_a_printed_page_shows_the_static_plots_and_every_column(look: Callable[..., Any], tmp_path: Path) -> None:
    page = look("results", 760, "dark")
    page.emulate_media(media="print")
    assert page.locator(".panel:visible").count() == 0 and page.locator("figure img:visible").count() >= 5
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 less its margins
    assert page.evaluate(OVERFLOWS) == []
    page.pdf(path=str(tmp_path / "page.pdf"), prefer_css_page_size=True)
    assert b"/MediaBox [0 0 594.9" in (tmp_path / "page.pdf").read_bytes()


def test_hovering_a_point_tells_the_runs_settings(look: Callable[..., Any]) -> None:
    page = look("results")
    point = page.locator(".panel .mark-symbol path").nth(1)
    point.scroll_into_view_if_needed()
    point.hover(force=True)
    tip = page.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    assert "scale_method" in tip.inner_text() and "top-1" in tip.inner_text()


def column(page: Any, table: int, place: int) -> list[str]:
    cells = page.locator(f"table >> nth={table} >> css=tbody tr > :nth-child({place + 1})")
    return [text.strip().split("\n")[0].split(" ±")[0] for text in cells.all_inner_texts()]


def test_a_click_on_a_header_sorts(look: Callable[..., Any]) -> None:
    page = look("results")
    texts = "all => all.map(table => [...table.tHead.rows[0].cells].map(cell => cell.innerText))"
    heads = page.locator("table").evaluate_all(texts)
    table = next(i for i, head in enumerate(heads) if head[:3] == ["method", "2 bits", "3 bits"])
    buttons = page.locator(f"table >> nth={table} >> css=th button")
    place = heads[table].index("4 bits")
    before = column(page, table, place)
    filled = [text for text in before if text]
    assert 2 < len(filled) < len(before)  # a cell without a run stays last, whichever way
    for reverse in (False, True):
        buttons.nth(place).click()
        ordered = sorted(filled, key=float, reverse=reverse) + [""] * before.count("")
        assert column(page, table, place) == ordered
        assert page.locator(f"th[aria-sort={'descending' if reverse else 'ascending'}]").count() == 1
    assert column(page, table, place) != before
    buttons.nth(0).focus()
    page.keyboard.press("Enter")
    names = column(page, table, 0)
    assert names[0].startswith("APoT") and names[-1].startswith("preset")
    assert page.locator("th[aria-sort]").count() == 1
    page.keyboard.press("Enter")
    assert column(page, table, 0) == names[::-1]


HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


def test_a_hostile_file_runs_nothing(browser: Any, tmp_path: Path) -> None:
    from logart.report.command import main

    made = [(grid, bits) for grid in ("a", "b", "c") for bits in (3, 4)]
    rows = [row(arch=HOSTILE, config=HOSTILE, scale_method=grid, bits=bits) for grid, bits in made]
    path = write_csv(tmp_path / "results.csv", *rows)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    opened = browser.new_page()
    opened.goto((tmp_path / "out" / "report.html").as_uri())
    opened.locator(".panel").first.scroll_into_view_if_needed()
    opened.locator(".panel svg").first.wait_for()
    assert opened.title() == "LogART report"
    assert "<script>document.title=2</script>" in opened.locator("h2").nth(1).inner_text()
    assert opened.locator("main script, img[src=x]").count() == 0
    opened.close()
