"""Quantized networks against each other on the same images: `python -m logart.compare A B ...`.

Two accuracies on the same n images share most of their chance: whether an image is hard is the same for both. So the
difference is judged on the images where only one of the two is right (McNemar, Psychometrika 12, 1947), whose count
says how large a difference chance alone explains.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from logart.cli import FlagParser, default_if_none, run_command
from logart.errors import UserError
from logart.networks.data import ImageSource, open_images
from logart.networks.digits import DIGITS
from logart.networks.image_info import preprocessing_of
from logart.networks.loader import validation_batches
from logart.packed.checkpoint import load_packed
from logart.packed.file import PackedFile
from logart.runs.run_folder import PACKED
from logart.runtime import progress_bar, resolve_device
from logart.text import table

NOT_TOLD_APART = 0.05  # a p-value above: chance alone gives such a difference in more than one of twenty cases


@dataclass(frozen=True)
class Answers:
    """What a network says to n images.

    Attributes:
        log_probs: [n, classes], natural logarithms.
        right: [n], whether the first choice is the label.
        seconds: of all forwards together, without reading images.
    """

    log_probs: Tensor
    right: Tensor
    seconds: float

    @property
    def choices(self) -> Tensor:
        """[n], the first choices."""
        return self.log_probs.argmax(1)


@dataclass(frozen=True)
class Pair:
    """A network's answers beside those of a reference on the same n images.

    Attributes:
        agreement: share of images with the same first choice, in %.
        kl: mean KL divergence of the network's probabilities from the reference's, in nats.
        difference: top-1 accuracy less the reference's, in points.
        standard_error: of the difference, by the images where one alone is right, in points.
        lost, won: images that the reference alone, or the network alone, has right.
        p: McNemar's exact two-sided p-value: how often chance alone parts `lost` and `won` at least so unevenly.
    """

    agreement: float
    kl: float
    difference: float
    standard_error: float
    lost: int
    won: int
    p: float


def compare_answers(reference: Answers, other: Answers) -> Pair:
    """Two networks on the same images."""
    n = len(reference.right)
    lost = int((reference.right & ~other.right).sum())
    won = int((~reference.right & other.right).sum())
    kl = F.kl_div(other.log_probs, reference.log_probs, reduction="batchmean", log_target=True)
    return Pair(
        agreement=100 * float((reference.choices == other.choices).double().mean()),
        kl=max(0.0, float(kl)),
        difference=100 * (won - lost) / n,
        standard_error=100 * math.sqrt(lost + won - (won - lost) ** 2 / n) / n,
        lost=lost,
        won=won,
        p=float(binomtest(won, lost + won).pvalue) if lost + won else 1.0,
    )


@torch.inference_mode()
def answers(model: nn.Module, batches: DataLoader[Any], images: int, device: torch.device, quiet: bool) -> Answers:
    """What a network on `device` says to the first `images` images of the batches."""
    log_probs: list[Tensor] = []
    right: list[Tensor] = []
    seconds = 0.0
    with progress_bar(images, "compare", quiet) as bar:
        for inputs, labels in batches:
            left = images - sum(map(len, right))
            inputs, labels = inputs[:left].to(device), labels[:left]
            started = time.perf_counter()
            logits = model(inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += time.perf_counter() - started
            log_probs.append(logits.double().log_softmax(1).float().cpu())
            right.append(log_probs[-1].argmax(1) == labels)
            bar.update(len(labels))
            if left == len(labels):
                break
    return Answers(torch.cat(log_probs), torch.cat(right), seconds)


@dataclass(frozen=True)
class Compared:
    """One network of a comparison, and how it stands to the first; `bits` is the widest code's."""

    name: str
    bits: int
    bytes: int
    accuracy: float
    standard_error: float
    seconds_per_1000_images: float
    against_first: Pair | None


def compare(paths: Sequence[str], data_path: str | None, images: int | None, batch_size: int, workers: int,
            device: torch.device, quiet: bool = True) -> tuple[str, int, list[Compared]]:  # fmt: skip
    """Packed files and run folders on the same validation images, the first as the reference.

    Args:
        paths: two or more.
        data_path: a folder in ImageNet layout or 'digits'; None: the digits, for networks of digits.
        images: how many, from the first on; None: all.
        batch_size, workers: of the loader.
        device: where to compute.
        quiet: show no progress.

    Returns:
        The data set's name, the number of images, and each network.

    Raises:
        UserError: a path that is none of both, networks of other classes, or images that are not there.
    """
    places = [Path(path) / PACKED if Path(path).is_dir() else Path(path) for path in paths]
    files = [PackedFile.read(place) for place in places]
    sources = [_images(path, file, data_path) for path, file in zip(paths, files, strict=True)]
    for path, source in zip(paths, sources, strict=True):
        if source.class_names != sources[0].class_names:
            raise UserError(f"{path}: another data set than that of {paths[0]}; expected networks of the same classes")
    total = min(len(sources[0].val), default_if_none(images, len(sources[0].val)))
    first: Answers | None = None
    found = []
    for path, place, file, source in zip(paths, places, files, sources, strict=True):
        batches = validation_batches(source, batch_size, workers)
        seen = answers(load_packed(place, device=device), batches, total, device, quiet)
        accuracy = float(seen.right.double().mean())
        found.append(Compared(
            Path(path).name, max(layer.n_bits for layer in file.layers.values()), place.stat().st_size,
            100 * accuracy, 100 * math.sqrt(accuracy * (1 - accuracy) / total), 1000 * seen.seconds / total,
            None if first is None else compare_answers(first, seen),
        ))  # fmt: skip
        first = first or seen
    return sources[0].name, total, found


