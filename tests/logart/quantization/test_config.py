"""Settings: the values in and out of range, and what follows from them."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from logart.errors import SettingError
from logart.grids.grid import ScaleSearch
from logart.grids.logarithmic import LOG_2
from logart.grids.registry import GRIDS
from logart.quantization.config import PRESETS, QuantConfig, ReconInput, ReconMetric, SearchMethod, preset


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n_bits", [1, 9, 0, -4]),
        ("first_last_bits", [1, 9]),
        ("layer_bits", [{"a": 1}, {"a": 9}, "a=4"]),
        ("skip", ["head", [3]]),
        ("bits_budget", [1.9, 8.1, float("nan")]),
        ("size_budget", [0, -1]),
        ("search_samples", [0, -1]),
        ("search_batch_size", [0]),
        ("calib_samples", [0]),
        ("batch_size", [0]),
        ("iters", [-1]),
        ("lr", [0.0, -1.0, float("inf"), float("nan")]),
        ("rrweight", [-0.1, float("inf"), float("nan")]),
        ("b_start", [1.5, float("inf"), float("nan")]),
        ("b_end", [1.0, 0.5, 21.0, float("nan")]),
        ("warmup", [-0.1, 1.1, float("nan")]),
        ("damping", [-0.1, float("nan"), float("inf"), "much"]),
        ("drop_prob", [-0.1, 1.1, float("nan")]),
        ("temperature", [0.0, -1.0, float("inf"), float("nan")]),
        ("hardware_terms", [1, 5, -1]),
        ("scale_method", ["log", "log_dynamic", ""]),
        ("search_method", ["channel_wise"]),
        ("scale_search", ["full", "", 1]),
        ("rounding", ["plain", "learn", ""]),
        ("recon_input", ["quantised"]),
        ("recon_metric", ["hessian"]),
        *((name, [1, 17, 33, 0]) for name in ("n_bits_a", "input_bits_a", "head_bits_a")),
        ("act_scale", ["integer"]),
        ("softmax_grid", ["log"]),
        ("iters_a", [-1]),
        ("crops", [-1, 1.0]),
    ],
)
def test_values_out_of_range_are_refused(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError) as caught:
            QuantConfig(**{field: value})
        assert "\n" not in str(caught.value)
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("n_bits", [4.0, "4", True, None], "a whole number"),
        ("iters", [float("nan"), 10.0, "10"], "a whole number"),
        ("seed", [0.0, None], "a whole number"),
        ("first_last_bits", [8.0, True], "a whole number"),
        ("asymmetric", ["False", 0, None], "True or False"),
        ("channel_wise", ["True", 1], "True or False"),
        ("lr", ["0.1", True, None], "a number"),
        ("layer_bits", [{"a": 4.0}, {"a": True}], "a whole number"),
        ("layer_bits", ["a=4", [("a", 4)]], "bits by pattern"),
        ("skip", ["head", [1]], "a list of patterns"),
        ("bits_budget", ["3", True], "a number"),
        ("size_budget", [3.0, True], "a whole number"),
    ],
)
def test_values_of_another_type_are_refused(field: str, values: list[Any], expected: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{field} must be {expected}, got "):
            QuantConfig(**{field: value})


def test_numbers_of_numpy_are_taken_as_their_own_kind() -> None:
    config = QuantConfig(n_bits=np.int64(3), lr=np.float32(0.5), iters=torch.tensor(7))  # type: ignore[arg-type]
    assert (type(config.n_bits), type(config.lr), config.iters) == (int, float, 7)
    json.dumps(config.as_dict())


LAYERS = ["stem", "blocks.0.conv", "blocks.1.conv", "head"]


def test_bits_are_resolved_by_pattern_and_the_last_match_counts() -> None:
    config = QuantConfig(n_bits=3, first_last_bits=8, layer_bits={"blocks.*": 2, "*.1.*": 5, "head": 6})
    assert config.bits_of(LAYERS, ["stem", "head"]) == dict(zip(LAYERS, (8, 2, 5, 6), strict=True))
    assert QuantConfig(n_bits=3).bits_of(LAYERS, ["stem", "head"]) == dict.fromkeys(LAYERS, 3)


def test_layers_are_skipped_by_pattern() -> None:
    assert QuantConfig(skip=["blocks.*", "s?em"]).skipped(LAYERS) == {
        "blocks.0.conv": "blocks.*",
        "blocks.1.conv": "blocks.*",
        "stem": "s?em",
    }


@pytest.mark.parametrize("pattern", ["block", "Head", "blocks.2*"])
def test_a_pattern_that_matches_nothing_is_named(pattern: str) -> None:
    wrong = re.escape(repr(pattern)) + " matches no layer that is quantized; they are stem, .*head"
    with pytest.raises(SettingError, match=f"^layer_bits: {wrong}"):
        QuantConfig(layer_bits={"stem": 4, pattern: 4}).bits_of(LAYERS, [])
    with pytest.raises(SettingError, match=f"^skip: {wrong}"):
        QuantConfig(skip=["stem", pattern]).skipped(LAYERS)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n_bits", [2, 8]),
        ("first_last_bits", [None, 2, 8]),
        ("search_samples", [1]),
        ("calib_samples", [1]),
        ("batch_size", [1]),
        ("iters", [0]),
        ("rrweight", [0.0]),
        ("b_start", [2.0]),
        ("b_end", [20.0, 1.01]),
        ("warmup", [0.0, 1.0]),
        ("drop_prob", [0.0, 1.0]),
        ("hardware_terms", [0, 2, 3, 4]),
        ("damping", [0.0, 10.0, "auto"]),
    ],
)
def test_values_at_the_ends_are_taken(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(QuantConfig(**{field: value}), field) == value


def test_every_field_has_a_test_of_its_range() -> None:
    (marks,) = (m for m in test_values_out_of_range_are_refused.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    fields = {field.name for field in dataclasses.fields(QuantConfig)}
    assert fields - {case[0] for case in marks.args[1]} == {
        "channel_wise",
        "asymmetric",
        "zero_code",
        "wide_gap",
        "head_kl",
        "calibrate_with_act",
        "mirror",
        "seed",
    }


def test_strings_become_members() -> None:
    config = QuantConfig(scale_method="log_2", search_method="block_wise", recon_input="float")  # type: ignore[arg-type]
    assert config.scale_method == "log_2" and config.grid is LOG_2
    assert config.search_method is SearchMethod.BLOCK_WISE
    assert config.recon_input is ReconInput.FLOAT
    assert QuantConfig(recon_metric="mae").recon_metric is ReconMetric.MAE  # type: ignore[arg-type]
    assert QuantConfig(scale_search="half_step").scale_search is ScaleSearch.HALF_STEP  # type: ignore[arg-type]
    assert QuantConfig(rounding="both").rounding == "both"  # type: ignore[arg-type]


def test_settings_are_frozen_and_comparable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().n_bits = 3  # type: ignore[misc]
    assert QuantConfig(n_bits=3) == dataclasses.replace(QuantConfig(), n_bits=3) != QuantConfig()


@pytest.mark.parametrize(
    ("scale_method", "search_method", "iters", "looks", "needed"),
    [
        ("dynamic", "tensor_wise", 0, False, 0),
        ("dynamic", "layer_wise", 0, True, 40),
        ("dynamic", "block_wise", 0, True, 40),
        ("log_2", "layer_wise", 0, False, 0),
        ("dynamic", "tensor_wise", 1, False, 30),
        ("dynamic", "layer_wise", 1, True, 40),
    ],
)
def test_images_are_asked_for_only_where_a_stage_looks_at_them(
    scale_method: Any, search_method: Any, iters: int, looks: bool, needed: int
) -> None:
    config = QuantConfig(
        scale_method=scale_method, search_method=search_method, iters=iters, search_samples=40, calib_samples=30
    )
    assert config.searches_data is looks
    assert config.images_needed == needed


@pytest.mark.parametrize(
    ("rounding", "iters", "acting", "needed"),
    [
        ("nearest", 5, "nearest", 40),
        ("learned", 0, "nearest", 40),
        ("learned", 5, "learned", 40),
        ("compensated", 5, "compensated", 30),  # whose search looks at the images of its own
        ("both", 0, "compensated", 30),
        ("both", 5, "both", 30),
    ],
)
def test_what_rounds_and_looks_at_which_images(rounding: str, iters: int, acting: str, needed: int) -> None:
    config = QuantConfig(
        rounding=rounding, iters=iters, search_method=SearchMethod.BLOCK_WISE, search_samples=40, calib_samples=30
    )
    assert config.method.name == acting
    assert config.searches and config.images_needed == needed
    tensor_wise = dataclasses.replace(config, search_method=SearchMethod.TENSOR_WISE)
    assert tensor_wise.images_needed == (0 if acting == "nearest" else 30)


@pytest.mark.parametrize("scale_method", list(GRIDS))
@pytest.mark.parametrize("scale_search", list(ScaleSearch))
def test_scales_make_any_log_grid_one_to_search(scale_method: str, scale_search: ScaleSearch) -> None:
    config = QuantConfig(scale_method=scale_method, scale_search=scale_search, search_method=SearchMethod.LAYER_WISE)
    scales = scale_search is not ScaleSearch.NONE and scale_method.startswith("log")
    expected = scale_method in ("dynamic", "apot") or scales
    assert config.searches is config.searches_data is expected


def test_presets_are_settings() -> None:
    for n_bits in range(2, 9):
        few = {"wide_gap": n_bits < 4}
        half_steps = {"scale_search": ScaleSearch.HALF_STEP if n_bits < 4 else ScaleSearch.NONE, **few}
        fast = QuantConfig(rounding="compensated", damping="auto", calib_samples=256, **half_steps)
        assert QuantConfig(**preset("fast", n_bits)) == fast
        assert QuantConfig(**preset("paper", n_bits)) == QuantConfig(iters=20000, rrweight=10000.0)
        grid = {"scale_search": ScaleSearch.GRID if n_bits < 6 else ScaleSearch.NONE, **few}
        more = {"calib_samples": 1024, "mirror": True, "iters": 300, "lr": 0.01}
        best = QuantConfig(rounding="both" if n_bits < 4 else "compensated", damping="auto", **grid, **more)
        assert QuantConfig(**preset("best", n_bits)) == best
    assert set(PRESETS) == {"fast", "paper", "best"}


def test_first_and_last_layer_may_have_bits_of_their_own() -> None:
    assert QuantConfig(n_bits=3).bits_of(["b", "a", "c"], ["b", "c"]) == {"b": 3, "a": 3, "c": 3}
    config = QuantConfig(n_bits=3, first_last_bits=8)
    assert config.bits_of(["b", "a", "c"], ["b", "c", "skipped"]) == {"b": 8, "a": 3, "c": 8}
    assert config.bits_of([], []) == {}
