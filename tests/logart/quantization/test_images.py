"""Calibration images as loaders, lists and arrays give them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from logart.errors import NetworkError
from logart.quantization.images import gather_images

IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10)


def inference(images: Tensor) -> Tensor:
    with torch.inference_mode():
        return images.clone()


FORMS: dict[str, Any] = {
    "a tensor": IMAGES,
    "batches": IMAGES.split(4),
    "a generator of batches": (batch for batch in IMAGES.split(4)),
    "a loader of (image, label)": DataLoader(TensorDataset(IMAGES, LABELS), 4),
    "a loader of [image]": DataLoader(TensorDataset(IMAGES), 3),
    "a data set": TensorDataset(IMAGES, LABELS),
    "single images": list(IMAGES),
    "pairs of a list": [(image, 0) for image in IMAGES],
    "nested pairs": [[(batch, 0), 1] for batch in IMAGES.split(5)],
    "an array": IMAGES.numpy(),
    "an array of doubles": IMAGES.double().numpy(),
    "arrays": [batch.numpy() for batch in IMAGES.split(4)],
    "inference tensors": inference(IMAGES),
    "with a gradient": IMAGES.clone().requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str) -> None:
    gathered = gather_images(FORMS[form], 7)
    assert torch.equal(gathered, IMAGES[:7])
    assert not gathered.requires_grad and not gathered.is_inference()


def test_dicts_by_key_and_anything_by_a_function() -> None:
    dicts = [{"image": batch, "label": 0} for batch in IMAGES.split(4)]
    assert torch.equal(gather_images(dicts, 7, "image"), IMAGES[:7])
    assert torch.equal(gather_images(dicts, 7, prepare=lambda batch: batch["image"]), IMAGES[:7])
    raw = [{"pixels": (batch, "jpg")} for batch in IMAGES.mul(255).split(4)]
    assert torch.allclose(gather_images(raw, 7, prepare=lambda batch: batch["pixels"][0] / 255), IMAGES[:7])
    assert torch.equal(gather_images(raw, 7, "pixels", lambda batch: batch), IMAGES[:7].mul(255))


def test_batches_of_tokens_are_no_images() -> None:
    tokens = torch.randn(12, 3, 4)
    assert torch.equal(gather_images(tokens.split(3), 12), tokens)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "bytes": (lambda: IMAGES.byte(), "calibration images are uint8; expected floating point, scaled and normalised"),
    "batches of bytes": (lambda: IMAGES.byte().split(3), "are uint8; expected floating point"),
    "whole numbers": (lambda: LABELS[:, None], "are int64; expected floating point"),
    "an array of bytes": (lambda: np.zeros((10, 3, 8, 8), np.uint8), "are uint8; expected floating point"),
    "dicts": (lambda: [{"a": IMAGES, "b": 0}], "dicts with 'a', 'b', input_key is None; expected one of the keys"),
    "text": (lambda: ["a.jpg"], "come as str; expected a tensor"),
    "a folder's name": (lambda: "images", "are a str; expected a tensor"),
    "nothing": (lambda: None, "are a NoneType; expected a tensor"),
    "too few": (lambda: IMAGES[:3], "ask for 7 calibration images, got 3"),
    "none": (lambda: [], "ask for 7 calibration images, got 0"),
    "other sizes": (lambda: [IMAGES[:2], IMAGES[:2, :, :4]], r"differ in shape: \[3, 8, 8\] and \[3, 4, 8\]"),
    "no numbers": (lambda: IMAGES.log(), "hold NaN or infinite values"),
    "single numbers": (lambda: [torch.tensor(1.0)], "single numbers"),
}


@pytest.mark.parametrize("form", WRONG)
def test_what_is_no_image_is_refused_in_a_line(form: str) -> None:
    build, message = WRONG[form]
    with pytest.raises(NetworkError, match=message) as caught:
        gather_images(build(), 7)
    assert "\n" not in str(caught.value)
