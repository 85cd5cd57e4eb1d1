"""What a report shows of packed files and run folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from results_rows import write_csv
from small_runs import assert_refused
from torch import nn

import logart.report.run_charts
from logart import QuantConfig, quantize_model, save_packed
from logart.grids.logarithmic import base_mix
from logart.packed.file import PackedFile
from logart.quantization.layer_report import HISTOGRAM_BINS
from logart.report.command import main
from logart.report.page import Paragraph, Table
from logart.report.run_charts import base_mix as base_mix_chart
from logart.report.run_charts import block_errors, histograms, losses
from logart.report.run_page import run_blocks
from logart.report.runs import code_histogram, common_levels, read_run
from logart.runs.columns import NAMES


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
         "base_mix": {str(k): n for k, n in base_mix(layer.spec).items()}, "error": 0.5, "n_changed_codes": 9,
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
        mix = base_mix(layer.spec)
        k = max(mix, key=lambda key: mix[key])
        assert sum(round(2 * np.log2(b / a)) == 2 for a, b in zip(levels[4:], levels[5:], strict=False)) >= k - 1


def tables(path: Path) -> dict[str, list[list[str]]]:
    """The tables of a run's part of a page, by caption: head and rows as texts."""
    found = [block for block in run_blocks(read_run(str(path)), "run") if isinstance(block, Table)]
    return {t.caption: [list(t.head), *([cell.text for cell in row] for row in t.rows)] for t in found}


def starting(found: dict[str, list[list[str]]], start: str) -> list[list[str]]:
    return next(table for caption, table in found.items() if caption.startswith(start))


