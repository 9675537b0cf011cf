"""A picture of the Grafana dashboard's curves: its queries, answered by a real Prometheus, drawn by plotly.

    python -m benchmarks.service.dashboard [--seconds 75] [--out docs/images/dashboard.png]

starts a server and a Prometheus that reads it every second, has clients come to it, asks the queries of the dashboard's
curves over that time, and draws them. Panels without an answer are left out. Needs Debian's packages prometheus and
chromium; plotly comes with Open3D.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.service.prometheus import Prometheus, running_prometheus
from pem.bench.drive import closed_loop
from pem.bench.judge import Judge
from pem.bench.mix import Mix, prepare
from pem.bench.server import own_server, register

PATH = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "pem-server.json"
PANELS: list[dict[str, Any]] = json.loads(PATH.read_text())["panels"]
CLIENTS = (1, 6, 16)  # at a time, each number for its share of the seconds
RATE_S = 10  # that a rate is taken over
COLUMNS, WIDTH_PX, ROW_PX, HEAD_PX = 3, 1500, 230, 120
UNITS = {"none": "", "reqps": "/s", "lengthmm": "mm"}  # where Grafana's word for it is not the unit


def filled(target: Mapping[str, str], rate_s: int = RATE_S, instance: str = ".*", object_: str = ".*") -> str:
    """The PromQL of a panel's target with its variables' values put in; by default those of Grafana's "All"."""
    values = {"$__rate_interval": f"{rate_s}s", "$instance": instance, "$object": object_}
    return re.sub(r"\$\w+", lambda match: values[match[0]], target["expr"])


def legend(target: Mapping[str, str], labels: Mapping[str, str]) -> str:
    """What a series of a target is called; labels stand in double braces."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], match[0]), target["legendFormat"])


def page(prometheus: Prometheus, start: float, end: float, title: str) -> tuple[str, int]:
    """The curves between two unix times as HTML that loads nothing, and its height in pixels."""
    from plotly.subplots import make_subplots

    found: list[tuple[str, dict[str, Any], list[tuple[str, list[tuple[float, float]]]]]] = []
    for panel in (one for one in PANELS if one["type"] == "timeseries"):
        lines = []
        for target in panel["targets"]:
            answer = prometheus.ask_range(filled(target), start=start, end=end, step_s=1)
            lines += [(legend(target, labels), values) for labels, values in answer]
        unit = panel["fieldConfig"]["defaults"]["unit"].removeprefix("suffix:").strip()
        if lines:
            found.append((f"<b>{panel['title']}</b> {UNITS.get(unit, unit)}", panel["fieldConfig"], lines))
    rows = -(-len(found) // COLUMNS)
    spacing = {"vertical_spacing": 0.3 / rows, "horizontal_spacing": 0.13}
    specs, titles = [[{"secondary_y": True}] * COLUMNS] * rows, [title for title, _, _ in found]
    figure = make_subplots(rows, COLUMNS, specs=specs, subplot_titles=titles, **spacing)
    for index, (_, fields, lines) in enumerate(found):
        place, box = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}, f"legend{index + 1}"
        on_right = {one["matcher"]["options"] for one in fields["overrides"] if "axisPlacement" in json.dumps(one)}
        stacked = fields["defaults"]["custom"]["stacking"]["mode"] == "normal"
        look = {"mode": "lines", "stackgroup": "all" if stacked else None, "legend": box}
        for number, (name, values) in enumerate(lines):
            right = name in on_right
            label = (f"{name}, right axis" if right else name).replace(", ", "<br>")
            line = {"color": f"hsl({(number * 137 + 210) % 360},60%,45%)", "width": 1.5}
            x, y = [when - start for when, _ in values], [value for _, value in values]
            figure.add_scatter(x=x, y=y, name=label, secondary_y=right, line=line, **look, **place)
        axes = figure.get_subplot(**place, secondary_y=False)
        beside = {"x": axes.xaxis.domain[1] + 0.02, "y": axes.yaxis.domain[1], "yanchor": "top"}
        figure.update_layout({box: beside | {"font_size": 11, "bgcolor": "rgba(0,0,0,0)"}})
    figure.update_annotations(font_size=14)
    figure.update_yaxes(rangemode="tozero", exponentformat="SI")
    figure.update_yaxes(secondary_y=True, tickmode="auto", showgrid=False)
    figure.update_xaxes(range=[0, end - start], ticksuffix=" s")
    height_px = rows * ROW_PX + HEAD_PX
    margin = {"t": HEAD_PX, "b": 40, "l": 60, "r": 180, "autoexpand": False}
    figure.update_layout(title=title, width=WIDTH_PX, height=height_px, template="plotly_white", margin=margin)
    return figure.to_html(include_plotlyjs=True, config={"staticPlot": True}), height_px


def main() -> None:
    """Put load on a server, ask, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.dashboard", description=__doc__)
    parser.add_argument("--seconds", type=float, default=75.0, help="how long the load lasts (75)")
    parser.add_argument("--out", type=Path, default=Path("docs/images/dashboard.png"), help="the picture")
    options = parser.parse_args()
    if shutil.which("chromium") is None:
        parser.error("chromium is not installed (Debian: the package chromium)")
    load = prepare(Mix(masks=(1, 3, 6), scenes=2, objects=4))
    with tempfile.TemporaryDirectory() as name, own_server({"metrics.objects": ",".join(load.objects)}) as target:
        register(target, load)
        with running_prometheus(target.url, Path(name)) as prometheus:
            prometheus.wait_for_scrape()
            start, judge, each_s = time.time(), Judge(load.questions), options.seconds / len(CLIENTS)
            for count in CLIENTS:
                run = closed_loop(target, load.questions, clients=count, seconds=each_s, warmup_s=0.0, judge=judge)
                asyncio.run(run)
            prometheus.wait_for_scrape()
            title = f"The dashboard's queries, answered by a real Prometheus during {options.seconds:.0f} s of load"
            title += f"<br><sub>from {', then '.join(map(str, CLIENTS))} clients; drawn by "
            title += "benchmarks/service/dashboard.py, Grafana draws the same panels in its own style</sub>"
            html, height_px = page(prometheus, start, time.time(), title)
        path = Path(name, "dashboard.html")
        path.write_text(html)
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH_PX},{height_px}"]
        flags += ["--virtual-time-budget=10000", f"--screenshot={options.out.resolve()}"]
        subprocess.run(["chromium", *flags, path.as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
