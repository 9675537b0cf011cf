"""The table of routes: the label of each path, its log level, and its readers."""

from __future__ import annotations

import pytest

from serve.errors import CODES
from serve.gateway import routes


@pytest.mark.parametrize(
    "path, label, name",
    [
        ("/api/v1/objects/9f2c", "/api/v1/objects/{id}", "9f2c"),
        ("/api/v1/objects/9f2c/../..", "other", "9f2c/../.."),
        ("/api/v1/objects/{id}", "/api/v1/objects/{id}", "{id}"),
        ("/api/v1/objects/", "/api/v1/objects/{id}", ""),
        ("/wp-admin.php", "other", ""),
        ("/", "other", ""),
        ("/livez", "/livez", ""),
    ],
)
def test_a_path_becomes_its_route(path: str, label: str, name: str) -> None:
    found = routes.find(path)
    assert (found.label, found.name) == (label, name)


def test_a_path_that_is_no_route_has_no_methods() -> None:
    for path in ("/api/v1", "/api/v2/status", ""):
        assert not routes.find(path).methods


def test_what_machines_ask_every_few_seconds_is_quiet() -> None:
    quiet = {route.path for route in routes.ROUTES if route.quiet == "probe"}
    assert {"/livez", "/readyz", "/metrics"} <= quiet
    assert not quiet & {route.path for route in routes.ROUTES if route.method != "GET" or route.timed}


def test_nothing_that_changes_something_is_quiet() -> None:
    assert {route.method for route in routes.ROUTES if route.quiet is not None} == {"GET"}


def test_the_routes_of_a_path_agree_on_what_is_told_of_it() -> None:
    told: dict[str, tuple[object, ...]] = {}
    for route in routes.ROUTES:
        facts = (route.label, route.timed, route.failure)
        assert told.setdefault(route.path, facts) == facts


def test_every_failure_that_a_route_names_is_in_the_vocabulary() -> None:
    assert {code for route in routes.ROUTES for code in route.codes} <= CODES.keys()


def test_no_operation_stands_there_twice() -> None:
    operations = [(route.method, route.path) for route in routes.ROUTES]
    assert len(operations) == len(set(operations))
