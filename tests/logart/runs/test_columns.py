"""The list of columns: what a row says of which settings, and the page of documentation that is made from it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from logart.grids.grid import ScaleSearch
from logart.networks.evaluate import Accuracy
from logart.quantization.config import QuantConfig, ReconInput, ReconMetric, SearchMethod
from logart.runs.columns import (
    COLUMNS,
    NAMES,
    SETTINGS,
    Facts,
    Part,
    columns_of,
    documentation,
    measured_row,
    settings_row,
    versions,
)

ROOT = Path(__file__).parents[3]


def test_the_documentation_is_what_the_list_of_columns_gives() -> None:
    assert (ROOT / "docs" / "results_csv.md").read_text("utf-8") == documentation()
    done = subprocess.run([sys.executable, "-m", "logart.runs.columns"], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout.decode("utf-8") == documentation()


def test_the_documentation_has_one_row_of_five_cells_for_every_column() -> None:
    lines = [line for line in documentation().splitlines() if line.startswith("| `")]
    assert sorted(line.split(" | ")[0] for line in lines) == sorted(f"| `{name}`" for name in NAMES)
    assert all(line.count("|") == 6 and line.endswith(" |") for line in lines)
    assert all(column.meaning for column in COLUMNS)


def test_every_column_is_there_once_and_in_one_part() -> None:
    assert len(set(NAMES)) == len(NAMES)
    parts = [name for part in Part for name in columns_of(part)]
    assert sorted(parts) == sorted(NAMES)
    assert {column.unit for column in COLUMNS if "Acc@" in column.name} == {"%"}
    assert {column.unit for column in COLUMNS if column.name.endswith("seconds")} == {"s"}


def decided(config: QuantConfig) -> dict[str, Any]:
    """The cells that the settings decide, without the empty ones."""
    return {name: cell for name, cell in settings_row(Facts(config)).items() if cell is not None}


def test_the_settings_say_what_acted() -> None:
    config = QuantConfig(
        n_bits=3,
        first_last_bits=8,
        channel_wise=False,
        search_method=SearchMethod.LAYER_WISE,
        search_samples=7,
        calib_samples=9,
        batch_size=5,
        iters=11,
        rrweight=0.25,
        lr=0.125,
        b_start=10.0,
        b_end=3.0,
        warmup=0.5,
        recon_input=ReconInput.FLOAT,
        recon_metric=ReconMetric.MAE,
        search_batch_size=4,
        hardware_terms=2,
        seed=6,
    )
    always = {
        "bits": 3, "first_last_bits": 8, "channel_wise": "False", "scale_method": "dynamic",
        "scale_search": "none", "asymmetric": "False", "zero_code": "False", "rounding": "learned",
        "hardware_approx": "True", "hardware_approx_terms": 2, "iters_w": 11, "seed": 6, "mirror": "False",
    }  # fmt: skip
    learning = {
        "calib_samples": 9, "batch_size": 5, "lr": 0.125, "rrweight": 0.25, "b_start": 10.0, "b_end": 3.0,
        "warmup": 0.5, "recon_input": "float", "recon_metric": "mae",
    }  # fmt: skip
    searching = {"search_method": "layer_wise", "search_samples": 7, "search_batch_size": 4}
    assert decided(config) == always | searching | learning
    tensor_wise = replace(config, search_method=SearchMethod.TENSOR_WISE)  # looks at no image
    assert decided(tensor_wise) == always | {"search_method": "tensor_wise"} | learning
    plain = always | searching | {"iters_w": 0, "rounding": "nearest"}
    assert decided(replace(config, iters=0)) == plain
    assert decided(replace(config, rounding="nearest")) == plain
    mixed = replace(
        config, recon_input=ReconInput.MIXED, drop_prob=0.25, recon_metric=ReconMetric.HESSIAN_PERTURB, head_kl=True
    )
    more = {"recon_input": "mixed", "drop_prob": 0.25, "recon_metric": "hessian_perturb+kl", "temperature": 20.0}
    assert decided(mixed) == always | searching | learning | more
    base2 = replace(config, scale_method="log_2", hardware_terms=0, first_last_bits=None)
    expected = {"scale_method": "log_2", "hardware_approx": "False", "first_last_bits": "same"}
    without = {name: cell for name, cell in always.items() if name != "hardware_approx_terms"}
    assert decided(base2) == without | learning | expected
    scaled = replace(base2, scale_search=ScaleSearch.HALF_STEP, asymmetric=True, zero_code=True, hardware_terms=4)
    scaled = replace(scaled, wide_gap=True)
    codes = {"scale_search": "half_step", "asymmetric": "True", "zero_code": "True", "wide_gap": "True"}
    codes |= {"hardware_approx_terms": 4}
    acts = always | searching | learning | {"scale_method": "log_2", "first_last_bits": "same"} | codes
    assert decided(scaled) == acts  # base 2 has scales to search


def test_the_settings_of_compensated_rounding() -> None:
    """Neither the search's own settings act nor, without steps, those of LLR."""
    config = QuantConfig(search_method=SearchMethod.LAYER_WISE, calib_samples=9, batch_size=5, iters=11)
    always = {
        "bits": 4, "first_last_bits": "same", "channel_wise": "True", "scale_method": "dynamic",
        "scale_search": "none", "asymmetric": "False", "zero_code": "False", "hardware_approx": "False",
        "seed": 0, "calib_samples": 9, "batch_size": 5, "damping": 0.01, "mirror": "False",
    }  # fmt: skip
    alone = always | {"rounding": "compensated", "iters_w": 0}
    assert decided(replace(config, rounding="compensated")) == alone
    learning = {
        "lr": 0.01, "rrweight": 0.1, "b_start": 20.0, "b_end": 2.0, "warmup": 0.2, "recon_input": "quantized",
        "recon_metric": "mse",
    }  # fmt: skip
    both = replace(config, rounding="both")
    assert decided(both) == always | learning | {"rounding": "both", "iters_w": 11}


