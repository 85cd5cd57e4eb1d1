"""One LLR step of a 512→512 3×3 convolution, against the same step written plainly.

    python benchmarks/llr_step.py [--size 7] [--batch 32] [--runs 11]

The plain step finds the neighbours, the sigmoid, the power and the penalty anew every time and leaves the derivative to
autograd and the update to Adam as it comes. Both start from the same α; the weights of one step are compared first.
"""

from __future__ import annotations

import argparse

import torch
from timing import in_turn
from torch import Tensor, nn
from torch.nn import functional as F

from logart.grids.logarithmic import LOG_SQRT2, half_steps_and_signs
from logart.grids.losses import squared_error
from logart.grids.search import choose_codebook
from logart.quantization.layers import quantize_parameter

BETA, RRWEIGHT = 11.0, 0.1


def plain_soft(w: Tensor, alpha: Tensor, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """Soft weights and penalty on a base-√2 grid, every step from scratch.

    The magnitude lies between two half-steps, floor and floor + 1; h counts towards the upper level of the codebook,
    which is the smaller magnitude for a negative weight.
    """
    sign = torch.sign(w)
    lower = torch.floor(2 * torch.log2(w.abs())).clamp(lowest, highest - 1)
    h = (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1)
    up = torch.where(sign > 0, h, 1 - h)
    magnitude = torch.pow(2.0, (lower + up) / 2)
    straddles = w.abs() < torch.pow(2.0, lowest / 2)
    smallest = torch.pow(2.0, lowest / 2)
    soft = torch.where(straddles, smallest * (2 * h - 1), sign * magnitude)
    return soft, (1 - (2 * h - 1).abs().pow(BETA)).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=7, help="height and width of the feature map")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--runs", type=int, default=11)
    args = parser.parse_args()
    torch.manual_seed(0)
    conv = nn.Conv2d(512, 512, 3, padding=1, bias=False).requires_grad_(False)
    layer = quantize_parameter(conv, "weight", 4, 512)
    codebook = choose_codebook(layer.rows, LOG_SQRT2, 4)
    layer.set_codebook(codebook)
    x = torch.randn(args.batch, 512, args.size, args.size)
    target = F.conv2d(x, layer.float_weight, padding=1)
    soft = layer.start_learning()
    fast_adam = torch.optim.Adam([soft.alpha], lr=1e-2, fused=True)
    alpha = nn.Parameter(soft.alpha.detach().clone())
    plain_adam = torch.optim.Adam([alpha], lr=1e-2)
    w, shape = layer.rows, layer.shape
    half_steps, _ = half_steps_and_signs(codebook.spec.columns, 4)
    lowest = half_steps[:, -half_steps.shape[1] // 2, None].float()
    highest = half_steps[:, -1:].float()

    def fast() -> Tensor:
        penalty = layer.update_soft_weight(BETA)
        loss = squared_error(conv(x), target) + RRWEIGHT * penalty
        fast_adam.zero_grad()
        loss.backward()
        fast_adam.step()
        return soft.alpha

    def plain() -> Tensor:
        weight, penalty = plain_soft(w, alpha, lowest, highest)
        loss = (F.conv2d(x, weight.reshape(shape), padding=1) - target).pow(2).sum(1).mean() + RRWEIGHT * penalty
        plain_adam.zero_grad()
        loss.backward()
        plain_adam.step()
        return alpha

    differs = (plain_soft(w, alpha, lowest, highest)[0] - soft(BETA)[0]).abs() > 1e-5 * w.abs().amax(1, keepdim=True)
    # float32's log2 puts a weight within an ulp of a level into the wrong interval: a handful of millions
    assert differs.float().mean() < 1e-5, f"the steps compute different weights: {int(differs.sum())} differ"
    fast_seconds, plain_seconds = in_turn(fast, plain, args.runs)

    def convolution() -> None:
        weight = layer.float_weight.detach().requires_grad_()
        squared_error(F.conv2d(x, weight, padding=1), target).backward()

    conv_seconds, _ = in_turn(convolution, lambda: None, args.runs)
    print(f"threads {torch.get_num_threads()}, batch {args.batch}, {args.size}×{args.size}")
    print(f"plain step        {1000 * plain_seconds:8.1f} ms")
    print(f"fast step         {1000 * fast_seconds:8.1f} ms   {plain_seconds / fast_seconds:.2f}× faster")
    print(f"the convolution   {1000 * conv_seconds:8.1f} ms of both, forward and weight gradient")
    own = (plain_seconds - conv_seconds) / (fast_seconds - conv_seconds)
    print(f"without it        {own:8.2f}× faster")


if __name__ == "__main__":
    main()
