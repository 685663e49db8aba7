"""Pieces of HTML that every page is made of."""

from __future__ import annotations

import html
from typing import Any


def escaped(value: Any) -> str:
    """Return a value as text that stands for itself in HTML, within quotation marks too."""
    return html.escape(str(value), quote=True)


def scrolling(table: str, label: str) -> str:
    """Wrap a table so that it scrolls by itself on a narrow screen, by keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{escaped(label)}" tabindex="0">{table}</div>\n'
