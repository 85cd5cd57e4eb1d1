"""The built-in data: scikit-learn's handwritten digits, 8×8 pixels, in a fixed split."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from logart.networks.image_folder import Files

DIGITS = "digits"
DIGITS_VAL_IMAGES = 500
DIGITS_SPLIT_SEED = 0


def split_digits(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fixed split of the digits: 500 for validation, of every class its share; the others for training.

    Args:
        labels: [n], the classes of all digits.

    Returns:
        The indices of the training images and those of the validation images, ascending.
    """
    shuffled = np.random.RandomState(DIGITS_SPLIT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    quota = np.arange(len(labels) + 1) * DIGITS_VAL_IMAGES // len(labels)
    is_val = np.diff(quota) == 1  # evenly spaced over the classes
    return np.sort(by_class[~is_val]), np.sort(by_class[is_val])


def find_digits() -> tuple[tuple[str, ...], Files, Files]:
    """The names of the classes, the training images and those for validation."""
    from sklearn.datasets import load_digits  # slow to import, and only the built-in data needs it

    digits = load_digits()
    load = partial(_load_digit, (digits.images / 16).astype(np.float32))
    train, val = (
        Files(tuple(f"{DIGITS}/{part}/{i}" for i in indices), tuple(map(str, digits.target[indices])), load)
        for part, indices in zip(("train", "val"), split_digits(digits.target), strict=True)
    )
    return tuple(map(str, digits.target_names)), train, val


def _load_digit(pixels: np.ndarray, mode: str, name: str) -> Image.Image:
    return Image.fromarray(pixels[int(name.rpartition("/")[2])])  # in mode F, which ToTensor does not rescale
