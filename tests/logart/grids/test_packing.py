"""Codes to bytes and back, against bits written out one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logart.grids import packing
from logart.grids.packing import pack, packed_bytes, unpack


def plain_pack(codes: list[int], n_bits: int) -> list[int]:
    stream = sum(code << i * n_bits for i, code in enumerate(codes))
    return list(stream.to_bytes((len(codes) * n_bits + 7) // 8, "little"))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 8).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 2**n - 1), max_size=70))))
def test_packing_is_the_bits_in_order(case: tuple[int, list[int]]) -> None:
    n_bits, codes = case
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(tensor, n_bits)
    assert packed.dtype == torch.uint8 and packed.tolist() == plain_pack(codes, n_bits)
    assert len(packed) == packed_bytes(len(codes), n_bits)
    assert torch.equal(unpack(packed, n_bits, len(codes)), tensor)


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("count", [15, 16, 17, 31, 32, 33, 100])
def test_more_codes_than_are_worked_on_at_once(n_bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**n_bits, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    expected = pack(codes, n_bits)
    monkeypatch.setattr(packing, "_CHUNK_SIZE", 2)
    assert torch.equal(pack(codes, n_bits), expected)
    assert torch.equal(unpack(expected, n_bits, count), codes)


def test_three_bits_take_three_and_any_shape_is_read_row_by_row() -> None:
    codes = torch.arange(48, dtype=torch.uint8).reshape(2, 3, 8) % 8
    assert pack(codes, 3).shape == (18,)
    assert torch.equal(pack(codes.transpose(0, 1), 3), pack(codes.transpose(0, 1).contiguous(), 3))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pack(torch.tensor([4], dtype=torch.uint8), 2), "code 4 does not fit 2 bits"),
        (lambda: pack(torch.tensor([1]), 2), "uint8"),
        (lambda: pack(torch.zeros(1, dtype=torch.uint8), 1), "bit width"),
        (lambda: unpack(torch.zeros(2, dtype=torch.uint8), 4, 5), "5 codes of 4 bits are 3 bytes"),
        (lambda: unpack(torch.zeros(3, dtype=torch.int8), 4, 5), "int8"),
        (lambda: unpack(torch.zeros(1, dtype=torch.uint8), 9, 1), "bit width"),
    ],
)
def test_what_does_not_fit_is_refused(call: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
