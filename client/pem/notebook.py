"""HTML of results for notebooks, without styles, so that it follows the notebook's theme."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from html import escape


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return an HTML table of texts; escapes each of them."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(png: bytes) -> str:
    """Return an HTML image that holds the PNG itself."""
    return f'<img alt="overlay" src="data:image/png;base64,{b64encode(png).decode("ascii")}">'
