"""Wrong calls of both commands: one line that names the flag, exit code 2, and no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import Files, VitFiles, assert_refused
from wrong_calls import TABLE, Call, Wrong, wrong_for_cnns, wrong_for_transformers

import logart_cnn.main
import logart_vit.main

MAIN = {"cnn": logart_cnn.main.main, "vit": logart_vit.main.main}


@pytest.fixture(scope="module")
def wrong(
    tmp_path_factory: pytest.TempPathFactory,
    image_folder: Path,
    digits_checkpoint: Path,
    make_image_folder: Callable[..., Path],
) -> dict[str, Wrong]:
    make, folder = make_image_folder, tmp_path_factory.mktemp("wrong")
    for name in ("cnn_files", "vit_files", "cnn", "vit"):
        (folder / name).mkdir()
    files = Files(folder / "cnn_files", image_folder, digits_checkpoint, make)
    vit_files = VitFiles(folder / "vit_files", image_folder, make)
    return {
        "cnn": wrong_for_cnns(folder / "cnn", files, make),
        "vit": wrong_for_transformers(folder / "vit", vit_files, make),
    }


@pytest.mark.parametrize(("track", "call"), TABLE, ids=lambda part: part.flags if isinstance(part, Call) else part)
def test_a_wrong_call_takes_one_line_and_leaves_no_trace(
    track: str,
    call: Call,
    wrong: dict[str, Wrong],
    hub: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    argv, line = call.of(track, wrong[track])
    before = stamps(wrong[track].folder)
    assert_refused(MAIN[track], argv, line, capfd)
    assert list(here.iterdir()) == []
    assert stamps(wrong[track].folder) == before


def stamps(folder: Path) -> dict[Path, int]:
    """What is in a folder, and when each was last written to."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".pyc"}
