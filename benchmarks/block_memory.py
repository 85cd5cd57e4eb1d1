"""The memory that each block was foreseen to take, against what it took (Linux, CPU).

    python benchmarks/block_memory.py [--arch resnet18] [--size 112] [--images 64] [--batch_size 32]
        [--rounding learned] [--recon_input quantized]

Random weights. Taken is the most that was resident while the block was worked on, beyond what was before it.
"""

from __future__ import annotations

import argparse

import torch
from memory import peak_mib, reset_peak, resident_mib

import logart_cnn.models
import logart_vit.models
from logart import QuantConfig, quantize_model
from logart.quantization.blocks import blocks_of_types
from logart.quantization.clone import clone_sharing
from logart.quantization.dataflow import trace_sources
from logart.quantization.folding import fold_batch_norms
from logart.quantization.memory import estimate_memory
from logart.quantization.state import StageResult, StageStore
from logart.quantization.survey import survey


class Watch(StageStore):
    """Notes the memory that each block of the last stage took."""

    def __init__(self) -> None:
        self.before, self.taken = 0.0, dict[str, list[float]]()

    def restore(self, stage: str, index: int, layers: object) -> StageResult | None:
        reset_peak()
        self.before = resident_mib()
        return None

    def save(self, stage: str, index: int, layers: object, done: StageResult) -> None:
        self.taken.setdefault(stage, []).append(peak_mib() - self.before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounding", default="learned")
    parser.add_argument("--recon_input", default="quantized")
    args = parser.parse_args()
    torch.manual_seed(0)
    track = logart_vit.models if "vit" in args.arch or "deit" in args.arch else logart_cnn.models
    model = track.build_network(args.arch, shapes={}).eval()
    images = torch.randn(args.images, 3, args.size, args.size)
    config = QuantConfig(
        rounding=args.rounding, calib_samples=args.images, batch_size=args.batch_size, recon_input=args.recon_input,
        iters=3, warmup=0.0,
    )  # fmt: skip
    types = sorted({type(m).__name__ for m in model.modules() if type(m).__name__ in ("BasicBlock", "Block")})
    watch = Watch()
    reference = clone_sharing(model).eval().requires_grad_(False)
    fold_batch_norms(reference, images[:2])
    names = survey(reference, images[:2]).layers
    blocks = blocks_of_types(reference, names, types)
    sources = trace_sources(reference, [reference.get_submodule(block.name) for block in blocks], images[:2])
    needs = estimate_memory(reference, blocks, sources, images[:2], config)
    quantize_model(model, config, images, block_types=types, stage_store=watch)
    print("MiB\n\n| block | captured | working | foreseen | taken | ratio |\n|---|---|---|---|---|---|")
    for (name, need), taken in zip(needs.items(), list(watch.taken.values())[-1], strict=True):
        captured, working = need.captured / 2**20, need.working / 2**20
        total = captured + working
        print(f"| {name} | {captured:.0f} | {working:.0f} | {total:.0f} | {taken:.0f} | {taken / total:.2f} |")


if __name__ == "__main__":
    main()
