"""The state of a finished block as a file: a packed file of its own, of its layers' codes, codebooks and biases.

That is all that the stages after it see of the block; beside it, what the report says of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logart.packed.checkpoint import packed_layer
from logart.packed.file import PackedFile, PackedFileError
from logart.quantization.activation_quantizer import ActivationQuantizer, Measured
from logart.quantization.damping import Damping
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.reconstruct import BlockReport
from logart.quantization.state import StageResult, Stored


def save_state(path: Path, own: Mapping[str, Stored], done: StageResult) -> None:
    """Write the state of a block's rounded layers and of its quantizers; OSError where that fails, and no half file."""
    state_file(own, done).write(path)


def state_file(own: Mapping[str, Stored], done: StageResult) -> PackedFile:
    """The file that `save_state` writes."""
    layers, quantizers = _layers(own), _quantizers(own)
    packed = {name: packed_layer(layer) for name, layer in layers.items()}
    rest = {f"{name}.bias": layer.bias.detach() for name, layer in layers.items() if layer.bias is not None}
    rest |= {f"{name}.{kind}": tensor for name, q in quantizers.items() for kind, tensor in q.tensors().items()}
    info = {"seconds": done.seconds, "report": done.report and asdict(done.report)}
    info["damping"] = {name: layer.damping for name, layer in layers.items()}
    info["measured"] = {name: quantizer.measured for name, quantizer in quantizers.items()}
    return PackedFile(packed, rest, info)


def load_state(path: Path, own: Mapping[str, Stored]) -> StageResult:
    """Give layers that hold their float weights, and quantizers without levels, those of `save_state`.

    Raises:
        PackedFileError: the file is damaged or is another block's; everything is as it was.
    """
    file = PackedFile.read(path)
    layers, quantizers = _layers(own), _quantizers(own)
    done, damping, measured = _done(path, file.info, layers, quantizers)
    for name, layer in layers.items():
        packed = file.layers.get(name)
        if packed is None or (packed.shape, packed.n_bits, packed.dtype) != (layer.shape, layer.n_bits, layer.dtype):
            raise PackedFileError(f"{path} is no state of layer {name}")
    for name, quantizer in quantizers.items():
        levels = {key.removeprefix(f"{name}."): t for key, t in file.rest.items() if key.startswith(f"{name}.")}
        try:
            quantizer.take(levels)
        except ValueError as error:
            raise PackedFileError(f"{path} is no state of {name} ({error})") from error
        quantizer.measured = measured[name]
    for name, layer in layers.items():
        packed, device = file.layers[name], layer.rows.device
        codebook = packed.spec.codebook(packed.n_bits, packed.dtype).to(device)
        layer.set_codebook(codebook, packed.unpacked().to(device).reshape(layer.n_codebooks, -1))
        layer.damping = damping[name]
        if f"{name}.bias" in file.rest:
            layer.set_bias(file.rest[f"{name}.bias"].to(device))
    return done


def _layers(own: Mapping[str, Stored]) -> dict[str, QuantizedWeight]:
    return {name: each for name, each in own.items() if isinstance(each, QuantizedWeight)}


def _quantizers(own: Mapping[str, Stored]) -> dict[str, ActivationQuantizer]:
    return {name: each for name, each in own.items() if isinstance(each, ActivationQuantizer)}


def _done(
    path: Path, info: Mapping[str, Any], layers: Iterable[str], quantizers: Iterable[str]
) -> tuple[StageResult, dict[str, Damping | None], dict[str, Measured]]:
    try:
        report, damping, measured = info["report"], info["damping"], info["measured"]
        result = StageResult(
            float(info["seconds"]), report and BlockReport(**report | {"losses": tuple(report["losses"])})
        )
        chosen = {name: damping[name] and Damping(*map(float, damping[name])) for name in layers}
        return result, chosen, {name: Measured(*map(float, measured[name])) for name in quantizers}
    except (KeyError, TypeError, ValueError) as error:
        raise PackedFileError(f"{path} is no state of a block") from error
