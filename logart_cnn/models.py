"""From a name to a trained network: builder, weights, the images it expects, the blocks to reconstruct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from logart.errors import UserError
from logart.networks.builders import register_builder
from logart.networks.data import Preprocessing
from logart.networks.network import DIGITS_PREPROCESSING as DIGITS
from logart.networks.network import INTERPOLATIONS as INTERPOLATIONS
from logart.networks.network import TIMM, Network, load_by, unknown_network
from logart.networks.timm_network import build_timm, load_timm
from logart.networks.weights import fetch_state_dict, file_sha256, load_state_dict, read_state_dict
from logart_cnn.layouts import State, rename_mnasnet, rename_mobilenetv2, rename_regnet
from logart_cnn.networks import CifarResNet, DigitsResNet, build_mnasnet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET = Preprocessing((3, 224, 224), 0.875, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
CIFAR = Preprocessing((3, 32, 32), 1.0, "bilinear", IMAGENET_MEAN, IMAGENET_STD)

BRECQ_URL = "https://github.com/yhhhli/BRECQ/releases/download/v1.0/"
WEIGHT_URLS = {
    "resnet18": BRECQ_URL + "resnet18_imagenet.pth.tar",
    "resnet50": BRECQ_URL + "resnet50_imagenet.pth.tar",
    "mobilenetv2": BRECQ_URL + "mobilenetv2.pth.tar",
    "regnetx_600m": BRECQ_URL + "regnet_600m.pth.tar",
    "regnetx_3200m": BRECQ_URL + "regnet_3200m.pth.tar",
    "mnasnet": BRECQ_URL + "mnasnet.pth.tar",
    "squeezenet1_1": torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
}
PACKAGED_WEIGHTS = {"digits_resnet": "weights/digits_resnet.safetensors"}

# timm's residual and inception units that take one tensor and give one; other networks go layer by layer.
TIMM_BLOCKS = (
    "BasicBlock",
    "Bottleneck",
    "Bottle2neck",
    "BottleneckBlock",
    "PreBottleneck",
    "PreActBasic",
    "PreActBottleneck",
    "ResBottleneckBlock",
    "ResNestBottleneck",
    "SelectiveKernelBasic",
    "SelectiveKernelBottleneck",
    "SEBottleneck",
    "SEResNetBlock",
    "SEResNetBottleneck",
    "SEResNeXtBottleneck",
    "InvertedResidual",
    "UniversalInvertedResidual",
    "DepthwiseSeparableConv",
    "EdgeResidual",
    "CondConvResidual",
    "ConvBnAct",
    "LinearBottleneck",
    "GhostBottleneck",
    "RepGhostBottleneck",
    "DarkBlock",
    "EdgeBlock",
    "RepVggBlock",
    "MobileOneBlock",
    "XceptionModule",
    "PreXceptionModule",
    "HighPerfGpuBlock",
    "OsaBlock",
    "NormFreeBlock",
    "ConvNeXtBlock",
    "InceptionA",
    "InceptionB",
    "InceptionC",
    "InceptionD",
    "InceptionE",
    "Block35",
    "Block17",
    "Block8",
    "Fire",
)


@dataclass(frozen=True)
class _Stock:
    """A network known by name: how to build it for a state dict, and how to rename that one's keys."""

    build: Callable[[State, int], nn.Module]
    block_types: tuple[str, ...]
    rename: Callable[[State], State] = dict
    preprocessing: Preprocessing = IMAGENET
    num_classes: int = 1000


def load_network(arch: str, checkpoint: str | Path | None = None, **settings: Any) -> Network:
    """The network of one of `ARCHS`, or of 'timm:' and a name that timm knows; `settings` as for `network.load_by`."""
    return load_by(_load, "cnn", arch, checkpoint, **settings)


def _load(
    arch: str,
    checkpoint: str | Path | None,
    model_kwargs: Mapping[str, object] | None,
    num_classes: int | None,
    input_size: int | None,
) -> Network:
    if arch.startswith(TIMM):
        return load_timm(
            arch,
            arch.removeprefix(TIMM),
            checkpoint,
            flag="--arch",
            find_blocks=_find_blocks,
            model_kwargs=model_kwargs,
            num_classes=num_classes,
            input_size=input_size,
        )
    if model_kwargs:
        raise UserError(f"--model_kwargs: only for --arch {TIMM}NAME, not for {arch}")
    if arch not in _STOCK:
        raise unknown_network(arch, ARCHS, flag="--arch")
    return _load_stock(arch, checkpoint, num_classes)


