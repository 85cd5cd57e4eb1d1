"""Rows of a results file that no run made."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from logart.runs.columns import NAMES

SETTINGS = {
    "utc_time": "2026-01-01T00:00:00Z", "track": "cnn", "arch": "net", "checkpoint": "net.pth",
    "checkpoint_sha256": "ab", "data": "pictures", "bits": "4", "first_last_bits": "same", "channel_wise": "True",
    "scale_method": "dynamic",
    "scale_search": "none", "asymmetric": "False", "zero_code": "False",
    "search_method": "tensor_wise", "rounding": "learned", "calib_samples": "64", "batch_size": "8", "iters_w": "10",
    "lr": "0.01",
    "hardware_approx": "False", "seed": "0", "val_images": "100", "Acc@1": "80", "float_Acc@1": "90",
    "search_Acc@1": "70", "search_seconds": "1", "reconstruction_seconds": "2", "peak_memory_mb": "100",
    "device": "cpu",
}  # fmt: skip
NEAREST = {"rounding": "nearest", "search_Acc@1": ""} | dict.fromkeys(["calib_samples", "batch_size", "lr"], "")


def row(**changes: Any) -> dict[str, str]:
    return dict.fromkeys(NAMES, "") | SETTINGS | {name.replace("_at_", "@"): str(v) for name, v in changes.items()}


def write_csv(path: Path, *rows: dict[str, str], **changes: Any) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows or [row(**changes)])
    return path
