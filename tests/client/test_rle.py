"""Run-length encoding against COCO's own code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from pem.rle import decode_rle, encode_rle
from tests.fuzzing import examples

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def masks() -> st.SearchStrategy[Mask]:
    sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))

    def fill(size: tuple[int, int], seed: int, coarse: int) -> Mask:
        small = np.random.default_rng(seed).random((-(-size[0] // coarse), -(-size[1] // coarse))) < 0.5
        return np.kron(small, np.ones((coarse, coarse), bool))[: size[0], : size[1]] > 0

    return st.builds(fill, sizes, st.integers(0, 2**32 - 1), st.integers(1, 12))


@settings(max_examples=examples(80), deadline=None)
@given(mask=masks())
def test_cocos_code_reads_and_writes_the_same(mask: Mask) -> None:
    rle = encode_rle(mask)
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert rle["counts"] == theirs["counts"].decode()
    assert rle["size"] == list(theirs["size"])
    np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize("value", [False, True])
def test_a_large_mask_of_one_value_needs_long_numbers(value: bool) -> None:
    mask = np.full((2000, 3000), value)
    rle = encode_rle(mask)
    assert rle["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert decode_rle(rle).all() == value


@pytest.mark.parametrize("counts", ["0", "o", "\x7f", "1P", "oooooooo0"])
def test_nonsense_is_refused(counts: str) -> None:
    with pytest.raises(ValueError, match="RLE"):
        decode_rle({"size": [4, 4], "counts": counts})