def test_linear_grids_have_none_of_the_options_of_logarithmic_ones() -> None:
    config = QuantConfig(
        scale_method="linear_mse", scale_search=ScaleSearch.GRID, asymmetric=True, zero_code=True, wide_gap=True
    )
    row = settings_row(Facts(config))
    options = [row[name] for name in ("scale_search", "asymmetric", "zero_code", "wide_gap")]
    assert options == ["none", "False", "False", None]
    assert row["search_method"] is None


@pytest.mark.parametrize("iters", [0, 5])
def test_what_the_command_line_says_of_calibration_images_acts_where_they_are_seen(iters: int) -> None:
    said = {"calib_augment": "True", "calib_list": "ab", "arch": "net", "preset": None}
    row = settings_row(Facts(QuantConfig(iters=iters), said, terms_at_test=3))
    assert (row["calib_augment"], row["calib_list"]) == (("True", "ab") if iters else (None, None))
    assert (row["arch"], row["hardware_approx"], row["hardware_approx_terms"]) == ("net", "False", 3)
    assert tuple(row) == SETTINGS


def test_the_final_network_s_accuracy_is_that_of_the_last_stage() -> None:
    stages = {"float": Accuracy(1.11111, 2, 7), "searched": Accuracy(3, 4, 7), "rounded": Accuracy(5, 6, 7)}
    row = measured_row(Facts(QuantConfig(iters=1), accuracies=stages))
    assert (row["Acc@1"], row["Acc@5"], row["search_Acc@1"], row["search_Acc@5"]) == (5, 6, 3, 4)
    assert (row["float_Acc@1"], row["approx_Acc@1"], row["val_images"]) == (1.111, None, 7)
    row = measured_row(Facts(QuantConfig(iters=0), accuracies=stages))
    assert (row["Acc@1"], row["search_Acc@1"]) == (3, 3)


def test_time_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    row = measured_row(Facts(QuantConfig(iters=0), accuracies={"searched": Accuracy(1, 2, 3)}))
    written = datetime.strptime(str(row["utc_time"]), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert before <= written <= datetime.now(timezone.utc)
    assert row["torch_version"] == version("torch") and row["timm_version"] == version("timm")
    assert versions() == {name: row[name] for name in ("torch_version", "timm_version", "project_version")}
    monkeypatch.setattr("sys.path", [])
    assert versions()["timm_version"] == ""
