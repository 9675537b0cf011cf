"""`pem serve --print-config`: every setting as TOML with its description, as in `configs/default.toml`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

from posekit import registry
from serve.settings import Setting, Settings, every

_HEAD = """\
# Every setting of the server. Keep the lines that you change, and start with: pem serve --config FILE
#
# Above each setting: what it is for; then its unit, its range, its default, its environment variable, and its option
# of `pem serve` where it has one. A line that begins with "# " and a name is not set: take the "# " away and change it.
# The environment wins over this file, the command line over both. A variable lists several values with commas.
# MB are 2^20 bytes.
"""


def of(settings: Settings, *, options: Collection[str]) -> str:
    """Return the manual with the values of `settings`; `options` names those that are options of `pem serve`."""
    flags = {f"PEM_{name}".upper(): f"--{name.replace('_', '-')}" for name in options}
    tables: dict[str, list[Setting]] = {}
    for setting in every().values():
        tables.setdefault("".join(setting.path[:-1]), []).append(setting)
    blocks = [_HEAD]
    for name in sorted(tables, key=registry.names().__contains__):  # tables of engines last
        table = getattr(settings, name) if name else settings
        if name:
            words = (type(table).__doc__ or "").strip().partition("\n")[0]
            blocks.append("\n".join([*_comment(words), f"[{name}]"]) + "\n")
        blocks += [_block(one, getattr(table, one.path[-1]), flags.get(one.variable)) for one in tables[name]]
    return "\n".join(blocks)


def _block(setting: Setting, value: Any, option: str | None) -> str:
    default = setting.note("unset") if setting.default is None else _value(setting.default)
    facts = [setting.note("unit"), _range(setting), f"default {default}", setting.variable, option]
    line = f"{setting.path[-1]} = {_value(setting.note('example') if value is None else value)}"
    lines = [*_comment(setting.words), *_comment("; ".join(fact for fact in facts if fact))]
    return "\n".join([*lines, f"# {line}" if value is None else line]) + "\n"


def _comment(words: str) -> Iterator[str]:
    yield from textwrap.wrap(words, 120, initial_indent="# ", subsequent_indent="# ")


def _range(setting: Setting) -> str:
    if setting.choices:
        return " | ".join(_value(one) for one in setting.choices)
    if setting.kind is bool:
        return "true | false"
    least, over, most = (setting.note(bound) for bound in ("ge", "gt", "le"))
    if least is not None and most is not None:
        return f"{_value(least)} to {_value(most)}"
    words = [
        "" if least is None else f"{_value(least)} at least",
        "" if over is None else f"over {_value(over)}",
        "" if most is None else f"{_value(most)} at most",
    ]
    return ", ".join(word for word in words if word)


def _value(value: Any) -> str:
    """Write a value as TOML does."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:_}"
    return json.dumps(value, ensure_ascii=False)
