"""Every vision transformer by name: where its weights come from, which images it expects, which blocks it has."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

import logart.networks.timm_network
from logart.errors import UserError
from logart.networks.data import Preprocessing
from logart.networks.network import Network
from logart.networks.weights import file_sha256, state_sha256
from logart.quantization.blocks import find_blocks
from logart.quantization.survey import survey
from logart_vit import models
from logart_vit.models import ENTRIES, MODELS, load_network

TAGS = {
    **{f"vit_{size}": "augreg_in21k_ft_in1k" for size in ("tiny", "small", "base", "large")},
    **{f"deit_{size}": "fb_in1k" for size in ("tiny", "small", "base")},
    **{f"swin_{size}": "ms_in1k" for size in ("tiny", "small")},
    **{name: "ms_in22k_ft_in1k" for name in ("swin_base", "swin_base_384")},
}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (1, 2),
}
VIT_BIN = "checkpoint/vit_raw/vit_tiny_patch16_224.bin"
SWIN_BIN = "checkpoint/vit_raw/swin_tiny_patch4_window7_224.bin"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with an empty folder for files of weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint/vit_raw").mkdir(parents=True)
    return tmp_path


def saved(path: str, name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A network with random weights, which also are in the file."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, **kwargs).eval()
    save = save_file if path.endswith(".safetensors") else torch.save
    save(model.state_dict(), path)
    return model


def vit(path: str, seed: int = 0, classes: int = 5, **kwargs: Any) -> nn.Module:
    return saved(path, "vit_tiny_patch16_224", seed, **{**VIT, "num_classes": classes, **kwargs})


def assert_same(network: Network, reference: nn.Module) -> None:
    images = torch.randn(2, *network.preprocessing.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(network.model(images), reference(images))
    assert not network.model.training and {p.dtype for p in network.model.parameters()} == {torch.float32}


def fails(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_network(*args, **kwargs)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


# Names and weights


def test_names_mean_weights_that_timm_has() -> None:
    assert {name: ENTRIES[name].timm.partition(".")[2] for name in MODELS if name != "digits_vit"} == TAGS
    for name in TAGS:
        config = timm.get_pretrained_cfg(ENTRIES[name].timm)
        assert config is not None and config.has_weights and config.num_classes == 1000
        assert config.input_size[1] == (384 if name.endswith("384") else 224)


@pytest.mark.parametrize("path", ["a.pth", "a.safetensors", "checkpoint/vit_raw/other.bin"])
def test_vit_from_a_checkpoint(path: str) -> None:
    reference = vit(path)
    vit(VIT_BIN, seed=1)  # which a checkpoint comes before
    network = load_network("vit_tiny", path, model_kwargs=VIT, num_classes=5)
    assert_same(network, reference)
    assert (network.arch, network.num_classes) == ("vit_tiny", 5)
    assert (network.source, network.sha256) == (Path(path).name, file_sha256(path))
    assert network.preprocessing == Preprocessing((3, 32, 32), 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert network.row_groups == {"qkv": 3, "in_proj_weight": 3}


@pytest.mark.parametrize("name", ["vit_tiny", "timm:vit_tiny_patch16_224"])
def test_vit_from_the_raw_folder(name: str) -> None:
    reference = vit(VIT_BIN)
    network = load_network(name, model_kwargs=VIT, num_classes=5)
    assert_same(network, reference)
    assert (network.source, network.sha256) == ("vit_tiny_patch16_224.bin", file_sha256(VIT_BIN))


def test_who_names_a_tag_gets_those_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    vit(VIT_BIN)
    asked = []

    def pretrained(arch: str, name: str, kwargs: Any, flag: str) -> tuple[Any, str]:
        asked.append(name)
        return timm.create_model(name, **kwargs), "timm's"

    monkeypatch.setattr(logart.networks.timm_network, "_pretrained", pretrained)
    name = "vit_tiny_patch16_224.augreg_in21k"
    assert load_network(f"timm:{name}", model_kwargs=VIT, num_classes=21843).source == "timm's"
    assert asked == [name]


def test_swin_from_the_raw_folder() -> None:
    reference = saved(SWIN_BIN, "swin_tiny_patch4_window7_224", num_classes=5, **SWIN)
    network = load_network("swin_tiny", model_kwargs=SWIN, num_classes=5)
    assert_same(network, reference)
    mean_and_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    assert network.preprocessing == Preprocessing((3, 32, 32), 0.9, "bicubic", *mean_and_std)


def test_old_swin_keys() -> None:
    reference = saved(SWIN_BIN, "swin_tiny_patch4_window7_224", num_classes=5, **SWIN)
    old = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): value
        for key, value in reference.state_dict().items()
    }
    torch.save({"model": {**old, "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}}, SWIN_BIN)
    assert_same(load_network("swin_tiny", model_kwargs=SWIN, num_classes=5), reference)


def test_pretrained_weights_come_last_and_have_the_full_tag(folder: Path) -> None:
    reference = vit("a.pth", classes=1000)
    overlay = {"file": str(folder / "a.pth"), "custom_load": False}
    kwargs = {**VIT, "pretrained_cfg_overlay": overlay}
    for name, tag in (
        ("vit_tiny", "augreg_in21k_ft_in1k"),
        ("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "augreg_in21k_ft_in1k"),
        ("timm:deit_tiny_patch16_224", "fb_in1k"),
    ):
        network = load_network(name, model_kwargs=kwargs)
        assert_same(network, reference)
        architecture = "deit_tiny_patch16_224" if "deit" in name else "vit_tiny_patch16_224"
        assert network.source == f"timm:{architecture}.{tag}"
        assert network.sha256 == state_sha256(reference.state_dict())
    vit(VIT_BIN, seed=1, classes=1000)
    assert load_network("vit_tiny", model_kwargs=kwargs).source == "vit_tiny_patch16_224.bin"
    overlay["file"] = "lost.pth"
    fails("--model: no pretrained weights for deit_tiny", "deit_tiny", model_kwargs=kwargs)


# The built-in network


def test_digits_vit() -> None:
    vit(VIT_BIN)  # is not looked at
    network = load_network("digits_vit")
    packaged = resources.files("logart_vit").joinpath("weights/digits_vit.safetensors")
    with resources.as_file(packaged) as path:
        assert (network.source, network.sha256) == ("digits_vit.safetensors", file_sha256(path))
    assert network.preprocessing == Preprocessing((1, 8, 8), 1.0, "bilinear", (0.3053,), (0.3761,))
    assert network.row_groups == {"qkv": 3, "in_proj_weight": 3}
    with torch.no_grad():
        assert network.model(torch.rand(3, 1, 8, 8)).shape == (3, 10) and network.num_classes == 10
    assert sum(p.numel() for p in network.model.parameters()) * 4 < 400_000  # what may be shipped
    assert all(p.abs().sum() > 0 for p in network.model.parameters())
    fails("has 10 classes (head.weight), but the network was built for 7", "digits_vit", num_classes=7)


def test_digits_vit_with_settings_of_ones_own() -> None:
    reference = saved(
        "a.pth",
        "vit_tiny_patch16_224",
        **{**models.DIGITS_VIT_KWARGS, "img_size": 16, "num_classes": 7, "depth": 1},
    )
    network = load_network("digits_vit", "a.pth", model_kwargs={"depth": 1}, input_size=16, num_classes=7, mean=[0.4])
    assert_same(network, reference)
    assert network.preprocessing == Preprocessing((1, 16, 16), 1.0, "bilinear", (0.4,), (0.3761,))


# Settings


def test_the_image_size() -> None:
    kwargs = {key: value for key, value in VIT.items() if key != "img_size"}
    reference = vit("a.pth", img_size=48)
    network = load_network("vit_tiny", "a.pth", model_kwargs=kwargs, num_classes=5, input_size=48, crop_pct=1.0)
    assert_same(network, reference)
    assert network.preprocessing == Preprocessing((3, 48, 48), 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    swin_kwargs = {key: value for key, value in SWIN.items() if key != "img_size"}
    reference = saved("b.pth", "swin_tiny_patch4_window7_224", num_classes=5, **{**SWIN, "img_size": 64})
    assert_same(load_network("swin_tiny", "b.pth", model_kwargs=swin_kwargs, num_classes=5, input_size=64), reference)
    message = "--input_size: 48, but --model_kwargs has img_size=32"
    fails(message, "vit_tiny", "a.pth", model_kwargs=VIT, input_size=48)


def test_overrides() -> None:
    vit("a.pth")
    settings: dict[str, Any] = {"mean": [0.1], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "crop_pct": 0.5}
    network = load_network("vit_tiny", "a.pth", model_kwargs=VIT, num_classes=5, **settings)
    assert network.preprocessing == Preprocessing((3, 32, 32), 0.5, "bilinear", (0.1,) * 3, (0.2, 0.3, 0.4))


def test_mistakes() -> None:
    vit("a.pth")
    fails("expected --num_classes 5", "vit_tiny", "a.pth", model_kwargs=VIT)
    fails("--num_classes: 0; expected at least 1", "vit_tiny", "a.pth", num_classes=0)
    fails("--input_size: 0; expected at least 1", "vit_tiny", "a.pth", input_size=0)
    fails("--crop_pct: 2; ", "vit_tiny", "a.pth", model_kwargs=VIT, num_classes=5, crop_pct=2)
    fails("--model_kwargs: timm cannot build vit_tiny_patch16_224", "vit_tiny", model_kwargs={"bogus": 1})
    fails("--checkpoint: lost.pth does not exist", "vit_tiny", "lost.pth")
    fails("--model: no network 'vit_bsae'; did you mean vit_base?", "vit_bsae")
    fails("; did you mean timm:resnet18?", "resnet18")
    fails("or timm:NAME", "xyz")
    fails("--model: timm has no model 'vit_tiny_patch16_244'; did you mean timm:vit_", "timm:vit_tiny_patch16_244")


# Blocks


def blocks(network: Network) -> list[str]:
    images = torch.rand(2, *network.preprocessing.input_size)
    layers = survey(network.model, images).layers
    return [block.name for block in find_blocks(network.model, layers, images)]


def test_the_blocks_of_a_vit() -> None:
    vit("a.pth")
    network = load_network("vit_tiny", "a.pth", model_kwargs=VIT, num_classes=5)
    assert blocks(network) == ["patch_embed.proj", "blocks.0", "blocks.1", "head"]


def test_the_blocks_of_a_swin() -> None:
    saved("a.pth", "swin_tiny_patch4_window7_224", num_classes=5, **SWIN)
    network = load_network("swin_tiny", "a.pth", model_kwargs=SWIN, num_classes=5)
    names = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.downsample.reduction", "layers.1.blocks.0"]
    assert blocks(network) == ["patch_embed.proj", *names, "head.fc"]
