"""Renders tables and lists as text."""

import io
from collections.abc import Callable
from typing import Any

WIDTH = 120
"""Width of a table that does not go to a terminal, in characters."""

LISTED = 5
"""Entries of a list that are named; the others are counted."""


def render_text(table: Callable[[Any], Any], remarks: list[str]) -> str:
    """Renders a table and lines below it as plain text, without colors, for any encoding.

    Args:
        table: Function from a `rich.box.Box` to something that `rich` prints.
        remarks: Lines below it.
    """
    from rich.box import Box
    from rich.console import Console

    rules = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)  # as SIMPLE_HEAD
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(table(rules), *remarks, sep="\n", markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def group_by_reason(title: str, entries: list[tuple[str, str]]) -> list[str]:
    """Returns a line for each reason with the first few paths that it applies to; the first few reasons.

    Args:
        title: The beginning of every line.
        entries: `(path, reason)` pairs.
    """
    by_reason: dict[str, list[str]] = {}
    for path, reason in entries:
        by_reason.setdefault(reason, []).append(path)
    lines = [f"{title}: {shorten(paths)}: {reason}" for reason, paths in by_reason.items()]
    more = sum(len(paths) for paths in list(by_reason.values())[LISTED:])
    return lines[:LISTED] + ([f"{title}: and {more} more"] if more else [])


def shorten(paths: list[str]) -> str:
    """Joins the first few paths and counts the others."""
    more = len(paths) - LISTED
    return ", ".join(paths[:LISTED]) + (f" and {more} more" if more > 0 else "")


def format_bytes(number: float) -> str:
    """Formats a number of bytes, such as `"13.6 MB"`; units are powers of 1,000."""
    if number < 1000:
        return f"{number:.0f} B"
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 999.95 or unit == "GB":
            break
    return f"{number:,.1f} {unit}"


def format_energy(picojoules: float) -> str:
    """Formats an energy, such as `"1.3 uJ"`."""
    for unit in ("pJ", "nJ", "uJ", "mJ"):
        if picojoules < 999.5 or unit == "mJ":
            break
        picojoules /= 1000
    return f"{picojoules:,.3g} {unit}"
