"""What becomes of the smallest network of each timm family, and of torchvision's: one line a network, random weights.

    python benchmarks/families.py [--out FILE.csv] [--only timm:NAME torchvision:NAME ...] [--stages share packed ...]

Resumable: networks that have a line in the file are passed over. The columns: share of the weights quantized (%), then
`ok` or the error, for compensated rounding, LLR of two steps, a packed file that loads to the same logits, and
torch.jit.trace and torch.export of the quantized network. Weights are random, so accuracies would mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import one_line

STAGES = ("share", "compensated", "learned", "packed", "trace", "export")
COMPENSATED = QuantConfig(rounding="compensated", calib_samples=2, batch_size=2)
LEARNED = QuantConfig(calib_samples=2, batch_size=2, iters=2)


def families() -> dict[str, Callable[[], nn.Module]]:
    """A name and a builder for the smallest network of each family: the one with the fewest parameters."""
    smallest: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                size = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # some cannot be built without memory
                continue
        smallest[module] = min(smallest.get(module, (size, name)), (size, name))
    found: dict[str, Callable[[], nn.Module]] = {
        f"timm:{name}": partial(builder, f"timm:{name}") for _, name in sorted(smallest.values())
    }
    for name in torchvision.models.list_models(module=torchvision.models):
        found[f"torchvision:{name}"] = partial(builder, f"torchvision:{name}")
    return found


def builder(name: str) -> nn.Module:
    """The network called timm:NAME or torchvision:NAME, with random weights."""
    kind, _, name = name.partition(":")
    if kind == "timm":
        return timm.create_model(name)  # type: ignore[no-any-return]
    return torchvision.models.get_model(name, weights=None)  # type: ignore[no-any-return]


def images_for(model: nn.Module) -> torch.Tensor:
    """Two images of the network's own size."""
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def look(build: Callable[[], nn.Module], stages: list[str]) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    model = build().eval()
    images = images_for(model)
    line: dict[str, Any] = {}
    network: nn.Module | None = None

    def attempt(stage: str, function: Callable[[], Any]) -> None:
        if stage in stages:
            try:
                line[stage] = function()
            except Exception as error:  # the error is the result
                line[stage] = f"{type(error).__name__}: {one_line(error):.150}"

    def nearest() -> float:
        nonlocal network
        network, report = quantize_model(model, QuantConfig(rounding="nearest"), images)
        line["float"] = "; ".join(f"{name}: {reason}" for name, reason in report.skipped[:3])
        return round(100 * report.quantized_share, 2)

    def packed() -> str:
        assert network is not None
        with tempfile.TemporaryDirectory() as folder:
            save_packed(network, Path(folder) / "net.safetensors")
            again = load_packed(Path(folder) / "net.safetensors", model)
            return "ok" if torch.equal(again(images), network(images)) else "other logits"

    attempt("share", nearest)
    attempt("compensated", lambda: quantize_model(model, COMPENSATED, images) and "ok")
    attempt("learned", lambda: quantize_model(model, LEARNED, images) and "ok")
    if network is not None:
        attempt("packed", packed)
        attempt("trace", lambda: torch.jit.trace(network, images, check_trace=False) and "ok")
        attempt("export", lambda: torch.export.export(network, (images,)) and "ok")
    return line


def main() -> None:
    """Write the lines that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.devnull))
    parser.add_argument("--only", nargs="+", help="timm:NAME or torchvision:NAME, in place of all families")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    done = {row["network"] for row in csv.DictReader(args.out.open())} if args.out.is_file() else set()
    networks = {name: partial(builder, name) for name in args.only} if args.only else families()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["network", *STAGES, "float"], restval="")
        if not done:
            writer.writeheader()
        for name, build in networks.items():
            if name in done:
                continue
            try:
                line = look(build, args.stages)
            except Exception as error:  # it cannot even be built or run
                line = {"share": f"{type(error).__name__}: {one_line(error):.150}"}
            writer.writerow({"network": name, **line})
            file.flush()
            print(name, line, flush=True)


if __name__ == "__main__":
    main()
