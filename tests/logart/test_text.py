"""Tables as plain text."""

import pytest

from logart.text import shape_text, table


def test_words_stand_left_and_numbers_right() -> None:
    rows = [("a", 7, "x"), ("longer", "1,234", None), ("b", None, "yy")]
    assert table(("layer", "n", "mix"), rows, text=("layer", "mix")) == (
        "layer       n  mix\n"
        "a           7  x\n"
        "longer  1,234\n"
        "b              yy"
    )  # fmt: skip
    assert table(("n", "top"), [(1, 2.5)]) == "n  top\n1  2.5"
    assert table(("layer", "n"), []) == "layer  n"
    assert table(("layer", "n"), [("a\x1b[2J\n", 1)], text=("layer",)) == "layer   n\na�[2J�  1"


def test_a_row_of_another_length_is_a_bug() -> None:
    with pytest.raises(ValueError):
        table(("layer", "n"), [("a",)])


def test_shapes() -> None:
    assert shape_text((8, 1, 3, 3)) == "8×1×3×3"
