"""The dashboard as a picture, without Grafana: its queries, asked of a real Prometheus, drawn by ourselves.

    python -m benchmarks.service.dashboard_picture --out docs/images/dashboard.png

starts a server, puts it under changing load for five minutes with Prometheus reading it every second, and draws. With
`--prometheus URL` it draws what an existing one has seen over the last `--minutes`. `--html FILE` keeps the page that
the picture is of. Needs Debian's packages prometheus and chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import numpy as np
from PIL import Image

from benchmarks.service import dashboard
from benchmarks.service.prometheus import Prometheus, running_prometheus
from pem.bench.drive import closed_loop
from pem.bench.judge import Judge
from pem.bench.mix import Load, Mix, prepare
from pem.bench.sample import Target
from pem.bench.server import own_server, register
from pem.rle import encode_rle
from workers.state import read_states

WIDTH: Final = 1560  # of the page, pixels
_COLUMN, _UNIT, _GAP = WIDTH / 24, 34, 8  # Grafana's grid: a column, a unit of height, between panels
_PALETTE: Final = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#b877d9", "#8ab8ff", "#f2495c", "#96d98d", "#ffb357")
_COLOURS: Final = {
    "green": "#73bf69",
    "yellow": "#f2cc0c",
    "orange": "#ff9830",
    "red": "#f2495c",
    "blue": "#5794f2",
    "transparent": "#22252b",
}
_STYLE: Final = """
body { margin: 0; background: #111217; color: #ccccdc; font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { position: relative; }
header, section, h2 { position: absolute; box-sizing: border-box; overflow: hidden; margin: 0; }
header { left: 12px; top: 10px; font-size: 20px; font-weight: 600; }
header small { font-size: 13px; font-weight: 400; color: #8e8e9b; margin-left: 14px; }
h2 { font-size: 15px; font-weight: 600; line-height: 30px; padding-left: 6px; }
section { background: #181b1f; border: 1px solid #25282e; border-radius: 3px; padding: 6px 10px; }
h3 { margin: 0 0 2px; font-size: 13px; font-weight: 600; white-space: nowrap; }
.big { font-size: 28px; font-weight: 600; text-align: center; line-height: 56px; white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12px; line-height: 17px; overflow: hidden; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin: 0 5px 3px 0; }
table { border-collapse: collapse; font-size: 12px; width: 100%; }
td, th { text-align: left; padding: 3px 8px 3px 0; border-bottom: 1px solid #25282e; white-space: nowrap; }
th { color: #6e9fff; font-weight: 600; }
svg text { fill: #8e8e9b; font-size: 11px; }
.none { color: #8e8e9b; text-align: center; padding-top: 60px; }
"""

Values = list[tuple[float, float]]  # unix time, value


@dataclass(frozen=True, kw_only=True)
class Span:
    """The stretch of time that is drawn, unix seconds, and how finely."""

    start: float
    end: float
    step_s: int
    interval_s: int  # between two scrapes

    @property
    def rate_interval_s(self) -> int:
        """Grafana's rule for `$__rate_interval`, and 20 s at least: single requests are no curve."""
        return max(4 * self.interval_s, self.step_s + self.interval_s, 20)


@dataclass
class Line:
    """One series as it is drawn."""

    name: str
    values: Values
    colour: str
    unit: str
    fill: float = 0.0  # opacity
    dashed: bool = False
    right: bool = False  # against the axis on the right


# ------------------------------------------------------------------------------------------------------------ the page


def page(prometheus: Prometheus, span: Span, words: str) -> str:
    """The whole dashboard as HTML, `words` beside its title."""
    tree = dashboard.load()
    bodies = [_panel(panel, prometheus, span) for panel in tree["panels"]]
    return (
        f'<!doctype html><meta charset="utf-8"><style>{_STYLE}</style><main style="height:{height()}px">'
        f"<header>{escape(tree['title'])}<small>{escape(words)}</small></header>{''.join(bodies)}</main>"
    )


def height() -> int:
    """Of the page, pixels."""
    lowest = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard.load()["panels"])
    return lowest * _UNIT + 60


def _panel(panel: Mapping[str, Any], prometheus: Prometheus, span: Span) -> str:
    grid = panel["gridPos"]
    x, y = grid["x"] * _COLUMN + _GAP / 2, grid["y"] * _UNIT + 48
    wide, high = grid["w"] * _COLUMN - _GAP, grid["h"] * _UNIT - _GAP
    place = f'style="left:{x:.0f}px;top:{y:.0f}px;width:{wide:.0f}px;height:{high:.0f}px"'
    if panel["type"] == "row":
        return f"<h2 {place}>{escape(panel['title'])}</h2>"
    draw = {"stat": _stat, "timeseries": _curves, "table": _table, "state-timeline": _states}[panel["type"]]
    body = draw(panel, prometheus, span, wide - 22, high - 32)
    return f"<section {place}><h3>{escape(panel['title'])}</h3>{body}</section>"


def _series(panel: Mapping[str, Any], prometheus: Prometheus, span: Span) -> list[tuple[str, Values]]:
    found = []
    for query in dashboard.queries(panel):
        expression = query.filled(span.rate_interval_s)
        answer = prometheus.ask_range(expression, start=span.start, end=span.end, step_s=span.step_s)
        for labels, values in sorted(answer, key=lambda one: sorted(one[0].items())):
            found.append((query.name(labels), [pair for pair in values if math.isfinite(pair[1])]))
    return [(name, values) for name, values in found if values]


def _stat(panel: Mapping[str, Any], prometheus: Prometheus, span: Span, wide: float, high: float) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    found = _series(panel, prometheus, span)
    if not found:
        return '<div class="big">–</div>'
    value = found[0][1][-1][1]
    colour = "blue"
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    texts = {key: one["text"] for mapping in defaults.get("mappings", []) for key, one in mapping["options"].items()}
    text = texts.get(f"{value:g}") or spelled(value, defaults["unit"], defaults.get("decimals"))
    body = f'<div class="big" style="color:{_COLOURS[colour]}">{escape(text)}</div>'
    return body + _spark(found[0][1], _COLOURS[colour], span, wide, high - 58)


def _spark(values: Values, colour: str, span: Span, wide: float, high: float) -> str:
    """How a number came to be what it is, without axes."""
    most = max(value for _, value in values) or 1.0
    points = " ".join(
        f"{(when - span.start) / (span.end - span.start) * wide:.1f},{high - 1 - value / most * (high - 3):.1f}"
        for when, value in values
    )
    line = f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2" opacity="0.7"/>'
    return f'<svg width="{wide:.0f}" height="{high:.0f}">{line}</svg>'


def _curves(panel: Mapping[str, Any], prometheus: Prometheus, span: Span, wide: float, high: float) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults["custom"]
    lines = [
        Line(name, values, _PALETTE[index % len(_PALETTE)], defaults["unit"], fill=custom["fillOpacity"] / 100)
        for index, (name, values) in enumerate(_series(panel, prometheus, span))
    ]
    if not lines:
        return '<div class="none">No data</div>'
    for line in lines:
        _override(line, panel["fieldConfig"]["overrides"])
    stacked = custom["stacking"]["mode"] == "normal"
    bars = custom["drawStyle"] == "bars"
    legend_px = 17 * (1 + sum(len(line.name) * 7 + 32 for line in lines) // int(wide)) + 3
    return _chart(lines, span, wide, high - legend_px, stacked=stacked, bars=bars, defaults=defaults) + _legend(lines)


def _override(line: Line, overrides: Sequence[Mapping[str, Any]]) -> None:
    for override in overrides:
        matcher = override["matcher"]
        if not (line.name == matcher["options"] or (matcher["id"] == "byRegexp" and _matches(matcher, line.name))):
            continue
        for prop in override["properties"]:
            match prop["id"]:
                case "color":
                    line.colour = _COLOURS[prop["value"]["fixedColor"]]
                case "unit":
                    line.unit = prop["value"]
                case "custom.axisPlacement":
                    line.right = prop["value"] == "right"
                case "custom.lineStyle":
                    line.dashed = True
                case "custom.fillOpacity":
                    line.fill = prop["value"] / 100


def _matches(matcher: Mapping[str, str], name: str) -> bool:
    return re.fullmatch(matcher["options"], name) is not None


def _chart(
    lines: list[Line], span: Span, wide: float, high: float, *, stacked: bool, bars: bool, defaults: Mapping[str, Any]
) -> str:
    left, bottom = 66.0, high - 18
    right = wide - (52 if any(line.right for line in lines) else 6)
    shapes: list[str] = []

    def x_of(when: float) -> float:
        return left + (when - span.start) / (span.end - span.start) * (right - left)

    for on_right in (False, True):
        chosen = [line for line in lines if line.right == on_right]
        if not chosen:
            continue
        tops = _stacked(chosen) if stacked else [line.values for line in chosen]
        most = max(value for values in tops for _, value in values)
        ticks = _ticks(min(most, defaults.get("max", most)), base=1024 if chosen[0].unit == "bytes" else 10)

        def y_of(value: float, top: float = ticks[-1]) -> float:
            return bottom - min(value / top, 1.0) * (bottom - 6)

        for tick in ticks:
            y = y_of(tick)
            text = escape(spelled(tick, chosen[0].unit))
            if on_right:
                shapes.append(f'<text x="{right + 6:.1f}" y="{y + 4:.1f}">{text}</text>')
            else:
                shapes.append(f'<line x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#2a2d34"/>')
                shapes.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        order = reversed(list(enumerate(zip(chosen, tops, strict=True))))
        for index, (line, values) in order:  # the upper ones first, so that the lower ones lie over them
            below = tops[index - 1] if stacked and index else []
            shapes += _shape(line, values, below, x_of, y_of, span, bars=bars)
    shapes += _times(span, x_of, high)
    return f'<svg width="{wide:.0f}" height="{high:.0f}">{"".join(shapes)}</svg>'


def _shape(
    line: Line,
    values: Values,
    below: Values,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    span: Span,
    *,
    bars: bool,
) -> list[str]:
    if bars:
        wide = max(1.0, x_of(span.start + span.step_s) - x_of(span.start) - 0.5)
        return [
            f'<rect x="{x_of(when):.1f}" y="{y_of(value):.1f}" width="{wide:.1f}" '
            f'height="{max(0.0, y_of(0) - y_of(value)):.1f}" fill="{line.colour}" opacity="0.7"/>'
            for when, value in values
            if value > 0
        ]
    floor = dict(below)
    shapes = []
    for stretch in _stretches(values, span.step_s):
        points = " ".join(f"{x_of(when):.1f},{y_of(value):.1f}" for when, value in stretch)
        back = " ".join(f"{x_of(when):.1f},{y_of(floor.get(when, 0.0)):.1f}" for when, _ in reversed(stretch))
        if line.fill:
            shapes.append(f'<polygon points="{points} {back}" fill="{line.colour}" opacity="{line.fill:.2f}"/>')
        dash = ' stroke-dasharray="8 6"' if line.dashed else ""
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="1.6"{dash}/>')
    return shapes


def _stretches(values: Values, step_s: float) -> list[Values]:
    """Cut where values are missing: a line over a gap would be made up."""
    found: list[Values] = []
    for pair in values:
        if found and pair[0] - found[-1][-1][0] < 1.5 * step_s:
            found[-1].append(pair)
        else:
            found.append([pair])
    return found


def _stacked(lines: Sequence[Line]) -> list[Values]:
    """Each line's values on top of those of the lines before it."""
    times = sorted({when for line in lines for when, _ in line.values})
    base = dict.fromkeys(times, 0.0)
    tops: list[Values] = []
    for line in lines:
        own = dict(line.values)
        base = {when: base[when] + own.get(when, 0.0) for when in times}
        tops.append(list(base.items()))
    return tops


def _times(span: Span, x_of: Callable[[float], float], high: float) -> list[str]:
    every_s = next(step for step in (30, 60, 120, 300, 600, 900, 3600, 10**9) if (span.end - span.start) / step <= 6)
    first = math.ceil(span.start / every_s) * every_s
    return [
        f'<text x="{x_of(when):.1f}" y="{high - 3:.1f}" text-anchor="middle">'
        f"{time.strftime('%H:%M:%S' if every_s < 60 else '%H:%M', time.gmtime(when))}</text>"
        for when in range(first, int(span.end) + 1, every_s)
        if x_of(when) < x_of(span.end) - 26  # half of its width
    ]


def _ticks(most: float, base: int = 10) -> list[float]:
    """Round numbers from 0 to at least `most`; of base 1024: round as multiples of its powers."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / 4
    size = float(base) ** math.floor(math.log(rough, base))
    factors = (1, 2, 2.5, 5, 10, 20, 50, 100, 200, 256, 512, 1024)
    step = next(size * factor for factor in factors if size * factor >= rough * 0.999)
    return [step * index for index in range(math.ceil(most / step * 0.999) + 1)]


def _legend(lines: Sequence[Line]) -> str:
    entries = "".join(f'<span><i style="background:{line.colour}"></i>{escape(line.name)}</span>' for line in lines)
    return f'<div class="legend">{entries}</div>'


def _table(panel: Mapping[str, Any], prometheus: Prometheus, span: Span, wide: float, high: float) -> str:
    (query,) = dashboard.queries(panel)
    rows = [labels for labels, _ in prometheus.ask(query.filled(span.rate_interval_s))]
    hidden = {name for one in panel["transformations"] for name in one["options"]["excludeByName"]}
    columns = sorted({name for row in rows for name in row} - hidden)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    cells = [[f"<td>{escape(row.get(name) or '–')}</td>" for name in columns] for row in rows]
    return f"<table><tr>{head}</tr>{''.join('<tr>' + ''.join(row) + '</tr>' for row in cells)}</table>"


def _states(panel: Mapping[str, Any], prometheus: Prometheus, span: Span, wide: float, high: float) -> str:
    left, bar = 80.0, 26
    shapes: list[str] = []

    def x_of(when: float) -> float:
        return left + (when - span.start) / (span.end - span.start) * (wide - left)

    for index, (name, values) in enumerate(_series(panel, prometheus, span)):
        y = 12 + index * (bar + 12)
        shapes.append(f'<text x="0" y="{y + bar / 2 + 4}">{escape(name)}</text>')
        for when, value in values:
            colour = _COLOURS["orange" if value >= 1 else "transparent"]
            step = x_of(when + span.step_s) - x_of(when) + 0.6
            shapes.append(f'<rect x="{x_of(when):.1f}" y="{y}" width="{step:.1f}" height="{bar}" fill="{colour}"/>')
    return f'<svg width="{wide:.0f}" height="{high:.0f}">{"".join(shapes + _times(span, x_of, high))}</svg>'


def spelled(value: float, unit: str, decimals: int | None = None) -> str:
    """A number as Grafana writes it in one of its units."""

    def number(scaled: float) -> str:
        if decimals is not None:
            return f"{scaled:.{decimals}f}"
        return f"{scaled:.3g}" if abs(scaled) < 1000 else f"{scaled:.0f}"

    if unit == "percentunit":
        return f"{number(value * 100)} %"
    if unit == "s":
        return f"{number(value)} s" if value >= 1 or value == 0 else f"{number(value * 1000)} ms"
    if unit == "bytes":
        power = min(4, int(math.log(value, 1024))) if value >= 1 else 0
        return f"{number(value / 1024**power)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    endings = {"reqps": " req/s", "lengthmm": " mm", "none": ""}
    return number(value) + endings.get(unit, unit.removeprefix("suffix:"))


def screenshot(html: Path, out: Path) -> None:
    """The page as a PNG."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
    ]
    command += [f"--window-size={WIDTH},{height()}", f"--screenshot={out.resolve()}", html.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(out) as picture:
        few_colours = picture.convert("RGB").quantize(200)
    few_colours.save(out, optimize=True)


# ------------------------------------------------------------------------------------------------------------ the load


def under_load(prometheus: Prometheus, target: Target, load: Load, seconds: float) -> None:
    """Clients that come and go, some of their requests bad, and one worker that dies."""
    register(target, load, print)
    clients = (1, 4, 12, 24, 12, 2)
    judge = Judge(load.questions)
    for index, count in enumerate(clients):
        print(f"{count} clients, {index + 1} of {len(clients)}")
        _mistakes(target, load)
        if index == 3:
            _kill_a_decoder(target)
        share_s = seconds / len(clients)
        asyncio.run(closed_loop(target, load.questions, clients=count, seconds=share_s, warmup_s=0.0, judge=judge))
    prometheus.wait_for_scrape()


def _mistakes(target: Target, load: Load) -> None:
    """Bodies that are no requests, and masks with nothing in them."""
    bodies = [(b"\xc1", 400), (msgspec.msgpack.encode({}), 422)]
    question = msgspec.msgpack.decode(load.questions[-1].body)
    masks = question["detections"]["masks"]
    height_px, width_px = masks[0]["size"]
    question["detections"]["masks"] = [encode_rle(np.zeros((height_px, width_px), dtype=bool)) for _ in masks]
    bodies.append((msgspec.msgpack.encode(question), 200))
    for body, status in bodies * 5:
        headers = {"Content-Type": load.questions[-1].content_type}
        answer = httpx.post(f"{target.url}/api/v1/pose_estimation", content=body, headers=headers, timeout=60)
        if answer.status_code != status:
            raise RuntimeError(f"expected {status}: {answer.text[:500]}")


def _kill_a_decoder(target: Target) -> None:
    for folder in Path("/dev/shm").glob(f"pem-server-{target.pid}-*"):
        for worker in read_states(folder):
            if worker.stage == "decode" and worker.alive:
                os.kill(worker.pid, signal.SIGKILL)
                return


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, after a load of its own unless told of a Prometheus."""
    parser = argparse.ArgumentParser(description="The dashboard as a picture, drawn without Grafana.")
    parser.add_argument(
        "--prometheus", metavar="URL", help="draw what this one has seen, in place of a load of our own"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="with --prometheus: how far back (60)")
    parser.add_argument(
        "--scrape-interval", type=int, default=15, help="with --prometheus: its scrape interval, s (15)"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="without: how long the load lasts (300)")
    parser.add_argument("--out", type=Path, default=Path("docs/images/dashboard.png"), help="the picture")
    parser.add_argument("--html", type=Path, help="keep the page")
    chosen = parser.parse_args(arguments)
    for program in ("chromium",) if chosen.prometheus else ("chromium", "prometheus"):
        if shutil.which(program) is None:
            parser.exit(1, f"{program} is not installed (Debian: the package {program})\n")
    with tempfile.TemporaryDirectory(prefix="pem-dashboard-") as name:
        folder = Path(name)
        if chosen.prometheus:
            with Prometheus(chosen.prometheus) as prometheus:
                text = _drawn(prometheus, time.time() - chosen.minutes * 60, chosen.scrape_interval)
        else:
            load = prepare(Mix(masks=(1, 3, 6), scenes=2, objects=4))
            settings = {"metrics.objects": ",".join(sorted(load.objects)[:3])}
            with own_server(settings) as target, running_prometheus(target.url, folder) as prometheus:
                begun = time.time()
                under_load(prometheus, target, load, chosen.seconds)
                text = _drawn(prometheus, begun, 1)
        html = chosen.html or folder / "dashboard.html"
        html.write_text(text)
        screenshot(html, chosen.out)
    print(f"wrote {chosen.out}")


def _drawn(prometheus: Prometheus, start: float, interval_s: int) -> str:
    end = time.time()
    step_s = max(interval_s, round((end - start) / 300))
    span = Span(start=start, end=end, step_s=step_s, interval_s=interval_s)
    words = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(start))} to {time.strftime('%H:%M UTC', time.gmtime(end))}"
    return page(prometheus, span, f"{words}; drawn by benchmarks/service/dashboard_picture.py")


if __name__ == "__main__":
    main()
