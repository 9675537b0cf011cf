"""What a table of settings is, so that an engine can have one of its own."""

from __future__ import annotations

import msgspec


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A settings table; an unknown key is an error, so a typo never passes silently."""


class WeightsTable(Table, frozen=True):
    """What the settings of every engine with weights hold."""

    weights: str  # a file in the folder of weights, or its path; workers get an absolute one
    fallback: bool = True  # where the engine cannot be loaded its stand-in answers, degraded; false: no start
