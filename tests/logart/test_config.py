"""Settings: the values in and out of range, and what follows from them."""

import dataclasses
from typing import Any

import pytest

from logart.config import QuantConfig, ReconInput, ReconMetric, SearchMethod
from logart.grid import ScaleMethod


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n_bits", [1, 9, 0, -4]),
        ("first_last_bits", [1, 9]),
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
        ("drop_prob", [-0.1, 1.1, float("nan")]),
        ("temperature", [0.0, -1.0, float("inf"), float("nan")]),
        ("hardware_terms", [1, 5, -1]),
        ("scale_method", ["log", "log_dynamic", ""]),
        ("search_method", ["channel_wise"]),
        ("recon_input", ["quantised"]),
        ("recon_metric", ["hessian"]),
    ],
)
def test_values_out_of_range_are_refused(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError) as caught:
            QuantConfig(**{field: value})
        assert "\n" not in str(caught.value)
        assert str(value) in str(caught.value)


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
    ],
)
def test_values_at_the_ends_are_taken(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(QuantConfig(**{field: value}), field) == value


def test_every_field_has_a_test_of_its_range() -> None:
    (marks,) = (m for m in test_values_out_of_range_are_refused.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    fields = {field.name for field in dataclasses.fields(QuantConfig)}
    assert fields - {case[0] for case in marks.args[1]} == {"channel_wise", "head_kl", "seed"}


def test_strings_become_members() -> None:
    config = QuantConfig(scale_method="log_2", search_method="block_wise", recon_input="float")  # type: ignore[arg-type]
    assert config.scale_method is ScaleMethod.LOG_2
    assert config.search_method is SearchMethod.BLOCK_WISE
    assert config.recon_input is ReconInput.FLOAT
    assert QuantConfig(recon_metric="mae").recon_metric is ReconMetric.MAE  # type: ignore[arg-type]


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


def test_first_and_last_layer_may_have_bits_of_their_own() -> None:
    assert QuantConfig(n_bits=3).bits_of(["b", "a", "c"]) == {"b": 3, "a": 3, "c": 3}
    assert QuantConfig(n_bits=3, first_last_bits=8).bits_of(["b", "a", "c"]) == {"b": 8, "a": 3, "c": 8}
    assert QuantConfig(n_bits=3, first_last_bits=8).bits_of(["a"]) == {"a": 8}
    assert QuantConfig(n_bits=3, first_last_bits=8).bits_of([]) == {}
