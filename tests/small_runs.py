"""What a run of the CNN command needs to take half a second: files, command lines, and what a run left."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from logart.weights import file_sha256

SMALL_KWARGS = ["channels=(8,8,8,8)", "stem_width=8"]  # of timm's resnet10t: 7,538 weights
SURROUNDINGS = {  # columns that two equal runs need not share
    "utc_time", "search_seconds", "reconstruction_seconds", "total_seconds", "peak_memory_mb",
}  # fmt: skip


def rows(results: Path) -> list[dict[str, str]]:
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def seeded(build: Callable[[], nn.Module], path: Path, seed: int = 0) -> Path:
    """A network's random weights as a file."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = build().state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def small(name: str = "resnet10t", classes: int = 4) -> nn.Module:
    return timm.create_model(name, channels=(8, 8, 8, 8), stem_width=8, num_classes=classes)


class Files:
    """Checkpoints and image folders that these tests read."""

    def __init__(self, folder: Path, images: Path, digits: Path, make_image_folder: Callable[..., Path]) -> None:
        self.images, self.digits = images, digits
        self.others = make_image_folder(folder / "others", train=3, size=48)
        self.small = seeded(small, folder / "small.safetensors")
        self.again = seeded(small, folder / "again.pth", seed=1)
        self.again_sha256 = file_sha256(self.again)
        self.small14 = seeded(lambda: small("resnet14t"), folder / "small14.pth")
        self.small14_sha256 = file_sha256(self.small14)

    def on_images(self) -> list[str]:
        """A whole run on the small folder of images, in a second or less."""
        return [
            *("--data_path", str(self.images), "--arch", "timm:resnet10t", "--checkpoint", str(self.small)),
            *("--model_kwargs", *SMALL_KWARGS, "--num_classes", "4", "--input_size", "32"),
            *"--device cpu --workers 0 --iters_w 8 --calib_samples 6 --batch_size 4 --calib_lr 0.1".split(),
        ]


class Outcome(NamedTuple):
    """What a run left: its row, and what the core did (every code, every LLR loss)."""

    row: dict[str, str]
    codes: list[tuple[str, list[int]]]
    losses: list[tuple[float, ...]]

    def settings(self) -> dict[str, str]:
        """The row without what is measured."""
        return {k: v for k, v in self.row.items() if "Acc@" not in k and k not in SURROUNDINGS}
