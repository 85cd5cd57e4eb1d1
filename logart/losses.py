"""What reconstruction minimises between the quantized block's output and the float one's."""

from __future__ import annotations

from torch import Tensor


def squared_error(output: Tensor, target: Tensor, channel_dim: int = 1) -> Tensor:
    """Squared error summed over channels and averaged over everything else (Li et al. 2021, BRECQ).

    Args:
        output, target: the same shape, [B, C, ...] or with channels at `channel_dim`.
    """
    return (output - target).square().sum(channel_dim).mean()
