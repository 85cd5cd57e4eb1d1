"""Layer-wise DBS of a 512→512 3×3 convolution, against plain forward passes.

    python benchmarks/layer_wise_search.py [--size 7] [--images 32] [--bits 4] [--channels 512] [--kernel 3]
        [--scale_search none]

Reference 1 runs one forward pass of the layer per candidate, all channels rounded at once; its candidates are all
mixes, 0..N, times the scales. Reference 2 runs one per candidate and channel, only that channel rounded, as a search
that cannot separate channels would; it is timed on a few channels and candidates and extrapolated. The choices are
compared by the reference's errors first.
"""

from __future__ import annotations

import argparse
import time

import torch
from timing import in_turn
from torch import Tensor, nn
from torch.nn import functional as F

from logart.grids.grid import Codebook, ErrorFunction, GridOptions, ScaleSearch
from logart.grids.logarithmic import DYNAMIC, log_candidates
from logart.grids.rounding import dequantize, nearest
from logart.grids.search import choose_codebook
from logart.quantization.cache import Captured
from logart.quantization.capture import Call
from logart.quantization.clone import clone_sharing
from logart.quantization.dbs import layer_error, layer_moments
from logart.quantization.layers import quantize_parameter

FEW = 2  # channels that reference 2 is timed on
FEW_CANDIDATES = 9  # and candidates; 4 bits without scale search have no more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=7, help="height and width of the feature map")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--scale_search", choices=[way.value for way in ScaleSearch], default="none")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    c, padding = args.channels, args.kernel // 2
    conv = nn.Conv2d(c, c, args.kernel, padding=padding, bias=False).requires_grad_(False)
    layer = quantize_parameter(clone_sharing(conv), "weight", args.bits, c)
    x_float = torch.randn(args.images, c, args.size, args.size).relu_()
    x = x_float + 0.05 * torch.randn_like(x_float)
    calls = Captured([Call((x_float,), {})]), Captured([Call((x,), {})])
    w = layer.rows
    every, search = range(2 ** (args.bits - 1) + 1), ScaleSearch(args.scale_search)
    every_columns = log_candidates(w.abs().amax(1), args.bits, every, scale_search=search)
    candidates = [DYNAMIC.codebook(columns, args.bits, 0, w.dtype) for columns in every_columns]
    searched = DYNAMIC.n_candidates(args.bits, GridOptions(scale_search=search))

    def choose(error: ErrorFunction) -> Codebook:
        return choose_codebook(w, DYNAMIC, args.bits, error=error, options=GridOptions(scale_search=search))

    def by_moments() -> Codebook:
        return choose(layer_moments(conv, layer.module, conv.weight, layer, *calls).error)

    def as_chosen() -> Codebook:
        return choose(layer_error(conv, layer.module, conv.weight, layer, *calls, candidates=searched))

    def rounded(codebook: Codebook) -> Tensor:
        return dequantize(nearest(w, codebook), codebook.levels).to(w.dtype).reshape(conv.weight.shape)

    def error(weight: Tensor, wanted: Tensor) -> Tensor:
        return (F.conv2d(x, weight, padding=padding) - wanted).square().sum((0, 2, 3))

    def per_candidate() -> Tensor:
        wanted = F.conv2d(x_float, conv.weight, padding=padding)
        return torch.stack([error(rounded(candidate), wanted) for candidate in candidates])

    def per_channel(channels: int) -> Tensor:
        wanted = F.conv2d(x_float, conv.weight, padding=padding)
        few = list(candidates)[:FEW_CANDIDATES]
        errors = torch.zeros(len(few), channels)
        for k, candidate in enumerate(few):
            for channel in range(channels):
                weight = conv.weight.clone()
                row = candidate.select(torch.tensor([channel]))
                weight[channel] = dequantize(nearest(w[channel : channel + 1], row), row.levels).reshape(
                    weight[0].shape
                )
                errors[k, channel] = error(weight, wanted)[channel]
        return errors

    plain = per_candidate()
    wanted = F.conv2d(x_float, conv.weight, padding=padding)
    for found in (as_chosen(), by_moments()):
        assert torch.allclose(error(rounded(found), wanted), plain.amin(0), rtol=1e-3), "forward passes choose better"
    assert torch.allclose(plain[:FEW_CANDIDATES, :FEW], per_channel(FEW), rtol=1e-3)
    fast_seconds, plain_seconds = in_turn(as_chosen, per_candidate, args.runs)
    moment_seconds, _ = in_turn(by_moments, lambda: None, args.runs)
    start = time.perf_counter()
    per_channel(FEW)
    channel_seconds = (time.perf_counter() - start) * c / FEW * len(candidates) / min(len(candidates), FEW_CANDIDATES)
    print(
        f"{c}→{c} {args.kernel}×{args.kernel} at {args.size}×{args.size}, {args.images} images, {args.bits} bits "
        f"({len(candidates)} candidates, {searched} searched), {torch.get_num_threads()} threads"
    )
    rows = [
        ("as chosen", fast_seconds),
        ("by second moments", moment_seconds),
        ("a forward per candidate", plain_seconds),
        (f"a forward per candidate and channel (from {FEW} channels)", channel_seconds),
    ]
    for name, seconds in rows:
        print(f"{name:<60} {seconds:10.2f} s   {seconds / fast_seconds:8.2f} of the chosen")


if __name__ == "__main__":
    main()
