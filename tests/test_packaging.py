"""The wheel: built from the sources, installed elsewhere, and run there without the checkout."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(init.parent.name for init in ROOT.glob("logart*/__init__.py"))
# Finding a package does not import it, nor torch with it.
WHERE = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {PACKAGES}))"
COMMANDS = {  # the console script: the module that `python -m` runs
    "logart-cnn": "logart_cnn.main",
    "logart-vit": "logart_vit.main",
    "logart-inspect": "logart.inspect",
    "logart-export": "logart.export",
    "logart-report": "logart.report",
    "logart-compare": "logart.compare",
}
# One process runs several commands, because importing torch takes long: each a path of a script or a module's name.
RUN = """
import runpy, sys
for argv in {calls}:
    sys.argv = argv
    try:
        (runpy.run_path if "/" in argv[0] else runpy.run_module)(argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, argv
    print(flush=True)
"""
FLAGS = {
    "cnn": "--iters_w 20 --calib_samples 64 --workers 0",
    "vit": "--optimize --iters_w 20 --optim_size 64 --num_workers 0",
}


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves a build folder whose stale files enter the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = "-m pip wheel . --no-deps --no-build-isolation --no-index --quiet --wheel-dir"
    run(*command.split(), str(folder), cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(*"-m pip install --no-deps --no-index --quiet --target".split(), str(target), str(wheel), cwd=target)
    return target


def test_the_wheel_holds_every_module_and_all_data(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    shipped = {name for name in names if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()]
    expected = {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}
    assert shipped == expected
    assert shipped > {
        "logart/report/paper_results.csv",
        "logart_cnn/weights/digits_resnet.safetensors",
        "logart_vit/weights/digits_vit.safetensors",
        *(f"logart/{name}/__init__.py" for name in "grids quantization networks packed runs export report".split()),
    }
    assert not any(name.startswith(("tests", "scripts", "benchmarks")) for name in names)
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_wheel_is_found_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    found = run("-c", WHERE, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert found == [str(installed / package / "__init__.py") for package in PACKAGES]
    assert PACKAGES == ["logart", "logart_cnn", "logart_vit"]


def run_all(calls: list[list[str]], installed: Path, cwd: Path) -> str:
    return run("-c", RUN.format(calls=calls), cwd=cwd, PYTHONPATH=str(installed))


def test_each_command_runs_as_a_script_and_as_a_module(installed: Path, tmp_path: Path) -> None:
    scripts = {path.name: path for path in (installed / "bin").glob("logart*")}
    assert scripts.keys() == COMMANDS.keys()
    calls = [[str(scripts[name]), "--help"] for name in COMMANDS] + [[name, "--help"] for name in COMMANDS.values()]
    out = run_all(calls, installed, tmp_path)
    assert [line.split()[1] for line in out.splitlines() if line.startswith("usage: ")] == [*COMMANDS, *COMMANDS]


@pytest.fixture(scope="module")
def demo(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two results files and two packed files, by both commands as `python -m` runs them."""
    folder = tmp_path_factory.mktemp("demo")
    files = {track: f"--device cpu --results {track}.csv --save {track}.safetensors".split() for track in FLAGS}
    run_all(
        [[f"logart_{track}.main", *flags.split(), *files[track]] for track, flags in FLAGS.items()], installed, folder
    )
    return folder


@pytest.mark.parametrize("track", ["cnn", "vit"])
def test_the_installed_wheel_runs_the_demo_without_the_checkout(track: str, installed: Path, demo: Path) -> None:
    (version,) = (info.stem.split("-")[1] for info in installed.glob("logart-*.dist-info"))
    (shipped,) = (installed / f"logart_{track}").rglob("*.safetensors")
    with (demo / f"{track}.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["track"], row["arch"], row["data"]) == (track, shipped.stem, "digits")
    assert (row["iters_w"], row["calib_samples"], row["project_version"]) == ("20", "64", version)
    assert row["checkpoint_sha256"] == hashlib.sha256(shipped.read_bytes()).hexdigest()
    assert float(row["float_Acc@1"]) > 90 and float(row["Acc@1"]) > 50


def test_the_installed_wheel_shows_exports_and_reports_what_it_packed(installed: Path, demo: Path) -> None:
    """In a process that no entry point was imported into: the distribution says who builds the networks."""
    calls = [
        ["logart.inspect", "vit.safetensors"],
        ["logart.export", "cnn.safetensors", "--out", "hardware", "--terms", "2"],
        ["logart.compare", "cnn.safetensors", "vit.safetensors", "--device", "cpu", "--images", "20"],
        ["logart.report", "cnn.csv", "--run", "cnn.safetensors", "--out", "page"],
    ]
    out = run_all(calls, installed, demo)
    assert "blocks.0.attn.qkv" in out and "McNemar" in out
    assert json.loads((demo / "hardware" / "manifest.json").read_text())["cost"]  # the network was built, and run
    assert (demo / "page").is_dir() and any(path.suffix == ".html" for path in (demo / "page").iterdir())
