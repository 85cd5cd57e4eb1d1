"""Memory of capturing a block's inputs, and of a float and a quantized network side by side.

    python benchmarks/capture_memory.py [--images 1024] [--width 64] [--size 56]

Each way of capturing runs in a process of its own, whose peak of resident memory is compared with what the captured
tensor itself takes. The plain way gathers batches in a list and joins them.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from torch import nn

from logart.quantization import surgery
from logart.quantization.activations import Activations
from logart.quantization.blocks import Block
from logart.quantization.cache import Cache
from logart.quantization.clone import clone_sharing
from logart.quantization.dataflow import trace_sources
from logart.quantization.folding import fold_batch_norms
from logart.quantization.survey import survey

MIB = 2**20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1)).eval()


@torch.no_grad()
def capture_in_this_process(way: str, images: int, width: int, size: int) -> None:
    """Print the growth of the peak in units of the captured tensor."""
    model, x = network(width), torch.randn(images, 1, size, size)
    layers, cache = [Block("0", ("0",)), Block("2", ("2",))], Cache(torch.device("cpu"))
    sources = trace_sources(model, [model[0], model[2]], x[:2])
    Activations(model, layers, sources, x[:32], 32, cache).inputs(1)  # one batch's temporaries belong to both ways
    before = peak_bytes()
    if way == "handed forward":
        shape = Activations(model, layers, sources, x, 32, cache).inputs(1).shape
    else:
        shape = torch.cat([model[:2](batch) for batch in x.split(32)]).shape
    size_bytes = shape.numel() * x.element_size()
    print(
        f"{way:<16} {size_bytes / MIB:8.0f} MiB captured, peak grew by {(peak_bytes() - before) / size_bytes:.2f} of it"
    )


def shared_weights() -> None:
    """Print how much of a ResNet-18 and its quantized counterpart is held twice."""
    from torchvision.models import resnet18

    reference = clone_sharing(resnet18().eval().requires_grad_(False))
    example = torch.randn(2, 3, 64, 64)
    fold_batch_norms(reference, example)
    names = survey(reference, example).layers
    quantized = clone_sharing(reference)
    surgery.replace_layers(quantized, dict.fromkeys(names, 4), channel_wise=True)
    both = [*reference.parameters(), *quantized.parameters()]
    total = sum(p.numel() * p.element_size() for p in both)
    held = sum({p.data_ptr(): p.numel() * p.element_size() for p in both}.values())
    print(f"ResNet-18, float and quantized: parameters of {total / MIB:.1f} MiB in {held / MIB:.1f} MiB of memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--way", choices=["handed forward", "list and cat"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        capture_in_this_process(args.way, args.images, args.width, args.size)
        return
    for way in ("handed forward", "list and cat"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], check=True)
    shared_weights()


if __name__ == "__main__":
    main()
