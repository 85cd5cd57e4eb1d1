"""From a name to a trained network: builder, weights, the images it expects, the blocks to reconstruct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
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
from logart.networks.network import TIMM, Network, Plan, Size, names_table, plan_by, unknown_network
from logart.networks.timm_network import build_timm, plan_timm
from logart.networks.weights import Checkpoint, fetch_state_dict, load_state_dict, read_checkpoint
from logart_cnn.layouts import State, rename_mnasnet, rename_mobilenetv2, rename_regnet
from logart_cnn.networks import CifarResNet, DigitsResNet, build_mnasnet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET = Preprocessing((3, 224, 224), 0.875, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
CIFAR = Preprocessing((3, 32, 32), 1.0, "bilinear", IMAGENET_MEAN, IMAGENET_STD)

BRECQ_URL = "https://github.com/yhhhli/BRECQ/releases/download/v1.0/"
PACKAGED = "weights/"  # how the path of weights that come with this package begins


@dataclass(frozen=True)
class Entry:
    """A network known by name; all that is known of it, which help and documentation are made from.

    Attributes:
        about: What it is.
        build: From a state dict and the number of classes.
        weights: A URL, a path in this package, or "" where it has none of its own.
        rename: The keys of published state dicts, as the network has them.
        preprocessing: The images it expects.
        num_classes: Its outputs.
    """

    about: str
    build: Callable[[State, int], nn.Module]
    weights: str = ""
    rename: Callable[[State], State] = dict
    preprocessing: Preprocessing = IMAGENET
    num_classes: int = 1000


def load_network(arch: str, checkpoint: str | Path | None = None, **settings: Any) -> Network:
    """The network of one of `ARCHS`, or of 'timm:' and a name that timm knows; `settings` as for `network.plan_by`."""
    return plan_network(arch, checkpoint, **settings).load()


def plan_network(arch: str, checkpoint: str | Path | None = None, **settings: Any) -> Plan:
    """The same before its weights are read or fetched."""
    return plan_by(_plan, "cnn", arch, checkpoint, **settings)


def _plan(
    arch: str,
    checkpoint: str | Path | None,
    checkpoint_key: str | None,
    model_kwargs: Mapping[str, object] | None,
    num_classes: int | None,
    input_size: Size | None,
) -> Plan:
    if arch.startswith(TIMM):
        return plan_timm(
            arch,
            arch.removeprefix(TIMM),
            None if checkpoint is None else nullcontext(Path(checkpoint)),
            checkpoint_key,
            flag="--arch",
            model_kwargs=model_kwargs,
            num_classes=num_classes,
            input_size=input_size,
        )
    if model_kwargs:
        raise UserError(f"--model_kwargs: only for --arch {TIMM}NAME, not for {arch}")
    if arch not in ENTRIES:
        raise unknown_network(arch, ARCHS, flag="--arch")
    entry = ENTRIES[arch]
    if checkpoint is None and not entry.weights:
        raise UserError(f"--checkpoint: {arch} comes without weights; expected a file of them")
    classes = num_classes or entry.num_classes
    return Plan(entry.preprocessing, classes, lambda: _load(arch, checkpoint, checkpoint_key, classes))


def build_network(
    arch: str,
    *,
    shapes: Mapping[str, Tensor],
    model_kwargs: Mapping[str, object] | None = None,
    num_classes: int | None = None,
    input_size: Size | None = None,
) -> nn.Module:
    """The network that `load_network` would give weights to.

    Args:
        arch: One of `ARCHS`, or 'timm:' and a name that timm knows.
        shapes: A tensor, on any device, of the shape of each weight; what decides the width of some networks.
        model_kwargs, num_classes, input_size: As for `load_network`.
    """
    if arch in ENTRIES:
        return ENTRIES[arch].build(dict(shapes), num_classes or ENTRIES[arch].num_classes)
    name = arch.removeprefix(TIMM)
    return build_timm(name, flag="--arch", model_kwargs=model_kwargs, num_classes=num_classes, input_size=input_size)[0]  # type: ignore[no-any-return]


def _load(arch: str, checkpoint: str | Path | None, checkpoint_key: str | None, classes: int) -> Network:
    entry = ENTRIES[arch]
    file = _weights(entry, checkpoint, checkpoint_key)
    state = entry.rename(file.state)
    model = entry.build(state, classes)
    load_state_dict(model, state, flag="--checkpoint", source=file.source)
    return Network(arch, model, entry.preprocessing, classes, file.source, file.sha256)


def _weights(entry: Entry, checkpoint: str | Path | None, checkpoint_key: str | None) -> Checkpoint:
    if checkpoint is not None:
        return read_checkpoint(checkpoint, checkpoint_key)
    if not entry.weights.startswith(PACKAGED):
        state, sha256 = fetch_state_dict(entry.weights)
        return Checkpoint(entry.weights, state, sha256)
    with resources.as_file(resources.files("logart_cnn").joinpath(entry.weights)) as path:
        return read_checkpoint(path)


def _timm_builder(name: str) -> Callable[[State, int], nn.Module]:
    return lambda _, num_classes: timm.create_model(name, num_classes=num_classes)


def _torchvision_builder(name: str) -> Callable[[State, int], nn.Module]:
    return lambda _, num_classes: torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def _cifar(depth: int) -> Entry:
    return Entry(
        f"ResNet-{depth} for CIFAR-10 (He et al., 2016)",
        lambda _, classes: CifarResNet(depth, classes),
        preprocessing=CIFAR,
        num_classes=10,
    )


ENTRIES = {
    "resnet18": Entry("torchvision's ResNet-18", _torchvision_builder("resnet18"),
                      BRECQ_URL + "resnet18_imagenet.pth.tar"),
    "resnet50": Entry("torchvision's ResNet-50", _torchvision_builder("resnet50"),
                      BRECQ_URL + "resnet50_imagenet.pth.tar"),
    "mobilenetv2": Entry("torchvision's MobileNetV2", _torchvision_builder("mobilenet_v2"),
                         BRECQ_URL + "mobilenetv2.pth.tar", rename_mobilenetv2),
    "regnetx_600m": Entry("RegNetX-600MF (timm's regnetx_006)", _timm_builder("regnetx_006"),
                          BRECQ_URL + "regnet_600m.pth.tar", rename_regnet),
    "regnetx_3200m": Entry("RegNetX-3.2GF (timm's regnetx_032)", _timm_builder("regnetx_032"),
                           BRECQ_URL + "regnet_3200m.pth.tar", rename_regnet),
    "mnasnet": Entry("torchvision's MNASNet, of the width that the weights have", build_mnasnet,
                     BRECQ_URL + "mnasnet.pth.tar", rename_mnasnet),
    "squeezenet1_1": Entry("torchvision's SqueezeNet 1.1", _torchvision_builder("squeezenet1_1"),
                           torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url),
    **{f"cifar_resnet{depth}": _cifar(depth) for depth in (20, 32, 44, 56)},
    "digits_resnet": Entry("a small ResNet for the built-in digits", lambda _, n: DigitsResNet(num_classes=n),
                           PACKAGED + "digits_resnet.safetensors", dict, DIGITS, 10),
}  # fmt: skip
ARCHS: tuple[str, ...] = tuple(ENTRIES)


def names_documentation() -> str:
    """The table of the names of --arch."""
    return names_table(
        (name, entry.about, entry.preprocessing.input_size, entry.num_classes, entry.weights)
        for name, entry in ENTRIES.items()
    )


register_builder("cnn", build_network)
