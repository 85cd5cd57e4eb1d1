"""Builders of networks: found where they are registered, installed or declared, and never named by logart."""

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

import logart_cnn.models
from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.networks import builders
from logart.networks.network import network_recipe
from logart.packed.file import PackedFileError

ROOT = Path(__file__).parents[3]


def build_plain(arch: str, **settings: object) -> nn.Module:
    assert arch == "plain" and settings.keys() == {"shapes", "model_kwargs", "num_classes", "input_size"}
    return nn.Sequential(nn.Linear(3, 2))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A file that names a network of a track of a user's own."""
    torch.manual_seed(0)
    config = QuantConfig(n_bits=4, rounding="nearest")  # type: ignore[arg-type]
    quantized, _ = quantize_model(nn.Sequential(nn.Linear(3, 2)).eval(), config, torch.randn(2, 3), quiet=True)
    save_packed(quantized, tmp_path / "a.safetensors", {"network": network_recipe("own", "plain", {}, None, None)})
    return tmp_path / "a.safetensors"


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "_BUILDERS", {})


def test_a_registered_builder_is_asked(packed: Path) -> None:
    with pytest.raises(PackedFileError, match="no builder of track 'own': install LogART .*pass model="):
        load_packed(packed)
    builders.register_builder("own", build_plain)
    assert isinstance(load_packed(packed), nn.Sequential)


def test_an_installed_builder_is_found(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packed.parent / "own_track.py").write_text(
        "from torch import nn\ndef build(arch, **settings):\n    return nn.Sequential(nn.Linear(3, 2))\n"
    )
    monkeypatch.syspath_prepend(packed.parent)
    point = EntryPoint("own", "own_track:build", builders.GROUP)
    monkeypatch.setattr(builders, "entry_points", lambda group: [point] if group == builders.GROUP else [])
    assert isinstance(load_packed(packed), nn.Sequential)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
def test_a_checkout_that_is_not_installed_finds_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "entry_points", lambda group: [])
    assert builders.find_builder("cnn") is logart_cnn.models.build_network
    assert builders.find_builder("nothing") is None


def test_importing_a_track_registers_it_and_the_core_imports_none(tmp_path: Path) -> None:
    code = (
        "import sys, logart.packed.checkpoint; from logart.networks import builders;"
        "assert not builders._BUILDERS and not {m for m in sys.modules if m.startswith('logart_')};"
        "import logart_vit.models; assert list(builders._BUILDERS) == ['vit']"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()


def test_logart_names_no_track() -> None:
    for path in (ROOT / "logart").rglob("*.py"):
        assert not {"logart_cnn", "logart_vit"} & set(re.findall(r"\w+", path.read_text())), path
