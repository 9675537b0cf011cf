"""The receipt: where a request's time went."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.scheduling.receipt import Receipt, receipt
from workers.messages import PartAnswer

ARRIVED = 1_000.0  # seconds since the epoch


def part(**spans: tuple[float, float]) -> PartAnswer:
    """Make a part's answer: for each stage its start, in ms since the request came, and its duration."""
    fields: dict[str, Any] = {}
    for stage, (begun_ms, length_ms) in spans.items():
        fields |= {f"{stage}_unix": ARRIVED + begun_ms / 1e3, f"{stage}_ms": length_ms}
    return PartAnswer(part_id="a/0", **fields)


def of(*parts: PartAnswer, took_ms: float) -> Receipt:
    return receipt(parts, arrived_unix=ARRIVED, done_unix=ARRIVED + took_ms / 1e3)


def shares(one: Receipt) -> tuple[float, float, float, float]:
    return one.decode_ms, one.queue_ms, one.pose_ms, one.respond_ms


def test_what_is_no_stages_time_was_waited() -> None:
    found = of(part(decode=(5, 10), pose=(20, 100), respond=(125, 2)), took_ms=130)
    assert shares(found) == pytest.approx((10, 18, 100, 2))


def test_parts_that_ran_side_by_side_count_once() -> None:
    found = of(part(decode=(0, 10), pose=(10, 100)), part(decode=(0, 10), pose=(30, 100)), took_ms=130)
    assert shares(found) == pytest.approx((10, 0, 120, 0))


def test_a_part_that_waits_for_another_ones_turn_shows_as_waiting_between_the_two() -> None:
    found = of(part(decode=(0, 10), pose=(10, 100)), part(decode=(2110, 10), pose=(2120, 100)), took_ms=2220)
    assert shares(found) == pytest.approx((20, 2000, 200, 0))


def test_while_one_part_is_with_the_engine_the_others_decoding_costs_the_client_nothing() -> None:
    found = of(part(decode=(0, 10), pose=(10, 100)), part(decode=(50, 70), pose=(120, 50)), took_ms=170)
    assert shares(found) == pytest.approx((20, 0, 150, 0))


def test_what_a_clock_that_was_set_puts_outside_of_the_request_does_not_count() -> None:
    found = of(part(decode=(-3_600_000, 10), pose=(20, 3_600_000)), took_ms=130)
    assert shares(found) == pytest.approx((0, 20, 110, 0))


spans = st.tuples(st.floats(-50, 300), st.floats(0, 300))


@given(st.lists(st.builds(part, decode=spans, pose=spans, respond=spans), max_size=6), st.floats(0, 200))
def test_the_shares_add_up_to_what_it_took(parts: list[PartAnswer], took_ms: float) -> None:
    found = shares(of(*parts, took_ms=took_ms))
    assert min(found) >= 0
    assert sum(found) == pytest.approx(took_ms, abs=1e-3)
