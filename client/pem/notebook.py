"""How results look in a notebook: HTML without styles of its own, so that it follows the notebook's theme."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from html import escape


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts, each escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(png: bytes) -> str:
    """A PNG inside the page."""
    return f'<img alt="overlay" src="data:image/png;base64,{b64encode(png).decode("ascii")}">'
