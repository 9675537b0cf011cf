"""The dashboard: its JSON is sound, and a running Prometheus answers every query of it with data."""

from __future__ import annotations

import json
import re
import time
from itertools import combinations
from typing import Any

import pytest

from benchmarks.service import dashboard
from tests.deploy.conftest import Watched, every_kind_of_request
from tests.deploy.documented import families
from tests.deploy.test_prometheus import RULES

DASHBOARD = json.loads(dashboard.PATH.read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
DRAWN = [panel for panel in PANELS if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in DRAWN for target in panel["targets"]]
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
    for _, target in TARGETS:
        bare = re.sub(r'"[^"]*"', "", target["expr"])
        assert set(re.findall(r"(?<![\w:])(?:pose|mosec_service)_\w+", bare)) <= known, target
        assert set(re.findall(r"(?:pem|instance|instance_code|instance_object):[\w:]+", bare)) <= recorded, target


def test_only_variables_that_exist_are_used() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "instance", "object"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__all"} == variables | {"__rate_interval"}


@pytest.fixture(scope="module")
def busy(watched: Watched) -> Watched:
    """Make the watched server busy between two scrapes with each kind of request, so that its rates are above zero."""
    watched.prometheus.wait_for_scrape()
    every_kind_of_request(watched)
    watched.prometheus.wait_for_scrape()
    return watched


@pytest.mark.slow
@pytest.mark.parametrize("panel, target", TARGETS, ids=[f"{panel}: {one['legendFormat']}" for panel, one in TARGETS])
def test_a_query_is_answered_with_data(busy: Watched, panel: str, target: dict[str, str]) -> None:
    end = time.time()
    found = busy.prometheus.ask_range(dashboard.filled(target, 120), start=end - 30, end=end, step_s=1)
    numbers = [value for _, values in found for _, value in values if value == value]
    assert bool(numbers) != (panel in WITHOUT_DATA), target
    if panel not in WITHOUT_DATA:
        names = {dashboard.legend(target, labels) for labels, _ in found}
        assert len(names) == len(found) or target["legendFormat"] == "", "a legend for each line"
        assert not any("{{" in name for name in names)


@pytest.mark.slow
def test_the_choices_of_the_variables_come_from_prometheus(busy: Watched) -> None:
    for variable in DASHBOARD["templating"]["list"][1:]:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert match is not None
        selector = dashboard.filled({"expr": match[1]})
        values = busy.prometheus.get(f"label/{match[2]}/values", **{"match[]": selector})
        assert values == sorted(
            [busy.server.url.removeprefix("http://")] if match[2] == "instance" else ["other", "stepped"]
        )


@pytest.mark.slow
def test_choosing_one_object_leaves_the_others_out(busy: Watched) -> None:
    (target,) = [target for panel, target in TARGETS if panel == "Confidence by object"]
    found = busy.prometheus.ask(dashboard.filled(target, 120, object_="stepped"))
    assert [labels["object"] for labels, _ in found] == ["stepped"]
    assert 0 < found[0][1] <= 1


@pytest.mark.slow
def test_the_picture_has_every_curve_that_has_data_and_loads_nothing(busy: Watched) -> None:
    end = time.time()
    html, height_px = dashboard.page(busy.prometheus, end - 120, end, "a test")
    for panel in (panel for panel in DRAWN if panel["type"] == "timeseries"):
        assert (rf"u003e{panel['title']}\u003c" in html) != (panel["title"] in WITHOUT_DATA), panel["title"]
    assert height_px > 1000
    assert 'src="http' not in html
