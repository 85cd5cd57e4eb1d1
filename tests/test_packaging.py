"""The wheel: built from the sources, installed elsewhere, and run there without the checkout."""

from __future__ import annotations

import csv
import hashlib
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


def test_the_wheel_holds_every_module_and_the_shipped_weights(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    shipped = {name for name in names if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()]
    expected = {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}
    assert shipped == expected
    assert {name for name in names if name.endswith(".safetensors")} == {
        "logart_cnn/weights/digits_resnet.safetensors",
        "logart_vit/weights/digits_vit.safetensors",
    }
    assert not any(name.startswith(("tests", "scripts", "benchmarks")) for name in names)
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_names_its_commands(wheel: Path) -> None:
    archive = ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    lines = archive.read(entry_points).decode().splitlines()
    assert {"logart-cnn = logart_cnn.main:main", "logart-vit = logart_vit.main:main"} <= set(lines)
    assert "logart-report = logart.report.__main__:main" in lines


def test_the_installed_wheel_is_found_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    found = run("-c", WHERE, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert found == [str(installed / package / "__init__.py") for package in PACKAGES]
    assert PACKAGES == ["logart", "logart_cnn", "logart_vit"]


@pytest.fixture(scope="module")
def demo(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two results files, by both commands as `python -m` runs them; one process, for imports take long."""
    folder = tmp_path_factory.mktemp("demo")
    lines = ["import runpy, sys", "from logart import *", "print(load_packed.__module__)"]
    for track, flags in FLAGS.items():
        argv = [f"logart-{track}", *flags.split(), "--device", "cpu", "--results", f"{track}.csv"]
        lines += [f"sys.argv = {argv}", "try:", f"    runpy.run_module('logart_{track}.main', run_name='__main__')"]
        lines += ["except SystemExit as end:", "    assert end.code == 0"]
    out = run("-c", "\n".join(lines), cwd=folder, PYTHONPATH=str(installed))
    assert out.startswith("logart.packed.checkpoint\n")
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
