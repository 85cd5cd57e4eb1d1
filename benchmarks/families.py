"""What becomes of the smallest network of each timm family, and of torchvision's: one line a network, random weights.

    python benchmarks/families.py [--out FILE.csv] [--only timm:NAME torchvision:NAME ...] [--stages share packed ...]
    python benchmarks/families.py --choose                # write families.csv anew: each family's smallest network
    python benchmarks/families.py --table --out FILE.csv  # the page in docs, docs/families.md, from the file

Resumable: networks that have a line in the file are passed over. The columns: share of the weights quantized (%), then
`ok` or the error, for compensated rounding, LLR of two steps, a packed file that loads to the same logits, and
torch.jit.trace and torch.export of the quantized network. Weights are random, so accuracies would mean nothing. Images
are small, and behind the share, of more than two equal blocks in a row two are kept where the network runs so.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import one_line

STAGES = ("share", "compensated", "learned", "packed", "trace", "export")
# One base and much damping, so little is searched: looked at is whether a network goes through, not how well.
NEAREST = QuantConfig(rounding="nearest", scale_method="log_2")
COMPENSATED = replace(NEAREST, rounding="compensated", damping=1.0, calib_samples=2, batch_size=2)
MOST_INPUTS = 768  # of a layer's channel; larger ones stay float under compensated rounding, whose time grows as K³
LEARNED = replace(COMPENSATED, rounding="learned", iters=2)
CHOSEN = Path(__file__).with_suffix(".csv")
PAGE = Path(__file__).parents[1] / "docs/families.md"
SECONDS = 420  # of the processor, for each stage of each network
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32"),
    *("r3d_18", "mc3_18", "r2plus1d_18", "s3d"),
    *("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "retinanet_resnet50_fpn"),
)
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")


def smallest() -> Iterable[tuple[str, str]]:
    """Each family of timm's and its network of the fewest parameters."""
    found: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                size = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # some cannot be built without memory
                continue
        found[family] = min(found.get(family, (size, name)), (size, name))
    return [(family, name) for family, (_, name) in sorted(found.items())]


def all_networks() -> list[str]:
    """timm:NAME and torchvision:NAME of every network of the sweep."""
    chosen = [row["network"] for row in csv.DictReader(CHOSEN.open())]
    return [*(f"timm:{name}" for name in chosen), *(f"torchvision:{name}" for name in TORCHVISION)]


def thinned(model: nn.Module, images: Tensor) -> nn.Module:
    """The network with two at most of equal blocks in a row, where it runs so; else as it is."""
    fewer = _thinned(copy.deepcopy(model))
    try:
        with torch.no_grad():
            fewer(images.clone())
        return fewer
    except Exception:  # of any type: it counts its blocks
        return model


