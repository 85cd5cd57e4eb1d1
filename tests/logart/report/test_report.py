"""The report, against plain computations by pandas from the same file."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from results_rows import NEAREST, row, write_csv

from logart.report.charts import Chart
from logart.report.command import main, report_files
from logart.report.groups import Group, groups_of
from logart.report.page import Plot
from logart.report.paper import KEYS, paper_figures
from logart.report.result_charts import against_bits, against_time
from logart.report.results_page import results_blocks, sections
from logart.report.rows import damage, read_rows
from logart.report.styles import SHAPES, styles
from logart.runs.columns import NAMES

ROOT = Path(__file__).parents[3]


class Page(HTMLParser):
    """The tables of a page as rows of cells, each the list of its lines; its images, scripts and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[list[str]]]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.in_cell = self.in_script = False
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([""])
            self.in_cell = True
        elif tag == "small":
            self.tables[-1][-1][-1].append("")
        elif tag in ("script", "style"):
            self.in_script = True
        elif tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")
        self.in_script = self.in_script and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self.in_script else data
        if self.in_cell:
            self.tables[-1][-1][-1][-1] += data

    def cell(self, table: int, name: str, column: str) -> list[str]:
        head, *rows = self.tables[table]
        return next(r for r in rows if r[0][0] == name)[[h[0] for h in head].index(column)]

    def matrix(self, name: str, column: str) -> list[str]:
        """The cell of the first network's table of methods by bits."""
        return self.cell(next(i for i, t in enumerate(self.tables) if t[0][1][0].endswith(" bits")), name, column)


def page_of(*rows: dict[str, str], paper: list[dict[str, str]] | None = None) -> Page:
    """The page of some rows, without plots, which take most of the time."""
    blocks = [b for b in results_blocks(rows, paper or []) if not isinstance(b, Plot)]
    return Page(report_files(blocks, {})["report.html"].decode())


def groups(*rows: dict[str, str]) -> dict[str, Group]:
    return {group.label: group for group in groups_of(rows)[0]}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert main([str(ROOT / "results.csv"), "--out", str(out)]) == 0
    return out


def minus(text: str) -> str:
    return text.replace("-", "−")


def test_the_shipped_results_are_the_tables_that_pandas_computes(shipped: Path) -> None:
    page = Page((shipped / "report.html").read_text("utf-8"))
    frame = pd.read_csv(ROOT / "results.csv")
    rows = frame[(frame.arch == "cifar_resnet20") & (frame.rounding == "learned") & (frame.lr == 0.01)]
    methods = {
        "base 2": ("log_2", None), "base √2": ("log_sqrt2", None), "linear MSE": ("linear_mse", None),
        "dynamic TW": ("dynamic", "tensor_wise"), "dynamic LW": ("dynamic", "layer_wise"),
        "dynamic BW": ("dynamic", "block_wise"),
    }  # fmt: skip
    place = next(i for i, table in enumerate(page.tables) if len(table[0]) == 8 and table[0][1] == ["2 bits"])
    for label, (grid, search) in methods.items():
        for bits in (3, 4):
            same = rows[(rows.scale_method == grid) & (rows.bits == bits)]
            same = same[same.search_method.isna() if search is None else same.search_method == search]
            for column, suffix, seed_acts in (("search_Acc@1", "RTN", search not in (None, "tensor_wise")),
                                              ("Acc@1", "LLR", True)):  # fmt: skip
                found = same[column]
                assert seed_acts or found.nunique() == 1
                spread = f" ± {found.std():.2f}" if len(found) > 1 and seed_acts else ""
                drop = minus(f"drop {(same['float_Acc@1'] - found).mean():.2f}")
                seen = page.cell(place, f"{label}, {suffix}", f"{bits} bits")
                assert seen[0] == f"{found.mean():.2f}{spread}"
                assert seen[1] == drop and seen[2].startswith("n 3 · ") == bool(spread)


