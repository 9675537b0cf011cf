"""Base classes of settings tables, so that each engine can define its own."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A settings table. An unknown key is an error, so that no typo passes silently."""


def says(words: str, *, unit: str | None = None, unset: str | None = None, example: str | None = None) -> Meta:
    """Note the words of one setting on its type: the manual and the command line take them from there.

    `unset` says what holds where the default is None, `example` shows a value for such a setting.
    """
    extra: dict[str, Any] = {"unit": unit, "unset": unset, "example": example}
    return Meta(description=words, extra={name: value for name, value in extra.items() if value is not None})


class WeightsTable(Table, frozen=True):
    """The settings that every engine with weights has."""

    weights: str  # a file in the folder of weights, or its path; workers get an absolute one
    fallback: Annotated[
        bool,
        says("Where the engine cannot be loaded, another answers for it, with degraded: true. false: do not start."),
    ] = True
