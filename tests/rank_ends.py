"""A run whose second rank ends at a block: `torchrun ... rank_ends.py HOW BLOCK FLAGS`, HOW is killed or refuses."""

from __future__ import annotations

import os
import signal
import sys

from logart.errors import NonFiniteError
from logart.quantization.rounding_methods import BlockTask, Compensate
from logart_cnn.command import main

how, block, *flags = sys.argv[1:]
run = Compensate.run


def run_or_end(stage: Compensate, task: BlockTask) -> None:
    if os.environ["RANK"] == "1" and task.block.name == block:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise NonFiniteError("image 1 is not finite", 1)
    run(stage, task)


Compensate.run = run_or_end  # type: ignore[method-assign]
sys.exit(main(flags))
