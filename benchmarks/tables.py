"""What every benchmark here does with its results: a table in Markdown, written between markers of a README."""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence

README = pathlib.Path(__file__).with_name("README.md")
FRONT_PAGE = README.parent.parent / "README.md"

_RECORDED = ("tensorflow", "keras", "numpy")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the two options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the README as well")
    parser.add_argument("--quick", action="store_true", help="smoke run; its numbers mean nothing")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line. A smoke run must not end up in a README."""
    args = parser.parse_args()
    if args.quick and args.write:
        parser.error("--quick measures nothing worth writing. Leave out --quick or --write.")
    return args


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are flush right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(*packages: str) -> str:
    """One line that says what ran where and when: for under a table."""
    names = (*_RECORDED, *packages)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return (
        f"Python {platform.python_version()}, {', '.join(versions)}; {os.cpu_count()} CPUs, {_cpu_name()}, "
        f"{platform.system()}; {datetime.date.today():%Y-%m-%d}."
    )


def write(name: str, text: str, readme: pathlib.Path = README) -> None:
    """Replaces what stands between `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: the file lacks the markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = readme.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{readme} must have the lines {begin} and {end}, in this order.")
    readme.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
