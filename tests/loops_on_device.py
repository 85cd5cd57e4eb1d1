"""Compares the Triton kernels of compensated rounding with the plain loops and prints as JSON what is equal.

    python loops_on_device.py DEVICE

On the CPU Triton's interpreter runs them, which needs no GPU.
"""

from __future__ import annotations

import json
import os
import sys

DEVICE = sys.argv[1]
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from quadratic import correlated  # noqa: E402

from logart.quantization import column_rounding, loops_plain, loops_triton  # noqa: E402

SHAPES = [(1, 1, 1), (1, 7, 64), (5, 1, 9), (2, 6, 33), (3, 2, 2), (2, 3, 130)]  # groups, rows of each, columns


def equal_on(bits: int, shape: tuple[int, int, int]) -> dict[str, bool]:
    """Whether codes and errors are the same, bit for bit."""
    t, a, codebook = correlated(*shape, bits, n_bits=bits)
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    grid = column_rounding.LinearLevels.of(codebook, shape[0])
    t, a, codes, levels, borders = (x.to(DEVICE) for x in (t.reshape(shape), a, codes, grid.levels, grid.borders))
    slope = (levels.gather(2, codes.long()) - t) @ a
    by_loops = {
        "error_feedback": lambda loops: loops.error_feedback(t.clone(), a.triu() / 7, t, levels, borders),
        "coordinate_descent": lambda loops: loops.coordinate_descent(slope.clone(), a, codes, levels, borders, 1e-12),
        "correlation_order": lambda loops: (loops.correlation_order(a),),
    }
    found = {name: (run(loops_triton), run(loops_plain)) for name, run in by_loops.items()}
    return {name: all(map(torch.equal, *both)) for name, both in found.items()}


if __name__ == "__main__":
    print(json.dumps({f"{bits} bits, {shape}": equal_on(bits, shape) for bits in (2, 4, 8) for shape in SHAPES}))
