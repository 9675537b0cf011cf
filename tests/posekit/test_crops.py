"""One detection cut out of its frame. tests/workers/stages/test_decode.py tests the crops of a request's job."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from posekit import crops
from posekit.crops import cut_out, look, why_not
from posekit.io.frame import Frame, camera_warnings

HEIGHT, WIDTH = 120, 160


def frame() -> Frame:
    """Return a frame whose pixels all differ in colour and depth; 0.5 mm a unit."""
    rng = np.random.default_rng(0)
    return Frame(
        rgb=rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
        depth_raw=rng.integers(1000, 2000, (HEIGHT, WIDTH), dtype=np.uint16),
        depth_scale_mm=0.5,
        K=np.array([[200.0, 0, 80], [0, 210.0, 60], [0, 0, 1]]),
    )


def rectangle(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
    mask[rows, columns] = True
    return mask


def test_a_crop_has_a_margin_and_a_principal_point_of_its_own() -> None:
    mask = rectangle(slice(40, 60), slice(50, 80))
    cut = cut_out(frame(), look(frame(), mask))
    window = (slice(40 - 16, 60 + 16), slice(50 - 16, 80 + 16))
    np.testing.assert_array_equal(cut.rgb, frame().rgb[window])
    np.testing.assert_allclose(cut.depth_m, frame().depth_raw[window] * 0.5e-3, rtol=1e-6)
    np.testing.assert_array_equal(cut.mask, mask[window])
    np.testing.assert_array_equal(cut.K, [[200.0, 0, 80 - 34], [0, 210.0, 60 - 24], [0, 0, 1]])
    assert (cut.origin_px, cut.image_size_px) == ((34, 24), (WIDTH, HEIGHT))
    assert (cut.rgb.dtype, cut.depth_m.dtype, cut.mask.dtype) == (np.uint8, np.float32, np.uint8)


def test_a_crop_ends_with_the_image() -> None:
    cut = cut_out(frame(), look(frame(), rectangle(slice(100, HEIGHT), slice(0, 9))))
    assert cut.mask.shape == (HEIGHT - 84, 9 + 16)
    assert cut.origin_px == (0, 84)


def test_a_large_crop_is_thinned_out_with_its_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "CROP_PIXELS", 2000)
    cut = cut_out(frame(), look(frame(), rectangle(slice(40, 60), slice(50, 80))))  # 52 x 62 pixels
    np.testing.assert_array_equal(cut.rgb, frame().rgb[24:76:2, 34:96:2])
    np.testing.assert_array_equal(cut.K, [[100.0, 0, 23], [0, 105.0, 18], [0, 0, 1]])
    assert (cut.origin_px, cut.image_size_px) == ((17, 12), (WIDTH // 2, HEIGHT // 2))


def test_a_seed_is_of_the_pixels_and_the_object() -> None:
    cut = cut_out(frame(), look(frame(), rectangle(slice(40, 60), slice(50, 80))))
    assert cut.seed("a") == cut.seed("a") != cut.seed("b")
    assert 0 <= cut.seed("a") < 1 << 63
    darker = dataclasses.replace(cut, rgb=cut.rgb // 2)
    assert darker.seed("a") != cut.seed("a")


@pytest.mark.parametrize(
    "rows, columns, has_cad, blind, code",
    [
        (slice(0, 0), slice(0, 0), False, False, "mask_empty"),
        (slice(40, 60), slice(50, 80), False, True, "no_cad"),
        (slice(40, 60), slice(50, 80), True, True, "no_depth"),
        (slice(40, 44), slice(50, 58), True, False, "mask_too_small"),
        (slice(40, 43), slice(50, 61), True, False, None),
    ],
)
def test_the_first_reason_that_holds_is_given(
    rows: slice, columns: slice, has_cad: bool, blind: bool, code: str | None
) -> None:
    seen_by = dataclasses.replace(frame(), depth_raw=np.zeros_like(frame().depth_raw)) if blind else frame()
    rejection = why_not(look(seen_by, rectangle(rows, columns)), has_cad=has_cad)
    assert (rejection and rejection.code) == code


def test_a_principal_point_outside_of_the_image_is_odd() -> None:
    assert camera_warnings(frame()) == []
    K = frame().K.copy()
    K[0, 2] = 161
    assert "(161, 60)" in camera_warnings(dataclasses.replace(frame(), K=K))[0]
