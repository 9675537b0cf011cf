"""The client that a request counts for: its key or, without one, the address that it came from."""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Iterator

import msgspec
import pytest

from serve.gateway import keys
from tests.running import RunningServer
from tests.serve.special import Special
from tests.serve.tiny import POSE, one


@pytest.fixture
def locked(special: Special) -> Iterator[str]:
    """Give the special server one key during the test."""
    path = special.server.data / "keys.json"
    yield keys.add(path, "camera")
    path.unlink()


def plain(server: RunningServer, **headers: str) -> tuple[int, str | None]:
    """Send a pose request with headers exactly as given, trailing blanks included; return status and refusal code."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        headers = {"Content-Type": "application/msgpack", **headers}
        connection.request("POST", POSE, msgspec.msgpack.encode(one()), headers)
        answer = connection.getresponse()
        error = json.loads(answer.read()).get("error") or {}
        return answer.status, error.get("code")
    finally:
        connection.close()


def counted_for(server: RunningServer, **headers: str) -> str:
    """Return the client that a pose request counted for, from the log."""
    request_id = secrets.token_hex(8)
    assert plain(server, **{"X-Request-Id": request_id, **headers}) == (200, None)
    (line,) = server.logged(request_id)
    client: str = json.loads(line)["client"]
    return client


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host", "X-Client-IP", "True-Client-IP"]
)
def test_nobody_can_claim_to_be_somebody_else(server: RunningServer, header: str) -> None:
    assert counted_for(server) == "address 127.0.0.1"
    assert counted_for(server, **{header: "203.0.113.9"}) == "address 127.0.0.1"


def test_a_key_is_who_it_was_made_for_from_wherever_it_comes(special: Special, locked: str) -> None:
    for headers in (
        {"X-API-Key": locked},
        {"Authorization": f"Bearer {locked}"},
        {"Authorization": f"bearer   {locked}", "X-Forwarded-For": "203.0.113.9"},
    ):
        assert counted_for(special.server, **headers) == "key camera"


@pytest.mark.parametrize("empty", ["Bearer", "Bearer ", "bearer  ", "Basic dXNlcjpwdw==", ""])
def test_an_authorization_without_a_key_in_it_does_not_hide_a_good_key(
    special: Special, locked: str, empty: str
) -> None:
    good = {"X-API-Key": locked, "Authorization": empty}
    assert counted_for(special.server, **good) == "key camera"
    assert plain(special.server, Authorization=empty) == (401, "key_missing")


def test_a_wrong_key_beside_a_good_one_is_wrong(special: Special, locked: str) -> None:
    both = {"X-API-Key": locked, "Authorization": "Bearer pem_guess"}
    assert plain(special.server, **both) == (403, "key_wrong")
