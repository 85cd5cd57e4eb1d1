"""What a run keeps of a block that is finished, so that a later run can resume after it.

A block's state is a packed file of its own: codes, codebooks, biases and activation levels of its layers, which
is all that the stages after it see of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from logart.quantization.activation_quantizer import ActivationQuantizer
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.reconstruct import BlockReport

Stored = QuantizedWeight | ActivationQuantizer


@dataclass(frozen=True)
class StageResult:
    """A block that a stage is through with: the seconds it took, and LLR's report."""

    seconds: float
    report: BlockReport | None = None


class StageStore:
    """Keeps nothing; what keeps something overrides the methods."""

    def bits(self, allocate: Callable[[], dict[str, int]]) -> dict[str, int]:
        """The width of each layer under a budget: what was kept, else allocated now."""
        return allocate()

    def restore(self, stage: str, index: int, own: Mapping[str, Stored]) -> StageResult | None:
        """Give a block's layers and quantizers what was kept of this stage; None, and nothing done, if nothing was."""
        return None

    def save(self, stage: str, index: int, own: Mapping[str, Stored], done: StageResult) -> None:
        """Keep what a stage made of them."""

    def warn(self, message: str) -> None:
        """A line on stderr, past the progress bars there."""
        tqdm.write(message, sys.stderr)
