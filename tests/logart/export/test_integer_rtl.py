"""The export's SystemVerilog in Icarus Verilog: `scripts/test_rtl.sh`."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from integer_networks import Odd, built, exported

from logart.export.command import main
from logart.export.hardware_export import new_folder, write_hex
from logart.export.integer_rtl import ENGINES, write_rtl
from logart_cnn.main import main as cnn_main

pytestmark = pytest.mark.rtl
SOURCES = Path(str(__import__("logart.export", fromlist=["x"]).__file__)).parent / "rtl"


@pytest.fixture(scope="module", autouse=True)
def simulator() -> None:
    assert shutil.which("iverilog"), "needs Icarus Verilog: scripts/test_rtl.sh says how to install it"


@pytest.fixture(scope="module")
def rtl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in CNN at 4 bits, √2 as 1 + 1/2, a factor per channel; two golden images."""
    folder = tmp_path_factory.mktemp("rtl")
    path = folder / "digits.safetensors"
    flags = "--preset fast --calib_samples 64 --hardware_approx --scale_search --quiet --device cpu --workers 0".split()
    assert cnn_main([*flags, "--save", str(path), "--results", str(folder / "results.csv")]) == 0
    argv = [str(path), "--integer", str(folder / "out"), "--n", "2", "--test_images", "20", "--quiet"]
    assert main(argv) == 0
    return folder / "out" / "rtl"


def make(rtl: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-s", "-k", *targets], cwd=rtl, capture_output=True, text=True)


def test_every_layer_and_the_whole_network_have_no_mismatch(rtl: Path) -> None:
    done = make(rtl, "all")
    lines = [line for line in done.stdout.splitlines() if "mismatches of" in line]
    layers = [path.name for path in (rtl.parent / "layers").iterdir()]
    assert len(layers) == 13
    assert {line.split(":")[0] for line in lines} == {*layers, "network"}, done.stderr
    assert all(": 0 mismatches of " in line and not line.endswith(" of 0") for line in lines)
    assert done.returncode == 0


def test_a_flipped_bit_of_a_code_is_seen(rtl: Path, tmp_path: Path) -> None:
    copied = tmp_path / "out"
    shutil.copytree(rtl.parent, copied)
    codes = copied / "layers" / "conv1" / "codes.hex"
    first, rest = codes.read_text("ascii").split("\n", 1)
    codes.write_text(f"{int(first, 16) ^ 1:x}\n{rest}", "ascii")
    done = make(copied / "rtl", "layer-conv1")
    assert done.returncode != 0 and "conv1: 0 mismatches" not in done.stdout and "mismatches of" in done.stdout
    done = make(copied / "rtl", "network", "IMAGES=1")
    first = next(line for line in done.stdout.splitlines() if "mismatches" in line)
    assert done.returncode != 0 and re.fullmatch(r"image 0, conv1: [1-9]\d* mismatches", first)


@pytest.mark.parametrize(
    ("words", "line"),
    [(["network", f"IMAGES={count}"], f"IMAGES: expected 1 or 2, got {count}") for count in ("x", "3", "", "1 2")]
    + [(["layer-blocks.0.conv1"], "No rule to make target 'layer-blocks.0.conv1'")],
)
def test_a_wrong_call_of_make_takes_one_line(rtl: Path, words: list[str], line: str) -> None:
    done = subprocess.run(["make", *words], cwd=rtl, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(rf"[^\n]*\*\*\* {re.escape(line)}[^\n]*\n", done.stderr), done.stderr


@pytest.mark.parametrize("target", ["network", "verilated"])
def test_one_image_alone_is_half_of_two(rtl: Path, target: str) -> None:
    if target == "verilated" and not shutil.which("verilator"):
        pytest.skip("needs Verilator")
    graph = json.loads((rtl.parent / "graph.json").read_text("utf-8"))
    computed = [value for name, value in graph["values"].items() if name != graph["input"]["value"]]
    values = sum(math.prod(value["shape"]) for value in computed)
    done = make(rtl, target, "IMAGES=1")
    assert done.returncode == 0 and f"network: 0 mismatches of {values}\n" in done.stdout, done.stderr


def test_every_operation_has_no_mismatch(tmp_path: Path) -> None:
    """Padding, slices, concatenation, both poolings, depthwise and strided convolutions."""
    torch.manual_seed(0)
    images = torch.randn(8, 2, 13, 12)
    network, integers = built(Odd(), images, seed=0)
    layers = exported(network)
    with new_folder(tmp_path / "out") as folder:
        for step in integers.steps:
            if step.module:
                (folder / "layers" / step.name).mkdir(parents=True)
                codes = layers[step.module][1]
                write_hex(folder / "layers" / step.name / "codes.hex", codes, 4)
        write_rtl(integers, layers, integers.run(images[:2]), folder)
    done = make(tmp_path / "out" / "rtl", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "network: 0 mismatches of" in done.stdout


@pytest.mark.parametrize("engine", ["layer_engine", "move_engine", "pool_engine"])
def test_the_engines_are_free_of_lint(engine: str) -> None:
    files = [str(SOURCES / f"{name}.sv") for name in ENGINES if not name.endswith("_tb")]
    icarus = subprocess.run(
        ["iverilog", "-g2012", "-Wall", "-t", "null", "-s", engine, *files], capture_output=True, text=True
    )
    assert (icarus.returncode, icarus.stderr) == (0, "")
    if shutil.which("verilator"):
        command = ["verilator", "--lint-only", "-Wall", "--top-module", engine, *files]
        verilator = subprocess.run(command, capture_output=True, text=True)
        assert verilator.returncode == 0, verilator.stderr
