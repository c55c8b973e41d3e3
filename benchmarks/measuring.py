"""How every benchmark here measures: in processes of its own, in turn, and with an interval."""

import importlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Estimate":
        """The median of the samples; the interval is a percentile bootstrap with a fixed seed."""
        values = np.asarray(samples, "float64")
        picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
        low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
        return cls(float(np.median(values)), float(low), float(high))

    def text(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Bar:
    """Something that was promised: `measured` is at most `limit`."""

    promise: str
    limit: float
    measured: Estimate
    digits: int = 3

    @property
    def verdict(self) -> str:
        verdict = "met" if self.measured.median <= self.limit else "**missed**"
        undecided = self.measured.low <= self.limit < self.measured.high
        return f"{verdict}, within the noise" if undecided else verdict


def bars_table(bars: Sequence[Bar]) -> str:
    """One row for each bar, met or missed by the median."""
    rows = [(bar.promise, f"{bar.limit:.3g}", bar.measured.text(bar.digits), bar.verdict) for bar in bars]
    return tables.markdown(("bar", "at most", "measured [95 % interval]", ""), rows)


def own_process() -> ProcessPoolExecutor:
    """One fresh process that runs what is submitted, one after the other. A context manager."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_import_tensorflow)


def _import_tensorflow() -> None:
    """Imports it without the lines that its C++ part prints before it knows its log level."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    shown = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        importlib.import_module("tensorflow")
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def in_turn(repetition: int, *functions: Callable) -> tuple:
    """Calls the functions, forwards and backwards in turn, so that no side always comes first.

    Returns:
        Their results, in the order of the arguments.
    """
    order = range(len(functions)) if repetition % 2 == 0 else reversed(range(len(functions)))
    results = {index: functions[index]() for index in order}
    return tuple(results[index] for index in range(len(functions)))


def progress_bar(console: Console) -> Progress:
    """A progress bar that is drawn only when something advances: it takes no time from what is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, auto_refresh=False)


def advance(progress: Progress, task) -> None:
    progress.advance(task)
    progress.refresh()


def warn_if_busy(console: Console) -> None:
    """Says so where something else is running on this machine."""
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"The load of this machine is {load:.1f} before anything is measured; expect noise.")
