"""What LLR minimises between a block's output and the float block's: one loss for each block of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from logart.grids.losses import absolute_error, kl_divergence, squared_error
from logart.quantization.blocks import Block
from logart.quantization.importance import IMPORTANCE_IMAGES, PerturbationImportance
from logart.quantization.settings import ReconMetric, Settings

Loss = Callable[[Tensor, Tensor], Tensor]  # of (output, target), a scalar


class BlockLosses:
    """The reconstruction loss of each block of a float network; arguments as for `quantize_model`."""

    def __init__(
        self, reference: nn.Module, blocks: Sequence[Block], images: Tensor, config: Settings, device: torch.device
    ) -> None:
        self._config, self._head = config, blocks[-1].name
        if config.recon_metric is ReconMetric.HESSIAN_PERTURB:
            self._importance = PerturbationImportance(
                reference, images[:IMPORTANCE_IMAGES], config.temperature, config.batch_size, device, config.seed
            )

    def of(self, block: Block, output_shape: torch.Size, channels: int) -> Loss:
        """The loss of one block, whose outputs have this shape, and its last layer so many channels."""
        if self._config.head_kl and block.name == self._head:
            return kl_divergence
        dim = channel_dim(output_shape, channels)
        if self._config.recon_metric is ReconMetric.MAE:
            return partial(absolute_error, channel_dim=dim)
        if self._config.recon_metric is ReconMetric.MSE:
            return partial(squared_error, channel_dim=dim)
        return partial(squared_error, channel_dim=dim, importance=self._importance.of(block.name))


def channel_dim(shape: torch.Size, channels: int) -> int:
    """Where an output has its channels: dimension 1, unless only the last has as many as the block's last layer."""
    return -1 if shape[-1] == channels != shape[1] else 1
