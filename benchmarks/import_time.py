"""What `import keras_squeeze` adds to `import keras`: time, and modules of other packages."""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import tables
from measuring import Bar, Estimate, advance, bars_table, in_turn, progress_bar, warn_if_busy
from rich.console import Console

LIMIT_MS = 200
KERAS = "import keras"
OURS = """
import json, sys, time
import keras
before, start = set(sys.modules), time.perf_counter()
import keras_squeeze
seconds, added = time.perf_counter() - start, set(sys.modules) - before
known = {"keras_squeeze", *sys.stdlib_module_names, *(name.partition(".")[0] for name in before)}
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in added} - known)]))
"""


@dataclass(frozen=True)
class Import:
    """One fresh interpreter: its life in seconds, and what the code printed."""

    seconds: float
    printed: str


def run(code: str) -> Import:
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"`{code.strip()}` failed:\n{process.stderr}")
    return Import(seconds, process.stdout)


def measure(repetitions: int, on_run) -> tuple[list[Import], list[Import]]:
    """Interpreters with and without, in turn, after a round that fills the caches and is thrown away."""
    pairs = []
    for repetition in range(-1, repetitions):
        pairs.append(in_turn(repetition, lambda: run(KERAS), lambda: run(OURS)))
        on_run()
    plain, ours = zip(*pairs[1:], strict=True)
    return list(plain), list(ours)


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=15, help="interpreters of each kind (15)")
    args = tables.parse(parser)
    if args.quick:
        args.repetitions = 2
    return args


def full_table(plain: list[Import], ours: list[Import], inside: list[float]) -> str:
    """All in milliseconds."""
    rows = [
        ("interpreter with `import keras`", [run.seconds for run in plain]),
        ("interpreter with `import keras`, then `import keras_squeeze`", [run.seconds for run in ours]),
        ("their difference, pair by pair", [b.seconds - a.seconds for a, b in zip(plain, ours, strict=True)]),
        ("`import keras_squeeze` by itself, after `import keras`", inside),
    ]
    texts = [(name, Estimate.of([1e3 * seconds for seconds in samples]).text(0)) for name, samples in rows]
    return tables.markdown(("", "median, ms [95 %]"), texts)


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    with progress_bar(console) as progress:
        task = progress.add_task("fresh interpreters", total=args.repetitions + 1)
        plain, ours = measure(args.repetitions, functools.partial(advance, progress, task))
    inside, packages = zip(*(json.loads(run.printed) for run in ours), strict=True)
    added = Estimate.of([len(names) for names in packages])
    own_time = Estimate.of([1e3 * seconds for seconds in inside])
    bars = [
        Bar("`import keras_squeeze` by itself, ms", LIMIT_MS, own_time, digits=0),
        Bar("packages imported that `import keras` had not imported already", 0, added, digits=0),
    ]
    names = ", ".join(packages[-1]) or "none"
    note = f"Packages imported besides: {names}. {args.repetitions} interpreters of each kind. {tables.machine()}"
    text = f"{full_table(plain, ours, list(inside))}\n\n{bars_table(bars)}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("import_time", text)


if __name__ == "__main__":
    main()
