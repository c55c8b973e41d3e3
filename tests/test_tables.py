"""Text of tables and lists: units, what is named and what is counted, and no character outside of ASCII."""

import pytest
from rich.table import Table

from keras_squeeze.analysis.tables import LISTED, format_bytes, format_energy, group_by_reason, render_text, shorten


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_950, "1.0 MB"), (2.5e12, "2,500.0 GB")]
)
def test_bytes(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("picojoules", "text"), [(0, "0 pJ"), (999, "999 pJ"), (1500, "1.5 nJ"), (2.5e6, "2.5 uJ"), (1e13, "1e+04 mJ")]
)
def test_energy(picojoules, text):
    assert format_energy(picojoules) == text


def test_paths_beyond_the_first_few_are_counted():
    paths = [f"layer_{number}" for number in range(LISTED + 2)]
    assert shorten(paths[:LISTED]) == ", ".join(paths[:LISTED])
    assert shorten(paths) == f"{', '.join(paths[:LISTED])} and 2 more"
    assert shorten([]) == ""


def test_a_line_for_each_reason():
    entries = [("a", "frozen"), ("b", "unknown"), ("c", "frozen")]
    assert group_by_reason("skipped", entries) == ["skipped: a, c: frozen", "skipped: b: unknown"]
    many = [(f"path {number}", f"reason {number}") for number in range(LISTED + 3)]
    lines = group_by_reason("skipped", many)
    assert len(lines) == LISTED + 1
    assert lines[-1] == "skipped: and 3 more"


def test_a_table_and_its_remarks_are_plain_text():
    def make(box):
        table = Table(box=box)
        for name in ("layer", "bytes"):
            table.add_column(name)
        table.add_row("[bold]dense", "12")
        return table

    text = render_text(make, ["a remark with [brackets]"])
    assert text.isascii()
    lines = text.splitlines()
    assert lines[-1] == "a remark with [brackets]"
    assert any("dense" in line and "12" in line for line in lines)
    assert all(line == line.rstrip() for line in lines)