def _thinned(model: nn.Module) -> nn.Module:
    """The network without those neighbours in lists that have two others of their kind and shapes before them."""
    for module in model.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            kept: list[tuple[str, nn.Module]] = []
            kinds: list[Any] = []
            for name, child in module.named_children():
                kinds.append((type(child), [(own, p.shape) for own, p in child.named_parameters()]))
                if not kinds[-1][1] or kinds[-3:] != [kinds[-1]] * 3:
                    kept.append((name, child))
            names = [str(i) for i in range(len(kept))] if isinstance(module, nn.ModuleList) else [n for n, _ in kept]
            module._modules = dict(zip(names, (child for _, child in kept), strict=True))
    return model


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network of this name, with random weights, and two inputs of the least size that it is seen to run on."""
    kind, _, own = name.partition(":")
    shapes = [(3, 128, 128), (3, 224, 224)]
    if own in VIDEO:
        shapes = [(3, 16, 64, 64), (3, 16, 224, 224)]
    elif kind == "timm" and (config := timm.get_pretrained_cfg(own)) is not None:
        shapes[1] = config.input_size
        shapes[0] = (shapes[1][0], 128, 128)
    for shape in shapes:
        try:
            model = _sized(kind, own, shape[1:])
            images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                model(images.clone())
            return model, images
        except Exception:  # of any type: the size is not one of its own
            if shape == shapes[-1]:
                raise
    raise AssertionError


def _sized(kind: str, name: str, size: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    if kind == "torchvision":
        kwargs = {"weights_backbone": None} if "resnet50" in name or name.endswith("_v3_large") else {}
        return torchvision.models.get_model(name, weights=None, **kwargs).eval()  # type: ignore[no-any-return]
    try:
        return timm.create_model(name, img_size=size).eval()  # type: ignore[no-any-return]
    except TypeError:
        return timm.create_model(name).eval()  # type: ignore[no-any-return]


def look(name: str, stages: list[str]) -> dict[str, Any]:
    """One line of the table."""
    whole, images = build(name)
    model = thinned(whole, images)
    line: dict[str, Any] = {}
    network: nn.Module | None = None
    large: list[str] = []

    def attempt(stage: str, function: Callable[[], Any]) -> None:
        if stage in stages:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                line[stage] = function()
            except Exception as error:  # the error is the result
                line[stage] = f"{type(error).__name__}: {one_line(error):.150}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)

    def share() -> float:
        nonlocal network
        _, report = quantize_model(whole, NEAREST, images)
        network, thin = quantize_model(model, NEAREST, images)
        line["float"] = "; ".join(f"{name}: {reason}" for name, reason in report.skipped[:3])
        large.extend(layer.name for layer in thin.layers if math.prod(layer.shape[1:]) > MOST_INPUTS)
        return round(100 * report.quantized_share, 2)

    def packed() -> str:
        assert network is not None
        with tempfile.TemporaryDirectory() as folder:
            save_packed(network, Path(folder) / "net.safetensors")
            again = load_packed(Path(folder) / "net.safetensors", model)
            return "ok" if _same(again(images.clone()), network(images.clone())) else "other logits"

    attempt("share", share)
    attempt("compensated", lambda: quantize_model(model, replace(COMPENSATED, skip=large), images) and "ok")
    attempt("learned", lambda: quantize_model(model, LEARNED, images) and "ok")
    if network is not None:
        attempt("packed", packed)
        attempt("trace", lambda: torch.jit.trace(network, images, check_trace=False, strict=False) and "ok")
        attempt("export", lambda: torch.export.export(network, (images,)) and "ok")
    return line


def _same(a: Any, b: Any) -> bool:
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"not through after {SECONDS} s of the processor")


def sweep(out: Path, networks: Iterable[str], stages: list[str]) -> None:
    """Write the lines that are not there yet."""
    done = {row["network"] for row in csv.DictReader(out.open())} if out.is_file() else set()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["network", *STAGES, "float"], restval="")
        if not done:
            writer.writeheader()
        for name in networks:
            if name in done:
                continue
            try:
                line = look(name, stages)
            except Exception as error:  # it cannot even be built or run
                line = {"share": f"{type(error).__name__}: {one_line(error):.150}"}
            writer.writerow({"network": name, **line})
            file.flush()
            print(name, line, flush=True)


def page(rows: list[dict[str, str]]) -> str:
    """The page in docs: how many networks are how far, and a line for each."""
    lines = [
        "# Families of networks",
        "",
        "What becomes of the smallest network of each family of timm's, and of networks of torchvision's, with random",
        "weights: the share of the weights that is quantized; compensated rounding; LLR of two steps; a packed file",
        "that loads to the same outputs; `torch.jit.trace` and `torch.export` of the result. An error stands as it was",
        "raised. Position tables and class tokens stay float. Made by `python benchmarks/families.py`.",
    ]
    for kind in ("timm", "torchvision"):
        own = [row for row in rows if row["network"].startswith(f"{kind}:")]
        every = sum(name.startswith(f"{kind}:") for name in all_networks())
        enough = sum(_number(row["share"]) >= 99 for row in own)
        fine = sum(_number(row["share"]) >= 99 and all(row[stage] == "ok" for stage in STAGES[1:]) for row in own)
        lines += [
            "",
            f"## {kind}",
            "",
            f"{len(own)} of {every} were looked at: {enough} have 99 % of their weights quantized or more, {fine}",
            "of them with all else fine.",
            "",
            "| network | % quantized | compensated | LLR | packed | trace | export | float, the first of it |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in own:
            cells = [row["network"].partition(":")[2], *(row[stage] for stage in STAGES), row["float"]]
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _number(share: str) -> float:
    return float(share) if share.replace(".", "").isdigit() else 0.0


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("*", "\\*")[:160]


def main() -> None:
    """One of the three ways of calling it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.devnull))
    parser.add_argument("--only", nargs="+", help="timm:NAME or torchvision:NAME, in place of all families")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--choose", action="store_true", help=f"write {CHOSEN.name} anew and end; takes minutes")
    parser.add_argument("--table", action="store_true", help=f"write docs/{PAGE.name} from --out and end")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.choose:
        with CHOSEN.open("w", newline="") as file:
            csv.writer(file).writerows([("family", "network"), *smallest()])
        return
    if args.table:
        found = {row["network"]: row for row in csv.DictReader(args.out.open())}
        PAGE.write_text(page([found[name] for name in all_networks() if name in found]))
        return
    signal.signal(signal.SIGPROF, _late)
    sweep(args.out, args.only or all_networks(), args.stages)


if __name__ == "__main__":
    main()
