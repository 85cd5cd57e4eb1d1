"""What each quantized layer of a packed network sees and does for some images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn

from logart.errors import UserError, one_line
from logart.export.hardware import Array
from logart.export.integer_layer import Geometry
from logart.networks.image_info import preprocessing_of
from logart.packed.checkpoint import load_packed
from logart.packed.file import PackedFile, PackedFileError
from logart.packed.layer import PackedLayer
from logart.quantization import surgery


@dataclass(frozen=True)
class LayerRun:
    """What a layer did for some images: its input, how often its weights were used for one, and how."""

    input: Array
    positions: int
    geometry: Geometry | None


def run_layers(
    path: Path, file: PackedFile, layers: Mapping[str, PackedLayer], images: Tensor | None, model: nn.Module | None
) -> tuple[dict[str, LayerRun], str | None]:
    """What each layer does in the network with the exported levels, or why nothing is known of it."""
    try:
        network = load_packed(path, model)
    except PackedFileError as error:
        if model is not None:
            raise
        if images is not None:
            raise UserError(f"--inputs: golden vectors need the network; {one_line(error)}") from error
        return {}, one_line(error)
    if images is None:
        preprocessing = preprocessing_of(file.info)
        if preprocessing is None:
            return {}, "the file does not say which images the network takes"
        images = torch.zeros(1, *preprocessing.input_size)
    quantized = surgery.quantized_layers(network)
    runs: dict[str, LayerRun] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        geometry = geometry_of(module, args[0]) if isinstance(module, nn.Conv2d) else None
        channels = output.shape[-1] if geometry is None else output.shape[1]
        runs[name] = LayerRun(
            args[0].to(torch.float64, copy=True).numpy(), output.numel() // channels // len(images), geometry
        )

    handles = []
    try:
        for name, layer in layers.items():
            module = quantized[name]
            module.set_packed(layer.codes, layer.spec, dequantized_weight=True)
            handles.append(module.register_forward_hook(lambda m, a, o, name=name: record(name, m, a, o)))
        with torch.no_grad():
            network(images.to(next(iter(layers.values())).dtype, copy=True))  # some networks normalise in place
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's and timm's answers to a size that is wrong
        raise UserError(f"--inputs: the network does not take {list(images.shape)} ({one_line(error):.160})") from error
    finally:
        for handle in handles:
            handle.remove()
    return runs, None


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
