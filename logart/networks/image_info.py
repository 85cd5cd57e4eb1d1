"""What the info of a packed file says of the images that its network takes; nothing in it is believed unchecked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from logart.networks.data import Preprocessing
from logart.networks.network import INTERPOLATIONS

MAX_PIXELS = 2**25  # of an image, all channels; a size that a file claims is not believed beyond


def input_size_of(info: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width.

    Raises:
        ValueError: the info does not say, or says what no image has.
    """
    preprocessing = info.get("preprocessing")
    size = preprocessing.get("input_size") if isinstance(preprocessing, dict) else None
    if size is None:
        raise ValueError("does not say how large its images are")
    if not (isinstance(size, list | tuple) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)) or (
        math.prod(size) > MAX_PIXELS
    ):
        raise ValueError(f"has the input_size {size!r:.80}, no [channels, height, width]")
    return tuple(size)


def preprocessing_of(info: Mapping[str, Any]) -> Preprocessing | None:
    """What a network expects of its images, where the info says it in full."""
    try:
        size, p = input_size_of(info), info["preprocessing"]
        mean, std = (tuple(p[name]) for name in ("mean", "std"))
        numbers = all(math.isfinite(v) for v in mean) and all(0 < v < math.inf for v in std)
        fit = (
            len(mean) == len(std) == size[0]
            and 0 < p["crop_pct"] <= 1
            and math.prod(size) <= MAX_PIXELS * p["crop_pct"] ** 2  # images are resized to more before the crop
            and p["interpolation"] in INTERPOLATIONS
        )
        return Preprocessing(size, p["crop_pct"], p["interpolation"], mean, std) if numbers and fit else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
