"""What each quantized layer of a packed network sees and does for some images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from logart.errors import UserError, one_line
from logart.export.hardware import Array
from logart.export.inputs import GoldenImages
from logart.export.integer_layer import Geometry
from logart.networks.image_info import preprocessing_of
from logart.packed.checkpoint import load_packed
from logart.packed.file import PackedFile, PackedFileError
from logart.packed.layer import PackedLayer
from logart.quantization import surgery

BATCH_SIZE = 32
_MOVES = ("clone", "_to_copy", "copy_", "cat", "stack", "empty_like", "detach")


@dataclass(frozen=True)
class LayerRun:
    """What a layer did: its input for the golden images, how often its weights were used for one, how, and the largest
    magnitude that it read for the images that formats are chosen from."""

    input: Array
    positions: int
    geometry: Geometry | None
    largest: float


@dataclass(frozen=True)
class NetworkRun:
    """What a network did for some images.

    Attributes:
        layers: by name, what each quantized layer did.
        float_operations: how often each operation ran outside of them, by PyTorch's name; views and copies are none.
        not_run: why nothing is known.
    """

    layers: dict[str, LayerRun] = field(default_factory=dict)
    float_operations: dict[str, int] = field(default_factory=dict)
    not_run: str | None = None


def run_layers(
    path: Path,
    file: PackedFile,
    layers: Mapping[str, PackedLayer],
    golden: GoldenImages | None,
    model: nn.Module | None,
) -> NetworkRun:
    """What each layer does in the network with the exported levels, or why nothing is known of it."""
    try:
        network = load_packed(path, model)
    except PackedFileError as error:
        if model is not None:
            raise
        if golden is not None:
            raise UserError(f"--inputs: golden vectors need the network; {one_line(error)}") from error
        return NetworkRun(not_run=one_line(error))
    if golden is None:
        preprocessing = preprocessing_of(file.info)
        if preprocessing is None:
            return NetworkRun(not_run="the file does not say which images the network takes")
        images = torch.zeros(1, *preprocessing.input_size)
        golden = GoldenImages(images, images, "")
    held = surgery.quantized_layers(network)
    # Of what else is quantized, a weight used by a function or a convolution of other dimensions, codes alone are kept.
    quantized = {name: held[name].module for name in layers if isinstance(held[name].module, nn.Conv2d | nn.Linear)}
    dtype = next(iter(layers.values())).dtype
    try:
        for name, layer in layers.items():
            held[name].set_packed(layer.codes, layer.spec, dequantized_weight=True)
        with torch.no_grad():
            largest = dict.fromkeys(layers, 0.0)

            def widen(name: str, x: Tensor, output: Tensor) -> None:
                largest[name] = max(largest[name], float(x.abs().max()))

            with _watched(quantized, widen):
                for images in golden.calibration.split(BATCH_SIZE):
                    network(images.to(dtype, copy=True))  # some networks normalise in place
            return _run(network, quantized, golden.images.to(dtype, copy=True), largest)
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's and timm's answers to a size that is wrong
        seen = list(golden.images.shape)
        raise UserError(f"--inputs: the network does not take {seen} ({one_line(error):.160})") from error


def _run(network: nn.Module, quantized: Mapping[str, Any], images: Tensor, largest: Mapping[str, float]) -> NetworkRun:
    run, operations = NetworkRun(), _Operations()

    def record(name: str, x: Tensor, output: Tensor) -> None:
        module = quantized[name]
        geometry = geometry_of(module, x) if isinstance(module, nn.Conv2d) else None
        channels = output.shape[-1] if geometry is None else output.shape[1]
        positions = output.numel() // channels // len(images)
        run.layers[name] = LayerRun(x.to(torch.float64, copy=True).numpy(), positions, geometry, largest[name])
        operations.inside = False

    def enter(*_: Any) -> None:
        operations.inside = True

    with _watched(quantized, record, enter), operations:
        network(images)
    run.float_operations.update(sorted(operations.counts.items()))
    return run


class _Operations(TorchDispatchMode):
    """Counts operations while it is not inside a quantized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.counts = False, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not self.inside and not view and name not in _MOVES:
            self.counts[name.removeprefix("_")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(layers: Mapping[str, nn.Module], after: Any, before: Any = None) -> Iterator[None]:
    """Call after(name, input, output) behind every forward of a layer, and before() in front of it."""
    handles = []
    try:
        for name, module in layers.items():
            if before is not None:
                handles.append(module.register_forward_pre_hook(before, prepend=True))  # before a quantizer's
            handles.append(module.register_forward_hook(lambda m, args, y, name=name: after(name, args[0], y)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def geometry_of(module: nn.Conv2d, x: Tensor) -> Geometry:
    """Of a convolution on an input of this size, its padding as numbers."""
    kernel, stride, dilation = ((int(a), int(b)) for a, b in (module.kernel_size, module.stride, module.dilation))
    if isinstance(module, Conv2dSame):
        total = [get_same_padding(x.shape[2 + i], kernel[i], stride[i], dilation[i]) for i in (0, 1)]
    elif isinstance(module.padding, str):
        total = [d * (k - 1) if module.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    else:
        total = [2 * int(p) for p in module.padding]
    top, left = (t // 2 for t in total)
    padding = ((top, total[0] - top), (left, total[1] - left))
    return Geometry(kernel, stride, padding, dilation, module.groups, module.padding_mode)
