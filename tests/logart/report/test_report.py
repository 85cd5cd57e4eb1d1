"""The report, against plain computations by pandas from the same file."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter, OrderedDict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from results_rows import NEAREST, row, write_csv
from small_runs import assert_refused
from torch import nn

import logart.report.__main__
import logart.report.plots
import logart.report.run_plots
from logart import QuantConfig, quantize_model, save_packed
from logart.packed.file import PackedFile
from logart.packed.inspect import base_mix
from logart.quantization.layer_report import HISTOGRAM_BINS
from logart.report.__main__ import main, report_files, results_blocks
from logart.report.page import Figure
from logart.report.paper import KEYS, paper_figures
from logart.report.plots import _searches, against_bits, against_time, costs, drawing, finished, plain_numbers
from logart.report.rows import damage, read_rows
from logart.report.run_plots import run_figures
from logart.report.runs import code_histogram, common_levels, read_run
from logart.report.tables import sections
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
        self.in_cell = False
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
        elif tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1][-1] += data

    def cell(self, table: int, name: str, column: str) -> list[str]:
        head, *rows = self.tables[table]
        return next(r for r in rows if r[0][0] == name)[[h[0] for h in head].index(column)]


def page_of(*rows: dict[str, str], paper: list[dict[str, str]] | None = None) -> Page:
    """The page of some rows, without plots, which take most of the time."""
    blank = Figure("blank", "", "", b"", b"")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("against_bits", "against_time", "costs"):
            patch.setattr(logart.report.__main__, name, lambda *_: blank)
        return Page(report_files(results_blocks(rows, paper or []))["report.html"].decode())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert main([str(ROOT / "results.csv"), "--out", str(out)]) == 0
    return out


def test_the_shipped_results_are_the_tables_that_pandas_computes(shipped: Path) -> None:
    page = Page((shipped / "report.html").read_text("utf-8"))
    frame = pd.read_csv(ROOT / "results.csv")
    rows = frame[(frame.arch == "cifar_resnet20") & (frame.rounding == "learned") & (frame.lr == 0.01)]
    methods = {
        "base 2": ("log_2", None), "base √2": ("log_sqrt2", None), "linear_mse": ("linear_mse", None),
        "dynamic, TW": ("dynamic", "tensor_wise"), "dynamic, LW": ("dynamic", "layer_wise"),
        "dynamic, BW": ("dynamic", "block_wise"),
    }  # fmt: skip
    closed = [f"dynamic, compensated, calib_samples {count}" for count in (256, 1024)]
    assert [r[0][0] for r in page.tables[0][1:]] == ["base 2", "base √2", *[*methods][3:], "linear_mse", *closed]
    for label, (grid, search) in methods.items():
        for bits in (3, 4):
            same = rows[(rows.scale_method == grid) & (rows.bits == bits)]
            same = same[same.search_method.isna() if search is None else same.search_method == search]
            for column, suffix, seconds in (
                ("search_Acc@1", "", same.search_seconds),
                ("Acc@1", ", LLR", same.search_seconds + same.reconstruction_seconds),
            ):
                values = same[column]
                spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
                away = f"{(values - same['float_Acc@1']).mean():+.2f}".replace("-", "−")
                seen = page.cell(0, label, f"{bits} bits{suffix}")
                assert seen == [f"{values.mean():.2f}{spread}", f"n {len(values)} · {away} · {seconds.mean():.3g} s"]


def test_the_page_is_whole_and_asks_nothing_of_a_network(shipped: Path) -> None:
    html = (shipped / "report.html").read_text("utf-8")
    page = Page(html)
    names = {path.stem for path in shipped.glob("*.svg")}
    assert len(page.images) == len(names) >= 9 and names == {path.stem for path in shipped.glob("*.png")}
    assert all(str(image["src"]).startswith("data:image/svg+xml;base64,") and image["alt"] for image in page.images)
    assert page.tags["script"] == 1 and page.tags["link"] == 1
    assert not re.search(r'(src|href)="(?!data:)', html) and "@import" not in html and "url(" not in html
    printed = (shipped / "report.md").read_text("utf-8")
    assert {name for name in re.findall(r"\]\((\w+)\.svg\)", printed)} == names
    assert "87.73 ± 0.08" in printed and "87.73 ± 0.08" in html
    assert "click" in html and "click" not in printed  # Markdown's tables do not sort


def test_an_older_report_leaves_nothing_behind_and_loses_nothing_else(tmp_path: Path) -> None:
    hostile = "![x](mine.svg)"
    write_csv(tmp_path / "two.csv", row(arch=hostile, data="](mine.svg)"), row(arch="other"))
    write_csv(tmp_path / "one.csv")
    out = tmp_path / "out"
    assert main([str(tmp_path / "two.csv"), "--out", str(out)]) == 0
    mine = {"mine.svg", "mine.png", "network2_notes.svg", "data.csv"}
    for name in mine:
        (out / name).write_text("kept")
    (out / "network2_time.png").unlink()
    assert main([str(tmp_path / "one.csv"), "--out", str(out)]) == 0
    kinds = ("table1_bits", "time", "costs")
    expected = {f"network1_{kind}.{end}" for kind in kinds for end in ("png", "svg")} | {"report.md", "report.html"}
    assert {path.name for path in out.iterdir()} == expected | mine
    assert all((out / name).read_text() == "kept" for name in mine)
    (out / "report.md").write_text("# My own\n\n![mine](mine.svg)\n")
    assert main([str(tmp_path / "one.csv"), "--out", str(out)]) == 0 and (out / "mine.svg").exists()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", row(), row(bits=3))
    for name in ("one", "two"):
        assert main([str(path), "--out", str(tmp_path / name)]) == 0
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 2 + 2 * 3


@pytest.mark.parametrize(
    "name, value",
    [("lr", "0.5"), ("calib_samples", "65"), ("iters_w", "11"), ("scale_search", "grid"), ("zero_code", "True"),
     ("asymmetric", "True"), ("hardware_approx", "True"), ("recon_metric", "mae"), ("search_samples", "9"),
     ("first_last_bits", "8"), ("network_options", "a=1"), ("device", "gpu"), ("calib_augment", "True"),
     ("checkpoint_sha256", "cd"),
     ("preset", "best"), ("config", "mine.py"), ("val_images", "99"), ("scale_method", "log_2"), ("bits", "3")],
)  # fmt: skip
def test_rows_of_different_settings_are_never_averaged(name: str, value: str) -> None:
    other = row(**{name: value, "seed": 1, "Acc@1": 60, "search_Acc@1": 70})
    page = page_of(row(), other)
    lines = [line for table in page.tables for r in table[1:] for cell in r[1:] for line in cell]
    assert {"80.00", "60.00"} <= set(lines)
    assert all(line.startswith("70.00 ± 0.00") for line in lines if "±" in line)  # before LLR they are the same run
    assert page_of(row(), row(seed=1, Acc_at_1=60)).cell(0, "dynamic, TW", "4 bits, LLR")[0] == "70.00 ± 14.14"


def test_a_learned_run_gives_both_cells_and_the_newest_of_equal_seeds_counts() -> None:
    newer = row(utc_time="2026-02-01T00:00:00Z", Acc_at_1=82)
    for rows in ((row(), newer), (newer, row())):
        page = page_of(*rows)
        assert page.cell(0, "dynamic, TW", "4 bits") == ["70.00", "n 1 · −20.00 · 1 s"]
        assert page.cell(0, "dynamic, TW", "4 bits, LLR") == ["82.00", "n 1 · −8.00 · 3 s"]
        assert "1 row(s) repeat the settings and seed of a newer one" in page.text
    alone = page_of(row(**NEAREST, Acc_at_1=71), row())
    assert alone.cell(0, "dynamic, TW", "4 bits")[0] == "71.00"  # a run of its own goes before one on its way
    assert "1 accuracies taken on a run's way differ" in alone.text and "repeat" not in alone.text


def test_an_approximation_at_test_is_a_table_of_its_own() -> None:
    both = {"hardware_approx_terms": 2, "approx_Acc@1": 55}
    page = page_of(row(), row(seed=1, **both), row(hardware_approx="True", hardware_approx_terms=2, Acc_at_1=60))
    titles = [f"Table {n}: hardware_approx {how}" for n, how in ((1, "False"), (2, "at test"), (3, "True"))]
    assert [page.text.count(title) for title in titles] == [1, 1, 1]
    assert page.cell(0, "dynamic, TW", "4 bits, LLR")[:2] == ["80.00 ± 0.00", "n 2 · −10.00 · 3 s"]
    assert page.cell(1, "dynamic, TW", "4 bits, LLR")[:2] == ["55.00", "n 1 · −35.00 · 3 s"]
    assert page.cell(2, "dynamic, TW", "4 bits, LLR")[0] == "60.00" and len(page.tables[1]) == 2
    figures = page_of(row(arch="resnet18", **both), paper=paper_figures())
    assert figures.cell(0, "dynamic, TW", "4 bits, LLR")[2:] == ["paper 69.24 [1]"]  # with the exact √2
    assert len(figures.cell(1, "dynamic, TW", "4 bits, LLR")) == 2


def test_settings_that_only_llr_has_part_no_tables() -> None:
    plain = row(**NEAREST, scale_method="log_2", search_method="", calib_augment="")
    page = page_of(row(calib_augment="False"), plain, row(calib_augment="False", bits=3, config="3bit.py"))
    assert [[r[0][0] for r in table] for table in page.tables] == [["method", "base 2", "dynamic, TW"]]
    assert [cell[0] for cell in page.tables[0][0]] == ["method", "4 bits", "4 bits, LLR", "3 bits", "3 bits, LLR"]
    twice = page_of(row(config="a.py"), row(config="b.py", Acc_at_1=60)).cell(0, "dynamic, TW", "4 bits, LLR")
    assert twice[0] == "80.00" and "60.00" in twice and any("b.py" in line for line in twice)


def test_a_closed_form_that_saw_other_images_says_so() -> None:
    closed = {"rounding": "compensated", "search_method": "", "search_Acc@1": "", "lr": "", "iters_w": "0"}
    for count, label in (("32", "dynamic, compensated, calib_samples 32"), ("64", "dynamic, compensated")):
        (section,), _ = sections([row(), row(**closed | {"calib_samples": count})])
        assert sorted(section.tables[0].labels.values()) == sorted(["dynamic, TW", label])


def test_the_papers_figures_stand_beside_their_cells() -> None:
    figures = paper_figures()
    assert figures and all(f["source"] and 0 < float(f["Acc@1"]) < 100 for f in figures)
    keys = [tuple(f[k] for k in (*KEYS, "rounding", "source")) for f in figures]
    assert len(set(keys)) == len(keys)
    readme = {f["Acc@1"] for f in figures if f["arch"] == "resnet18" and "README" in f["source"]}
    assert len(readme) == 10 and {"31.53", "69.24"} <= readme
    page = page_of(row(arch="resnet18"), paper=figures)
    assert page.cell(0, "dynamic, TW", "4 bits")[2:] == ["paper 57.10 [1]"]
    assert page.cell(0, "dynamic, TW", "4 bits, LLR")[2:] == ["paper 69.24 [1]"]
    assert "logart-lab/logart" in page.text and "Sources" in page.text
    scaled = row(arch="resnet18", search_method="block_wise", scale_search="grid")
    assert page_of(scaled, paper=figures).cell(0, "dynamic, BW", "4 bits, LLR")[2:] == ["paper 70.69 (−0.31) [1]"]
    for other in ({"arch": "net"}, {"arch": "resnet18", "bits": 3}, {"arch": "resnet18", "zero_code": "True"}):
        assert "Sources" not in page_of(row(**other), paper=figures).text
    assert "Sources" not in page_of(row(arch="resnet18"), paper=[]).text


def test_a_time_that_no_row_tells_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(row(reconstruction_seconds=""), row(bits=3, search_seconds=1000, reconstruction_seconds="98765.4"))
    assert page.cell(0, "dynamic, TW", "4 bits")[1] == "n 1 · −20.00 · 1 s"
    assert page.cell(0, "dynamic, TW", "4 bits, LLR")[1] == "n 1 · −10.00"
    assert page.cell(0, "dynamic, TW", "3 bits")[1:] == ["n 1 · −20.00 · 1000 s"]
    assert page.cell(0, "dynamic, TW", "3 bits, LLR")[1:] == ["n 1 · −10.00 · 99765 s"]
    ((section,), _) = sections([row(search_seconds="", peak_memory_mb="")])
    assert against_time(section, "x") is None and costs(section, "x") is None


def test_a_search_is_drawn_where_no_accuracy_was_taken_behind_it() -> None:
    rows = [row(**{"search_Acc@1": ""}), row(bits=3, search_seconds=5), row(bits=3, lr="0.5", seed=1)]
    ((section,), _) = sections(rows)
    assert sorted(found[1:] for found in _searches(section)) == [(3, 3.0), (4, 1.0)]  # 3 bits: of both runs, once


def test_networks_and_tables_are_told_apart() -> None:
    closed = {"rounding": "both", "scale_search": "grid", "search_Acc@1": ""}
    rows = [row(), row(lr="0.5"), row(**closed), row(checkpoint="b.pth", checkpoint_sha256="cd")]
    first, second = sections(rows)[0]
    assert first.title == "net on pictures (checkpoint net.pth, checkpoint_sha256 ab)"
    assert second.title == "net on pictures (checkpoint b.pth, checkpoint_sha256 cd)"
    assert [table.title for table in first.tables] == [
        "Table 1: scale_search none, lr 0.01", "Table 2: scale_search none, lr 0.5",
        "Table 3: scale_search grid, lr 0.01",
    ]  # fmt: skip
    assert second.tables[0].title == ""
    assert sorted((label, group.llr) for label, group in first.lines) == [
        ("1: dynamic, TW", False), ("1: dynamic, TW", True), ("2: dynamic, TW", True),
        ("3: dynamic, TW, compensated", True),
    ]  # fmt: skip
    assert [label for label, _ in second.lines] == ["dynamic, TW", "dynamic, TW"]
    ((section,), _) = sections([row(), row(rounding="compensated", scale_search="grid", lr="", iters_w=0)])
    assert [t.title for t in section.tables] == ["Table 1: scale_search none", "Table 2: scale_search grid"]


@pytest.mark.parametrize("title", ["W" * 90 + ": accuracy", "网" * 60 + " on x", "one two " * 30, "first\nsecond"])
def test_titles_fit_their_figure(title: str) -> None:
    with warnings.catch_warnings(), drawing(5.0, 3.0) as (canvas, _):
        finished(canvas, "x", title, "")
        text = canvas._suptitle.get_text()
        assert "".join(text.split()) == "".join(title.split()) and ("\n" in text)
        assert canvas._suptitle.get_window_extent().width <= canvas.bbox.width


def test_every_method_is_in_the_legend_in_full() -> None:
    rows = [row(search_samples=n, search_batch_size=n, calib_augment=a) for n in (32, 64) for a in ("True", "False")]
    seen: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logart.report.plots, "finished", lambda canvas, *_: seen.append(
            [" ".join(text.get_text().split()) for text in canvas.legends[0].get_texts()]))  # fmt: skip
        ((section,), _) = sections(rows)
        for table in section.tables:
            against_bits(section, table, "x")
            assert seen.pop() == ["float", *table.labels.values()]
        against_time(section, "x")
    assert len(seen[0]) == 1 + 4 == len(set(seen[0]))


RANGES = [(0.155, 0.3), (6, 9.4), (0.41, 0.68), (6.1, 19), (0.052, 0.067), (1, 29), (1, 900)]


@pytest.mark.parametrize("low, high", RANGES)
def test_an_axis_has_numbers_to_read_by(low: float, high: float) -> None:
    with drawing(2.5, 2.0) as (canvas, axes):
        axis = axes[0, 0]
        axis.set(xscale="log", xlim=(low, high))
        plain_numbers(axis.xaxis)
        canvas.draw_without_rendering()
        labels = [label for label in axis.get_xticklabels(which="both") if low <= label.get_position()[0] <= high]
    assert len([label for label in labels if label.get_text()]) >= 2


HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'|`$\\frac{_\x1b\u202e\udcff"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = ["arch", "data", "device", "scale_method", "search_method", "config", "lr", "rounding"]
    files = report_files(results_blocks([row(**{name: HOSTILE}) for name in names], []))
    page = Page(files["report.html"].decode())
    assert page.tags["script"] == 1 and page.tags["img"] == len(page.images)
    assert all(str(image["src"]).startswith("data:") for image in page.images)
    assert not any(name.startswith("on") for name in page.attributes)
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text and "\u202e" not in page.text
    printed = files["report.md"].decode()
    assert "<script" not in printed and "<img" not in printed and "\\|" in printed
    assert all(b"<script" not in data for name, data in files.items() if name.endswith(".svg"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()
    quantized, _ = quantize_model(model, QuantConfig(n_bits=3, rounding="nearest"), torch.randn(4, 1, 8, 8))  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("packed") / "net.safetensors"
    save_packed(quantized, path)
    return path


def run_folder(folder: Path, packed: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "packed.safetensors").write_bytes(packed.read_bytes())
    file = PackedFile.read(packed)
    layers = [
        {"name": name, "shape": list(layer.shape), "n_bits": layer.n_bits, "block": name, "error_nearest": 0.25,
         "base_mix": {str(k): n for k, n in base_mix(layer).items()}, "error": 0.5, "n_changed_codes": 9,
         "histogram": [0] * 29 + [7, 5] + [0] * 29}
        for name, layer in file.layers.items()
    ]  # fmt: skip
    blocks = [
        {"name": name, "error_before": 1.5, "error_learned": after, "kept": kept, "losses": [3.0, 2.0, 1.0],
         "capture_seconds": 0.1, "learning_seconds": 0.2}
        for name, after, kept in (("good", 1.25, "learned"), ("bad", 2.5, "before"))
    ]  # fmt: skip
    account = {"format": 2, "row": {"arch": "net", "bits": 3}, "layers": layers, "skipped": [["odd", "its type"]],
               "folded": [], "blocks": blocks, "search_seconds": 0.1, "reconstruction_seconds": 0.2}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(account | changes))
    return folder


def test_a_packed_files_histogram_counts_every_code(packed: Path) -> None:
    for layer in PackedFile.read(packed).layers.values():
        counts, reach = code_histogram(layer)
        books = layer.spec.codebook(layer.n_bits).levels.abs().amax(1)
        rows = layer.weight().reshape(len(books), -1).double() / books[:, None]
        expected, _ = np.histogram(rows.numpy(), len(counts), (-reach, reach))
        assert counts == expected.tolist() and sum(counts) == layer.shape.numel()
        levels = common_levels(layer)
        assert len(levels) == 8 and levels == [-level for level in levels[::-1]] and levels[-1] == 1
        mix = base_mix(layer)
        k = max(mix, key=lambda key: mix[key])
        assert sum(round(2 * np.log2(b / a)) == 2 for a, b in zip(levels[4:], levels[5:], strict=False)) >= k - 1


def test_a_packed_file_and_a_run_folder_are_shown(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", packed)
    out = tmp_path / "deep" / "out"
    assert main(["--run", str(packed), "--run", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    page = Page((out / "report.html").read_text("utf-8"))
    first, second, blocks, skipped = page.tables
    info = PackedFile.read(packed).info["layers"]
    for line, (name, layer) in zip(first[1:], PackedFile.read(packed).layers.items(), strict=True):
        shown = [cell[0] for cell in line]
        assert shown[:4] == [name, "×".join(map(str, layer.shape)), "3", info[name]["block"]]
        assert shown[4] == ", ".join(f"{k}: {n}" for k, n in base_mix(layer).items())
        assert shown[5:] == [f"{info[name]['error_nearest']:.4g}", f"{info[name]['error']:.4g}", "0", "0.0"]
    assert [cell[0] for cell in second[1]][5:] == ["0.25", "0.5", "9", "25.0"]  # 9 of 36 weights
    assert [[cell[0] for cell in line] for line in blocks[1:]] == [
        ["good", "1.5", "1.25", "kept"], ["bad", "1.5", "2.5", "reverted: no improvement"]
    ]  # fmt: skip
    assert [cell[0] for cell in skipped[1]] == ["odd", "its type"]
    assert "holds no float weights" in page.text and len(page.images) == 2 + 3
    assert read_run(str(folder)).floats and not read_run(str(packed)).floats
    assert len(read_run(str(folder)).layers[0].histogram) == HISTOGRAM_BINS


def test_many_layers_and_an_8_bit_grid_stay_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logart.report.run_plots, "A_PAGE", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(4, 4) for _ in range(5))).eval()
    quantized, _ = quantize_model(model, QuantConfig(n_bits=8, rounding="nearest"), torch.randn(4, 1, 2, 2))  # type: ignore[arg-type]
    path = tmp_path / "deep.safetensors"
    save_packed(quantized, path)
    assert main(["--run", str(path), "--out", str(tmp_path / "out")]) == 0
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert len(Page(html).tables[0]) == 6
    assert "<summary>Weights and levels: 1 more</summary>" in html
    assert {f.name for f in (tmp_path / "out").glob("*.png")} == {
        "run1_weights_1.png", "run1_weights_2.png", "run1_base_mix.png"
    }  # fmt: skip


def test_a_runs_plots_name_their_layers_in_full_and_say_whose_levels_they_draw(tmp_path: Path) -> None:
    names = [f"{'a_long_part_' * 5}{i}" for i in range(5)]
    seen: list[Any] = []

    def keep(canvas: Any, name: str, *_: Any) -> Figure:
        canvas.draw_without_rendering()
        titles = [axis.title for axis in canvas.axes if axis.get_visible() and axis.title.get_text()]
        boxes = [title.get_window_extent() for title in titles]
        rows = {round(box.y0): [b for b in boxes if round(b.y0) == round(box.y0)] for box in boxes}
        assert all(a.x1 < b.x0 for row in rows.values() for a, b in zip(row, row[1:], strict=False))
        texts = [re.sub(r"\s", "", title.get_text()) for title in titles]
        seen.append((texts, canvas._supxlabel and canvas._supxlabel.get_text(), canvas.axes))
        return Figure(name, "", "", b"", b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logart.report.run_plots, "finished", keep)
        for grid in ("dynamic", "linear_mse"):
            model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names)).eval()
            config = QuantConfig(n_bits=6, scale_method=grid, rounding="nearest")  # type: ignore[arg-type]
            save_packed(quantize_model(model, config, torch.randn(4, 4))[0], tmp_path / "run.safetensors")
            run_figures(read_run(str(tmp_path / "run.safetensors")), "run")
    (panels, dynamic, _), (_, _, mix), (_, linear, _) = seen
    assert panels == [f"{name}(6bits)" for name in names]
    assert "most common base mix" in dynamic and "most common" not in linear and linear.endswith("the first")
    assert [re.sub(r"\s", "", label.get_text()) for label in mix[0].get_yticklabels()] == names
    top, bottom = mix[0].figure.bbox.y1, mix[0].figure.bbox.y0
    assert all(bottom <= axis.get_tightbbox().y0 and axis.get_tightbbox().y1 <= top for axis in mix)


def test_wrong_calls_take_one_line_and_write_nothing(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = write_csv(tmp_path / "good.csv")
    (tmp_path / "header.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    bare = tmp_path / "bare.csv"
    bare.write_text(good.read_text().splitlines()[0] + "\n")
    (tmp_path / "cut.csv").write_text(good.read_text()[:-9])
    words = write_csv(tmp_path / "words.csv", Acc_at_1="fine")
    (tmp_path / "folder").mkdir()
    wide = write_csv(tmp_path / "wide.csv", bits="1e300")
    half = write_csv(tmp_path / "half.csv", bits="4.5")
    nan = write_csv(tmp_path / "nan.csv", search_Acc_at_1="nan")
    bad_json = run_folder(tmp_path / "bad", packed)
    (bad_json / "report.json").write_text("[NaN]")
    short = run_folder(tmp_path / "short", packed, layers=[{"name": "0"}])
    other = run_folder(tmp_path / "other", packed, format=1)
    out, none, shown = tmp_path / "out", "results: none of the 1 rows", "can be shown; the first, at line 2, has"
    for argv, line in (
        ([], "nothing to report: expected a results file, or --run PATH"),
        ([tmp_path / "absent.csv"], f"results: '{tmp_path / 'absent.csv'}' is not there"),
        ([tmp_path / "folder"], f"results: '{tmp_path / 'folder'}' is a folder"),
        ([tmp_path / "header.csv"], f"results: '{tmp_path / 'header.csv'}' has no column 'utc_time'"),
        (
            [tmp_path / "cut.csv"],
            f"{none} of '{tmp_path / 'cut.csv'}' can be shown; the first, "
            f"at line 2, has {len(NAMES) - 5} cells; expected {len(NAMES)}",
        ),
        ([tmp_path / "empty.csv"], "results: the file holds no rows"),
        ([bare], "results: the file holds no rows"),
        ([words], f"{none} of '{words}' {shown} Acc@1 'fine'; expected a number from 0 to 100"),
        ([half], f"{none} of '{half}' {shown} bits '4.5'; expected a whole number from 2 to 8"),
        ([wide], f"{none} of '{wide}' {shown} bits '1e300'; expected a whole number from 2 to 8"),
        ([nan], f"{none} of '{nan}' {shown} search_Acc@1 'nan'; expected"),
        (
            ["--run", tmp_path / "absent"],
            f"--run: {tmp_path / 'absent'}: does not exist; expected a packed file or a run folder",
        ),
        (["--run", good], f"--run: {good}: is not a valid safetensors file"),
        (["--run", tmp_path / "folder"], f"--run: {tmp_path / 'folder'} has no readable report.json"),
        (["--run", bad_json], f"--run: {bad_json / 'report.json'} is not a run's report"),
        (["--run", short], f"--run: {short / 'report.json'} is not a run's report"),
        (["--run", other], f"--run: {other / 'report.json'} is not a run's report (expected format 2)"),
        ([good, "--run", tmp_path / "absent"], "--run:"),
    ):
        assert_refused(main, [*map(str, argv), "--out", str(out)], f"logart-report: {line}", capfd)
        assert not out.exists()
    assert_refused(main, [str(good), "--out", str(words)], f"logart-report: --out: '{words}' is a file", capfd)
    assert_refused(main, [str(good), "--out", str(words / "x")], "logart-report: --out: cannot write", capfd)
    assert_refused(main, [str(good)], "logart-report: the following arguments are required", capfd)


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
    assert "2 runs." in printed.text and line in printed.text
    assert printed.cell(0, "dynamic, TW", "4 bits, LLR")[0] == "70.00 ± 14.14"


def test_a_row_without_damage_is_whole() -> None:
    assert damage(row()) == "" and damage(row(peak_memory_mb="", float_Acc_at_1="")) == ""
    for value in ("-1", "101", "inf", "0x10", "1,5", "80 %"):
        assert damage(row(Acc_at_1=value)).startswith(f"has Acc@1 '{value}'; ")


def test_matplotlib_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"needs the extra \[report\] .*install logart\[report\]"):
        results_blocks([row()], [])


def test_sections_keep_the_order_of_the_file() -> None:
    found, notes = sections(read_rows(ROOT / "results.csv").rows)
    assert [s.row["arch"] for s in found] == [*dict.fromkeys(pd.read_csv(ROOT / "results.csv").arch)] and notes == []
