"""Losses by hand."""

import math

import pytest
import torch
from torch import Tensor

from logart.grids.losses import absolute_error, kl_divergence, squared_error


def differing() -> tuple[Tensor, Tensor]:
    """[2, 3, 2], different in four places."""
    output, target = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    output[0, :, 0] = torch.tensor([1.0, 2.0, 3.0])
    target[1, 2, 1] = 4.0
    return output, target


def test_squared_error_sums_channels_and_averages_the_rest() -> None:
    output, target = differing()
    assert float(squared_error(output, target)) == (1 + 4 + 9 + 16) / 4
    assert float(squared_error(output, target, channel_dim=-1)) == (1 + 4 + 9 + 16) / 6
    assert float(squared_error(output[:, :, 0], target[:, :, 0])) == (1 + 4 + 9) / 2


def test_importance_weighs_the_squares() -> None:
    output, target = differing()
    importance = torch.tensor([[[2.0, 9.0], [0.0, 9.0], [1.0, 0.5]]])
    assert float(squared_error(output, target, importance=importance)) == (2 * 1 + 9 + 0.5 * 16) / 4


def test_absolute_error_does_not_square() -> None:
    output, target = differing()
    assert float(absolute_error(output, target)) == (1 + 2 + 3 + 4) / 4
    assert float(absolute_error(output, target, channel_dim=-1)) == pytest.approx((1 + 2 + 3 + 4) / 6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_divergence_is_that_of_target_to_output_per_image(temperature: float) -> None:
    target = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    output = torch.tensor([[1.0, 0.0, 1.0], [3.0, 0.0, 0.0]])
    p, q = ([math.exp(z / temperature) for z in row] for row in (target[0].tolist(), output[0].tolist()))
    expected = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert float(kl_divergence(output, target, temperature)) == pytest.approx(expected / 2, rel=1e-5)
    assert float(kl_divergence(target, target)) == 0