def test_a_packed_file_and_a_run_folder_are_shown(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", packed)
    out = tmp_path / "deep" / "out"
    assert main(["--run", str(packed), "--run", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    html = (out / "report.html").read_text("utf-8")
    assert "holds no float weights" in html and html.count("<img alt") == len(list(out.glob("*.svg")))
    names = {path.stem for path in out.glob("*.png")}
    assert {"run1_weights_1", "run2_weights_1", "run2_blocks", "run2_losses_1"} <= names
    assert not {"run1_blocks", "run1_losses_1"} & names
    info = PackedFile.read(packed).info["layers"]
    first = starting(tables(packed), "Layers")
    for line, (name, layer) in zip(first[1:], PackedFile.read(packed).layers.items(), strict=True):
        assert line[:4] == [name, "×".join(map(str, layer.shape)), "3", info[name]["block"]]
        assert line[4] == ", ".join(f"{k}: {n}" for k, n in base_mix(layer.spec).items())
        assert line[5:] == [f"{info[name]['error_nearest']:.4g}", f"{info[name]['error']:.4g}", "0.0"]
    found = tables(folder)
    assert starting(found, "Layers")[1][5:] == ["0.25", "0.5", "25.0"]  # 9 of 36 weights
    assert starting(found, "Blocks")[1:] == [
        ["good", "1.5", "1.25", "kept"], ["bad", "1.5", "2.5", "reverted: no improvement"]
    ]  # fmt: skip
    assert starting(found, "Left in float")[1] == ["odd", "its type"]
    assert read_run(str(folder)).floats and not read_run(str(packed)).floats
    assert len(read_run(str(folder)).layers[0].histogram) == HISTOGRAM_BINS


def test_the_network_as_a_whole(packed: Path, tmp_path: Path) -> None:
    row = {"Acc@1": 80.0, "float_Acc@1": 90.0, "val_images": 50, "lost": 6, "won": 1, "agreement": 84.0}
    folder = run_folder(tmp_path / "run", packed, row=row)
    said = {line[0]: line[1] for line in starting(tables(folder), "The network")[1:]}
    weights = 4 * 9 + 144 * 3  # and 4 + 3 biases
    assert said["quantized"] == f"{100 * weights / (weights + 7):.2f} %" and said["bits per quantized weight"] == "3"
    assert (said["top-1 accuracy"], said["drop from float"]) == ("80.00 %", "10.00 points")
    assert said["file"] == f"{packed.stat().st_size / 1000:.1f} kB"
    assert said["codes off the nearest"] == f"{100 * 18 / weights:.1f} %"
    file = PackedFile.read(packed)
    ks = torch.cat([layer.spec.columns["n_base2"].float() for layer in file.layers.values()])
    assert said["base-2 levels"] == f"{100 * float(ks.mean()) / 4:.1f} %"
    assert starting(tables(folder), "Test images")[1:] == [["float right", "39", "6"], ["float wrong", "1", "4"]]
    texts = [block.text for block in run_blocks(read_run(str(folder)), "run") if isinstance(block, Paragraph)]
    assert any("loses 6 images and wins 1" in text and "chance alone explains" in text and "84.00 %" in text
               for text in texts)  # fmt: skip
    assert not any(caption.startswith("Test images") for caption in tables(packed))


def test_errors_that_a_run_has_measured_besides_are_shown(packed: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", packed)
    account = json.loads((folder / "report.json").read_text())
    account["blocks"][0]["error_held_out"] = 1.375
    account["layers"][1]["output_error_held_out"] = 0.125
    (folder / "report.json").write_text(json.dumps(account))
    found = tables(folder)
    head, good, bad = starting(found, "Blocks")
    assert head[3] == "error held out" and (good[3], bad[3]) == ("1.375", "")
    head, first, second = starting(found, "Layers")
    assert head[7] == "output error held out" and (first[7], second[7]) == ("", "0.125")


def test_a_run_folders_plots_show_what_is_in_it(packed: Path, tmp_path: Path) -> None:
    run = read_run(str(run_folder(tmp_path / "run", packed)))
    errors = block_errors(run, "x")
    assert errors is not None
    lines, points = (layer["data"]["values"] for layer in errors.panels[0]["layer"])
    assert lines == [{"block": "good", "low": 1.5, "high": 1.25}, {"block": "bad", "low": 1.5, "high": 2.5}]
    assert [(p["stage"], p["error"]) for p in points[:2]] == [("before", 1.5), ("after", 1.25)]
    (curves,) = losses(run, "x")
    assert [p["loss"] for p in curves.panels[0]["data"]["values"]] == [1.0, 2 / 3, 1 / 3]
    assert curves.panels[1]["title"]["text"] == "bad (reverted)"
    assert curves.panels[0]["encoding"]["y"]["scale"] == curves.panels[1]["encoding"]["y"]["scale"]
    (weights,) = histograms(run, "x")
    bars, levels = (layer["data"]["values"] for layer in weights.panels[0]["layer"])
    assert [round(bar["share"], 2) for bar in bars] == [58.33, 41.67] and bars[0]["to"] == bars[1]["from"] == 0
    assert [level["level"] for level in levels] == run.layers[0].levels
    # the lines of the levels begin below the bars
    assert weights.panels[0]["layer"][1]["encoding"]["y"]["value"] > weights.height


def test_a_block_of_one_loss_has_no_curve(packed: Path, tmp_path: Path) -> None:
    entry = {"name": "only", "error_before": 1.0, "error_learned": 0.5, "kept": "learned", "losses": [1.0]}
    run = read_run(str(run_folder(tmp_path / "run", packed, blocks=[entry])))
    assert losses(run, "x") == [] and block_errors(run, "x") is None


def test_many_layers_and_an_8_bit_grid_stay_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logart.report.run_charts, "A_PAGE", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(4, 4) for _ in range(5))).eval()
    quantized, _ = quantize_model(model, QuantConfig(n_bits=8, rounding="nearest"), torch.randn(4, 1, 2, 2))  # type: ignore[arg-type]
    path = tmp_path / "deep.safetensors"
    save_packed(quantized, path)
    assert main(["--run", str(path), "--out", str(tmp_path / "out")]) == 0
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<summary>Weights and levels: 1 more</summary>" in html
    names = {f.stem for f in (tmp_path / "out").glob("*.png")}
    assert {"run1_weights_1", "run1_weights_2"} <= names
    run = read_run(str(path))
    assert (base_mix_chart(run, "x") is None) == ("run1_base_mix" not in names)
    titles = [panel["title"]["text"] for chart in histograms(run, "x") for panel in chart.panels]
    assert titles == [f"{layer.name} (8 bits)" for layer in run.layers] and len(re.findall("<h2 ", html)) == 1


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
