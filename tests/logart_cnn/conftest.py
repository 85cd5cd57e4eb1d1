"""Files for runs of the command, and runs of which each is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Files, Outcome, rows

import logart.run
from logart.surgery import quantized_layers
from logart_cnn import models
from logart_cnn.main import main


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    image_folder: Path,
    digits_checkpoint: Path,
    make_image_folder: Callable[..., Path],
) -> Files:
    return Files(tmp_path_factory.mktemp("files"), image_folder, digits_checkpoint, make_image_folder)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Outcome]]:
    """Runs the command, each command line once."""
    original = logart.run.quantize_model
    results = tmp_path_factory.mktemp("outcomes") / "results.csv"
    last: list[Any] = []
    known: dict[tuple[str, ...], Outcome] = {}

    def keeping(*args: Any, **kwargs: Any) -> Any:
        last[:] = original(*args, **kwargs)
        return tuple(last)

    def run(*argv: str, again: bool = False) -> Outcome:
        if again or argv not in known:
            assert main([*argv, "--results", str(results)]) == 0
            layers = quantized_layers(last[0])
            codes = [(name, layer.codes.flatten().tolist()) for name, layer in layers.items()]  # type: ignore[union-attr]
            known[argv] = Outcome(rows(results)[-1], codes, [block.losses for block in last[1].blocks])
        return known[argv]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logart.run, "quantize_model", keeping)
        yield run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's checkpoint folder, empty; and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models, "WEIGHT_URLS", {"resnet18": "http://127.0.0.1:9/resnet18_imagenet.pth.tar"})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder
