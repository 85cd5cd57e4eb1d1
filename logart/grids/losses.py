"""What reconstruction minimises between the quantized block's output and the float one's.

Every loss takes (output, target) and gives a scalar. That of a block sums over channels and averages over everything
else; `importance`, where given, weighs the elements first.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def squared_error(output: Tensor, target: Tensor, channel_dim: int = 1, importance: Tensor | float = 1.0) -> Tensor:
    """Squared error summed over channels and averaged over everything else (Li et al. 2021, BRECQ).

    Args:
        output, target: the same shape, [B, C, ...] or with channels at `channel_dim`.
        importance: a weight per element, [1, ...] to be the same for all images.
    """
    return ((output - target).square() * importance).sum(channel_dim).mean()


def absolute_error(output: Tensor, target: Tensor, channel_dim: int = 1) -> Tensor:
    """Absolute error summed over channels and averaged over everything else; arguments as `squared_error`."""
    return (output - target).abs().sum(channel_dim).mean()


def kl_divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target / T) ‖ softmax(logits / T)) of each image, averaged over the batch; both [B, classes]."""
    target_log, output_log = (F.log_softmax(z / temperature, dim=1) for z in (target, logits))
    return F.kl_div(output_log, target_log, reduction="batchmean", log_target=True)
