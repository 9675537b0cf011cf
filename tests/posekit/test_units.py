"""Millimetres to metres and back, in the one place that converts them."""

from __future__ import annotations

import numpy as np

from posekit.units import METRES_OF, m_to_mm, mm_to_m, transform_m_to_mm, transform_mm_to_m

T_MM = np.array([[0.0, -1, 0, 12.3456], [1, 0, 0, -7], [0, 0, 1, 678.9], [0, 0, 0, 1]])


def test_a_transforms_translation_alone_is_converted_and_the_given_one_stays() -> None:
    before = T_MM.copy()
    T_m = transform_mm_to_m(T_MM)
    np.testing.assert_array_equal(T_m[:3, :3], T_MM[:3, :3])
    np.testing.assert_array_equal(T_m[3], [0, 0, 0, 1])
    np.testing.assert_array_equal(T_m[:3, 3], T_MM[:3, 3] / 1000)
    np.testing.assert_array_equal(T_MM, before)
    np.testing.assert_allclose(transform_m_to_mm(T_m), T_MM, rtol=1e-15)


def test_sixteen_numbers_are_a_transform() -> None:
    np.testing.assert_array_equal(transform_mm_to_m(T_MM.ravel().tolist()), transform_mm_to_m(T_MM))


def test_a_transform_is_converted_in_double_precision() -> None:
    single = T_MM.astype(np.float32)
    assert transform_m_to_mm(single).dtype == np.float64
    np.testing.assert_array_equal(transform_m_to_mm(single)[:3, 3], single[:3, 3].astype(np.float64) * 1000)


def test_lengths_keep_their_precision() -> None:
    lengths_mm = np.array([0, 1, 33.3, 5000], dtype=np.float32)
    assert mm_to_m(lengths_mm).dtype == np.float32
    np.testing.assert_array_equal(mm_to_m(lengths_mm), lengths_mm / np.float32(1000))
    np.testing.assert_allclose(m_to_mm(mm_to_m(lengths_mm)), lengths_mm, rtol=1e-6)


def test_a_files_unit_is_told_in_metres() -> None:
    assert METRES_OF == {"mm": 0.001, "m": 1.0}