def test_the_headline_is_the_best_of_each_bit_width(shipped: Path) -> None:
    page = Page((shipped / "report.html").read_text("utf-8"))
    frame = pd.read_csv(ROOT / "results.csv")
    for table, arch in enumerate(dict.fromkeys(frame.arch)):
        rows = frame[frame.arch == arch]
        learned = rows[rows.rounding == "learned"].assign(rounding="", **{"Acc@1": rows["search_Acc@1"], "lr": 0})
        keys = ["bits", "scale_method", "scale_search", "zero_code", "search_method", "rounding", "preset",
                "config", "calib_samples", "lr", "damping", "mirror", "wide_gap"]  # fmt: skip
        means = pd.concat([rows, learned]).groupby(keys, dropna=False)["Acc@1"].mean()
        best = means.groupby("bits").max()
        shown = {int(line[0][0]): line[1][0].split(" ±")[0] for line in page.tables[table][1:]}
        assert shown == {bits: f"{value:.2f}" for bits, value in best.items()}


def test_the_page_is_whole_and_asks_nothing_of_a_network(shipped: Path) -> None:
    html = (shipped / "report.html").read_text("utf-8")
    page = Page(html)
    names = {path.stem for path in shipped.glob("*.svg")}
    assert len(page.images) == len(names) >= 5 and names == {path.stem for path in shipped.glob("*.png")}
    assert all(str(image["src"]).startswith("data:image/svg+xml;base64,") and image["alt"] for image in page.images)
    assert page.tags["script"] == 2 and page.tags["link"] == 1
    markup = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!data:|#section)', markup) and "@import" not in markup and "url(" not in markup
    charts = json.loads(re.findall(r'<script type="application/json" id="charts">(.*?)</script>', html)[0])
    assert set(charts) == names
    anchors = re.findall(r'href="#([^"]+)"', html)
    assert len(anchors) == len(set(anchors)) == html.count("<h2 ") and all(f'id="{a}"' in html for a in anchors)
    printed = (shipped / "report.md").read_text("utf-8")
    assert {name for name in re.findall(r"\]\((\w+)\.svg\)", printed)} == names
    assert "87.73 ± 0.08" in printed and "87.73 ± 0.08" in html
    lines = [line.rstrip() for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) > 100 and all(line.endswith("|") and line.count("|") > 2 for line in lines)
    assert printed.count("\n## ") == len(anchors) and "\\\\" not in printed


def test_the_head_says_when_and_with_what(shipped: Path) -> None:
    said = (shipped / "report.md").read_text("utf-8").partition("##")[0]
    frame = pd.read_csv(ROOT / "results.csv")
    assert f"{len(frame)} runs of" in said and frame.utc_time.min()[:10] in said and frame.utc_time.max()[:10] in said
    assert frame.torch_version.unique()[0] in said and "python -m logart.report" in said


def many(**changes: Any) -> list[dict[str, str]]:
    """Rows of three methods at two bit widths, so that all plots of a network are drawn."""
    grids = ("dynamic", "log_2", "log_sqrt2")
    return [row(bits=bits, scale_method=grid, **changes) for bits in (3, 4) for grid in grids]


def test_an_older_report_leaves_nothing_behind_and_loses_nothing_else(tmp_path: Path) -> None:
    hostile = "![x](mine.svg)"
    write_csv(tmp_path / "two.csv", *many(arch=hostile, data="](mine.svg)"), *many(arch="other"))
    write_csv(tmp_path / "one.csv", *many())
    out = tmp_path / "out"
    assert main([str(tmp_path / "two.csv"), "--out", str(out)]) == 0
    mine = {"mine.svg", "mine.png", "network2_notes.svg", "data.csv"}
    for name in mine:
        (out / name).write_text("kept")
    (out / "network2_time.png").unlink()
    assert main([str(tmp_path / "one.csv"), "--out", str(out)]) == 0
    kinds = ("bits", "time")
    expected = {f"network1_{kind}.{end}" for kind in kinds for end in ("png", "svg")} | {"report.md", "report.html"}
    assert {path.name for path in out.iterdir()} == expected | mine
    assert all((out / name).read_text() == "kept" for name in mine)
    (out / "report.md").write_text("# My own\n\n![mine](mine.svg)\n")
    assert main([str(tmp_path / "one.csv"), "--out", str(out)]) == 0 and (out / "mine.svg").exists()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", *many())
    out = tmp_path / "out"
    files = []
    for _ in range(2):
        assert main([str(path), "--out", str(out)]) == 0
        files.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert files[0] == files[1] and len(files[0]) == 2 + 2 * 2


