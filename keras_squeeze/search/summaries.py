"""What a search says about its trials: a line for each, and a table in the end."""

from collections.abc import Mapping

from keras_squeeze.search.artifacts import Result
from keras_squeeze.search.objectives import Budgets
from keras_squeeze.search.oracle import ParetoOracle
from keras_squeeze.search.results import measured, was_stopped


def in_words(trial, oracle: ParetoOracle) -> str:
    """What a trial was, and what came out."""
    values = ", ".join(f"{name} {number(value)}" for name, value in trial.hyperparameters.values.items())
    if trial.status != "COMPLETED":
        reason = (trial.message or "").strip().splitlines()
        return f"{values}: failed: {reason[-1] if reason else 'no reason was given'}"
    metrics = measured(trial)
    found = ", ".join(f"{x.name} {number(metrics[x.name])}" for x in oracle.objectives)
    early = " (ended early)" if was_stopped(trial) else ""
    return f"{values}: {found}{early}"


def extremes(results: list[Result], budgets: Budgets) -> str:
    """The extreme that was found of everything that has a budget."""
    found = []
    for name, kind, _ in budgets.limits:
        values = [result.metrics[name] for result in results if name in result.metrics]
        extreme = min(values) if kind == "max" else max(values)
        found.append(f"The {'smallest' if kind == 'max' else 'largest'} {name} found is {number(extreme)}.")
    return " ".join(found)


def table_of(rows: list[tuple[Result, bool]], before: Mapping[str, float], *, recipes: bool):
    """Results, with a star where they are on the front, under what the search began with; a `rich.table.Table`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = [name for name in (rows[0][0].metrics if rows else ()) if name not in ("tflite_bytes", "packed_bytes")]
    table = Table(box=SIMPLE_HEAD, title="What the search found")
    for name in ("trial", "", *names):
        table.add_column(name, justify="left" if name in ("trial", "") else "right", no_wrap=True)
    if recipes:
        table.add_column("recipe", overflow="fold")
    if before:
        table.add_row("before", "", *(number(before[name]) if name in before else "-" for name in names))
    for result, on_front in rows:
        numbers = (number(result.metrics[name]) if name in result.metrics else "-" for name in names)
        table.add_row(result.trial, "*" if on_front else "", *numbers, *([str(result.recipe)] if recipes else []))
    return table


def number(value) -> str:
    """Four digits, or all of a large one."""
    return str(value) if isinstance(value, (str, bool)) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """In the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
