"""What a run keeps of a block that is finished, so that a later run can go on behind it.

A block's state is a packed file of its own: codes, codebooks and biases of its layers, which is all that the stages
after it see of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from logart.checkpoint import packed_layer
from logart.layers import QuantizedLayer
from logart.packed_file import PackedFile, PackedFileError
from logart.reconstruct import BlockReport


@dataclass(frozen=True)
class Done:
    """A unit that a stage is through with: the seconds it took, and LLR's report."""

    seconds: float
    report: BlockReport | None = None


class Keeper:
    """Keeps nothing; what keeps something overrides both methods."""

    def restore(self, stage: str, index: int, layers: Mapping[str, QuantizedLayer]) -> Done | None:
        """Give a unit's layers what was kept of this stage; None, and nothing done, if nothing was."""
        return None

    def keep(self, stage: str, index: int, layers: Mapping[str, QuantizedLayer], done: Done) -> None:
        """Keep what a stage made of a unit's layers."""

    def warn(self, message: str) -> None:
        """A line on stderr, past the progress bars there."""
        tqdm.write(message, sys.stderr)


def save_state(path: Path, layers: Mapping[str, QuantizedLayer], done: Done) -> None:
    """Write the state of a unit's rounded layers; OSError where that fails, and no half file."""
    packed = {name: packed_layer(layer) for name, layer in layers.items()}
    biases = {name: layer.bias.detach() for name, layer in layers.items() if isinstance(layer.bias, Tensor)}
    PackedFile(packed, biases, {"seconds": done.seconds, "report": done.report and asdict(done.report)}).write(path)


def load_state(path: Path, layers: Mapping[str, QuantizedLayer]) -> Done:
    """Give layers that hold their float weights the codes, codebooks and biases of `save_state`.

    Raises:
        PackedFileError: the file is damaged or is another unit's; the layers are as they were.
    """
    file = PackedFile.read(path)
    done = _done(path, file.info)
    for name, layer in layers.items():
        packed = file.layers.get(name)
        if packed is None or (packed.shape, packed.n_bits, packed.dtype) != (layer.shape, layer.n_bits, layer.dtype):
            raise PackedFileError(f"{path} is no state of layer {name}")
    for name, layer in layers.items():
        packed, device = file.layers[name], layer.rows.device
        codebook = packed.spec.codebook(packed.n_bits, packed.dtype).to(device)
        layer.set_codebook(codebook, packed.unpacked().to(device).reshape(layer.n_codebooks, -1))
        if name in file.rest:
            layer.bias = nn.Parameter(file.rest[name].to(device), requires_grad=False)
    return done


def _done(path: Path, info: Mapping[str, Any]) -> Done:
    try:
        report = info["report"]
        return Done(float(info["seconds"]), report and BlockReport(**report | {"losses": tuple(report["losses"])}))
    except (KeyError, TypeError, ValueError) as error:
        raise PackedFileError(f"{path} is no state of a block") from error
