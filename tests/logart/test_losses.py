"""Losses by hand."""

import torch

from logart.losses import squared_error


def test_squared_error_sums_channels_and_averages_the_rest() -> None:
    output, target = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    output[0, :, 0] = torch.tensor([1.0, 2.0, 3.0])
    target[1, 2, 1] = 4.0
    assert float(squared_error(output, target)) == (1 + 4 + 9 + 16) / 4
    assert float(squared_error(output, target, channel_dim=-1)) == (1 + 4 + 9 + 16) / 6
    assert float(squared_error(output[:, :, 0], target[:, :, 0])) == (1 + 4 + 9) / 2