@pytest.mark.parametrize(
    "name, value",
    [("lr", "0.5"), ("calib_samples", "65"), ("iters_w", "11"), ("scale_search", "grid"), ("zero_code", "True"),
     ("wide_gap", "True"), ("crops", "1"),
     ("asymmetric", "True"), ("hardware_approx", "True"), ("recon_metric", "mae"), ("search_samples", "9"),
     ("first_last_bits", "8"), ("network_options", "a=1"), ("device", "gpu"), ("calib_augment", "True"),
     ("checkpoint_sha256", "cd"),
     ("preset", "best"), ("config", "mine.py"), ("val_images", "99"), ("scale_method", "log_2"), ("bits", "3")],
)  # fmt: skip
def test_rows_of_different_settings_are_never_averaged(name: str, value: str) -> None:
    other = row(**{name: value, "seed": 1, "Acc@1": 60, "search_Acc@1": 70})
    page = page_of(row(), other)
    lines = [line for table in page.tables for r in table[1:] for cell in r for line in cell]
    assert {"80.00", "60.00"} <= set(lines) and not any("±" in line for line in lines if line.startswith("70.00"))
    assert groups(row(), row(seed=1, Acc_at_1=60))["dynamic TW, LLR"].deviation == pytest.approx(200**0.5)


def test_a_learned_run_gives_both_cells_and_the_newest_of_equal_seeds_counts() -> None:
    newer = row(utc_time="2026-02-01T00:00:00Z", Acc_at_1=82)
    for rows in ((row(), newer), (newer, row())):
        page = page_of(*rows)
        assert page.matrix("dynamic TW, RTN", "4 bits") == ["70.00", "drop 20.00", "1 s"]
        assert page.matrix("dynamic TW, LLR", "4 bits") == ["82.00", "drop 8.00", "3 s"]
        assert "1 row(s) repeat the settings of a newer one" in page.text
    alone = page_of(row(**NEAREST, Acc_at_1=71), row())
    assert alone.matrix("dynamic TW, RTN", "4 bits")[0] == "71.00"  # a run of its own goes before one on its way
    assert "1 accuracies taken on a run's way differ" in alone.text and "repeat" not in alone.text


def test_a_seed_that_cannot_act_makes_no_spread() -> None:
    for search, images in (("tensor_wise", ""), ("layer_wise", "32")):
        rows = [row(**NEAREST, search_method=search, search_samples=images, seed=seed) for seed in range(3)]
        (group,) = groups(*rows).values()
        assert (group.n, group.deviation) == ((1, None) if not images else (3, 0.0))
    learned = groups(row(), row(seed=1))
    assert learned["dynamic TW, RTN"].deviation is None and learned["dynamic TW, LLR"].deviation == 0


def test_an_approximation_at_test_is_a_method_of_its_own() -> None:
    both = {"hardware_approx_terms": 2, "approx_Acc@1": 55}
    rows = [row(), row(seed=1, **both), row(hardware_approx="True", hardware_approx_terms=2, Acc_at_1=60)]
    found = groups(*rows)
    name = "dynamic TW, √2 ≈ {}, LLR"
    assert found["dynamic TW, LLR"].n == 2
    assert found[name.format("1 + 1/2 at test")].accuracy == 55 and found[name.format("1 + 1/2")].accuracy == 60
    figures = page_of(row(arch="resnet18", **both), paper=paper_figures())
    assert figures.matrix("dynamic TW, LLR", "4 bits")[3:] == ["paper 69.24 [1]"]  # with the exact √2
    assert len(figures.matrix(name.format("1 + 1/2 at test"), "4 bits")) == 3


def test_methods_of_one_name_are_told_apart_by_what_differs() -> None:
    twice = groups(row(config="a/best.py"), row(config="other.py", Acc_at_1=60), row(bits=3, config="b/best.py"))
    assert set(twice) == {"dynamic TW, RTN", "dynamic TW, LLR, config best", "dynamic TW, LLR, config other"}
    clash = groups(row(config="a/best.py"), row(config="b/best.py", Acc_at_1=60))
    assert set(clash) == {"dynamic TW, RTN", "dynamic TW, LLR", "dynamic TW, LLR (2)"}
    closed = {"rounding": "compensated", "search_method": "", "search_Acc@1": "", "lr": "", "iters_w": "0"}
    images = groups(*(row(**closed, calib_samples=count) for count in (32, 64)))
    assert set(images) == {"dynamic, compensated, 32 images", "dynamic, compensated, 64 images"}


