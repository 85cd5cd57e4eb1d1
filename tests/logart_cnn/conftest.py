"""Files for runs of the command, and runs of which each is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_runs import Files, Outcome, outcomes

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
    with outcomes(main, tmp_path_factory.mktemp("outcomes") / "results.csv") as run:
        yield run
