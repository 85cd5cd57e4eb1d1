"""Top-1 and top-5 accuracy of a classifier, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn

from logart import ranks
from logart.errors import NetworkError


class Accuracy(NamedTuple):
    """Accuracy over a set of images, in percent; with fewer than 5 classes top-5 looks at all of them.

    `answers` has seven characters an image, in order: the class that comes first in 6 hex digits, and `+` where that
    is right, `-` where it is not; it may be empty where nobody knows.
    """

    top1: float
    top5: float
    images: int
    answers: str = ""

    def figures(self) -> dict[str, float]:
        """Without the answers, by name."""
        return {"top1": self.top1, "top5": self.top5, "images": self.images}

    def against(self, reference: Accuracy) -> tuple[int, int, float] | None:
        """How many images only the reference has right, and only this, and on how many % both say the same class.

        None where not both know their answers to the same number of images.
        """
        if not self.answers or len(self.answers) != len(reference.answers):
            return None
        ours, theirs = ([text[i : i + 7] for i in range(0, len(text), 7)] for text in (self.answers, reference.answers))
        pairs = list(zip(ours, theirs, strict=True))
        lost = sum(b[-1] == "+" != a[-1] for a, b in pairs)
        won = sum(a[-1] == "+" != b[-1] for a, b in pairs)
        return lost, won, 100 * sum(a[:-1] == b[:-1] for a, b in pairs) / len(pairs)


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    progress: Callable[[int], object] | None = None,
) -> Accuracy:
    """Count how often the label is the network's first choice, and among its first five.

    Which of several equal logits comes first is `torch.topk`'s choice, not the label's: a network that
    answers the same for every class gains nothing from its ties.

    Args:
        model: gives logits [B, classes]; on `device`, and in evaluation mode throughout.
        batches: images [B, ...] and labels [B] (int64); read once, one batch held at a time. Those of this rank, where
            there are several; the figures are of all ranks'.
        device: where the images go.
        progress: called with B after every batch, such as `tqdm.update`.

    Raises:
        ValueError: a module is in training mode, a batch has logits that are not finite or not of the shape
            [B, classes], or there are no images.
    """
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"accuracy needs a model in evaluation mode; {training[0]} is in training mode")
    top1 = top5 = images = 0
    answers: list[str] = []  # by batch
    for index, (inputs, labels) in enumerate(batches):
        logits = _checked(model(inputs.to(device)), labels, index)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels.to(device).unsqueeze(1)
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        images += len(labels)
        said = zip(best[:, 0].tolist(), hits[:, 0].tolist(), strict=True)
        answers.append("".join(f"{c:06x}{'-+'[hit]}" for c, hit in said))
        if progress is not None:
            progress(len(labels) * ranks.size())
    counts, of_ranks = zip(*ranks.gather(((top1, top5, images), answers)), strict=True)
    top1, top5, images = map(sum, zip(*counts, strict=True))
    if images == 0:
        raise ValueError("accuracy needs at least one image; the batches are empty")
    in_order = "".join(chain.from_iterable(zip_longest(*of_ranks, fillvalue="")))
    return Accuracy(100 * top1 / images, 100 * top5 / images, images, in_order)


def _checked(logits: Tensor, labels: Tensor, index: int) -> Tensor:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        seen = f"logits {list(logits.shape)} and labels {list(labels.shape)}"
        raise NetworkError(f"batch {index}: expected logits [B, classes] and labels [B], got {seen}")
    if not logits.isfinite().all():
        raise NetworkError(f"batch {index}: the network's logits are not all finite")
    return logits
