"""Seconds of a quantization, and how they grow with depth; and LLR's steps per second. On the CPU those of one thread.

    python benchmarks/handed_forward.py network [--arch mobilenetv2] [--checkpoint FILE] [--images_from FOLDER]
        [--images 64] [--rounding compensated] [--iters 2000] [--damping auto] [--device cuda] [--loops torch]
    python benchmarks/handed_forward.py growth [--width 32] [--size 32]
    python benchmarks/handed_forward.py steps [--steps 60] [--batch 32] [--device cuda]

`network` quantizes one; without a checkpoint its weights are random, without a folder its images are. `growth` takes
networks of 4, 8 and 16 equal residual blocks, in turn, and LLR of one step a block, whose capture is timed. `steps`
learns a block of ResNet-18 and one of DeiT-tiny alone, on random inputs; on CUDA launched kernel by kernel as well.

On CUDA the seconds are the wall's, behind a run on a few images that compiles; a last run under the profiler tells the
share of its time in which the GPU had nothing to do. `--loops torch` rounds without Triton's kernels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import timm
import torch
from memory import peak_mib, reset_peak
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from logart import QuantConfig, quantize_model
from logart.networks.calibration import calibration_images
from logart.networks.data import open_images
from logart.quantization import column_rounding, loops_plain, reconstruct
from logart_cnn.models import build_network, load_network

DEPTHS = (4, 8, 16)


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def idle_share(function: Callable[[], object]) -> float:
    """The share of the time that a GPU, which works through one queue, spends in no kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        seconds = seconds_of(function)
    return 1 - sum(event.self_device_time_total for event in found.key_averages()) / 1e6 / seconds


def network(args: argparse.Namespace) -> None:
    if args.checkpoint is None:
        model, types = build_network(args.arch, shapes={}).eval(), args.types
        images = torch.randn(args.images, 3, args.size, args.size)
    else:
        loaded = load_network(args.arch, args.checkpoint)
        model, types = loaded.model, None
        source = open_images(args.images_from, loaded.preprocessing, loaded.num_classes)
        images, _ = calibration_images(source, args.images, 0, quiet=True)
    config = QuantConfig(
        rounding=args.rounding, calib_samples=args.images, iters=args.iters, damping=damping(args.damping)
    )
    run = partial(quantize_model, model, config, images, block_types=types, device=args.device)
    where = f"{args.arch}, {args.images} images, {args.rounding}, damping {args.damping}"
    where += f", {args.iters} steps a block" if config.method.learns else ""
    loops = patch.object(column_rounding, "_loops", plain_loops) if args.loops == "torch" else nullcontext()
    with loops:
        if args.device.type == "cuda":
            few = replace(config, calib_samples=2, iters=1)
            quantize_model(model, few, images[:2], block_types=types, device=args.device)
            torch.cuda.reset_peak_memory_stats()
            print(
                f"{where}, loops of {args.loops}: {seconds_of(run):.1f} s on {torch.cuda.get_device_name()}, ", end=""
            )
            print(f"peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB", flush=True)
            if args.profile:
                print(f"  idle {idle_share(run):.0%} under the profiler", flush=True)
        else:
            reset_peak()
            print(f"{where}: {seconds_of(run):.1f} CPU-s, peak {peak_mib():.0f} MiB")


class Residual(nn.Sequential):
    """A block to reconstruct."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)  # type: ignore[no-any-return]


def of_equal_blocks(depth: int, width: int) -> nn.Module:
    def convolution() -> nn.Module:
        return nn.Conv2d(width, width, 3, padding=1)

    blocks = [Residual(convolution(), nn.ReLU(), convolution()) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, width, 3), *blocks, nn.Flatten(), nn.LazyLinear(10))


def growth(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    images = torch.randn(args.images, 3, args.size, args.size)
    config = QuantConfig(rounding="learned", iters=1, calib_samples=args.images)
    capture: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    whole: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for _ in range(args.runs + 1):
        for depth in DEPTHS:
            model = of_equal_blocks(depth, args.width).eval()
            model(images[:1])
            start = time.perf_counter()
            _, report = quantize_model(model, config, images, block_types=["Residual"])
            whole[depth].append(time.perf_counter() - start)
            capture[depth].append(sum(block.capture_seconds for block in report.blocks))
    for name, seconds in (("capture", capture), ("all", whole)):
        median = {depth: statistics.median(of[1:]) for depth, of in seconds.items()}  # the first is a warm-up
        print(f"equal blocks, {name}: " + ", ".join(f"{depth}: {s:.2f} CPU-s" for depth, s in median.items()))
        print(f"from 4 to 8 blocks {median[8] / median[4]:.2f}×, from 8 to 16 blocks {median[16] / median[8]:.2f}×")


def steps(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    resnet, deit = timm.create_model("resnet18"), timm.create_model("deit_tiny_patch16_224")
    for name, block, shape in (
        ("ResNet-18 block of 128 channels at 28×28", resnet.layer2[1], (128, 28, 28)),
        ("DeiT-tiny block of 197 tokens", deit.blocks[0], (197, 192)),
    ):
        config = QuantConfig(calib_samples=2 * args.batch, batch_size=args.batch, iters=args.steps, warmup=0.0)
        model, images = nn.Sequential(block).eval(), torch.randn(2 * args.batch, *shape)
        run = partial(quantize_model, model, config, images, block_types=[type(block).__name__], device=args.device)

        def rate(run: Callable[[], Any] = run) -> float:
            _, report = run()
            return args.steps / report.blocks[0].learning_seconds  # type: ignore[no-any-return]

        what = f"{name}, {args.batch} images a step"
        if args.device.type != "cuda":
            print(f"{what}: {rate():.2f} steps per second, errors before and after included")
            continue
        quantize_model(model, replace(config, iters=1), images, device=args.device)
        with patch.object(reconstruct, "Recorded", lambda function, *_: function):
            plain = rate()
            idle = [idle_share(run)]
        recorded = rate()
        idle.append(idle_share(run))
        print(
            f"{what}: {plain:.0f} steps per second launched kernel by kernel, {recorded:.0f} recorded as a CUDA graph, "
            f"{recorded / plain:.1f}×; idle {idle[0]:.0%} and {idle[1]:.0%} under the profiler, capture included",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["network", "growth", "steps"])
    parser.add_argument("--arch", default="mobilenetv2")
    parser.add_argument("--checkpoint")
    parser.add_argument("--images_from", default="digits")
    parser.add_argument("--types", nargs="*", help="classes of the blocks; those that are found without it")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounding", default="compensated")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iters", type=int, default=2000)
    parser.add_argument("--damping", default="0.01")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--loops", choices=["compiled", "torch"], default="compiled")
    parser.add_argument("--profile", action="store_true", help="on CUDA: the network's run again, under the profiler")
    args = parser.parse_args()
    part = {"network": network, "growth": growth, "steps": steps}[args.part]
    if args.part == "growth" and args.device.type != "cpu":
        parser.error(f"--device: growth runs on the CPU; got {args.device}")
    if args.device.type == "cuda":
        part(args)
        return
    torch.set_num_threads(1)
    with patch.object(time, "perf_counter", time.process_time):  # the reports' seconds are the processor's too
        part(args)


def damping(text: str) -> float | str:
    return text if text == "auto" else float(text)


def plain_loops(device: torch.device) -> ModuleType:
    return loops_plain


if __name__ == "__main__":
    main()
