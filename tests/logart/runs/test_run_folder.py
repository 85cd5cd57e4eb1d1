"""Run folders: what they hold, what they refuse, and that a run which was killed comes to the same codes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from sklearn.datasets import load_digits
from small_runs import SURROUNDINGS, Files, VitFiles, assert_refused, quiet_main, rows

import logart.quantization.rounding_methods
import logart.runs.resume
import logart.runs.run
import logart.runs.run_folder
import logart_cnn.main
import logart_vit.main
from logart.packed.file import PackedFile

CNN = "--iters_w 20 --calib_samples 64 --rounding both --workers 0 --device cpu"
VIT = "--iters_w 20 --optim_size 64 --optimize --num_workers 0 --device cpu"
RUNS = {"cnn": (logart_cnn.main.main, CNN.split()), "vit": (logart_vit.main.main, VIT.split())}
Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run's folder of each track."""
    folder = tmp_path_factory.mktemp("whole")
    for track, (main, argv) in RUNS.items():
        out = ["--results", str(folder / f"{track}.csv")]
        assert main([*argv, *out, "--run_dir", str(folder / track)]) == 0
    return {track: folder / track for track in RUNS}


@pytest.fixture
def interrupted(whole: dict[str, Path], tmp_path: Path) -> Path:
    """A CNN run that was interrupted behind its third block."""
    return cut_short(whole["cnn"], tmp_path / "interrupted")


def cut_short(whole: Path, path: Path) -> Path:
    shutil.copytree(whole, path)
    for late in [path / "report.json", path / "packed.safetensors", *sorted(path.glob("blocks/LLR-*"))[3:]]:
        late.unlink()
    return path


@pytest.mark.parametrize("track", RUNS)
def test_what_a_folder_holds(track: str, whole: dict[str, Path]) -> None:
    folder = whole[track]
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.json", "calibration.txt", "log.txt", "accuracies.json", "blocks", "packed.safetensors",
                     "report.json", "lock"}  # fmt: skip
    (row,) = rows(folder.with_suffix(".csv"))
    report = json.loads((folder / "report.json").read_text())
    assert f"{report['row']['Acc@1']}" == row["Acc@1"] and str(report["row"]["bits"]) == row["bits"]
    assert json.loads((folder / "run.json").read_text())["row"]["run_id"] == row["run_id"]
    packed = PackedFile.read(folder / "packed.safetensors")
    assert [layer["name"] for layer in report["layers"]] == list(packed.layers)
    for layer in report["layers"]:
        assert sum(layer["histogram"]) == packed.layers[layer["name"]].shape.numel() and len(layer["histogram"]) == 60
    assert len(report["blocks"]) == len(list(folder.glob("blocks/LLR-*"))) > 3
    assert all(len(block["losses"]) == 20 for block in report["blocks"])
    listed = (folder / "calibration.txt").read_text().splitlines()
    assert len(set(listed)) == 64 and all(name.startswith("digits/train/") for name in listed)
    log = (folder / "log.txt").read_text()
    assert "captured inputs and targets are kept on" in log and f"Acc@1 {float(row['Acc@1']):6.2f}" in log
    settings = json.loads((folder / "run.json").read_text())["fingerprint"]
    assert (settings["iters"], settings["calib_samples"]) == (20, 64)


