"""File, memory and speed of ONNX exports in onnxruntime, against the float network as ONNX.

    python benchmarks/onnx_files.py [--arch resnet18] [--bits 4] [--batch 1] [--size 224] [--threads 1]

Random weights, rounded to the nearest level. Each file is loaded in a process of its own: growth of resident memory by
the session and one forward, seconds to load, and the median of a forward.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from memory import resident_mib

from logart import QuantConfig, quantize_model, save_packed
from logart.export.onnx_export import export_onnx
from logart.networks.network import network_recipe
from logart_cnn.models import build_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--file", type=Path, help="measure this one alone")
    args = parser.parse_args()
    if args.file is not None:
        measure(args)
        return
    print(f"{'':<16} file MiB  resident MiB  s to load  ms a forward of {args.batch}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for path in files(args, Path(name)):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--file", str(path)], check=True)


def files(args: argparse.Namespace, folder: Path) -> list[Path]:
    """The float network, log grid in float32 and float16, linear grid with float and with 8-bit activations."""
    images = torch.randn(2, 3, args.size, args.size)
    network = build_network(args.arch, shapes={}).eval()
    written = [folder / "float.onnx"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (images,), written[0], dynamo=False, opset_version=18, input_names=["images"],
                          dynamic_axes={"images": {0: "batch"}})  # fmt: skip
    info = {
        "network": network_recipe("cnn", args.arch, {}, None, None),
        "preprocessing": {"input_size": [3, args.size, args.size]},
    }
    for grid, n_bits_a in (("dynamic", 32), ("linear_minmax", 32), ("linear_minmax", 8)):
        config = QuantConfig(
            n_bits=args.bits, rounding="nearest", scale_method=grid, n_bits_a=n_bits_a, calib_samples=len(images)
        )
        name = grid + "-a8" * (n_bits_a == 8)
        packed = folder / f"{name}.safetensors"
        save_packed(quantize_model(build_network(args.arch, shapes={}).eval(), config, images)[0], packed, info)
        for half in (False, True) if grid == "dynamic" else (False,):
            written.append(folder / (name + "-fp16" * half + ".onnx"))
            export_onnx(packed, written[-1], half=half)
    return written


def measure(args: argparse.Namespace) -> None:
    """Load and run one file, and print its line."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = args.threads, 3
    before, start = resident_mib(), time.perf_counter()
    session = onnxruntime.InferenceSession(str(args.file), options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter() - start
    kind = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    images = np.random.default_rng(0).normal(size=(args.batch, 3, args.size, args.size)).astype(kind)
    seconds = []
    for _ in range(args.runs + 1):
        start = time.perf_counter()
        session.run(None, {"images": images})
        seconds.append(time.perf_counter() - start)
    size, held = args.file.stat().st_size / 2**20, resident_mib() - before
    print(f"{args.file.stem:<16} {size:8.1f} {held:13.1f} {loaded:10.2f} {1000 * statistics.median(seconds[1:]):10.1f}")


if __name__ == "__main__":
    main()
