"""The picture of a sweep: well-formed, to scale, with the knee in words."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from pem.bench import chart
from pem.bench.sweep import Point, Sweep

SVG = "{http://www.w3.org/2000/svg}"


def point(offered_hz: float, answered_hz: float, *latencies_ms: float, seconds: float = 20.0) -> Point:
    return Point(
        offered_hz=offered_hz,
        answered_hz=answered_hz,
        latency_ms=dict(zip(("p50", "p90", "p99"), latencies_ms, strict=False)),
        seconds=seconds,
        requests=100,
        refused=0,
        failed=0,
        wrong=0,
    )


POINTS = [
    point(2.0, 2.0, 30.0, 50.0, 100.0),
    point(8.0, 8.0, 40.0, 80.0, 200.0),
    point(10.0, 6.0),
    point(12.0, 8.5, 900.0, 3000.0, 5000.0),
]
SWEEP = Sweep(points=POINTS, knee=POINTS[1])


def drawn(sweep: Sweep) -> ElementTree.Element:
    return ElementTree.fromstring(chart.draw(sweep))


def dots(root: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """Return the places of a series' dots. The first group of a name is its curve or, in the legend, a single dot."""
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class") == name]
    return [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in groups[0].iter(f"{SVG}circle")]


def words(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def test_the_picture_says_what_it_shows() -> None:
    found = words(drawn(SWEEP))
    assert "knee: 8 requests/s, p99 200 ms" in found
    for text in ("offered load (requests/s)", "latency (ms), log scale", "answered (1/s)", "p50", "p90", "p99"):
        assert text in found


def test_a_step_with_too_few_answers_has_no_p99_and_the_picture_says_why() -> None:
    few, many = point(2.0, 2.0, 30.0, 50.0, seconds=40.0), point(8.0, 8.0, 40.0, 80.0, 200.0)
    root = drawn(Sweep(points=[few, many], knee=many))
    assert [len(dots(root, name)) for name in ("p50", "p90", "p99")] == [2, 2, 1]
    found = words(root)
    assert "p99: of 100 answers or more" in found
    assert "Poisson arrivals, 20 to 40 s at each rate, latency from when a request is due" in found
    assert "knee: 2 requests/s, p90 50 ms" in words(drawn(Sweep(points=[few, many], knee=few)))


def test_the_dots_are_to_scale_and_a_step_without_an_answer_leaves_a_gap() -> None:
    root = drawn(SWEEP)
    p99 = dots(root, "p99")
    assert len(p99) == 3
    xs = [x for x, _ in dots(root, "answered")]
    assert len(xs) == 4
    for x, one in zip(xs, POINTS, strict=True):  # linear: as far from the first as their rates are apart
        assert (x - xs[0]) / (xs[3] - xs[0]) == pytest.approx((one.offered_hz - 2) / 10, abs=0.002)
    span = math.log(5000 / 100)
    assert (p99[0][1] - p99[1][1]) / (p99[0][1] - p99[2][1]) == pytest.approx(math.log(2) / span, abs=0.002)
    assert all(chart.LATENCY_TOP <= y <= chart.LATENCY_BOTTOM for _, y in p99)
    lines = next(group for group in root.iter(f"{SVG}g") if group.get("class") == "p99").findall(f"{SVG}polyline")
    assert len(lines) == 1, "one line to the gap; after it a single dot"


def test_the_line_of_the_knee_goes_through_its_dots() -> None:
    root = drawn(SWEEP)
    (line,) = [line for line in root.iter(f"{SVG}line") if line.get("class") == "knee"]
    assert float(line.get("x1", "")) == float(line.get("x2", "")) == dots(root, "p50")[1][0]


@pytest.mark.parametrize("offered_hz", [0.02, 1.0, 9.7, 10.0, 99_000.0])
def test_a_sweep_of_one_step_can_be_drawn_at_any_rate(offered_hz: float) -> None:
    one = point(offered_hz, offered_hz, 20.0, 20.0, 20.0)
    root = drawn(Sweep(points=[one], knee=None))
    ((x, y),) = dots(root, "p50")
    assert chart.LEFT < x <= chart.RIGHT
    assert chart.LATENCY_TOP <= y <= chart.LATENCY_BOTTOM
    assert not any("knee" in text for text in words(root))


@pytest.mark.parametrize("offered_hz", [0.03, 0.97, 4.9, 5.0, 5.4, 6.8, 9.8, 13.0, 49.5, 700.0])
def test_no_line_of_the_grid_leaves_its_panel(offered_hz: float) -> None:
    one = point(offered_hz, offered_hz, 20.0, 99.0, 100.0)
    panels = ((chart.LATENCY_TOP, chart.LATENCY_BOTTOM), (chart.ANSWERED_TOP, chart.ANSWERED_BOTTOM))
    lines = drawn(Sweep(points=[one], knee=None)).iterfind(f"{SVG}line[@class='grid']")
    grid = [[float(line.get(end, "")) for end in ("x1", "x2", "y1", "y2")] for line in lines]
    assert len(grid) > 12
    for x1, x2, y1, y2 in grid:
        assert chart.LEFT <= x1 <= x2 <= chart.RIGHT
        assert any(top <= min(y1, y2) <= max(y1, y2) <= bottom for top, bottom in panels)


def test_the_words_at_a_knee_stay_inside_the_picture() -> None:
    for knee in (POINTS[0], POINTS[3]):
        root = drawn(Sweep(points=POINTS, knee=knee))
        (text,) = [text for text in root.iter(f"{SVG}text") if "".join(text.itertext()).startswith("knee")]
        at, width = float(text.get("x", "")), 290
        left = at - width if text.get("text-anchor") == "end" else at
        assert left >= chart.LEFT - 10
        assert left + width <= chart.WIDTH


def test_a_sweep_without_an_answer_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="no step"):
        chart.draw(Sweep(points=[point(1.0, 0.0)], knee=None))
