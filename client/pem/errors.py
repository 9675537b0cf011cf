"""The client's errors: one tree below PemError, so that one `except` is enough."""

from __future__ import annotations

from typing import Final


class PemError(Exception):
    """Base of the errors of this client."""


class ConnectionFailed(PemError):
    """No server answers at the address, or the connection broke."""


class TimedOut(ConnectionFailed):
    """The server did not answer within the client's own time."""


class NoPose(PemError):
    """The code asked for the pose of a detection that has none."""


class OnboardingFailed(PemError):
    """The server could not build its models of a CAD object, or not in time."""


class RequestRefused(PemError):
    """The server refused the request or failed; the subclasses say whose fault it is."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{detail} [{status} {code}{f', at {field}' if field else ''}]")
        self.status = status
        self.code = code  # stable: docs/api.md lists them
        self.detail = detail
        self.field = field  # path of the request field at fault
        self.request_id = request_id  # also in the server's log
        self.retry_after_s = retry_after_s


class BadInput(RequestRefused):
    """The request itself is wrong (400, 405, 408, 413, 415, 422): only a changed request will help."""


class KeyRefused(RequestRefused):
    """The API key is missing or wrong (401, 403)."""


class NotFound(RequestRefused):
    """No such object or CAD file (404)."""


class NotReady(RequestRefused):
    """The server is loading, warming up or restarting its workers (503 `not_ready`): `Client.wait_ready` waits for it.

    Raised after all retries.
    """


class Overloaded(RequestRefused):
    """A passing state: too many requests (429), or a server that is onboarding or shutting down (503).

    Raised after all retries; `retry_after_s` says when to come back.
    """


class DeadlinePassed(RequestRefused):
    """The deadline passed before the answer was ready (504)."""


class ServerFailed(RequestRefused):
    """The server failed (500, 503 `worker_lost`), the ISM server failed (502), or the operator must act.

    The operator must act if the disk is full (503 `storage_full`) or no ISM server is configured (503 `no_ism`).
    """


#: error code -> exception, if the status is not enough
BY_CODE: Final[dict[str, type[RequestRefused]]] = {
    "not_ready": NotReady,
    "worker_lost": ServerFailed,
    "storage_full": ServerFailed,
    "no_ism": ServerFailed,
}

#: HTTP status -> exception; any other status below 500 is BadInput, from 500 on ServerFailed
BY_STATUS: Final[dict[int, type[RequestRefused]]] = {
    401: KeyRefused,
    403: KeyRefused,
    404: NotFound,
    429: Overloaded,
    503: Overloaded,
    504: DeadlinePassed,
}


def kind_of(status: int, code: str) -> type[RequestRefused]:
    """Return the exception for a refusal; for a code that this client does not know, the status decides."""
    by_status = BY_STATUS.get(status, BadInput if status < 500 else ServerFailed)
    return BY_CODE.get(code, by_status)