def test_a_style_is_one_methods_alone_and_the_same_on_the_whole_page(shipped: Path) -> None:
    found, _ = groups_of(read_rows(ROOT / "results.csv").rows)
    legend = styles(found)
    assert {group.label for group in found} == set(legend) and len(set(legend.values())) == len(legend) > 25
    assert legend == styles(found[::-1])
    html = (shipped / "report.html").read_text("utf-8")
    marker = re.compile(r'<path d="([^"]+)" fill="([^"]+)"/></svg><span>([^<]+(?:<wbr>[^<]+)*)</span>')
    seen = {(label.replace("<wbr>", ""), shape, colour) for shape, colour, label in marker.findall(html)}
    assert {label for label, _, _ in seen} <= set(legend) and len(seen) == len(legend)
    charts = json.loads(re.findall(r'<script type="application/json" id="charts">(.*?)</script>', html)[0])
    for panel in (panel for chart in charts.values() for panel in chart):
        encoding = panel["layer"][-1]["encoding"]
        for label, colour, shape in zip(encoding["color"]["scale"]["domain"], encoding["color"]["scale"]["range"],
                                        encoding["shape"]["scale"]["range"], strict=True):  # fmt: skip
            assert (legend[label].colour, legend[label].shape) == (colour, shape)


def test_more_methods_than_styles_are_still_drawn() -> None:
    found, _ = groups_of([row(calib_samples=n, scale_method=f"g{n % 7}") for n in range(200)])
    assert len(styles(found)) == 200 + 7 and len({s.shape for s in styles(found).values()}) == len(SHAPES)


def test_the_papers_figures_stand_beside_their_cells() -> None:
    figures = paper_figures()
    assert figures and all(f["source"] and 0 < float(f["Acc@1"]) < 100 for f in figures)
    keys = [tuple(f[k] for k in (*KEYS, "rounding", "source")) for f in figures]
    assert len(set(keys)) == len(keys)
    readme = {f["Acc@1"] for f in figures if f["arch"] == "resnet18" and "README" in f["source"]}
    assert len(readme) == 10 and {"31.53", "69.24"} <= readme
    page = page_of(row(arch="resnet18"), paper=figures)
    ablation, matrix = page.tables[1:3]
    head = [cell[0] for cell in ablation[0]]
    assert head[:5] == ["method", "resnet18", "resnet18 [1]", "resnet50 [1]", "mobilenetv2 [1]"]
    assert [line[0][0] for line in ablation[1:]] == [
        f"{grid}, {rounding}" for grid in ("base 2", "base √2", "dynamic TW", "dynamic LW", "dynamic BW")
        for rounding in ("RTN", "LLR")
    ]  # fmt: skip
    assert page.cell(1, "base 2, RTN", "resnet18 [1]") == ["31.53"] and page.cell(1, "base 2, RTN", "resnet18") == [""]
    assert page.cell(1, "dynamic TW, LLR", "resnet18")[0] == "80.00"
    assert page.matrix("dynamic TW, RTN", "4 bits")[3:] == ["paper 57.10 [1]"]
    assert page.matrix("dynamic TW, LLR", "4 bits")[3:] == ["paper 69.24 [1]"] and len(matrix) == 3
    assert "logart-lab/logart" in page.text and "Sources" in page.text
    scaled = row(arch="resnet18", search_method="block_wise", scale_search="grid")
    seen = page_of(scaled, paper=figures).matrix("dynamic BW, scale search, LLR", "4 bits")
    assert seen[3:] == ["paper 70.69 (drop 0.31) [1]"]
    for other in ({"bits": 3}, {"arch": "resnet18", "bits": 3}, {"arch": "resnet18", "zero_code": "True"},
                  {"arch": "resnet18", "wide_gap": "True"}):
        assert "Sources" not in page_of(row(**other), paper=figures).text
    assert "Sources" not in page_of(row(arch="resnet18"), paper=[]).text


