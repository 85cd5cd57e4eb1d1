"""Accuracy, seconds and memory of rounding methods and grid options at every bit width, for one network.

    python benchmarks/grid_options.py cnn --arch cifar_resnet20 --checkpoint PATH --data_path DIR [--bits 4 3 2]
        [--rows "nearest" ...]

All flags but --bits and --rows go to the track's command line, which reads them, loads the network and the images and
checks everything; only its last step is replaced. Each cell is what that command with the flags of its row would give.
Seconds are those of quantizing, memory is what the process needed for it beyond what it held before (Linux), neither
with evaluation. Validation images are read once and kept.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest.mock import patch

from memory import peak_mib, reset_peak, resident_mib

import logart.runs.job
import logart_cnn.main
import logart_vit.main
from logart import quantize_model
from logart.networks.evaluate import accuracy
from logart.networks.loader import validation_batches

TRACKS: dict[str, tuple[Any, str]] = {"cnn": (logart_cnn.main, "--n_bits_w"), "vit": (logart_vit.main, "--w_bit")}
COMPENSATED = "--rounding compensated"
ROWS = {
    "nearest, TW": "--rounding nearest",
    "nearest, LW": "--rounding nearest --search_method layer_wise",
    "nearest, BW": "--rounding nearest --search_method block_wise",
    "compensated": COMPENSATED,
    "compensated, scale search": f"{COMPENSATED} --scale_search grid",
    "compensated, half-steps": f"{COMPENSATED} --scale_search half_step",
    "compensated, zero code": f"{COMPENSATED} --zero_code",
    "compensated, wide gap": f"{COMPENSATED} --wide_gap",
    "compensated, asymmetric": f"{COMPENSATED} --asymmetric",
    "compensated, √2 ≈ 1 + 1/2": f"{COMPENSATED} --hardware_approx",
    "compensated, scale search and zero code": f"{COMPENSATED} --scale_search grid --zero_code",
    "compensated, scale search and wide gap": f"{COMPENSATED} --scale_search grid --wide_gap",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6, 5, 4, 3, 2])
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS), metavar="ROW")
    args, network_flags = parser.parse_known_args()
    print(f"each cell: Acc@1 in %, seconds, MiB\n\n| | {' | '.join(f'{bits} bits' for bits in args.bits)} |")
    print("|---" * (len(args.bits) + 1) + "|", flush=True)
    for row in args.rows:
        print(f"| {row} |", end="", flush=True)
        for bits in args.bits:
            print(f" {cell(args.track, bits, [*network_flags, *ROWS[row].split()])} |", end="", flush=True)
        print()


def cell(track: str, bits: int, flags: list[str]) -> str:
    module, bits_flag = TRACKS[track]
    calibration = [] if "nearest" in flags else ["--calib_samples" if track == "cnn" else "--optim_size", "256"]
    measured: list[str] = []

    def measure(network: Any, source: Any, images: Any, config: Any, options: Any, *_: Any, **__: Any) -> None:
        reset_peak()
        before, start = resident_mib(), time.perf_counter()
        quantized, _report = quantize_model(
            network.model, config, images, row_groups=network.row_groups,
            device=options.device,
        )  # fmt: skip
        seconds, memory = time.perf_counter() - start, peak_mib() - before
        if not validation:
            validation.extend(validation_batches(source, options.val_batch_size, options.workers))
        top1 = accuracy(quantized, validation, options.device).top1
        measured.append(f"{top1:.2f}, {seconds:.0f} s, {memory:.0f}")

    with patch.object(logart.runs.job, "run", measure):
        if module.main([*flags, bits_flag, str(bits), *calibration, "--quiet"]):
            raise SystemExit(2)
    return measured[0]


validation: list[Any] = []


if __name__ == "__main__":
    main()
