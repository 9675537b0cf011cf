"""The dashboard: its JSON is sound, and every query of it is answered by a really running Prometheus, with data."""

from __future__ import annotations

import json
import re
import time
from html import escape
from itertools import combinations
from typing import Any

import pytest

from benchmarks.service import dashboard, dashboard_picture
from tests.deploy.conftest import Watched, every_kind_of_request
from tests.deploy.documented import families
from tests.deploy.test_prometheus import RULES

DASHBOARD = dashboard.load()
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
DRAWN = [panel for panel in PANELS if panel["type"] != "row"]
QUERIES = [query for panel in DRAWN for query in dashboard.queries(panel)]
WITHOUT_DATA = {"Device memory"}  # there is none on a CPU
NOT_SHOWN = {"pose_object_cache_hits_total"}  # misses are what costs
UNITS = {"none", "reqps", "s", "percentunit", "bytes", "lengthmm", "suffix:/s", "suffix: cores"}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


@pytest.mark.parametrize("panel", DRAWN, ids=lambda panel: str(panel["title"]))
def test_a_panel_has_words_a_unit_and_a_chosen_data_source(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 15
    assert panel["type"] in ("stat", "timeseries", "table", "state-timeline")
    if panel["type"] in ("stat", "timeseries"):
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_dashboard_shows_every_family_that_is_ours_or_says_which_not() -> None:
    documented = families()
    text = json.dumps(DASHBOARD)
    shown = {name for name, family in documented.items() if any(f"{one}{{" in text for one in family.series)}
    ours = {name for name in documented if name.startswith("pose_")}
    assert ours - shown == NOT_SHOWN
    known = {one for family in documented.values() for one in family.series}
    recorded = set(re.findall(r"record: (\S+)", (RULES / "recording.yml").read_text()))
    for query in QUERIES:
        bare = re.sub(r'"[^"]*"', "", query.expression)
        assert set(re.findall(r"(?<![\w:])(?:pose|mosec_service)_\w+", bare)) <= known, query
        assert set(re.findall(r"(?:pem|instance|instance_code|instance_object):[\w:]+", bare)) <= recorded, query


def test_only_variables_that_exist_are_used() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "instance", "object"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__all"} == variables | {"__rate_interval"}


@pytest.fixture(scope="module")
def busy(watched: Watched) -> Watched:
    """The watched server, its rates above zero: something of everything came between two scrapes."""
    watched.prometheus.wait_for_scrape()
    every_kind_of_request(watched)
    watched.prometheus.wait_for_scrape()
    return watched


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel}: {query.legend}")
def test_a_query_is_answered_with_data(busy: Watched, query: dashboard.Query) -> None:
    end = time.time()
    found = busy.prometheus.ask_range(query.filled(120), start=end - 30, end=end, step_s=1)
    numbers = [value for _, values in found for _, value in values if value == value]
    assert bool(numbers) != (query.panel in WITHOUT_DATA), query
    if query.panel not in WITHOUT_DATA:
        names = {query.name(labels) for labels, _ in found}
        assert len(names) == len(found) or query.legend == "", "a legend for each line"
        assert not any("{{" in name for name in names)


def test_the_choices_of_the_variables_come_from_prometheus(busy: Watched) -> None:
    for variable in DASHBOARD["templating"]["list"][1:]:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert match is not None
        selector = dashboard.Query("", match[1], "").filled(60)
        values = busy.prometheus.get(f"label/{match[2]}/values", **{"match[]": selector})
        assert values == sorted(
            [busy.server.url.removeprefix("http://")] if match[2] == "instance" else ["other", "stepped"]
        )


def test_choosing_one_object_leaves_the_others_out(busy: Watched) -> None:
    (query,) = [query for query in QUERIES if query.panel == "Confidence by object"]
    chosen = {"instance": ".*", "object": "stepped"}
    found = busy.prometheus.ask(query.filled(120, chosen))
    assert [labels["object"] for labels, _ in found] == ["stepped"]
    assert 0 < found[0][1] <= 1


# ----------------------------------------------------------------------------------------------------- our own drawing


def test_every_panel_is_drawn_with_data(busy: Watched) -> None:
    every_kind_of_request(busy)  # as lately as the picture shows
    busy.prometheus.wait_for_scrape()
    end = time.time()
    span = dashboard_picture.Span(start=end - 30, end=end, step_s=1, interval_s=1)
    html = dashboard_picture.page(busy.prometheus, span, "a test")
    for panel in PANELS:
        assert f">{escape(panel['title'])}</h" in html
    assert html.count("No data") == len(WITHOUT_DATA)
    assert html.count('class="big">–<') == 0
    assert "NaN" not in html
    assert html.count("<polyline") > 30


@pytest.mark.parametrize(
    "value, unit, decimals, words",
    [
        (0.0312, "percentunit", 1, "3.1 %"),
        (0.02, "s", None, "20 ms"),
        (2.5, "s", None, "2.5 s"),
        (3 * 2**30, "bytes", None, "3 GiB"),
        (0, "bytes", None, "0 B"),
        (12.34, "reqps", 1, "12.3 req/s"),
        (1.5, "suffix: cores", None, "1.5 cores"),
        (1200, "none", None, "1200"),
    ],
)
def test_numbers_are_spelled_in_their_unit(value: float, unit: str, decimals: int | None, words: str) -> None:
    assert dashboard_picture.spelled(value, unit, decimals) == words


@pytest.mark.parametrize(
    "most, base, ticks",
    [
        (0, 10, [0, 1]),
        (1, 10, [0, 0.25, 0.5, 0.75, 1]),
        (7, 10, [0, 2, 4, 6, 8]),
        (3 * 2**30, 1024, [0, 2**30, 2**31, 3 * 2**30]),
    ],
)
def test_an_axis_has_round_numbers_up_to_the_largest(most: float, base: int, ticks: list[float]) -> None:
    assert dashboard_picture._ticks(most, base) == ticks