def test_a_time_that_no_row_tells_is_no_time() -> None:
    page = page_of(row(reconstruction_seconds=""), row(bits=3, search_seconds=1000, reconstruction_seconds="98765.4"))
    assert page.matrix("dynamic TW, RTN", "4 bits")[1:] == ["drop 20.00", "1 s"]
    assert page.matrix("dynamic TW, LLR", "4 bits")[1:] == ["drop 10.00"]
    assert page.matrix("dynamic TW, RTN", "3 bits")[1:] == ["drop 20.00", "17 min"]
    assert page.matrix("dynamic TW, LLR", "3 bits")[1:] == ["drop 10.00", "27.7 h"]


def drawn(*rows: dict[str, str]) -> list[Chart | None]:
    found, _ = groups_of(rows)
    return [draw(found, styles(found), "net", "x") for draw in (against_bits, against_time)]


def test_a_plot_that_says_nothing_is_not_drawn() -> None:
    nearest = row(**NEAREST)
    assert drawn(nearest) == [None, None]
    assert drawn(nearest, row(**NEAREST, scale_method="log_2", bits=3)) == [None, None]  # two methods, a point each
    bits, time = drawn(nearest, row(**NEAREST, bits=3))
    assert bits is not None and time is None and [panel["title"] for panel in bits.panels] == ["rounded to nearest"]
    assert drawn(*many(float_Acc_at_1="")) == [None, None] and drawn(*many(search_seconds=""))[1] is None


def test_panels_that_are_compared_share_their_axes() -> None:
    for chart in drawn(*many(), row(Acc_at_1=30), row(bits=3, Acc_at_1=85, seed=1)):
        assert chart is not None and len(chart.panels) == 2
        for axis in ("x", "y"):
            first, second = ({json.dumps(layer["encoding"][axis]["scale"]) for layer in panel["layer"][1:]}
                             for panel in chart.panels)  # fmt: skip
            assert first == second and len(first) == 1
        low, high = chart.panels[0]["layer"][1]["encoding"]["y"]["scale"]["domain"]
        points = [p for panel in chart.panels for p in panel["data"]["values"]]
        assert all(low < p["low"] <= p["y"] <= p["high"] < high for p in points)
        assert any(p["drop"].startswith("20.00") and "lr 0.01" not in p["settings"] for p in points)
        assert any("lr 0.01" in p["settings"] and "seed" not in p["settings"] for p in points)


def test_networks_are_told_apart() -> None:
    found, _ = groups_of([row(), row(lr="0.5"), row(checkpoint="b.pth", checkpoint_sha256="cd")])
    first, second = sections(found)
    assert first.title == "net on pictures (checkpoint net.pth, checkpoint_sha256 ab)"
    assert second.title == "net on pictures (checkpoint b.pth, checkpoint_sha256 cd)"
    assert {g.label for g in first.groups} == {"dynamic TW, RTN", "dynamic TW, LLR, lr 0.01", "dynamic TW, LLR, lr 0.5"}
    assert {g.label for g in second.groups} == {"dynamic TW, RTN", "dynamic TW, LLR, lr 0.01"}


def test_settings_that_all_share_are_said_once() -> None:
    page = page_of(row(), row(bits=3, lr="0.5"))
    every = page.tables[-1]
    assert [cell[0] for cell in every[0]][-1] == "settings" and "first_last_bits" not in str(every)
    assert {line[-1][0].partition("lr ")[2][:4] for line in every[1:]} == {"", "0.01", "0.5"}
    assert "Settings of all: first_last_bits same" in page.text and "search_method tensor_wise" in page.text


HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'|`$\\frac{_\x1b\u202e\udcff"


