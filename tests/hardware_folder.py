"""The hardware export read back, by what its README says alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_export(folder: Path) -> dict[str, Tensor]:
    """The weights of an export by the names of the layers."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    return {layer["name"]: _read_weight(folder / layer["folder"], layer) for layer in manifest["layers"]}


def _read_weight(folder: Path, entry: dict[str, Any]) -> Tensor:
    codes, codebook = (np.load(folder / f"{part}.npy", allow_pickle=False) for part in ("codes", "codebook"))
    sign, shift, adds = codebook[..., 0], codebook[..., 1].astype(int), codebook[..., 2:].astype(int)
    values = sign * 2.0**shift * (1 + (np.sign(adds) * 2.0 ** -np.abs(adds)).sum(-1))
    if entry["scale"]:
        values = values * np.load(folder / "scale.npy")[:, None] / 32
    rows = codes.reshape(len(codes), -1)
    weight = values[np.arange(len(rows))[:, None] // (len(rows) // len(values)), rows]
    return torch.from_numpy(weight + 0.0).to(getattr(torch, entry["dtype"])).reshape(codes.shape)