@pytest.mark.parametrize("track", RUNS)
def test_killed_at_random_moments_it_comes_to_the_same_codes(
    track: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    """SIGKILL, twenty times, a run resumed until it ends and begun anew."""
    main, argv = RUNS[track]
    # Well below a run's length, on a busy machine too: a run is resumed more than once, and meets its end under fire.
    longest = 0.25 + 0.4 * json.loads((whole[track] / "report.json").read_text())["row"]["total_seconds"]
    random.seed(f"{track} 20")
    kills, ended, resumed = 0, 0, 0
    while kills < 20:
        folder, results = tmp_path / f"run{ended}", tmp_path / "results.csv"
        begun = (folder / "run.json").exists()
        resumed += begun
        flags = ["--resume", str(folder)] if begun else [*argv, "--run_dir", str(folder)]
        process = forked(quiet_main, main, [*flags, "--quiet", "--results", str(results)])
        process.join(random.uniform(0.05, longest))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if finished(folder):  # it may have been killed a moment later
            check_same(folder, whole[track])
            ended += 1
        else:
            assert process.exitcode != 0
    folder = tmp_path / f"run{ended}"
    flags = ["--resume", str(folder)] if (folder / "run.json").exists() else [*argv, "--run_dir", str(folder)]
    assert main([*flags, "--quiet", "--results", str(tmp_path / "results.csv")]) == 0 and finished(folder)
    check_same(folder, whole[track])
    found = [row["run_id"] for row in rows(tmp_path / "results.csv")]
    assert resumed > 3 and len(found) == len(set(found)) == ended + 1


def forked(target: Callable[..., None], *args: Any) -> BaseProcess:
    """A process that has started; it has all imported, which takes a plain one longer than the runs here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["logart_cnn.command", "logart_vit.command", "sklearn.datasets"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def finished(folder: Path) -> bool:
    return (folder / "report.json").exists()


def check_same(folder: Path, whole: Path) -> None:
    assert (folder / "packed.safetensors").read_bytes() == (whole / "packed.safetensors").read_bytes()
    losses = [
        [block["losses"] for block in json.loads((path / "report.json").read_text())["blocks"]]
        for path in (folder, whole)
    ]
    assert losses[0] == losses[1]


def test_the_seconds_of_both_parts_count(interrupted: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    state = json.loads((interrupted / "accuracies.json").read_text())
    (interrupted / "accuracies.json").write_text(json.dumps(state | {"seconds": 1000.0}))
    results = tmp_path / "results.csv"
    assert logart_cnn.main.main(["--resume", str(interrupted), "--results", str(results), "--quiet"]) == 0
    (row,) = rows(results)
    assert 1000 < float(row["total_seconds"]) < 1100
    check_same(interrupted, whole["cnn"])


def test_a_damaged_state_is_recomputed(
    interrupted: Path, whole: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state, other = (interrupted / "blocks" / f"LLR-000{i}.safetensors" for i in (1, 0))
    state.write_bytes(state.read_bytes()[:-9])
    file = PackedFile.read(other)
    file.info["report"] = {"loss": 3}
    file.write(other)
    argv = ["--resume", str(interrupted), "--results", str(tmp_path / "results.csv"), "--quiet"]
    assert logart_cnn.main.main(argv) == 0
    err = capfd.readouterr().err
    assert err.count("; the block is recomputed\n") == 2 and f"{other} is no state of a block" in err
    assert err in (interrupted / "log.txt").read_text()
    check_same(interrupted, whole["cnn"])


REFUSED = [
    ("--n_bits_w 3", "began with another bits: 4, now 3"),
    ("--iters_w 30", "began with another iters_w: 20, now 30"),
    ("--seed 1", "began with another seed: 0, now 1"),
    ("--test_with_hardware_approx", "began with another hardware_approx_terms: None, now 2"),
    ("--preset best --rounding both", "began with another scale_search: none, now grid"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_a_changed_flag_is_refused(
    flags: str, message: str, interrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in interrupted.glob("**/*.*")}
    argv = ["--resume", str(interrupted), *flags.split()]
    assert_refused(logart_cnn.main.main, argv, f"logart-cnn: --resume: the run in {interrupted} {message}", capfd)
    assert {path: path.stat().st_mtime_ns for path in interrupted.glob("**/*.*")} == before


def test_other_codes_by_half_precision_are_refused(interrupted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = f"the run in {interrupted} began with another capture_precision: None, now half"
    argv = ["--resume", str(interrupted), "--cache", "half"]
    assert_refused(logart_cnn.main.main, argv, f"logart-cnn: --resume: {message}", capfd)


def test_a_changed_checkpoint_config_or_data_set_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, weights = tmp_path / "config.py", tmp_path / "weights.pth"
    config.write_text("class Config:\n    lr = 0.1\n")
    model = logart_vit.models.load_network("digits_vit", None).model
    torch.save(model.state_dict(), weights)
    run = tmp_path / "run"
    argv = [*VIT.split(), "--config", str(config), "--checkpoint", str(weights), "--quiet", "--run_dir", str(run)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            logart.quantization.rounding_methods,
            "learn_rounding",
            lambda *args: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert logart_vit.main.main(argv) == 130
    assert f"interrupted; go on with --resume {run}" in capfd.readouterr().err
    main, begin = logart_vit.main.main, f"logart-vit: --resume: the run in {run} began with another "
    config.write_text("class Config:\n    lr = 0.2\n")
    assert_refused(main, ["--resume", str(run), "--quiet"], f"{begin}lr: 0.1, now 0.2", capfd)
    config.write_text("class Config:\n    lr = 0.1\n")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    torch.save(model.state_dict(), weights)
    assert_refused(main, ["--resume", str(run), "--quiet"], f"{begin}set of float weights: SHA-256 ", capfd)


def test_other_images_under_the_same_names_are_refused(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    digits = load_digits()
    digits.images = digits.images[::-1].copy()
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: digits)
    begin = f"logart-cnn: --resume: the run in {interrupted} began with another set of calibration images: SHA-256 "
    assert_refused(logart_cnn.main.main, ["--resume", str(interrupted), "--quiet"], begin, capfd)


def test_another_version_is_refused(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = {"torch_version": "9.9", "timm_version": "1", "project_version": "0"}
    monkeypatch.setattr(logart.runs.resume, "versions", lambda: other)
    begin = f"logart-cnn: --resume: the run in {interrupted} began with another torch_version: "
    assert_refused(logart_cnn.main.main, ["--resume", str(interrupted)], begin, capfd)


def test_a_finished_run_is_not_resumed(whole: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    line = f"logart-cnn: --resume: the run in {whole['cnn']} is finished; expected one that was interrupted"
    assert_refused(logart_cnn.main.main, ["--resume", str(whole["cnn"])], line, capfd)


def test_a_second_run_in_a_folder_is_refused(interrupted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with FileLock(interrupted / "lock"):
        line = f"logart-cnn: --resume: another process is running in {interrupted}"
        assert_refused(logart_cnn.main.main, ["--resume", str(interrupted)], line, capfd)
    again = f"logart-cnn: --run_dir: the folder {interrupted} is not empty; go on with --resume, or pass a new one"
    assert_refused(logart_cnn.main.main, ["--run_dir", str(interrupted)], again, capfd)


def test_a_foreign_run_json_is_refused(interrupted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    foreign = (("{", "Expecting"), ('{"format": 9}', "expected format 2"), ("[]", ""), ('{"format": 2}', "no flags"))
    for text, reason in foreign:
        (interrupted / "run.json").write_text(text)
        line = f"logart-cnn: --resume: cannot read {interrupted / 'run.json'} ({reason}"
        assert_refused(logart_cnn.main.main, ["--resume", str(interrupted)], line, capfd)


def test_foreign_accuracies_are_refused(interrupted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damaged = ({"float": {"top9": 1}}, {"float": 3}, [])
    for content in ({}, {"seconds": "x", "accuracies": {}}, *({"seconds": 1.0, "accuracies": a} for a in damaged)):
        content = {"format": 2, **content}
        (interrupted / "accuracies.json").write_text(json.dumps(content))
        line = f"logart-cnn: --resume: cannot read {interrupted / 'accuracies.json'} ("
        assert_refused(logart_cnn.main.main, ["--resume", str(interrupted)], line, capfd)


def test_ctrl_c_ends_cleanly(tmp_path: Path) -> None:
    """A real SIGINT to a real process, in the middle of LLR."""
    run, err = tmp_path / "run", tmp_path / "err"
    argv = f"--iters_w 100000 --workers 0 --device cpu --quiet --run_dir {run}".split()
    process = forked(main_that_hears_ctrl_c, argv, err)
    try:
        end = time.monotonic() + 60
        while not list(run.glob("blocks/DBS-0006*")) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == 130
    assert err.read_text() == f"logart-cnn: interrupted; go on with --resume {run}\n"


def main_that_hears_ctrl_c(argv: list[str], err: Path) -> None:
    # A shell that runs the tests in the background lets them ignore SIGINT, and what they start too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    quiet_main(logart_cnn.main.main, argv)


def test_a_results_file_that_cannot_be_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is locked or made read-only while the run goes on; `--resume` appends the row once it can."""
    run, results = tmp_path / "run", tmp_path / "results.csv"
    argv = "--iters_w 0 --workers 0 --quiet --device cpu".split() + ["--results", str(results)]

    def locked(*args: Any) -> None:
        raise logart.runs.run.UserError(f"--results: cannot write '{results}': Permission denied; pass another path")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(logart.runs.run, "append_row", locked)
        logart_cnn.main.main([*argv, "--run_dir", str(run)])
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and out.count("Acc@1") == 2
    assert err == (f"logart-cnn: --results: cannot write '{results}': Permission denied; pass another path; "
                   f"--resume {run} writes the rest when it can\n")  # fmt: skip
    assert not (run / "report.json").exists()
    assert (run / "packed.safetensors").exists() and err.strip().split(": ", 1)[1] in (run / "log.txt").read_text()
    assert logart_cnn.main.main(["--resume", str(run), "--quiet"]) == 0
    (row,) = rows(results)
    assert f"{float(row['Acc@1']):.2f}" in out


def test_a_disk_that_fills_up_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(logart.runs.run_folder, "save_state", full)
    run, results = tmp_path / "run", tmp_path / "results.csv"
    argv = "--iters_w 0 --workers 0 --quiet --device cpu".split() + ["--results", str(results), "--run_dir", str(run)]
    assert logart_cnn.main.main(argv) == 0
    out, err = capfd.readouterr()
    assert out.count("Acc@1") == 2 and len(rows(results)) == 1
    line = f"--run_dir: cannot write to {run} (No space left on device); the run goes on, but cannot be resumed\n"
    assert err == line


def test_a_disk_too_small_for_captured_inputs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    argv = "--rounding compensated --calib_samples 8 --workers 0 --quiet --device cpu --cache disk".split()
    with pytest.raises(SystemExit) as stopped:
        logart_cnn.main.main([*argv, "--results", str(tmp_path / "results.csv")])
    begin = r"logart-cnn: --device, --cache: captured tensors of 0\.0 MiB"
    line = begin + r" do not fit into .* \(No space left on device\)\n"
    assert stopped.value.code == 2 and re.fullmatch(line, capfd.readouterr().err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_place_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    try:
        line = f"logart-cnn: --run_dir: cannot write to {tmp_path / 'run'} (Permission denied)"
        assert_refused(logart_cnn.main.main, ["--run_dir", str(tmp_path / "run")], line, capfd)
    finally:
        tmp_path.chmod(0o700)


QUICK = "--iters_w 0 --workers 0 --device cpu --quiet".split()


@pytest.mark.parametrize("track", RUNS)
def test_resumed_from_another_directory_it_finds_and_leaves_its_files_where_it_began(
    track: str,
    tmp_path: Path,
    image_folder: Path,
    digits_checkpoint: Path,
    make_image_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every file and folder is named relatively; the row is the same, down to the names in it."""
    begun, other = tmp_path / "be gun", tmp_path / "other"
    for folder in (begun, other, begun / "kept"):
        folder.mkdir()
    monkeypatch.chdir(begun)
    Path("n.safetensors").symlink_to("kept/n.safetensors")
    if track == "cnn":
        files = Files(tmp_path, image_folder, digits_checkpoint, make_image_folder)
        Path("list.txt").write_text("".join(f"train/class{label}/1.png\n" for label in range(4)))
        argv = [*files.unlearned(), *"--calib_list list.txt --iters_w 2 --calib_samples 4 --batch_size 2".split()]
        data, files_of_other_images = "--data_path", files.others
    else:
        vit_files = VitFiles(tmp_path, image_folder, make_image_folder)
        learning = "--optimize --iters_w 2 --optim_size 4".split()
        argv = [*vit_files.unlearned(), "--config", str(vit_files.config), *learning]
        data, files_of_other_images = "--dataset", vit_files.others
    argv = [os.path.relpath(word) if word.startswith("/") else word for word in argv]
    main = RUNS[track][0]
    assert main([*argv, "--results", "r.csv", "--save", "n.safetensors", "--run_dir", "run", "--quiet"]) == 0
    capfd.readouterr()
    first, (row,) = (begun / "kept" / "n.safetensors").read_bytes(), rows(begun / "r.csv")
    for done in ("run/report.json", "kept/n.safetensors", "r.csv"):
        (begun / done).unlink()

    monkeypatch.chdir(other)
    again = ["--resume", "../be gun/run", "--quiet"]
    for more, line in (
        (["--seed", "3"], "--resume: the run in ../be gun/run began with another seed: 0, now 3"),
        ([data, str(files_of_other_images)], "--resume: the run in ../be gun/run began with another data: "),
        ([data, "x"], f"{data}: "),
    ):
        assert_refused(main, [*again, *more], f"logart-{track}: {line}", capfd)
    assert main([*again, data, str(image_folder)]) == 0
    (now,) = rows(begun / "r.csv")
    assert [name for name in row if row[name] != now[name] and name not in SURROUNDINGS] == []
    assert (begun / "n.safetensors").is_symlink() and (begun / "kept" / "n.safetensors").read_bytes() == first
    assert not any(other.iterdir())


@pytest.mark.parametrize("name", "results save checkpoint config calib_list save_calib_list dataset".split())
def test_a_place_is_kept_so_that_any_directory_names_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keep = logart.runs.resume.flags_to_keep
    assert keep({name: "a/b", "arch": "x/y"}) == {"results": f"{tmp_path}/results.csv", "arch": "x/y"} | {
        name: f"{tmp_path}/a/b"
    }
    assert keep({name: "/a/b", "run_dir": "r", "resume": "r"})[name] == "/a/b"
    assert keep({"dataset": "digits"})["dataset"] == "digits"  # the built-in data are no folder


def test_a_run_folder_behind_a_broken_link_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    argv = [*QUICK, "--results", str(tmp_path / "r.csv"), "--run_dir", str(tmp_path / "run")]
    line = f"logart-cnn: --run_dir: {tmp_path / 'run'} is a link to {tmp_path / 'nowhere'}, which is not there"
    assert_refused(logart_cnn.main.main, argv, line, capfd)
    assert not (tmp_path / "r.csv").exists() and not (tmp_path / "nowhere").exists()
