"""Time and peak memory of each block of a vision transformer: DBS and a few steps of LLR on random weights and images.

    python benchmarks/vit_blocks.py [--model deit_tiny_patch16_224] [--images 64] [--steps 5] [--depth 1] [--metric mse]

Accuracy means nothing here; the mechanics are those of a real run. The peak is the process's resident memory, reset
before each block (Linux). Time of capture and importance grows with the images, time of learning with the steps.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import timm
import torch
from memory import peak_mib, reset_peak

import logart.quantization.rounding_methods
from logart import QuantConfig, quantize_model
from logart.quantization.config import ReconInput, ReconMetric
from logart.quantization.reconstruct import BlockReport, learn_rounding

BLOCKS = ("PatchEmbed", "Block", "SwinTransformerBlock", "PatchMerging")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--depth", type=int, help="blocks, for models that take it (default: the model's own)")
    parser.add_argument("--metric", choices=[m.value for m in ReconMetric], default="hessian_perturb")
    args = parser.parse_args()
    kwargs: dict[str, Any] = {} if args.depth is None else {"depth": args.depth}
    torch.manual_seed(0)
    model = timm.create_model(args.model, **kwargs).eval()
    images = torch.randn(args.images, *model.pretrained_cfg["input_size"])
    config = QuantConfig(
        calib_samples=args.images, iters=args.steps, recon_metric=ReconMetric(args.metric),
        recon_input=ReconInput.MIXED, head_kl=True,
    )  # fmt: skip
    peaks: list[float] = []

    def measured(*arguments: Any, **keywords: Any) -> BlockReport:
        report = learn_rounding(*arguments, **keywords)
        peaks.append(peak_mib())  # since the last reset: this block's capture and learning
        reset_peak()
        return report

    logart.quantization.rounding_methods.learn_rounding = measured
    start = time.perf_counter()
    reset_peak()
    _, report = quantize_model(model, config, images, block_types=BLOCKS, quiet=False)
    title = f"{args.model} {kwargs or ''}: {args.images} images, {args.steps} steps of 32"
    print(f"{title}, {torch.get_num_threads()} threads, {time.perf_counter() - start:.0f} s in all")
    print(f"DBS {report.search_seconds:.1f} s; then block by block")
    print(f"{'block':<24} capture s  s per step  peak MiB")
    for block, peak in zip(report.blocks, peaks, strict=True):
        step = block.learning_seconds / args.steps
        print(f"{block.name:<24} {block.capture_seconds:9.1f} {step:11.2f} {peak:9.0f}")


if __name__ == "__main__":
    main()
