"""Another device than the CPU: a pretended one in every run, a GPU where there is one (`pytest -m gpu`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretended_device
import pytest
import torch

TESTS = Path(__file__).parent
PRETENDED = pytest.mark.skipif(not pretended_device.AVAILABLE, reason="this torch can't have a device made in Python")


def compared(*arguments: str) -> dict[str, Any]:
    """What `other_device.py` prints."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    run = subprocess.run(
        [sys.executable, str(TESTS / "other_device.py"), *arguments],
        env={**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def check(result: dict[str, Any], count: int, *, equal_codes: float, logits: float) -> None:
    """`logits` bounds their difference where all codes are equal; one other code may move them further."""
    assert result["refused"] == [True] * 5, "the device does not refuse the CPU's tensors"
    assert len(result["found"]) == count
    for title, found in result["found"].items():
        assert found["layers"] == (10 if title.startswith("vit") else 7), title
        assert found["elsewhere"] == [], title
        assert found["equal_codes"] >= equal_codes, title
        assert found["equal_codes"] < 1 or found["logits_differ_from_the_cpu_by"] <= logits, title
        assert found["equal_when_kept_on_the_cpu"], title
        assert found["reloaded_logits_are_equal"] == [True, True], title


@PRETENDED
def test_no_tensor_is_made_on_the_wrong_device() -> None:
    """The pretended device computes as the CPU does: all codes are equal. Attention takes another way there."""
    chosen = ("cnn, nearest by blocks", "cnn, compensated", "cnn, mixed inputs, Hessian")
    check(compared(pretended_device.NAME, *chosen), 3, equal_codes=1.0, logits=0.0)


@pytest.mark.slow
@PRETENDED
def test_no_tensor_of_any_configuration_is_made_on_the_wrong_device() -> None:
    check(compared(pretended_device.NAME), 12, equal_codes=1.0, logits=1e-6)


@pytest.mark.gpu
def test_a_gpu_comes_to_the_cpu_s_codes() -> None:
    """But for weights near a border, which other sums of the same products push across, and images drawn elsewhere."""
    assert torch.cuda.is_available(), "pytest -m gpu needs one"
    check(compared("cuda"), 12, equal_codes=0.8, logits=1e-3)
