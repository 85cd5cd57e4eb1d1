"""Memory and speed of a packed network, expanded once or on the fly, against the float network.

    python benchmarks/packed_network.py [--arch resnet18] [--bits 4] [--batch 1] [--size 224]

Random weights, rounded to the nearest level of base √2. Each way runs in a process of its own: what it holds after
loading (tensors, and growth of resident memory), its peak during a forward above that, and the seconds of a forward.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import peak_mib, reset_peak, resident_mib
from torch import nn

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.networks.network import network_recipe
from logart_cnn.models import build_network

WAYS = ("float", "once", "on-the-fly")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--way", choices=WAYS, help="only this one, of the file given")
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    if args.way is not None:
        measure(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        network = build_network(args.arch, shapes={}).eval()
        config = QuantConfig(n_bits=args.bits, rounding="nearest", scale_method="log_sqrt2")
        quantized, _ = quantize_model(network, config, torch.randn(2, 3, 64, 64))
        print(save_packed(quantized, path, {"network": network_recipe("cnn", args.arch, {}, None, None)}))
        torch.save(network, path.with_suffix(".pt"))
        print(f"\n{'':<12} tensors MiB  resident MiB  forward's MiB  ms a forward of {args.batch}", flush=True)
        for way in WAYS:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way, "--file", str(path)], check=True)


def measure(args: argparse.Namespace) -> None:
    """Load and run one way, and print its line."""
    reset_peak()
    before = resident_mib()
    model = load(args.way, args.file)
    gc.collect()
    reset_peak()
    held = resident_mib()
    tensors = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    images = torch.randn(args.batch, 3, args.size, args.size)
    seconds = []
    with torch.inference_mode():
        for _ in range(args.runs + 1):
            start = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - start)
    time_ms = 1000 * statistics.median(seconds[1:])
    print(f"{args.way:<12} {tensors / 2**20:11.1f} {held - before:13.1f} {peak_mib() - held:14.1f} {time_ms:10.1f}")


def load(way: str, path: Path) -> nn.Module:
    if way == "float":
        return torch.load(path.with_suffix(".pt"), weights_only=False)  # written by this script a moment ago
    return load_packed(path, dequantize=way)


if __name__ == "__main__":
    main()