def _images(path: str, file: PackedFile, data_path: str | None) -> ImageSource:
    preprocessing, named, source = preprocessing_of(file.info), file.info.get("class_names"), file.info.get("source")
    if preprocessing is None or not isinstance(named, list):
        raise UserError(f"{path}: does not say which images its network takes; expected a file that a run has written")
    if data_path is None and isinstance(source, dict) and source.get("data") == DIGITS:
        data_path = DIGITS
    if data_path is None:
        raise UserError(f"--data_path: {path} is of other images than the digits; expected a folder in ImageNet layout")
    return open_images(data_path, preprocessing, len(named), class_names=named)


def comparison_table(data: str, images: int, found: Sequence[Compared]) -> str:
    """The comparison as text."""
    head = ("network", "bits", "kB", "Acc@1 [%]", "difference", "agreement [%]", "KL [nats]", "lost/won", "McNemar p",
            "s/1000 images")  # fmt: skip
    rows = []
    for each in found:
        pair = each.against_first
        against: tuple[object, ...] = ("reference", None, None, None, None)
        if pair is not None:
            change = f"{pair.difference:+.2f} ± {pair.standard_error:.2f}"
            against = (change, f"{pair.agreement:.2f}", f"{pair.kl:.3g}", f"{pair.lost}/{pair.won}", f"{pair.p:.2g}")
        accuracy = f"{each.accuracy:.2f} ± {each.standard_error:.2f}"
        seconds = f"{each.seconds_per_1000_images:.2f}"
        rows.append((each.name, each.bits, f"{each.bytes / 1000:.1f}", accuracy, *against, seconds))
    lines = [f"{images} test images of {data}; ± is one standard error", table(head, rows, text=head[:1])]
    lines += [verdict(each, found[0].name) for each in found[1:]]
    return "\n".join(lines)


def verdict(each: Compared, reference: str) -> str:
    """Whether a difference says anything, in a line."""
    pair = each.against_first
    assert pair is not None
    if not pair.lost + pair.won:
        return f"{each.name}: right on the same images as {reference}"
    if pair.p > NOT_TOLD_APART:
        return f"{each.name}: not told apart from {reference} on these images"
    better = "more" if pair.difference > 0 else "less"
    return f"{each.name}: {better} accurate than {reference}, by more than chance explains"


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="logart-compare",
        description="Quantized networks on the same test images, each against the first: accuracy with a paired "
        "standard error and McNemar's test, agreement, KL divergence, size and time.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="packed files or run folders, two or more")
    parser.flag("--data_path", "--dataset", metavar="DIR", help="a folder in ImageNet layout, or digits (default: "
                "digits, for networks of digits)")  # fmt: skip
    parser.flag("--images", type=int, help="compare on the first so many test images (default all)")
    parser.flag("--batch_size", type=int, help="images a batch (default 128)")
    parser.flag("--workers", type=int, help="processes that read images (default 2; 0 reads in this one)")
    parser.flag("--device", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.flag("--json", action="store_true", help="JSON in place of text")
    return parser


def command(args: argparse.Namespace) -> None:
    """From flags to the table."""
    if len(args.paths) < 2:
        raise UserError(f"PATH: only {args.paths[0]!r}; expected two or more packed files or run folders")
    for name, least in (("images", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}: {value}; expected {least} or more")
    batch_size, workers = default_if_none(args.batch_size, 128), default_if_none(args.workers, 2)
    device = resolve_device(default_if_none(args.device, "auto"))
    quiet = bool(args.json)
    data, total, found = compare(args.paths, args.data_path, args.images, batch_size, workers, device, quiet)
    if args.json:
        print(json.dumps({"data": data, "images": total, "networks": [asdict(each) for each in found]}))
    else:
        print(comparison_table(data, total, found))


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_command(build_parser(), command, argv)


if __name__ == "__main__":
    sys.exit(main())
