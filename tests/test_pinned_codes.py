"""Every code, level and bias of some 90 runs, pinned: a change of shape must not change a bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pinned_runs import SURROUNDINGS

HERE = Path(__file__).parent
PINNED = json.loads((HERE / "pinned_codes.json").read_text())


def torch_release() -> str:
    return torch.__version__.split("+")[0]


@pytest.mark.skipif(
    torch_release() != PINNED["torch"], reason=f"pinned with torch {PINNED['torch']}; others may sum in another order"
)
@pytest.mark.parametrize("network", ["digits_resnet", "digits_vit"])
def test_no_bit_of_the_pinned_runs_has_changed(network: str) -> None:
    command = [sys.executable, str(HERE / "pinned_runs.py"), network]
    environment = {**os.environ, **SURROUNDINGS, "PYTHONPATH": str(HERE.parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    seen, pinned = json.loads(result.stdout), PINNED[network]
    assert [label for label in pinned if seen.get(label) != pinned[label]] == []
    assert seen.keys() == pinned.keys()


def test_there_are_enough_of_them_and_each_setting_acts() -> None:
    pinned = [*PINNED["digits_resnet"].values(), *PINNED["digits_vit"].values()]
    assert len(pinned) >= 80 and len(set(pinned)) >= len(pinned) - 1  # at 8 bits `linear_mse` shrinks nothing
