"""Blocks are found, not listed; their tensors may have several rows for each image, or none of their own."""

from typing import Any

import pytest
import timm
import torch
from networks import Graph, smooth_images
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn

from logart import QuantConfig, quantize_model
from logart.quantization.blocks import find_blocks
from logart.quantization.rows import BlockRows, trace_rows
from logart.quantization.surgery import quantized_layers
from logart.quantization.survey import survey

IMAGES = smooth_images(4, 3, 8).float()


def found(model: nn.Module, images: Tensor = IMAGES[:2]) -> list[str]:
    """The names of what is reconstructed as one."""
    model.eval()
    return [block.name for block in find_blocks(model, survey(model, images).layers, images)]


class Two(nn.Module):
    """Two convolutions in a row, with or without a shortcut around both."""

    def __init__(self, shortcut: bool = True, channels: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.shortcut = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 3, 1), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return x + y if self.shortcut else y


class Stage(nn.Module):
    """A list of blocks behind a convolution, with or without a shortcut around all."""

    def __init__(self, shortcut: bool, depth: int = 2) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 3, 1)
        self.blocks = nn.ModuleList(Two() for _ in range(depth))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        for block in self.blocks:
            y = block(y)
        return x + y if self.shortcut else y


class Numbered(nn.Module):
    """Blocks that are held one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.b1, self.b2 = Two(), Two()

    def forward(self, x: Tensor) -> Tensor:
        return self.b2(self.b1(x))  # type: ignore[no-any-return]


class Halves(nn.Module):
    """Two parts in a row that are no list."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = Two(), Two()

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.tokens(x))  # type: ignore[no-any-return]


