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
    """The request itself is wrong (400, 405, 408, 413, 415, 422): sending it again will not help."""


class KeyRefused(RequestRefused):
    """The API key is missing or wrong (401, 403)."""


class NotFound(RequestRefused):
    """No such object or CAD file (404)."""


class Overloaded(RequestRefused):
    """Over capacity, or not ready (429, 503), after all retries; `retry_after_s` says when to come back."""


class DeadlinePassed(RequestRefused):
    """The deadline passed before the answer was ready (504)."""


class ServerFailed(RequestRefused):
    """The server's fault (500), or that of the ISM server behind it (502)."""


#: HTTP status -> what it is; any other below 500 is BadInput, from 500 on ServerFailed
BY_STATUS: Final[dict[int, type[RequestRefused]]] = {
    401: KeyRefused,
    403: KeyRefused,
    404: NotFound,
    429: Overloaded,
    503: Overloaded,
    504: DeadlinePassed,
}
