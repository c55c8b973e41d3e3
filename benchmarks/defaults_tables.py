"""Tables of `defaults.py`, made of the rows there are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tables
from defaults_rows import Rows
from defaults_training import DEFAULTS, Cell, Settings
from measuring import Bar, bars_table
from networks import NETWORKS
from neuron_criteria import Mean

CELL_LIMIT, MEAN_LIMIT, RECALIBRATION_LIMIT = 3.0, 0.5, 1.0  # points


@dataclass(frozen=True)
class Promise:
    """At most how many points the default of a technique may lose in a cell."""

    technique: str
    cell: Cell
    limit: float


PROMISES = (
    Promise("weights", Cell("ds_cnn", 0.9, 328), 5.0),  # 8 epochs
    Promise("neurons", Cell("ds_cnn", 0.5, 120), 4.0),
    Promise("neurons", Cell("ds_cnn", 0.5, 328), 3.0),
    Promise("weights", Cell("characters_batch_norm", 0.9, 375), 3.5),  # 3 epochs
    Promise("weights", Cell("characters_biases", 0.9, 375), 3.5),
    Promise("weights", Cell("resnet8", 0.9, 375), 3.5),
)


def screening_table(rows: Rows, factors: Mapping[str, Mapping[str, Settings]], cells: Sequence[Cell]) -> str:
    """Returns the table of settings that differ from the default in one factor; a note explains its columns."""
    lines = []
    for factor, values in factors.items():
        ranked = rows.rank(values.values(), cells)
        unranked = [settings for settings in values.values() if settings not in ranked]
        names = {settings: value for value, settings in values.items()}
        for value in (names[settings] for settings in (*ranked, *unranked)):
            lines.append((factor, *_screening_line(rows, value, values, cells, values[value] in ranked)))
    columns = ("points lost", "beyond the default", "lost after recalibration", "worst network", "zeros overall")
    header = ("factor", "value", *columns, "cells", "note")
    note = (
        "Mean over networks and strengths, one seed; settings are ranked by what they lose beyond the default. Where "
        "they leave other layers dense than the default does, the target of the others is the one with which as many "
        "weights are zero overall (`zeros overall` is over all prunable weights). Settings that do not apply to a "
        "network, or would need a higher target than its layers can have, rank there as the worst value of their "
        "factor, and their points lost are those of the other networks."
    )
    return f"{tables.markdown(header, lines)}\n\n{note}"


def _screening_line(rows: Rows, value: str, values: Mapping[str, Settings], cells, is_ranked: bool) -> tuple:
    settings = values[value]
    lost, excess = rows.all_lost(settings, cells), rows.excess(settings, list(values.values()), cells)
    by_network = {
        name: _mean(rows.all_lost(settings, [cell for cell in cells if cell.network == name]))
        for name in dict.fromkeys(cell.network for cell in cells)
    }
    worst = max(by_network, key=lambda name: -math.inf if math.isnan(by_network[name]) else by_network[name])
    failed = rows.not_applicable(settings, cells)
    notes = [f"not applicable: {', '.join(failed)}"] if failed else []
    notes += [] if is_ranked else ["not ranked"]
    return (
        f"{value} (default)" if settings == DEFAULTS[settings.technique] else value,
        _number(_mean(lost)),
        _number(_mean(excess), "+"),
        _number(rows.mean_of("dense", settings, cells) - rows.mean_of("recalibrated", settings, cells)),
        f"{worst}: {_number(by_network[worst])}" if lost else "",
        _number(rows.mean_of("overall_sparsity", settings, cells)),
        str(len(lost)),
        "; ".join(notes),
    )


def choices_table(
    rows: Rows, factors: Mapping[str, Mapping[str, Mapping[str, Settings]]], cells: Mapping[str, Sequence[Cell]]
) -> str:
    """Returns a line for each choice: the default, and the points that every other value loses beyond it.

    Args:
        rows: The trainings.
        factors: Settings by technique, factor and value.
        cells: The cells of each technique.
    """
    lines = []
    for technique, by_factor in factors.items():
        for factor, values in by_factor.items():
            names = {settings: value for value, settings in values.items()}
            default = DEFAULTS[technique]
            others = [settings for settings in rows.rank(values.values(), cells[technique]) if settings != default]
            excess = {rival: _mean(rows.excess(rival, list(values.values()), cells[technique])) for rival in others}
            text = ", ".join(f"{names[rival]} {points:+.1f}" for rival, points in excess.items())
            lines.append((technique, factor, names.get(default, ""), text))
    return tables.markdown(("pruned", "choice", "default", "points lost beyond the default, on average"), lines)


def finalists_table(rows: Rows, named: Mapping[str, Settings], cells: Sequence[Cell], seeds: int) -> str:
    """Returns what the letters of the finalists stand for, and the points that they lose at every length."""
    lengths = sorted({cell.steps for cell in cells})
    lines = []
    for name, settings in named.items():
        points = {cell: _mean(rows.all_lost(settings, [cell], range(seeds))) for cell in cells}
        measured = {cell: lost for cell, lost in points.items() if not math.isnan(lost)}
        means = [_number(_mean([lost for cell, lost in measured.items() if cell.steps == steps])) for steps in lengths]
        worst = max(measured, key=lambda cell: measured[cell], default=None)
        text = f"{_describe_cell(worst)}: {measured[worst]:.2f}" if worst else ""
        schedule = (settings.criterion, settings.schedule)
        lines.append((name, settings.allocation, settings.left_out or "nothing", *schedule, *means, text))
    lengths_header = [f"points lost, {steps:,} steps" for steps in lengths]
    header = ("", "allocation", "left dense", "criterion", "schedule", *lengths_header, "worst")
    return tables.markdown(header, lines)


def cells_table(rows: Rows, named: Mapping[str, Settings], cells: Sequence[Cell], seeds: int) -> str:
    """Returns the points lost in every cell, and the default against the best of the others there."""
    default, rivals = _split(named)
    lines = []
    for cell in sorted(cells, key=lambda cell: (cell.steps, list(NETWORKS).index(cell.network), cell.strength)):
        points = {name: rows.all_lost(settings, [cell], range(seeds)) for name, settings in named.items()}
        means = [_number(_mean(lost)) for lost in points.values()]
        best = _best_in(rows, rivals, cell, seeds)
        pairs = _paired(rows, default, rivals[best], cell, seeds) if best else []
        difference = Mean.of(pairs) if pairs else None
        verdict = "" if difference is None else "met" if difference.low <= CELL_LIMIT else "**missed**"
        comparison = (best or "", difference.text() if difference else "", str(len(pairs)), verdict)
        lines.append((f"{_describe_cell(cell)}, {cell.steps:,} steps", *means, *comparison))
    header = ("points lost", *named, "best", "default beyond the best [95 %]", "seeds", f"at most {CELL_LIMIT:g}")
    return tables.markdown(header, lines)


def final_bars(rows: Rows, technique: str, named: Mapping[str, Settings], cells: Sequence[Cell], seeds: int):
    """Returns the bars that compare the default with the finalists over all cells."""
    default, rivals = _split(named)
    means = {name: _mean_of_cells(rows, settings, cells, seeds) for name, settings in rivals.items()}
    overall = min(means, key=lambda name: math.inf if math.isnan(means[name]) else means[name])
    choices = {
        "the best finalist of every cell": lambda cell: _best_in(rows, rivals, cell, seeds),
        f"{overall}, the best finalist on average": lambda cell: overall,
    }
    bars = []
    for text, choose in choices.items():
        by_seed = []
        for seed in range(seeds):
            chosen = [(cell, choose(cell)) for cell in cells]
            pairs = [_pair(rows, default, rivals[name], cell, seed) for cell, name in chosen if name]
            by_seed.append(_mean([pair for pair in pairs if pair is not None]))
        samples = [value for value in by_seed if not math.isnan(value)]
        if samples:
            promise = f"{technique}: points that the default loses beyond {text}, mean over all"
            bars.append(Bar(promise, MEAN_LIMIT, Mean.of(samples), digits=2))
    return bars


def promised_bars(rows: Rows, promises: Sequence[Promise], cells: Mapping[str, Sequence[Cell]], seeds: int):
    """Returns the bars on what the defaults lose, and on how far their statistics are from recalibrated ones."""
    bars = []
    for promise in promises:
        lost = rows.all_lost(DEFAULTS[promise.technique], [promise.cell], range(seeds))
        if lost:
            text = f"{promise.technique}, {_describe_cell(promise.cell)}, {promise.cell.steps:,} steps: points lost"
            bars.append(Bar(text, promise.limit, Mean.of(lost), digits=2))
    everywhere = {technique: list(part) for technique, part in cells.items()}
    for promise in promises:
        everywhere.setdefault(promise.technique, []).append(promise.cell)
    for network in NETWORKS:
        bars += _recalibration_bar(rows, network, everywhere, seeds)
    return bars


def _recalibration_bar(rows: Rows, network: str, cells: Mapping[str, Sequence[Cell]], seeds: int) -> list[Bar]:
    """Returns the bar of the cell where recalibration changes the accuracy most; none without batch normalization."""
    if "batch norm" not in NETWORKS[network].layers:
        return []
    changes: dict[str, list[float]] = {}
    for technique, part in cells.items():
        for cell in (cell for cell in part if cell.network == network):
            measured = (rows.get(DEFAULTS[technique], cell, seed) for seed in range(seeds))
            points = [abs(row["recalibrated"] - row["accuracy"]) for row in measured if row and not row["error"]]
            if points:
                changes[f"{technique}, {_describe_cell(cell)}, {cell.steps:,} steps"] = points
    if not changes:
        return []
    worst = max(changes, key=lambda text: np.mean(changes[text]))
    promise = f"{worst} (the worst of {len(changes)} cells): points that recalibration changes"
    return [Bar(promise, RECALIBRATION_LIMIT, Mean.of(changes[worst]), digits=2)]


def describe_bars(bars: Sequence[Bar]) -> str:
    """Returns the table of bars, with the note that belongs under it."""
    return f"{bars_table(bars)}\n\nRecalibration changes nothing in networks without batch normalization."


def _split(named: Mapping[str, Settings]) -> tuple[Settings, dict[str, Settings]]:
    return named["default"], {name: settings for name, settings in named.items() if name != "default"}


def _best_in(rows: Rows, rivals: Mapping[str, Settings], cell: Cell, seeds: int) -> str | None:
    """Returns the name of the settings that lose least in a cell, of those with the most seeds."""
    points = {name: rows.all_lost(settings, [cell], range(seeds)) for name, settings in rivals.items()}
    most = max(map(len, points.values()), default=0)
    complete = {name: _mean(lost) for name, lost in points.items() if lost and len(lost) == most}
    return min(complete, key=lambda name: complete[name], default=None)


def _paired(rows: Rows, default: Settings, rival: Settings, cell: Cell, seeds: int) -> list[float]:
    pairs = (_pair(rows, default, rival, cell, seed) for seed in range(seeds))
    return [pair for pair in pairs if pair is not None]


def _pair(rows: Rows, default: Settings, rival: Settings, cell: Cell, seed: int) -> float | None:
    """Returns by how much more the default loses than a rival with the same seed; None unless both were trained."""
    points = [rows.all_lost(settings, [cell], [seed]) for settings in (default, rival)]
    return points[0][0] - points[1][0] if all(points) else None


def _mean_of_cells(rows: Rows, settings: Settings, cells: Sequence[Cell], seeds: int) -> float:
    points = [_mean(rows.all_lost(settings, [cell], range(seeds))) for cell in cells]
    return _mean([lost for lost in points if not math.isnan(lost)])


def _describe_cell(cell: Cell) -> str:
    return f"{cell.network} {cell.strength:.0%}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _number(value: float, sign: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{sign}.2f}"
