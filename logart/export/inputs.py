"""The images of an export: which ones golden vectors are of, and which ones number formats are chosen from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logart.errors import UserError, one_line
from logart.networks.calibration import calibration_images
from logart.networks.data import ImageSource, open_images
from logart.networks.digits import DIGITS
from logart.networks.image_info import preprocessing_of

CALIBRATION_IMAGES, GOLDEN_IMAGES = 256, 8
EXPECTED = f"a folder in ImageNet layout, {DIGITS} or PATH.npy"


@dataclass(frozen=True)
class GoldenImages:
    """Images for golden vectors.

    Attributes:
        images: float32 [n, C, H, W], preprocessed.
        calibration: float32 [n, C, H, W], what the formats of activations hold; `images` where there is nothing else.
        data: what they are from.
        names: of `images`; empty for an array.
    """

    images: Tensor
    calibration: Tensor
    data: str
    names: tuple[str, ...] = ()


def open_source(info: Mapping[str, Any], data: str) -> ImageSource:
    """A data set with the preprocessing that a packed file records.

    Raises:
        UserError: the file does not say which images the network takes, or no such data set.
    """
    preprocessing = preprocessing_of(info)
    if preprocessing is None:
        raise UserError("--inputs: the file does not say which images the network takes; expected a file of --save")
    classes = info.get("class_names")
    if not isinstance(classes, list):
        if data != DIGITS:
            raise UserError("--inputs: the file does not say how many classes the network has; expected PATH.npy")
        classes = None
    count = 10 if classes is None else len(classes)
    return open_images(data, preprocessing, count, flag="--inputs", class_names=classes)


def own_data(info: Mapping[str, Any]) -> str | None:
    """The data set that a file needs no --inputs for: the digits, for a network of digits."""
    source = info.get("source")
    known = isinstance(source, dict) and source.get("data") == DIGITS and preprocessing_of(info) is not None
    return DIGITS if known else None


def golden_images(info: Mapping[str, Any], inputs: str, count: int | None, seed: int = 0) -> GoldenImages:
    """The images that --inputs names.

    Args:
        info: of the packed file.
        inputs: a data set, whose `val` gives the images and `train` the calibration images, or an array of images.
        count: how many; None is `GOLDEN_IMAGES` of a data set, all of an array.
        seed: chooses the calibration images.

    Raises:
        UserError: no such images, or images that the network does not take.
    """
    if inputs != DIGITS and (inputs.endswith(".npy") or Path(inputs).is_file()):
        images = _array(info, inputs)[:count]
        return GoldenImages(images, images, Path(inputs).name)
    source = open_source(info, inputs)
    golden = source.val.balanced(GOLDEN_IMAGES if count is None else count)
    images = torch.stack([golden[index][0] for index in range(len(golden))])
    calibration, _ = calibration_images(source, min(CALIBRATION_IMAGES, len(source.train)), seed)
    return GoldenImages(images, calibration, source.name, tuple(golden.names))


def _array(info: Mapping[str, Any], path: str) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged file makes NumPy raise almost anything
        why = one_line(error)
        raise UserError(f"--inputs: cannot read {path} ({why:.160}); expected {EXPECTED}") from error
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 4 or not len(array):
        seen = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"--inputs: {path} holds {seen}; expected preprocessed images, float32 [n, C, H, W]")
    preprocessing = preprocessing_of(info)
    if preprocessing is not None and array.shape[1:] != preprocessing.input_size:
        takes = list(preprocessing.input_size)
        raise UserError(f"--inputs: {path} has images {list(array.shape[1:])}; the network takes {takes}")
    return torch.from_numpy(array)
