"""Capture and second moments by two ranks against one process, one thread each.

    python benchmarks/ranks.py [--arch resnet18] [--size 224] [--images 64] [--batch_size 16] [--runs 3]

Compensated rounding of a network of random weights on random images, by one process and by the two that torchrun
starts, in turn. Timed are the inputs of every block and the moments of every layer, with their sum over ranks; rounding
itself, which every rank does, is to nearest here and not in the figure. On a machine with other work the wall's seconds
say little: the processor's are those of the rank that took most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from logart import QuantConfig, quantize_model, ranks
from logart.grids.rounding import nearest
from logart.quantization import compensate
from logart.quantization.activations import BothActivations
from logart_cnn.models import build_network

TIMED = [(BothActivations, "capture"), (compensate, "layer_moments"), (compensate, "of_all_ranks")]


def work(args: argparse.Namespace) -> None:
    """Print the seconds of one run as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, images = build_network(args.arch, shapes={}).eval(), torch.randn(args.images, 3, args.size, args.size)
    wall, cpu = [0.0], [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start, start_cpu = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                wall[0] += time.perf_counter() - start
                cpu[0] += time.process_time() - start_cpu

        return call

    def round_to_nearest(t: Any, a: Any, codebook: Any, factor: Any) -> Any:
        return nearest(t, codebook)

    config = QuantConfig(rounding="compensated", calib_samples=args.images, batch_size=args.batch_size)
    with ranks.joined("ranks"):
        patches = [patch.object(where, name, timed(getattr(where, name))) for where, name in TIMED]
        for each in [*patches, patch.object(compensate, "round_compensated", round_to_nearest)]:
            each.start()
        quantize_model(model, config, images, block_types=args.types)
        of_ranks = ranks.gather((wall[0], cpu[0]))
        print(json.dumps([max(of) for of in zip(*of_ranks, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--types", nargs="*", default=[])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", action="store_true", help="be one of the processes")
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    seconds: dict[int, list[list[float]]] = {1: [], 2: []}
    for _ in range(args.runs):
        for count, start in ((1, []), (2, torchrun)):
            command = [sys.executable, *start, __file__, *sys.argv[1:], "--work"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
            seconds[count].append(json.loads(done.stdout))
    for name, figures in (("wall", 0), ("processor", 1)):
        one, two = (statistics.median(run[figures] for run in seconds[count]) for count in (1, 2))
        print(f"{args.arch}, {args.images} images, capture and moments, {name}: one process {one:.1f} s, "
              f"two ranks {two:.1f} s, {one / two:.2f}×")  # fmt: skip


if __name__ == "__main__":
    main()