def build_network(
    arch: str,
    *,
    shapes: Mapping[str, Tensor],
    model_kwargs: Mapping[str, object] | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> nn.Module:
    """The network that `load_network` would give weights to.

    Args:
        arch: One of `ARCHS`, or 'timm:' and a name that timm knows.
        shapes: A tensor, on any device, of the shape of each weight; what decides the width of some networks.
        model_kwargs, num_classes, input_size: As for `load_network`.
    """
    if arch in _STOCK:
        return _STOCK[arch].build(dict(shapes), num_classes or _STOCK[arch].num_classes)
    name = arch.removeprefix(TIMM)
    return build_timm(name, flag="--arch", model_kwargs=model_kwargs, num_classes=num_classes, input_size=input_size)[0]  # type: ignore[no-any-return]


def _load_stock(arch: str, checkpoint: str | Path | None, num_classes: int | None) -> Network:
    stock = _STOCK[arch]
    state, source, sha256 = _weights(arch, checkpoint)
    state = stock.rename(state)
    classes = num_classes or stock.num_classes
    model = stock.build(state, classes)
    load_state_dict(model, state, flag="--checkpoint", source=source)
    return Network(arch, model, stock.preprocessing, stock.block_types, classes, source, sha256)


def _weights(arch: str, checkpoint: str | Path | None) -> tuple[State, str, str]:
    """The state dict, where it came from, and its hash."""
    if checkpoint is not None:
        return read_state_dict(checkpoint), Path(checkpoint).name, file_sha256(checkpoint)
    if arch in WEIGHT_URLS:
        state, sha256 = fetch_state_dict(WEIGHT_URLS[arch])
        return state, WEIGHT_URLS[arch], sha256
    if arch in PACKAGED_WEIGHTS:
        packaged = resources.files("logart_cnn").joinpath(PACKAGED_WEIGHTS[arch])
        if packaged.is_file():
            with resources.as_file(packaged) as path:
                return read_state_dict(path), path.name, file_sha256(path)
    raise UserError(f"--checkpoint: {arch} comes without weights; expected a file of them")


def _find_blocks(model: nn.Module) -> tuple[str, ...]:
    present = {type(module).__name__ for module in model.modules()}
    return tuple(block for block in TIMM_BLOCKS if block in present)


def _timm_builder(name: str) -> Callable[[State, int], nn.Module]:
    return lambda _, num_classes: timm.create_model(name, num_classes=num_classes)


def _torchvision_builder(name: str) -> Callable[[State, int], nn.Module]:
    return lambda _, num_classes: torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def _cifar(depth: int) -> _Stock:
    return _Stock(lambda _, classes: CifarResNet(depth, classes), ("CifarBlock",), dict, CIFAR, 10)


_STOCK = {
    "resnet18": _Stock(_torchvision_builder("resnet18"), ("BasicBlock",)),
    "resnet50": _Stock(_torchvision_builder("resnet50"), ("Bottleneck",)),
    "mobilenetv2": _Stock(_torchvision_builder("mobilenet_v2"), ("InvertedResidual",), rename_mobilenetv2),
    "regnetx_600m": _Stock(_timm_builder("regnetx_006"), ("Bottleneck",), rename_regnet),
    "regnetx_3200m": _Stock(_timm_builder("regnetx_032"), ("Bottleneck",), rename_regnet),
    "mnasnet": _Stock(build_mnasnet, ("_InvertedResidual",), rename_mnasnet),
    "squeezenet1_1": _Stock(_torchvision_builder("squeezenet1_1"), ("Fire",)),
    **{f"cifar_resnet{depth}": _cifar(depth) for depth in (20, 32, 44, 56)},
    "digits_resnet": _Stock(lambda _, classes: DigitsResNet(num_classes=classes), ("DigitsBlock",), dict, DIGITS, 10),
}
ARCHS: tuple[str, ...] = tuple(_STOCK)

register_builder("cnn", build_network)
