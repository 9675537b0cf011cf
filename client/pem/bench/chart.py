"""Draw a sweep as SVG: latency against offered load, the answered share, and the knee.

It is drawn by hand: a few lines, dots and words need no plotting library. Colours follow the reader's light or dark
theme; the background is the picture's own, so it looks the same on any page. Coordinates are pixels, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pem.bench.sweep import ENOUGH, SHARES, Point, Sweep

WIDTH, HEIGHT = 800, 560
LEFT, RIGHT = 76, 776  # of both panels
LATENCY_TOP, LATENCY_BOTTOM = 84, 346
ANSWERED_TOP, ANSWERED_BOTTOM = 382, 502
_LABEL_PX = 290  # width limit of the words at the knee

_STYLE = """
svg { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
text { paint-order: stroke; stroke: #ffffff; stroke-width: 4px; }
.paper { fill: #ffffff; stroke: #d5dae1; }
.words { fill: #1f2630; }
.pale { fill: #59636f; }
.title { font-size: 17px; font-weight: 600; }
.strong { font-weight: 600; }
.grid { stroke: #e4e8ed; }
.axis { stroke: #8a939e; }
.knee { stroke: #1f2630; stroke-dasharray: 5 4; }
.offered { stroke: #8a939e; stroke-width: 1.6; stroke-dasharray: 2 4; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.dot { stroke: #ffffff; stroke-width: 1.5; }
.p50 { --tone: #0f8a6d; } .p90 { --tone: #1f6fc2; } .p99 { --tone: #cc4b14; } .answered { --tone: #6b4fb3; }
.line { stroke: var(--tone); }
.dot { fill: var(--tone); }
@media (prefers-color-scheme: dark) {
  text { stroke: #12171e; }
  .paper { fill: #12171e; stroke: #343c47; }
  .words { fill: #e8ecf1; }
  .pale { fill: #a3adb9; }
  .grid { stroke: #262d37; }
  .axis { stroke: #6d7783; }
  .knee { stroke: #e8ecf1; }
  .dot { stroke: #12171e; }
  .p50 { --tone: #3cc9a4; } .p90 { --tone: #64aef5; } .p99 { --tone: #ff8a50; } .answered { --tone: #b29af0; }
}
"""


def draw(sweep: Sweep) -> str:
    """Draw a sweep, WIDTH x HEIGHT pixels. A latency that a step lacks is a gap in its line.

    A step without answers has no latency, one with too few has no p99. Raises ValueError if no step was answered: there
    is nothing to draw.
    """
    answered = [point for point in sweep.points if point.latency_ms]
    if not answered:
        raise ValueError("no step of this sweep was answered")
    latencies_ms = [value for point in answered for value in point.latency_ms.values()]
    most_hz = _round_up(max(max(point.offered_hz, point.answered_hz) for point in sweep.points))
    load = _Scale(0.0, most_hz, LEFT, RIGHT)
    latency = _log_scale(min(latencies_ms), max(latencies_ms))
    rate = _Scale(0.0, most_hz, ANSWERED_BOTTOM, ANSWERED_TOP)
    parts = [
        *_frame(load, latency, rate),
        *_knee(sweep, load),
        *_offered(load, rate),
        *_series("answered", sweep.points, load, lambda point: rate(point.answered_hz)),
    ]
    for name in SHARES:
        parts += _series(name, sweep.points, load, _latency_y(latency, name))
    parts += _words(sweep)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(_summary(sweep))}">'
    )
    return "\n".join(
        [head, f"<title>{escape(_summary(sweep))}</title>", f"<style>{_STYLE}</style>", *parts, "</svg>\n"]
    )


@dataclass(frozen=True)
class _Scale:
    """Maps values to pixels; both ends of a logarithmic scale are decimal logarithms."""

    low: float
    high: float
    at_low: float
    at_high: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.logarithmic else value
        return self.at_low + (place - self.low) / (self.high - self.low) * (self.at_high - self.at_low)


def _log_scale(least_ms: float, most_ms: float) -> _Scale:
    """Make a scale from the next 1, 2 or 5 times a power of ten below to the next above, so both ends have a number."""
    ticks = [factor * 10.0**power for power in range(-3, 8) for factor in (1, 2, 5)]
    low = max(tick for tick in ticks if tick <= max(least_ms, ticks[0]))
    high = min((tick for tick in ticks if tick > 1.05 * most_ms), default=ticks[-1])
    return _Scale(math.log10(low), math.log10(high), LATENCY_BOTTOM, LATENCY_TOP, logarithmic=True)


def _log_ticks(scale: _Scale) -> list[float]:
    low, high = 10**scale.low * 0.999, 10**scale.high * 1.001
    ticks = [factor * 10.0**power for power in range(-3, 8) for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _round_up(value: float) -> float:
    """Return the end of an axis: a little above the value, on a tick."""
    step = _step(1.02 * value)
    return math.ceil(1.02 * value / step) * step


def _step(value: float) -> float:
    """Return the distance of ticks on an axis to `value`: 1, 2 or 5 times a power of ten, for five to ten ticks."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (0.1, 0.2, 0.5, 1.0) if value / (factor * power) <= 10)


def _ticks(scale: _Scale, step: float) -> list[float]:
    return [number * step for number in range(math.floor(scale.high / step + 1e-6) + 1)]


def _frame(load: _Scale, latency: _Scale, rate: _Scale) -> list[str]:
    """Draw the paper, the grid, the numbers and the axis titles."""
    parts = [f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>']
    step = _step(load.high)
    for value in _ticks(load, step):
        x = load(value)
        parts.append(_line("grid", x, LATENCY_TOP, x, LATENCY_BOTTOM))
        parts.append(_line("grid", x, ANSWERED_TOP, x, ANSWERED_BOTTOM))
        parts.append(_text("pale", x, ANSWERED_BOTTOM + 20, _number(value), "middle"))
    for value in _log_ticks(latency):
        parts.append(_line("grid", LEFT, latency(value), RIGHT, latency(value)))
        parts.append(_text("pale", LEFT - 8, latency(value) + 4.5, _number(value), "end"))
    for value in _ticks(rate, 2 * step):
        parts.append(_line("grid", LEFT, rate(value), RIGHT, rate(value)))
        parts.append(_text("pale", LEFT - 8, rate(value) + 4.5, _number(value), "end"))
    for bottom in (LATENCY_BOTTOM, ANSWERED_BOTTOM):
        parts.append(_line("axis", LEFT, bottom, RIGHT, bottom))
    parts.append(_text("words", (LEFT + RIGHT) / 2, ANSWERED_BOTTOM + 44, "offered load (requests/s)", "middle"))
    for top, bottom, title in (
        (LATENCY_TOP, LATENCY_BOTTOM, "latency (ms), log scale"),
        (ANSWERED_TOP, ANSWERED_BOTTOM, "answered (1/s)"),
    ):
        parts.append(_text("words", 22, (top + bottom) / 2, title, "middle", turned=True))
    return parts


def _knee(sweep: Sweep, load: _Scale) -> list[str]:
    """Draw a line through both panels, its words above the curves before it or, without room, below those after it."""
    if sweep.knee is None:
        return []
    x = load(sweep.knee.offered_hz)
    label = f"knee: {sweep.knee.offered_hz:.3g} requests/s, {_tail(sweep.knee)}"
    words = (
        _text("words strong", x - 8, LATENCY_TOP + 18, label, "end")
        if x - LEFT > _LABEL_PX
        else _text("words strong", x + 8, LATENCY_BOTTOM - 10, label)
    )
    return [_line("knee", x, LATENCY_TOP, x, ANSWERED_BOTTOM), words]


def _offered(load: _Scale, rate: _Scale) -> list[str]:
    """Draw the line on which every offered request is answered."""
    return [_line("offered", load(0), rate(0), load(load.high), rate(load.high))]


def _latency_y(scale: _Scale, name: str) -> Callable[[Point], float | None]:
    return lambda point: scale(point.latency_ms[name]) if name in point.latency_ms else None


def _tail(point: Point) -> str:
    """Name its highest percentile."""
    return f"{point.tail} {point.latency_ms[point.tail]:.3g} ms"


def _series(name: str, points: Sequence[Point], load: _Scale, y_of: Callable[[Point], float | None]) -> list[str]:
    """Draw a line through its dots, broken where a point has no value."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        y = y_of(point)
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((load(point.offered_hz), y))
    lines = [
        f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in piece)}"/>'
        for piece in pieces
        if len(piece) > 1
    ]
    dots = [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>' for piece in pieces for x, y in piece]
    return [f'<g class="{name}">', *lines, *dots, "</g>"]


def _words(sweep: Sweep) -> list[str]:
    """Write title and legend."""
    seconds = sorted({round(point.seconds) for point in sweep.points})
    lasted = f"{seconds[0]} to {seconds[-1]} s" if len(seconds) > 1 else f"{_number(sweep.points[0].seconds)} s"
    told = f"Poisson arrivals, {lasted} at each rate, latency from when a request is due"
    parts = [
        _text("words title", LEFT, 32, "Latency against offered load"),
        _text("pale", LEFT, 54, told),
        _text("pale", RIGHT - 6, LATENCY_TOP - 8, f"p99: of {ENOUGH} answers or more", "end"),
    ]
    x = RIGHT - 268.0
    for name, label, width in (("p50", "p50", 54), ("p90", "p90", 54), ("p99", "p99", 54), ("answered", "answered", 0)):
        parts += [
            f'<g class="{name}">',
            _line("line", x, LATENCY_TOP - 57, x + 18, LATENCY_TOP - 57),
            f'<circle class="dot" cx="{x + 9:.1f}" cy="{LATENCY_TOP - 57}" r="4.2"/>',
            "</g>",
            _text("words", x + 24, LATENCY_TOP - 52.5, label),
        ]
        x += width + 8
    parts.append(_text("pale", RIGHT - 6, ANSWERED_TOP - 8, "dotted: all that is offered is answered", "end"))
    return parts


def _summary(sweep: Sweep) -> str:
    """Describe the picture in one sentence, for readers who do not see it."""
    least, most = sweep.points[0], sweep.points[-1]
    told = f"Latency against offered load from {least.offered_hz:.3g} to {most.offered_hz:.3g} requests/s"
    if sweep.knee is None:
        return f"{told}; the server keeps up with none of it"
    return f"{told}; knee at {sweep.knee.offered_hz:.3g} requests/s with {_tail(sweep.knee)}"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _number(value: float) -> str:
    """Format a number without exponent or trailing zeros."""
    return f"{value:.6g}" if value < 1e6 else f"{value:.0f}"
