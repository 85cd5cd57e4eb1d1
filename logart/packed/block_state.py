"""The state of a finished block as a file: a packed file of its own, of its layers' codes, codebooks and biases.

That is all that the stages after it see of the block; beside it, what the report says of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from logart.packed.checkpoint import packed_layer
from logart.packed.file import PackedFile, PackedFileError
from logart.quantization.damping import Damping
from logart.quantization.layers import QuantizedLayer
from logart.quantization.reconstruct import BlockReport
from logart.quantization.state import StageResult


def save_state(path: Path, layers: Mapping[str, QuantizedLayer], done: StageResult) -> None:
    """Write the state of a unit's rounded layers; OSError where that fails, and no half file."""
    packed = {name: packed_layer(layer) for name, layer in layers.items()}
    biases = {name: layer.bias.detach() for name, layer in layers.items() if isinstance(layer.bias, Tensor)}
    info = {"seconds": done.seconds, "report": done.report and asdict(done.report)}
    info["damping"] = {name: layer.damping for name, layer in layers.items()}
    PackedFile(packed, biases, info).write(path)


def load_state(path: Path, layers: Mapping[str, QuantizedLayer]) -> StageResult:
    """Give layers that hold their float weights the codes, codebooks and biases of `save_state`.

    Raises:
        PackedFileError: the file is damaged or is another unit's; the layers are as they were.
    """
    file = PackedFile.read(path)
    done, damping = _done(path, file.info, layers)
    for name, layer in layers.items():
        packed = file.layers.get(name)
        if packed is None or (packed.shape, packed.n_bits, packed.dtype) != (layer.shape, layer.n_bits, layer.dtype):
            raise PackedFileError(f"{path} is no state of layer {name}")
    for name, layer in layers.items():
        packed, device = file.layers[name], layer.rows.device
        codebook = packed.spec.codebook(packed.n_bits, packed.dtype).to(device)
        layer.set_codebook(codebook, packed.unpacked().to(device).reshape(layer.n_codebooks, -1))
        layer.damping = damping[name]
        if name in file.rest:
            layer.bias = nn.Parameter(file.rest[name].to(device), requires_grad=False)
    return done


def _done(path: Path, info: Mapping[str, Any], names: Iterable[str]) -> tuple[StageResult, dict[str, Damping | None]]:
    try:
        report, damping = info["report"], info["damping"]
        result = StageResult(
            float(info["seconds"]), report and BlockReport(**report | {"losses": tuple(report["losses"])})
        )
        return result, {name: damping[name] and Damping(*map(float, damping[name])) for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise PackedFileError(f"{path} is no state of a block") from error
