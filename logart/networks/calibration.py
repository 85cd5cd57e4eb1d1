"""Calibration images: chosen from `train` by a seed or by a list of names, and such lists as files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from logart.errors import UserError
from logart.networks.data import ImageSource
from logart.runtime import progress_bar


def choose_calibration(
    source: ImageSource,
    count: int,
    seed: int,
    *,
    names: Sequence[str] | None = None,
    flag: str = "--calib_samples",
    list_flag: str = "--calib_list",
) -> list[int]:
    """Choose training images by the seed, without replacement: the same on every machine. None is read.

    Args:
        source: The data set.
        count: How many images; a smaller count gives the first images of a larger one.
        seed: Chooses.
        names: The images to take instead, as `load_names` gives them; the first `count` of them.
        flag: The flag that errors about the count name.
        list_flag: The flag that errors about `names` name.

    Returns:
        Their indices in `source.train`.

    Raises:
        UserError: Fewer images than asked for, or an unknown name.
    """
    available = len(source.train) if names is None else len(names)
    where = f"the training images of {source.name}" if names is None else "the saved list"
    if not 1 <= count <= available:
        raise UserError(f"{flag}: {count} images asked for; expected 1 to {available}, the size of {where}")
    if names is None:
        # The streams of RandomState are frozen by NumPy's policy; those of its newer generators may change.
        return np.random.RandomState(seed % 2**32).permutation(available)[:count].tolist()  # type: ignore[no-any-return]
    return _find(source, names, list_flag)[:count]


def calibration_images(
    source: ImageSource,
    count: int,
    seed: int,
    *,
    augment: bool = False,
    crops: int = 0,
    names: Sequence[str] | None = None,
    flag: str = "--calib_samples",
    quiet: bool = False,
) -> tuple[Tensor, list[str]]:
    """Choose training images and load them: `choose_calibration`, then `load_calibration`."""
    indices = choose_calibration(source, count, seed, names=names, flag=flag)
    return load_calibration(source, indices, seed, augment=augment, crops=crops, quiet=quiet)


def load_calibration(
    source: ImageSource,
    indices: Sequence[int],
    seed: int,
    *,
    augment: bool = False,
    crops: int = 0,
    quiet: bool = False,
) -> tuple[Tensor, list[str]]:
    """Load training images.

    Args:
        source: The data set.
        indices: As `choose_calibration` gives them.
        seed: Chooses crops and flips. Global generators stay as they are.
        augment: Random-resized crops and flips instead of the evaluation's centre crop.
        crops: How many crops at other places of the resized image follow each.
        quiet: No progress bar.

    Returns:
        The images, float32 [len(indices) · (1 + crops), C, H, W], and the names of those that were chosen.

    Raises:
        UserError: An image that cannot be read, or crops of images of which nothing is cut off.
    """
    if crops and not any(map(source.train.is_cut, indices)):
        size = "×".join(map(str, source.train.size))
        raise UserError(f"--crops: the images are resized to {size}, which is all that the network sees; expected 0")
    count = len(indices) * (1 + crops)
    images: Tensor | None = None
    with torch.random.fork_rng(devices=[]), progress_bar(count, "calibration images", quiet) as bar:
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also reaches the GPU
        for row in range(count):
            index, crop = indices[row // (1 + crops)], row % (1 + crops)
            if crop:
                image = source.train.cropped(index)
            else:
                image = source.train.augmented(index) if augment else source.train[index][0]
            if images is None:
                images = image.new_empty(count, *image.shape)  # stacking a list would hold two copies
            images[row] = image
            bar.update()
    assert images is not None
    return images, [source.train.names[index] for index in indices]


def save_names(path: str | Path, names: Sequence[str], *, flag: str = "--save_calib_list") -> None:
    """Write a list of images, one name a line, for `load_names`.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        Path(path).write_text("".join(f"{name}\n" for name in names), "utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{flag}: cannot write {path} ({error.strerror})") from error


def names_digest(names: Sequence[str]) -> str:
    """What tells one list of images from another: the first 16 hex digits of their names' SHA-256."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def load_names(path: str | Path, *, flag: str = "--calib_list") -> list[str]:
    """Read a list of images that `save_names` wrote.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        text = Path(path).read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path} ({error.strerror})") from error
    return [line for line in text.split("\n") if line]


def _find(source: ImageSource, names: Sequence[str], flag: str) -> list[int]:
    known = {name: index for index, name in enumerate(source.train.names)}
    seen: set[str] = set()
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: {name!r} is not a training image of {source.name}")
        if name in seen:
            raise UserError(f"{flag}: {name!r} is listed twice; expected every image once")
        seen.add(name)
    return [known[name] for name in names]
