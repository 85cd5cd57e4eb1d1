"""`--save` in both entry points: the file is the network whose accuracy was printed."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import logart_cnn.main
import logart_vit.main
from logart import QuantConfig, load_packed
from logart.networks.data import open_images
from logart.networks.evaluate import accuracy
from logart.networks.loader import validation_batches
from logart.packed.file import PackedFile
from logart.runs.columns import SETTINGS, Facts, settings_row
from logart_cnn.models import load_network

TRACKS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "cnn": (logart_cnn.main.main, "--iters_w 0 --workers 0 --n_bits_w 3 --device cpu --quiet".split()),
    "vit": (logart_vit.main.main, "--num_workers 0 --w_bit 3 --device cpu --quiet".split()),
}


@pytest.mark.parametrize("track", TRACKS)
def test_the_file_is_the_network_that_was_measured(track: str, tmp_path: Path) -> None:
    main, argv = TRACKS[track]
    path, results = tmp_path / "net.safetensors", tmp_path / "results.csv"
    assert main([*argv, "--results", str(results), "--save", str(path), "--first_last_bits", "8"]) == 0
    (row,) = csv.DictReader(results.open())
    model = load_packed(path)
    source = open_images("digits", load_network("digits_resnet").preprocessing, 10)
    found = accuracy(model, validation_batches(source, 128, 0), torch.device("cpu"))
    assert round(found.top1, 3) == float(row["Acc@1"]) < float(row["float_Acc@1"])
    info = PackedFile.read(path).info
    assert info.keys() == {
        "settings", "layers", "quantized_share", "skipped", "network", "preprocessing", "class_names", "source",
        "accuracy", "versions", "run",
    }  # fmt: skip
    assert info["layers"].keys() == PackedFile.read(path).layers.keys()
    assert info["accuracy"]["searched"]["top1"] == found.top1
    assert info["source"] == {
        "checkpoint": row["checkpoint"], "sha256": row["checkpoint_sha256"], "data": "digits"
    }  # fmt: skip
    assert info["settings"]["n_bits"] == 3 and info["settings"]["first_last_bits"] == 8
    assert info["class_names"] == [str(digit) for digit in range(10)]
    assert info["preprocessing"]["input_size"] == [1, 8, 8]
    assert torch.__version__.startswith(info["versions"]["torch_version"]) and info["versions"]["timm_version"]
    assert info["network"]["track"] == track == row["track"] and info["network"]["arch"] == row["arch"]
    said = {*info["run"], "track", "arch", "checkpoint", "checkpoint_sha256", "data"}
    assert {name: row[name] for name in info["run"]} == info["run"] and "network_options" in said
    config = QuantConfig(**info["settings"])  # with what it decides, all of the row that decided the run
    decided = {name: str(value) for name, value in settings_row(Facts(config)).items() if value is not None}
    assert {name: row[name] for name in decided} == decided
    assert {name for name in SETTINGS if row[name]} <= said | set(decided)
    first = path.read_bytes()
    assert main([*argv, "--results", str(results), "--save", str(path), "--first_last_bits", "8"]) == 0
    assert path.read_bytes() == first  # the same command twice


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("net.pt", "expected a file that ends in .safetensors"),
        ("nowhere/net.safetensors", "lies in no folder that exists"),
        ("folder.safetensors", "is a folder"),
        ("closed/net.safetensors", "is not writable"),
        ("", "expected a file that ends in .safetensors"),
    ],
)
def test_a_place_that_cannot_take_it_is_refused_before_any_work(
    track: str,
    name: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "closed").mkdir()
    # The superuser may write anywhere; what the system would answer others is put in its place.
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path))
    main, argv = TRACKS[track]
    place = str(tmp_path / name) if name else ""
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--results", str(tmp_path / "results.csv"), "--save", place])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert "--save" in captured.err and said in captured.err
    assert not (tmp_path / "results.csv").exists()


def test_arguments_that_json_cannot_say_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, argv = TRACKS["vit"]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--model_kwargs", "depth={1}", "--save", str(tmp_path / "a.safetensors")])
    assert stop.value.code == 2 and "--model_kwargs: Object of type set" in capsys.readouterr().err


def test_the_float_weights_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, argv = TRACKS["cnn"]
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"float weights")
    for save in (str(path), str(tmp_path / "." / "a.safetensors")):
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--checkpoint", str(path), "--save", save])
        assert stop.value.code == 2 and "is the file that --checkpoint reads" in capsys.readouterr().err
    assert path.read_bytes() == b"float weights"


@pytest.mark.parametrize("words", ["cache_dir='x'", "depth=2000000", "a=" + "[" * 20 + "]" * 20])
def test_arguments_that_could_not_be_loaded_are_refused_before_any_work(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, argv = TRACKS["vit"]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--model_kwargs", words, "--save", str(tmp_path / "a.safetensors")])
    assert stop.value.code == 2 and "could not be loaded" in capsys.readouterr().err
