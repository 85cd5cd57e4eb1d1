"""Data as people have it: empty classes, class maps, numbers for names, hidden files, 16 bits, no `train`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from logart.errors import UserError
from logart.networks.data import DataChoice, ImageSource, Preprocessing, find_images, open_images
from logart.networks.image_folder import balanced_choice, read_class_map
from logart.networks.weights import class_indices

VIEW = Preprocessing((1, 4, 4), 1.0, "bilinear", (0.0,), (1.0,))


def write(root: Path, counts: dict[str, dict[str, int]]) -> Path:
    """Images of one grey each, other ones in each file: `counts` by part and class."""
    grey = 0
    for part, classes in counts.items():
        for name, count in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                grey += 1
                Image.new("L", (4, 4), grey).save(folder / f"{index}.png")
    return root


def opened(
    path: Path, classes: int, *, published: bool = False, class_indices: Any = lambda: None, **choice: Any
) -> ImageSource:
    found = find_images(DataChoice(str(path), **choice))
    return found.open(VIEW, classes, published=published, class_indices=class_indices)


def refused(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError) as caught:
        opened(*args, **kwargs)
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def labels(source: ImageSource) -> list[int]:
    return [source.val[index][1] for index in range(len(source.val))]


# Classes


@pytest.mark.parametrize(
    "counts",
    [
        {"train": {"a": 2, "b": 0, "c": 1}, "val": {"a": 1, "b": 1, "c": 0}},
        {"train": {"a": 2, "c": 1}, "val": {"b": 1, "c": 0, "a": 1}},
        {"train": {"a": 2, "b": 0, "c": 0}, "val": {"a": 1, "b": 1}},
    ],
)
def test_classes_are_the_folders_of_both_splits_empty_ones_too(counts: Any, tmp_path: Path) -> None:
    source = opened(write(tmp_path / "x", counts), 3)
    assert source.class_names == ("a", "b", "c") and labels(source) == [0, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.txt", "bee\nwasp\nant\n"),
        ("map.txt", "ant 2\nbee 0\n\nwasp 1\n"),
        ("map.csv", "ant, 2\nbee, 0\nwasp, 1\n"),
        ("map.json", json.dumps({"ant": 2, "bee": 0, "wasp": 1})),
        ("map.json", json.dumps({"0": ["bee", "a bee"], "1": ["wasp", "a wasp"], "2": ["ant", "an ant"]})),
        ("map.json", json.dumps(["bee", "wasp", "ant"])),
    ],
)
def test_a_class_map_says_which_output_a_folder_is(name: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"train": {"ant": 1}, "val": {"ant": 1, "bee": 2}})
    (tmp_path / name).write_text(text)
    assert read_class_map(tmp_path / name) == {"ant": 2, "bee": 0, "wasp": 1}
    source = opened(path, 3, class_map=str(tmp_path / name))
    assert labels(source) == [2, 0, 0] and source.class_names == ("bee", "wasp", "ant")
    assert str(source.options["class_order"]).startswith("map:")
    refused("has 2 classes, but the network has 3; --class_map FILE", path, 3)
    refused("class 'ant' is output 2, but the network has 2", path, 2, class_map=str(tmp_path / name))


@pytest.mark.parametrize("names", [["1", "2", "10"], ["0", "9", "11"], ["class 2", "class 10", "class 20"]])
def test_names_that_sort_differently_as_numbers_and_as_text(names: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"train": dict.fromkeys(names, 1), "val": dict.fromkeys(names, 1)})
    refused("if folders are ordered as numbers, ", path, 3)
    refused("expected --class_order number (timm's readers) or text (torchvision's), or --class_map FILE", path, 3)
    by_number, by_text = (opened(path, 3, class_order=order) for order in ("number", "text"))
    assert by_number.class_names == tuple(names) and by_text.class_names == tuple(sorted(names))
    assert by_number.options == {"class_order": "number"} and by_text.options == {"class_order": "text"}
    if names[0].isdigit():  # published weights number their outputs
        assert opened(path, 3, published=True).class_names == tuple(names)
    else:
        refused("--class_order", path, 3, published=True)
    assert open_images(str(path), VIEW, 3, class_names=names).class_names == tuple(names)


@pytest.mark.parametrize(
    ("content", "order"),
    [
        (lambda names: {"state_dict": {}, "class_to_idx": {n: i for i, n in enumerate(names)}}, "checkpoint"),
        (lambda names: {"hparams": {"data": {"class_to_idx": {n: 2 - i for i, n in enumerate(names)}}}}, "checkpoint"),
        (lambda names: {"class_to_idx": {n: i for i, n in enumerate(sorted(names))}}, "checkpoint"),
        (lambda names: {"class_to_idx": {n: i + 1 for i, n in enumerate(names)}}, None),  # of a network of four
        (lambda names: {"class_to_idx": {n + "x": i for i, n in enumerate(names)}}, None),
        (lambda names: {"state_dict": {}}, None),
    ],
)
def test_the_checkpoint_says_which_output_a_class_is(
    tmp_path: Path, content: Callable[[list[str]], Any], order: str | None
) -> None:
    names = ["2", "9", "10"]
    write(tmp_path / "images", {"train": dict.fromkeys(names, 1), "val": dict.fromkeys(names, 1)})
    torch.save(content(names), tmp_path / "net.pth")
    open_it = partial(opened, tmp_path / "images", 3, class_indices=partial(class_indices, tmp_path / "net.pth"))
    if order is None:
        with pytest.raises(UserError, match="expected --class_order number"):
            open_it()
        return
    indices = class_indices(tmp_path / "net.pth")
    source = open_it()
    assert indices is not None and source.class_names == tuple(sorted(indices, key=indices.__getitem__))
    assert source.options == {"class_order": order}
    assert open_it(class_order="number").class_names == tuple(names)  # a flag wins


@pytest.mark.parametrize("names", [["1", "2", "3"], ["01", "02", "10"], ["n01", "n1234", "zebra"]])
def test_names_of_one_order_need_nothing(names: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"train": dict.fromkeys(names, 1), "val": dict.fromkeys(names, 1)})
    source = opened(path, 3)
    assert source.class_names == tuple(names) and source.options == {}


# Files


@pytest.mark.parametrize(
    "place", [".DS_Store", ".ipynb_checkpoints/0.png", "a/.ipynb_checkpoints/0.png", "a/._0.png", "__MACOSX/a/0.png"]
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_hidden_files_and_folders_are_passed_over(place: str, part: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"train": {"a": 2, "b": 1}, "val": {"a": 1, "b": 1}})
    before = opened(path, 2)
    hidden = path / part / place
    hidden.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path / "val/b/0.png", hidden)
    after = opened(path, 2)
    assert (after.class_names, after.train.names, after.val.names) == (
        before.class_names,
        before.train.names,
        before.val.names,
    )


def test_files_are_found_in_capitals_behind_links_and_in_folders_of_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"train": {"a": 1}, "val": {"a": 1}})
    (tmp_path / "ä b").mkdir()
    (path / "val/a/0.png").rename(tmp_path / "ä b" / "0.PNG")
    (path / "val/a/deep").symlink_to(tmp_path / "ä b")
    (path / "val/b").symlink_to(tmp_path / "ä b")
    assert opened(path, 2).val.names == ["val/a/deep/0.PNG", "val/b/0.PNG"]


def ramp(kind: str, path: Path) -> np.ndarray:
    """A file with greys from 0 to white, and these as 0 to 1."""
    shares = np.linspace(0, 1, 16).reshape(4, 4)
    if kind == "8":
        Image.fromarray((shares * 255).round().astype(np.uint8)).save(path)
    elif kind == "float":
        Image.fromarray(shares.astype(np.float32)).save(path)
    elif kind == "32":
        Image.fromarray((shares * 255).astype(np.int32)).save(path)
    else:
        Image.fromarray((shares * 65535).round().astype(np.uint16)).save(path)
    return shares


@pytest.mark.parametrize(("kind", "suffix"), [("8", "png"), ("16", "png"), ("16", "tif"), ("16", "pgm"), ("8", "tif")])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled(kind: str, suffix: str, channels: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"train": {"a": 1}, "val": {"a": 0}})
    shares = ramp(kind, path / f"val/a/0.{suffix}")
    view = Preprocessing((channels, 4, 4), 1.0, "bilinear", (0.0,) * channels, (1.0,) * channels)
    image, _ = find_images(DataChoice(str(path))).open(view, 1).val[0]
    expected = torch.from_numpy((shares * 255).round() / 255).float().expand(channels, 4, 4)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "what"), [("float", "a float image"), ("32", "an image of 32-bit integers")])
@pytest.mark.parametrize("name", ["val/a/0.tif", "val/a/deep/1.tiff", "val/a/ä.TIF"])
def test_pixels_of_an_unknown_range_are_refused_by_name(kind: str, what: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"train": {"a": 1}, "val": {"a": 0}})
    (path / name).parent.mkdir(exist_ok=True)
    ramp(kind, path / name)
    with pytest.raises(UserError, match=f"^--data_path: {path / name} is {what}; expected 8 or 16 bits a channel$"):
        opened(path, 1).val[0]


# Calibration images, and a part of val


@pytest.mark.parametrize("layout", ["flat", "deep"])
def test_any_folder_of_images_calibrates(layout: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"val": {"a": 1, "b": 2}})
    other = write(tmp_path / "others", {"": {"": 3}} if layout == "flat" else {"q": {"r": 3, "s": 2}})
    source = opened(path, 2, calib_path=str(other))
    assert len(source.train) == (3 if layout == "flat" else 5) and labels(source) == [0, 1, 1]
    assert source.train.names[0] == ("0.png" if layout == "flat" else "q/r/0.png")
    assert source.options == {"calib_from": "path:others"}
    assert not torch.equal(source.train[0][0], source.train[1][0])


@pytest.mark.parametrize("count", [1, 4, 9])
def test_images_taken_out_of_val_are_never_measured_on(count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"val": {"a": 3, "b": 3, "c": 4}})
    whole = opened(write(tmp_path / "y", {"train": {"a": 1}, "val": {"a": 3, "b": 3, "c": 4}}), 3)
    source = opened(path, 3, calib_from_val=count)
    assert len(source.train) == count and source.options == {"calib_from": f"val:{count}"}
    assert sorted(source.train.names + source.val.names) == sorted(whole.val.names)
    assert [source.class_names[label] for label in labels(source)] == [name.split("/")[1] for name in source.val.names]
    refused("expected 1 to 9", path, 3, calib_from_val=10)
    refused("no folder 'train' under", path, 3)
    assert opened(path, 3, calibrates=False).train.names == whole.val.names  # for their shape


@pytest.mark.parametrize(("limit", "each"), [(2, [0, 1]), (3, [1]), (6, [2]), (7, [2, 3]), (10, [2, 3, 5])])
def test_a_part_of_val_is_balanced_and_always_the_same(limit: int, each: list[int], tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"train": {"a": 1}, "val": {"a": 2, "b": 3, "c": 5}})
    source = opened(path, 3, val_limit=limit)
    assert len(source.val) == limit and source.options == {"val_limit": limit}
    assert sorted(set(Counter(labels(source)).get(label, 0) for label in range(3))) == each
    assert source.val.names == opened(path, 3, val_limit=limit).val.names
    assert set(source.val.names) <= set(opened(path, 3, val_limit=min(limit + 1, 10)).val.names)
    both = opened(path, 3, val_limit=2, calib_from_val=4)
    assert not set(both.val.names) & set(both.train.names) and (len(both.val), len(both.train)) == (2, 4)


def test_a_balanced_choice_is_the_same_on_every_machine() -> None:
    assert balanced_choice("aaabbbbcc", 5, 0) == [1, 2, 4, 7, 8]
    digits = find_images(DataChoice("digits", val_limit=20)).open(
        Preprocessing((1, 8, 8), 1.0, "bilinear", (0.3,), (0.3,)), 10
    )
    assert Counter(labels(digits)) == dict.fromkeys(range(10), 2)
