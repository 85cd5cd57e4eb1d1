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


@pytest.mark.parametrize(
    "flags",
    [
        "--data_path {folder}/lost",
        "--data_path {three}",
        "--data_path digits",
        "--data_path {images} --calib_from_val 9",
        "--data_path {images} --calib_samples 9 --rounding compensated",
        "--data_path {images} --calib_path {void}",
        "--data_path {images} --save {folder}/lost/new.safetensors",
        "--data_path {images} --std 0",
        "--data_path {images} --input-size 1 32 32",
        "--data_path {images} --n_bits_w 9",
    ],
)
@pytest.mark.parametrize("track", ["cnn", "vit"])
def test_nothing_is_fetched_for_a_call_that_is_wrong(
    track: str, flags: str, wrong: dict[str, Wrong], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logart_cnn.models.fetch_state_dict", fetch)
    monkeypatch.setattr("logart.networks.timm_network._pretrained", fetch)
    monkeypatch.setattr("logart.networks.timm_network._check_classes", lambda name, model: None)
    network = {"cnn": "--arch squeezenet1_1", "vit": "--model vit_tiny --model_kwargs depth=1"}[track]
    call = [*network.split(), "--num_classes", "4", "--rounding", "nearest"]
    with pytest.raises(SystemExit) as stopped:
        MAIN[track]([*call, *flags.format_map(vars(wrong[track])).split()])
    assert stopped.value.code == 2
    with pytest.raises(AssertionError, match="a download began"):  # for a call that is right
        MAIN[track]([*call, "--data_path", str(wrong[track].images)])