def test_the_commands_of_rows_that_have_one_are_listed() -> None:
    rows = [row(command=f"logart-cnn --n_bits_w {bits}" if bits == 3 else "", bits=bits) for bits in (2, 3)]
    lines = [[cell[0] for cell in line] for table in page_of(*rows).tables for line in table]
    assert [line[-2:] for line in lines if "logart-cnn" in line[-1]] == [["3", "logart-cnn --n_bits_w 3"]]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = ["arch", "data", "device", "scale_method", "search_method", "config", "lr", "rounding"]
    rows = [row(**{name: HOSTILE, "bits": bits}) for name in names for bits in (3, 4)]
    files = report_files(results_blocks(rows, []), {"made by": HOSTILE})
    page = Page(files["report.html"].decode())
    assert page.tags["script"] == 2 and page.tags["img"] == len(page.images) > 0
    assert all(str(image["src"]).startswith("data:") for image in page.images)
    assert not any(name.startswith("on") for name in page.attributes)
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text and "\u202e" not in page.text
    printed = files["report.md"].decode()
    assert "<script" not in printed and "<img" not in printed and "\\|" in printed
    assert all(b"<script" not in data for name, data in files.items() if name.endswith(".svg"))


DAMAGED = {
    "no accuracy": (row(Acc_at_1=""), "has no Acc@1; expected a number from 0 to 100"),
    "no bits": (row(bits=""), "has no bits; expected a whole number from 2 to 8"),
    "a text": (row(float_Acc_at_1="fine"), "has float_Acc@1 'fine'; expected a number from 0 to 100"),
    "the header again": (dict(zip(NAMES, NAMES, strict=True)), "has bits 'bits'; expected a whole number from 2 to 8"),
    "short": (b"2026,cnn\n", f"has 2 cells; expected {len(NAMES)}"),
    "long": (b"," * len(NAMES) + b"\n", f"has {len(NAMES) + 1} cells; expected {len(NAMES)}"),
    "an open quote": (b'2026,"cnn,net\n', f"has 1 cell; expected {len(NAMES)}"),
    "no text": (b"," * (len(NAMES) - 1) + b"\xff\n", f"has 1 cell; expected {len(NAMES)}"),
    "zeros": (b"\0" * 512 + b"\n", f"has 1 cell; expected {len(NAMES)}"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_row_takes_no_other_with_it(name: str, tmp_path: Path) -> None:
    wrong, reason = DAMAGED[name]
    path = tmp_path / "r.csv"
    quoted = row(checkpoint='a "b"\nc.pth')
    cells = write_csv(path, wrong).read_bytes().partition(b"\n")[2] if isinstance(wrong, dict) else wrong
    header, _, good = write_csv(path, quoted).read_bytes().partition(b"\n")
    path.write_bytes(header + b"\n\n" + good + cells + good + cells)
    rows = [quoted, quoted]
    assert read_rows(path) == (rows, f"results: left out 2 of the 4 rows of '{path}'; the first, at line 5, {reason}")
    path.write_bytes(header + b"\n" + good[:-1])  # nothing but the last column can be cut there
    assert read_rows(path) == ([quoted], "")


def test_rows_left_out_are_told_on_stderr_and_on_the_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, out = write_csv(tmp_path / "r.csv", row(), row(seed=1, Acc_at_1=""), row(seed=2, Acc_at_1=60)), tmp_path / "o"
    assert main([str(path), "--out", str(out)]) == 0
    line = f"left out 1 of the 3 rows of '{path}'; the first, at line 3, has no Acc@1; expected a number from 0 to 100"
    printed = capfd.readouterr()
    assert printed.err == f"logart-report: results: {line}\n" and printed.out.startswith("report: ")
    printed = Page((out / "report.html").read_text("utf-8"))
    assert f"2 runs of {path}" in printed.text and line in printed.text
    assert printed.matrix("dynamic TW, LLR", "4 bits")[0] == "70.00 ± 14.14"


def test_a_row_without_damage_is_whole() -> None:
    assert damage(row()) == "" and damage(row(peak_memory_mb="", float_Acc_at_1="")) == ""
    for value in ("-1", "101", "inf", "0x10", "1,5", "80 %"):
        assert damage(row(Acc_at_1=value)).startswith(f"has Acc@1 '{value}'; ")


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(ValueError, match=r"needs the extra \[report\] .*install logart\[report\]"):
        report_files(results_blocks(many(), []), {})


def test_sections_keep_the_order_of_the_file() -> None:
    found, notes = groups_of(read_rows(ROOT / "results.csv").rows)
    assert [s.row["arch"] for s in sections(found)] == [*dict.fromkeys(pd.read_csv(ROOT / "results.csv").arch)]
    assert notes == []
