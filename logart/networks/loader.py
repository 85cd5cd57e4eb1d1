"""Validation images, streamed in batches; an image that cannot be read is one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from logart.errors import UserError
from logart.interrupt import processes_without_interrupt
from logart.networks.data import ImageSource, Split
from logart.ranks import own_batches


def validation_batches(source: ImageSource, batch_size: int, workers: int) -> DataLoader:
    """Stream the validation images in order, of several ranks every one its own batches.

    Args:
        source: The data set.
        batch_size: Images a batch; the last batch may be smaller.
        workers: Processes that read images; 0 reads in this one.

    Returns:
        A loader of (float32 [b, C, H, W], int64 [b]); iterating raises UserError at an image that cannot be
        read, and leaves torch's global generator as it is.
    """
    generator = torch.Generator()  # without one, every pass would draw a seed from the global generator
    images = _ErrorsAsItems(source.val)
    batches = [list(batch) for batch in own_batches(len(images), batch_size)]
    return _ValidationLoader(
        images, batch_sampler=batches, num_workers=workers, collate_fn=_collate, generator=generator
    )


class _ErrorsAsItems(Dataset):
    """Hands an unreadable image on as a value: torch would wrap what a worker raises in a long traceback."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UserError:
        try:
            return self._split[index]
        except UserError as error:
            return error


def _collate(items: Sequence[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    images, labels = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


class _ValidationLoader(DataLoader):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        with processes_without_interrupt():
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
