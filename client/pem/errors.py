"""What the client raises on purpose: one tree below PemError, so that one `except` is enough."""

from __future__ import annotations

from typing import Final


class PemError(Exception):
    """Base of everything that this client raises on purpose."""


class ConnectionFailed(PemError):
    """No server answers at the address, or the connection broke."""


class TimedOut(ConnectionFailed):
    """The server did not answer within the client's own time."""


class NoPose(PemError):
    """The pose of a detection that has none was asked for."""


class OnboardingFailed(PemError):
    """The server could not build its models of a CAD object, or not in time."""


class RequestRefused(PemError):
    """The server answered that it will not, or cannot; the subclasses say whose fault it is."""

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
        self.request_id = request_id  # the server's log has it
        self.retry_after_s = retry_after_s


class BadInput(RequestRefused):
    """The request itself is wrong (400, 405, 408, 413, 415, 422): only another one will help."""


class KeyRefused(RequestRefused):
    """The API key is missing or wrong (401, 403)."""


class NotFound(RequestRefused):
    """No such object or CAD file (404)."""


class NotReady(RequestRefused):
    """The server is loading, warming up or restarting its workers (503 `not_ready`): `Client.wait_ready` waits for it.

    Raised after all retries.
    """


class Overloaded(RequestRefused):
    """What passes by itself: too many requests (429), or a server that is onboarding or shutting down (503).

    Raised after all retries; `retry_after_s` says when to come back.
    """


class DeadlinePassed(RequestRefused):
    """The deadline passed before the answer was ready (504)."""


class ServerFailed(RequestRefused):
    """The server's fault (500, 503 `worker_lost`), the ISM server's (502), or what its operator must mend: a full disk
    (503 `storage_full`), no ISM server configured (503 `no_ism`)."""


#: error code -> what it is, where its status does not tell
BY_CODE: Final[dict[str, type[RequestRefused]]] = {
    "not_ready": NotReady,
    "worker_lost": ServerFailed,
    "storage_full": ServerFailed,
    "no_ism": ServerFailed,
}

#: HTTP status -> what it is; any other below 500 is BadInput, from 500 on ServerFailed
BY_STATUS: Final[dict[int, type[RequestRefused]]] = {
    401: KeyRefused,
    403: KeyRefused,
    404: NotFound,
    429: Overloaded,
    503: Overloaded,
    504: DeadlinePassed,
}


def kind_of(status: int, code: str) -> type[RequestRefused]:
    """The error that a refusal becomes; a code that this client does not know goes by its status."""
    by_status = BY_STATUS.get(status, BadInput if status < 500 else ServerFailed)
    return BY_CODE.get(code, by_status)