class Pair(Two):
    """A block that gives two tensors."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


TOYS: dict[str, tuple[nn.Module, list[str]]] = {
    "no class comes twice": (nn.Sequential(Two(), nn.Conv2d(3, 3, 1)), ["0.a", "0.b", "1"]),
    "blocks in a row": (nn.Sequential(nn.Conv2d(3, 3, 1), Two(), Two(False)), ["0", "1", "2"]),
    "stages are looked into": (
        nn.Sequential(Stage(False), Stage(False, 1)), ["0.down", "0.blocks.0", "0.blocks.1", "1.down", "1.blocks.0"],
    ),
    "a shortcut around a list makes a block": (nn.Sequential(Stage(True), Stage(True, 1)), ["0", "1"]),
    "numbered blocks": (nn.Sequential(Numbered(), Numbered()), ["0.b1", "0.b2", "1.b1", "1.b2"]),
    "parts of a block": (nn.Sequential(Halves(), Halves()), ["0", "1"]),
    "one of its own class in the list": (
        nn.Sequential(nn.Sequential(Halves()), nn.Sequential(Two(), Two())), ["0.0", "1.0", "1.1"],
    ),
    "one that gives two tensors": (
        Graph(lambda m, x: m.b(m.a(x)[0])[0], a=Pair(), b=Pair()), ["a.a", "a.b", "b.a", "b.b"],
    ),
    "blocks beside a layer": (
        Graph(lambda m, x: m.b(m.a(x)) + m.c(x), a=Two(), b=Two(), c=nn.Conv2d(3, 3, 1)), ["a", "b", "c"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
def test_what_a_block_is(name: str) -> None:
    model, blocks = TOYS[name]
    assert found(model) == blocks
    assert [type(m) for m in model.modules() if type(m).__call__ is not nn.Module.__call__] == []


SMALL = {"img_size": 64}
LISTED: dict[str, tuple[dict[str, Any], list[str]]] = {  # as they were listed by hand
    "test_vit": ({}, ["Block"]),
    "test_convnext": ({}, ["ConvNeXtBlock"]),
    "test_efficientnet": ({}, ["EdgeResidual", "InvertedResidual"]),
    "test_nfnet": ({}, ["NormFreeBlock"]),
    "mobilenetv3_small_050": ({}, ["DepthwiseSeparableConv", "InvertedResidual"]),
    "lcnet_035": ({}, ["DepthwiseSeparableConv"]),
    "resnet10t": ({}, ["BasicBlock"]),
    "repvgg_a0": ({}, ["RepVggBlock"]),
    "hgnetv2_b0": ({}, ["HighPerfGpuBlock"]),
    "swin_tiny_patch4_window7_224": ({**SMALL, "embed_dim": 24}, ["SwinTransformerBlock"]),
    "convit_tiny": (SMALL, ["Block"]),
    "hiera_tiny_224": ({**SMALL, "embed_dim": 32}, ["HieraBlock"]),
    "mobilevit_xxs": ({}, ["BottleneckBlock", "MobileVitBlock"]),
    "efficientvit_m0": ({}, ["EfficientVitBlock", "PatchMerging", "ResidualDrop"]),
}


@pytest.mark.parametrize("name", LISTED)
def test_the_blocks_of_networks_of_timms(name: str) -> None:
    kwargs, blocks = LISTED[name]
    model = timm.create_model(name, **kwargs).eval()
    images = torch.rand(2, 3, 160 if "test" in name else 64, 160 if "test" in name else 64)
    names = [
        block for block in found(model, images) if not isinstance(model.get_submodule(block), nn.Conv2d | nn.Linear)
    ]
    kinds = {type(model.get_submodule(block)).__name__ for block in names}
    assert sorted(kinds) == blocks
    for kind in set(blocks) - {"ResidualDrop"}:
        every = {n for n, m in model.named_modules() if type(m).__name__ == kind}
        assert every == {n for n in names if type(model.get_submodule(n)).__name__ == kind}


# Several inputs, several rows an image, none


class Windows(nn.Module):
    """Blocks that see windows of 4×4 pixels, and one with a table of positions beside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.blocks = nn.Sequential(Two(), Two())
        self.positions = nn.Linear(2, 3)
        self.head = nn.Linear(12, 4)
        self.register_buffer("where", torch.rand(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = self.stem(x).reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        x = self.blocks(x) + self.positions(self.where).mean(0)[:, None, None]
        return self.head(x.reshape(n, -1, c, 4, 4).mean((3, 4)).flatten(1))  # type: ignore[no-any-return]


def test_rows_for_each_image() -> None:
    torch.manual_seed(0)
    model = Windows().eval()
    blocks = {name: model.get_submodule(name) for name in found(model)}
    rows = dict(zip(blocks, trace_rows(model, blocks, IMAGES[:2]), strict=True))
    one, four, none = BlockRows((1,), (1,)), BlockRows((4,), (4,)), BlockRows((0,), (0,))
    assert rows == {"stem": one, "blocks.0": four, "blocks.1": four, "positions": none, "head": one}


@pytest.mark.parametrize("settings", [{"rounding": "compensated"}, {"iters": 3}, {"search_method": "layer_wise"}])
def test_windows_are_like_images_of_their_own(settings: dict[str, Any]) -> None:
    """Codes behind a network that cuts windows equal those of the network that is given the windows, where it may."""
    torch.manual_seed(0)
    model = Windows().eval()
    config = QuantConfig(
        **{"calib_samples": 4, "search_samples": 4, "batch_size": 3, "rounding": "learned", **settings}
    )
    quantized, _ = quantize_model(model, config, IMAGES)
    n = len(IMAGES)
    windows = IMAGES.reshape(n, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 4, 4)
    alone = nn.Sequential(model.stem, model.blocks)
    config = QuantConfig(**{**config.as_dict(), "calib_samples": 16, "search_samples": 16, "batch_size": 12})
    expected, _ = quantize_model(alone, config, windows)
    if settings.get("rounding") == "compensated":
        names = {"stem": "0", "blocks.0.a": "1.0.a", "blocks.1.b": "1.1.b"}
        for ours, theirs in names.items():
            assert torch.equal(quantized_layers(quantized)[ours].codes, quantized_layers(expected)[theirs].codes)  # type: ignore[arg-type]
    assert quantized(IMAGES).isfinite().all()


TAKERS: dict[str, dict[str, Any]] = {  # of blocks with keyword inputs, several inputs or other outputs
    "vit_tiny_patch16_dinov3_qkvb": {"img_size": 32, "depth": 2},  # rotary embeddings by keyword
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},  # bias by keyword
    "pvt_v2_b0": {"depths": (2, 1, 1, 1)},  # the size of the grid of tokens
    "xcit_nano_12_p8_224": {"img_size": 32, "depth": 2},  # height and width, and a network of positions
    "test_vit_relpos": {"img_size": 32},  # a network of positions beside
}


def taker(name: str) -> nn.Module:
    if name == "mvitv2":  # a block gives a tensor and a size
        config = MultiScaleVitCfg(depths=(2, 1), embed_dim=(8, 16), num_heads=(1, 2))
        return MultiScaleVit(config, img_size=32, num_classes=5)
    return timm.create_model(name, **TAKERS[name])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["mvitv2", *TAKERS])
@pytest.mark.filterwarnings("ignore::logart.errors.PartlyQuantized")
def test_blocks_of_several_inputs(name: str) -> None:
    torch.manual_seed(0)
    model = taker(name).eval()
    images = smooth_images(3, 3, TAKERS.get(name, {}).get("img_size", 32)).float()
    assert any("Block" in type(model.get_submodule(block)).__name__ for block in found(model, images[:2]))
    for settings in ({"rounding": "compensated"}, {"iters": 2, "recon_input": "mixed"}):
        config = QuantConfig(**{"calib_samples": 3, "batch_size": 2, "rounding": "learned", **settings})
        quantized, report = quantize_model(model, config, images)
        assert quantized(images).isfinite().all() and report.rerun == []
