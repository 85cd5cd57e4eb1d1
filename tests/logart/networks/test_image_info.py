"""What a packed file's info says of images."""

from typing import Any

import pytest

from logart.networks.data import Preprocessing
from logart.networks.image_info import input_size_of, preprocessing_of

WHOLE = {
    "input_size": [3, 8, 9], "crop_pct": 0.5, "interpolation": "bicubic",
    "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0],
}  # fmt: skip


def test_what_is_said_in_full_comes_back() -> None:
    expected = Preprocessing((3, 8, 9), 0.5, "bicubic", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert preprocessing_of({"preprocessing": WHOLE}) == expected
    assert input_size_of({"preprocessing": {"input_size": [3, 8, 9]}}) == (3, 8, 9)


@pytest.mark.parametrize("info", [{}, {"preprocessing": 3}, {"preprocessing": {}}], ids=str)
def test_nothing_is_said(info: dict[str, Any]) -> None:
    assert preprocessing_of(info) is None
    with pytest.raises(ValueError, match="does not say how large"):
        input_size_of(info)


@pytest.mark.parametrize(
    "size", [[3, 8], [3, 8, 0], [3, 8, 8.0], [3, True, 8], "388", 3, [1, 2**13, 2**12 + 1]], ids=str
)
def test_a_size_that_no_image_has(size: Any) -> None:
    info = {"preprocessing": {**WHOLE, "input_size": size, "crop_pct": 1.0, "mean": [0.0], "std": [1.0]}}
    assert preprocessing_of(info) is None
    with pytest.raises(ValueError, match="has the input_size"):
        input_size_of(info)


def test_both_have_the_same_limit_and_the_crop_counts() -> None:
    largest = {**WHOLE, "input_size": [1, 2**13, 2**12], "mean": [0.0], "std": [1.0]}
    assert input_size_of({"preprocessing": largest}) == (1, 2**13, 2**12)
    assert preprocessing_of({"preprocessing": {**largest, "crop_pct": 1.0}}) is not None
    assert preprocessing_of({"preprocessing": {**largest, "crop_pct": 0.9}}) is None  # resized to more first


@pytest.mark.parametrize(
    "change",
    [
        {"crop_pct": 0}, {"crop_pct": 1.5}, {"crop_pct": "1"}, {"interpolation": "magic"}, {"interpolation": []},
        {"mean": [0.0]}, {"mean": [0.0, 0.0, float("inf")]}, {"std": [1.0, 1.0, 0.0]}, {"std": None},
        {"mean": [10**400] * 3},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_whole_is_none(change: dict[str, Any]) -> None:
    assert preprocessing_of({"preprocessing": {**WHOLE, **change}}) is None
    missing = {name: value for name, value in WHOLE.items() if name not in change}
    assert preprocessing_of({"preprocessing": missing}) is None
