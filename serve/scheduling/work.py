"""A task's face: what the queue needs of a request, whatever was asked. Jobs and recordings know it by that, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from workers.messages import Failure, PassRecord


class Answered(Protocol):
    """What the backend answers for one share of the work."""

    @property
    def passes(self) -> Sequence[PassRecord]:
        """What was computed with it, each pass told once: the queue's measure of speed."""


A = TypeVar("A", bound=Answered, covariant=True)


class Share(Protocol):
    """A bounded run of a request's work, sent to the backend in one message."""

    @property
    def share_id(self) -> str:
        """Names it in the workers' states and in the log; begins with the request's id and a slash."""

    @property
    def cost(self) -> int:
        """In the task's own count, at least 1."""

    def message(self, *, path: str | None, inline: bytes) -> bytes:
        """What is sent: the encoded request lies in the file `path`, or goes along as `inline`."""


class Work(Protocol[A]):
    """One request on its way through the queue."""

    @property
    def route(self) -> str:
        """Of the backend."""

    @property
    def request_id(self) -> str:
        """Ours, unlike any other's."""

    @property
    def engine(self) -> str:
        """Whose measured speed its cost counts in."""

    @property
    def cost(self) -> int:
        """All of it, in the task's own count; 0 where there is nothing to compute."""

    def encoded(self) -> bytes:
        """The request as its stages read it. Asked for once: afterwards nobody holds its pictures."""

    def split(self, most: int) -> Sequence[Share]:
        """Its shares in order, none above `most`; at least one."""

    def read(self, answer: bytes) -> A | Failure:
        """The backend's answer to a share."""
