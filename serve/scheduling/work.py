"""The interface between the queue and the tasks. Jobs and recordings use it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from workers.messages import Failure, PassRecord


class Answered(Protocol):
    """The backend's answer to one share of the work."""

    @property
    def passes(self) -> Sequence[PassRecord]:
        """Return the passes computed for it, each counted once: the queue's measure of speed."""


A = TypeVar("A", bound=Answered, covariant=True)


class Share(Protocol):
    """A bounded run of a request's work, sent to the backend in one message."""

    @property
    def share_id(self) -> str:
        """Return its name in the workers' states and in the log: the request's id, a slash, and more."""

    @property
    def cost(self) -> int:
        """Return the cost in the task's own count, at least 1."""

    def message(self, *, path: str | None, inline: bytes) -> bytes:
        """Return the message to send: the encoded request lies in the file `path`, or goes along as `inline`."""


class Work(Protocol[A]):
    """One request on its way through the queue."""

    @property
    def route(self) -> str:
        """Return the route of the backend."""

    @property
    def request_id(self) -> str:
        """Return the server's own id of the request, which is unique."""

    @property
    def engine(self) -> str:
        """Return the engine in whose measured speed the cost counts."""

    @property
    def cost(self) -> int:
        """Return the total cost, in the task's own count; 0 if there is nothing to compute."""

    def encoded(self) -> bytes:
        """Return the request as its stages read it. Call it once: afterwards nobody holds its pictures."""

    def split(self, most: int) -> Sequence[Share]:
        """Return its shares in order, none above `most`; at least one."""

    def read(self, answer: bytes) -> A | Failure:
        """Decode the backend's answer to a share."""
