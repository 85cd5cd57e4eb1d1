"""Top-1 and the divergence from the float network, of one network with many settings: what an ablation is made of.

    python benchmarks/accuracy.py TRACK --settings "damping=auto" "damping=auto mirror=True" ... [--seeds 0 1 2]
        [--out accuracy.csv] FLAGS

TRACK is cnn or vit. FLAGS go to the track's command line, which reads them, loads the network and the images and checks
everything; only its last step is replaced. Each of the settings is fields of `QuantConfig` that replace those of FLAGS,
`preset=best` first of all. A line of the CSV file is a setting with a seed; what is there already is not run again.
The KL divergence is that of the quantized network's answers from the float one's, in nats, a mean over the validation
images with its standard error, and tells more than a top-1 of few images; agreement is how often both have the same
first choice. Seconds are of processor time, on CUDA the wall's, quantizing alone.
"""

from __future__ import annotations

import argparse
import ast
import csv
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import logart.runs.job
import logart_cnn.main
import logart_vit.main
from logart import QuantConfig, quantize_model
from logart.networks.calibration import calibration_images
from logart.networks.loader import validation_batches
from logart.quantization.config import preset

TRACKS: dict[str, Any] = {"cnn": logart_cnn.main, "vit": logart_vit.main}
COLUMNS = ("flags", "setting", "seed", "top1", "float_top1", "kl", "kl_error", "agreement", "seconds", "images")


@torch.inference_mode()
def logits_of(model: nn.Module, batches: Iterable[Sequence[Tensor]], device: torch.device) -> Tensor:
    model.to(device)
    return torch.cat([model(images.to(device)).cpu() for images, _ in batches])


def compared(float_logits: Tensor, logits: Tensor, labels: Tensor) -> dict[str, str]:
    """The columns of a results line that tell two sets of logits [n, classes] apart."""
    exact, seen = float_logits.double().log_softmax(1), logits.double().log_softmax(1)
    kl = (exact.exp() * (exact - seen)).sum(1)
    best, best_float = logits.argmax(1), float_logits.argmax(1)

    def percent(hits: Tensor) -> str:
        return f"{100 * float(hits.double().mean()):.2f}"

    return {
        "top1": percent(best == labels),
        "float_top1": percent(best_float == labels),
        "kl": f"{float(kl.mean()):.4f}",
        "kl_error": f"{float(kl.std() / len(kl) ** 0.5):.4f}",
        "agreement": percent(best == best_float),
        "images": str(len(labels)),
    }


def with_setting(config: QuantConfig, setting: str) -> QuantConfig:
    """`config` with fields replaced: "damping=auto mirror=True", "preset=best n_bits=3"."""
    fields: dict[str, Any] = {}
    for word in setting.split():
        name, _, text = word.partition("=")
        try:
            fields[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            fields[name] = text
    named = fields.pop("preset", None)
    chosen = {} if named is None else preset(named, fields.get("n_bits", config.n_bits))
    return replace(config, **(chosen | fields))


def finished(path: Path | None) -> set[tuple[str, ...]]:
    """Flags, setting and seed of the lines that a file has."""
    if path is None or not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["flags"], row["setting"], row["seed"]) for row in csv.DictReader(file)}


def append(path: Path | None, row: dict[str, str]) -> None:
    if path is None:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--settings", nargs="+", required=True, metavar="SETTING")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    said = shlex.join(flags)
    done = finished(args.out)
    todo = [(setting, seed) for setting in args.settings for seed in args.seeds]
    todo = [(setting, seed) for setting, seed in todo if (said, setting, str(seed)) not in done]

    def measure(network: Any, source: Any, _images: Any, config: QuantConfig, options: Any, *_: Any, **__: Any) -> None:
        batches = list(validation_batches(source, options.val_batch_size, options.workers))
        labels, device = torch.cat([each for _, each in batches]), options.device
        float_logits = logits_of(network.model, batches, device)
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        for setting, seed in todo:
            own = replace(with_setting(config, setting), seed=seed)
            images, _names = calibration_images(source, max(2, own.images_needed), seed, crops=own.crops, quiet=True)
            start = clock()
            quantized, _report = quantize_model(
                network.model, own, images, row_groups=network.row_groups, device=device
            )
            seconds = f"{clock() - start:.0f}"
            row = {"flags": said, "setting": setting, "seed": str(seed), "seconds": seconds}
            row |= compared(float_logits, logits_of(quantized, batches, device), labels)
            append(args.out, row)
            print(", ".join(f"{name} {row[name]}" for name in COLUMNS[1:]), flush=True)

    if todo:
        with patch.object(logart.runs.job, "run", measure):
            if TRACKS[args.track].main([*flags, "--quiet"]):
                raise SystemExit(2)


if __name__ == "__main__":
    main()
