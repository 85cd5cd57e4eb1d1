"""From a name to a trained network: builder, weights, the images it expects, the blocks to reconstruct."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.data import resolve_model_data_config
from torch import nn

from logart.data import Preprocessing
from logart.runtime import UserError
from logart.weights import (
    fetch_state_dict,
    file_sha256,
    load_state_dict,
    one_line,
    read_state_dict,
    state_sha256,
)
from logart_cnn.layouts import State, rename_mnasnet, rename_mobilenetv2, rename_regnet
from logart_cnn.networks import CifarResNet, DigitsResNet, build_mnasnet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET = Preprocessing((3, 224, 224), 0.875, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
CIFAR = Preprocessing((3, 32, 32), 1.0, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
DIGITS = Preprocessing((1, 8, 8), 1.0, "bilinear", (0.3053,), (0.3761,))  # of the training split
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
TIMM = "timm:"

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
class Network:
    """A trained network and what else its name decides.

    Attributes:
        arch: The name it was asked for by.
        model: float32, in eval mode.
        preprocessing: The images it expects.
        block_types: Class names of the blocks to reconstruct; empty means layer by layer.
        num_classes: Its outputs.
        source: Where the weights came from: a file's name, a URL, or timm's name of them.
        sha256: Of the weights' file; for timm's pretrained weights, of the state dict (`state_sha256`).
    """

    arch: str
    model: nn.Module
    preprocessing: Preprocessing
    block_types: tuple[str, ...]
    num_classes: int
    source: str
    sha256: str


@dataclass(frozen=True)
class _Stock:
    """A network known by name: how to build it for a state dict, and how to rename that one's keys."""

    build: Callable[[State, int], nn.Module]
    block_types: tuple[str, ...]
    rename: Callable[[State], State] = dict
    preprocessing: Preprocessing = IMAGENET
    num_classes: int = 1000


def load_network(
    arch: str,
    checkpoint: str | Path | None = None,
    *,
    model_kwargs: Mapping[str, object] | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    crop_pct: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
) -> Network:
    """Build a network, load its trained weights, and say which images it expects.

    Args:
        arch: One of `ARCHS`, or 'timm:' and a name that timm knows.
        checkpoint: A file of weights, in place of those that `arch` has by default.
        model_kwargs: Passed to `timm.create_model`; only with 'timm:'.
        num_classes: The network's outputs, where they differ from the default.
        input_size: Height and width; this and the following override the network's data settings.
        crop_pct: The part of the resized image that the centre crop keeps, in (0, 1].
        mean: Of pixels in [0, 1], one value or one per channel.
        std: Likewise, positive.
        interpolation: One of `INTERPOLATIONS`.

    Raises:
        UserError: An unknown name, settings that do not fit, or weights that are missing or do not fit.
    """
    if num_classes is not None and num_classes < 1:
        raise UserError(f"--num-classes: {num_classes}; expected at least 1")
    if arch.startswith(TIMM):
        network = _load_timm(arch, checkpoint, dict(model_kwargs or {}), num_classes)
    elif model_kwargs:
        raise UserError(f"--model-kwargs: only for --arch {TIMM}NAME, not for {arch}")
    elif arch in _STOCK:
        network = _load_stock(arch, checkpoint, num_classes)
    else:
        expected = f"expected {', '.join(ARCHS)} or {TIMM}NAME"
        raise UserError(f"--arch: no network {arch!r}{_close(arch, ARCHS)}; {expected}")
    preprocessing = _override(network.preprocessing, input_size, crop_pct, mean, std, interpolation)
    network.model.eval().float()
    return replace(network, preprocessing=preprocessing)


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


def _load_timm(
    arch: str, checkpoint: str | Path | None, model_kwargs: dict[str, Any], num_classes: int | None
) -> Network:
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        raise UserError(f"--arch: timm has no model {name!r}{_close(name, timm.list_models())}")
    if num_classes is not None and model_kwargs.setdefault("num_classes", num_classes) != num_classes:
        other = model_kwargs["num_classes"]
        raise UserError(f"--num-classes: {num_classes}, but --model-kwargs has num_classes={other}")
    try:
        model: Any = timm.create_model(name, **model_kwargs)
    except Exception as error:  # whatever the model's own constructor raises
        flag = "--model-kwargs" if model_kwargs else "--arch"
        raise UserError(f"{flag}: timm cannot build {name} ({one_line(error)})") from error
    if checkpoint is not None:
        source = Path(checkpoint).name
        load_state_dict(model, read_state_dict(checkpoint), flag="--checkpoint", source=source)
        sha256 = file_sha256(checkpoint)
    else:
        model, source = _pretrained_timm(name, model_kwargs)
        sha256 = state_sha256(model.state_dict())
    present = {type(module).__name__ for module in model.modules()}
    blocks = tuple(block for block in TIMM_BLOCKS if block in present)
    return Network(arch, model, _timm_preprocessing(model), blocks, model.num_classes, source, sha256)


def _pretrained_timm(name: str, model_kwargs: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The model with timm's own weights, and timm's name of these."""
    try:
        model: Any = timm.create_model(name, pretrained=True, **model_kwargs)
    except Exception as error:  # network, disk and timm, each with its own errors
        raise UserError(
            f"--arch: no pretrained weights for {TIMM}{name} ({one_line(error)}); expected --checkpoint PATH"
        ) from error
    config = model.pretrained_cfg
    if config["num_classes"] != model.num_classes:  # timm would leave the last layer untrained
        raise UserError(
            f"--num-classes: {model.num_classes} asked for, but timm's weights for {name} "
            f"have {config['num_classes']}; expected --checkpoint PATH"
        )
    return model, TIMM + ".".join(filter(None, (config["architecture"], config.get("tag"))))


def _timm_preprocessing(model: nn.Module) -> Preprocessing:
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            channels = module.in_channels  # timm's config ignores in_chans
            break
    return Preprocessing(
        (channels, height, width),
        config["crop_pct"],
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
    )


def _override(
    preprocessing: Preprocessing,
    input_size: int | None,
    crop_pct: float | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
) -> Preprocessing:
    p = preprocessing
    channels = p.input_size[0]
    result = Preprocessing(
        p.input_size if input_size is None else (channels, input_size, input_size),
        p.crop_pct if crop_pct is None else crop_pct,
        p.interpolation if interpolation is None else interpolation,
        _per_channel("--mean", p.mean if mean is None else mean, channels),
        _per_channel("--std", p.std if std is None else std, channels),
    )
    if min(result.input_size) < 1:
        raise UserError(f"--input-size: {input_size}; expected at least 1")
    if not 0 < result.crop_pct <= 1:
        raise UserError(f"--crop-pct: {result.crop_pct}; expected more than 0 and at most 1")
    if result.interpolation not in INTERPOLATIONS:
        raise UserError(f"--interpolation: {result.interpolation!r}; expected {', '.join(INTERPOLATIONS)}")
    if not min(result.std) > 0:
        raise UserError(f"--std: {min(result.std)}; expected positive values")
    return result


def _per_channel(flag: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UserError(f"{flag}: {len(values)} values; expected 1 or {channels}, one per input channel")
    return tuple(values) * (channels // len(values))


def _close(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name."""
    close = get_close_matches(name, known)
    return f"; perhaps {' or '.join(close)}" if close else ""


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
