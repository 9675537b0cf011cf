"""Base classes of settings tables, so that each engine can define its own."""

from __future__ import annotations

import msgspec


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A settings table. An unknown key is an error, so that no typo passes silently."""


class WeightsTable(Table, frozen=True):
    """The settings that every engine with weights has."""

    weights: str  # a file in the folder of weights, or its path; workers get an absolute one
    fallback: bool = True  # where the engine cannot be loaded its stand-in answers, degraded; false: no start
