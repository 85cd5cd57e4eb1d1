"""n-bit codes <-> bytes, densely: 3 bits really take 3. Pure functions of tensors.

Bits run from the least significant up, code after code: bit j of code i is bit (i·n + j) % 8 of byte (i·n + j) // 8.
The bits of the last byte that no code fills are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from logart.grids.grid import CodebookSpec, check_bits
from logart.grids.rounding import dequantize

_DEQUANTIZED_AT_ONCE = 2**18  # levels or weights
# Whether torch.export runs the network; torch 2.6 does not say.
is_exporting: Callable[[], bool] = getattr(
    torch.compiler,
    "is_exporting",
    lambda: torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling(),
)
_CHUNK_SIZE = 2**15  # groups of 8 codes worked on at a time: what is held beside is a few MiB


def packed_bytes(count: int, n_bits: int) -> int:
    """How many bytes `count` codes of `n_bits` bits take."""
    return (count * n_bits + 7) // 8


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Codes of any shape, uint8 and below 2^n_bits, as bytes [packed_bytes] uint8.

    Raises:
        ValueError: a bit width out of range, another type, or a code that does not fit.
    """
    check_bits(n_bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >= 2**n_bits:
        raise ValueError(f"code {int(flat.max())} does not fit {n_bits} bits")
    packed = torch.empty(-(-flat.numel() // 8) * n_bits, dtype=torch.uint8, device=flat.device)
    place = torch.arange(8, device=flat.device)
    for start in range(0, flat.numel(), 8 * _CHUNK_SIZE):
        chunk = flat[start : start + 8 * _CHUNK_SIZE]
        chunk = torch.cat([chunk, chunk.new_zeros(-len(chunk) % 8)]).reshape(-1, 8)  # 8 codes take n bytes
        words = (chunk.long() << n_bits * place).sum(1)  # disjoint bits: the sum is their union, also in the sign bit
        every = (words[:, None] >> 8 * place[:n_bits] & 255).to(torch.uint8).reshape(-1)
        packed[start // 8 * n_bits :][: len(every)] = every
    return packed[: packed_bytes(flat.numel(), n_bits)]


def unpack(packed: Tensor, n_bits: int, count: int) -> Tensor:
    """The first `count` codes [count] uint8 of bytes that `pack` made.

    Raises:
        ValueError: a bit width out of range, or another number of bytes than `count` codes take.
    """
    check_bits(n_bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, n_bits),):
        seen = f"{packed.dtype} {list(packed.shape)}"
        raise ValueError(f"{count} codes of {n_bits} bits are {packed_bytes(count, n_bits)} bytes, got {seen}")
    codes = torch.empty(count, dtype=torch.uint8, device=packed.device)
    place = torch.arange(8, device=packed.device)
    for start in range(0, count, 8 * _CHUNK_SIZE):
        chunk = packed[start // 8 * n_bits :][: _CHUNK_SIZE * n_bits]
        chunk = torch.cat([chunk, chunk.new_zeros(-len(chunk) % n_bits)]).reshape(-1, n_bits)
        words = (chunk.long() << 8 * place[:n_bits]).sum(1)
        every = (words[:, None] >> n_bits * place & 2**n_bits - 1).to(torch.uint8).reshape(-1)
        codes[start : start + 8 * _CHUNK_SIZE] = every[: count - start]
    return codes


def dequantize_packed(packed: Tensor, spec: CodebookSpec, shape: torch.Size, n_bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [*shape] that packed codes stand for, of G codebooks that share its rows evenly.

    Some channels, and of a channel some weights, at a time: all levels, or the indices of all weights, would take far
    more memory than the weights.
    """
    codes = unpack(packed, n_bits, shape.numel()).reshape(spec.channels, -1)
    weight = torch.empty(codes.shape, dtype=dtype, device=packed.device)
    size = max(1, _DEQUANTIZED_AT_ONCE // max(2**n_bits, codes.shape[1]))
    for start in range(0, spec.channels, size):
        part = slice(start, start + size)
        with _disable_current_modes() if is_exporting() else nullcontext():  # levels are constants of the graph
            levels = spec.select(part).codebook(n_bits, dtype).levels
        levels = levels.to(packed.device)
        for first in range(0, codes.shape[1], _DEQUANTIZED_AT_ONCE):
            columns = slice(first, first + _DEQUANTIZED_AT_ONCE)
            weight[part, columns] = dequantize(codes[part, columns], levels).to(dtype)
    return weight.reshape(shape)
