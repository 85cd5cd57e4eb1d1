"""For every test: one torch thread, and small inputs made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from logart_cnn import models
from logart_cnn.networks import DigitsResNet

if "OMP_NUM_THREADS" not in os.environ:
    # More would not help networks this small, and waiting for a busy core costs seconds a forward.
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_image_folder() -> Callable[..., Path]:
    """A maker of folders in ImageNet layout, `train/<class>/*.png` and `val/<class>/*.png`."""

    def make(root: Path, *, classes: int = 4, train: int = 2, val: int = 2, size: int = 40) -> Path:
        rng = np.random.default_rng(7)
        for part, count in (("train", train), ("val", val)):
            for label in range(classes):
                folder = root / part / f"class{label}"
                folder.mkdir(parents=True)
                for index in range(count):
                    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{index}.png")
        return root

    return make


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory, make_image_folder: Callable[..., Path]) -> Path:
    """4 classes, 2 images of each in `train` and in `val`, 40×40 pixels. Not to be written to."""
    return make_image_folder(tmp_path_factory.mktemp("images") / "pictures")


@pytest.fixture(scope="session")
def digits_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained digits_resnet as a .safetensors file. Not to be written to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = DigitsResNet().state_dict()
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's checkpoint folder, empty; and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    entry = replace(models.ENTRIES["resnet18"], weights="http://127.0.0.1:9/resnet18_imagenet.pth.tar")
    monkeypatch.setitem(models.ENTRIES, "resnet18", entry)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder
