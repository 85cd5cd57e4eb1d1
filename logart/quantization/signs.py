"""Random signs for what a network gives for some images: of each image the same on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchSigns:
    """Signs drawn batch by batch of all images, as a single process has them; a rank asks for those of its own.

    Args:
        seed: of the draws.
        count: how many images there are.
        batch_size: how many at a time.
    """

    def __init__(self, seed: int, count: int, batch_size: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]

    def of(self, images: range, output: Tensor, draws: int = 1) -> list[Tensor]:
        """So many draws of ±1 in the shape and type of an output, with as many rows for each of the images.

        Args:
            images: of one batch, which lies behind those of which signs were drawn before.
        """
        drawn: list[Tensor] = []
        rows = len(output) // len(images)
        while not drawn:
            batch = self._batches.pop(0)
            for _ in range(draws):
                signs = torch.randint(0, 2, (rows * len(batch), *output.shape[1:]), generator=self._generator)
                if images.start in batch:
                    own = slice(rows * (images.start - batch.start), rows * (images.stop - batch.start))
                    drawn.append(signs[own].mul_(2).sub_(1).to(output))
        return drawn
