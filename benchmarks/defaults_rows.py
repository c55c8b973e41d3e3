"""Rows of `defaults.py`: a file of finished trainings, and how settings compare over them."""

import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np
from defaults_training import DEFAULTS, Cell, Job, Settings

_COVERAGE = 0.5  # share of the cells, of those that the most measured rival has, that a rank asks for

_KEY = [field.name for part in (Settings, Cell) for field in fields(part)] + ["seed"]


class Rows:
    """Trainings that are finished, in a JSON-lines file with a row each; of equal ones the last counts.

    Args:
        path: The file; created with the first row.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._rows: dict[tuple, dict] = {}
        text = path.read_text() if path.exists() else ""
        self._separator = "\n" if text and not text.endswith("\n") else ""  # after a line that was written in part
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._rows[_key(row)] = row

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, row: dict) -> None:
        """Adds a row to the file at once."""
        self._rows[_key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{self._separator}{json.dumps(row)}\n")
            file.flush()
        self._separator = ""

    def get(self, settings: Settings, cell: Cell, seed: int = 0) -> dict | None:
        """Returns the row of a training, or None."""
        return self._rows.get(_key(Job(settings, cell, seed).fields))

    def is_finished(self, job: Job) -> bool:
        """Returns whether a training is done, or does not apply; one that failed by accident is done again."""
        row = self.get(job.settings, job.cell, job.seed)
        return row is not None and (row["accuracy"] is not None or row["error"].startswith("ValueError"))

    def lost(self, settings: Settings, cell: Cell, seed: int = 0) -> float | None:
        """Returns the points of accuracy lost; NaN where the settings do not apply, None without a row."""
        row = self.get(settings, cell, seed)
        if row is None:
            return None
        return math.nan if row["accuracy"] is None else row["dense"] - row["accuracy"]

    def all_lost(self, settings: Settings, cells: Iterable[Cell], seeds: Iterable[int] = (0,)) -> list[float]:
        """Returns the points lost of every row there is and that applies."""
        seeds = list(seeds)
        points = [self.lost(settings, cell, seed) for cell in cells for seed in seeds]
        return [lost for lost in points if lost is not None and not math.isnan(lost)]

    def is_in_final(self, finalists: Iterable[Settings], cell: Cell) -> bool:
        """Returns whether all finalists were trained in a cell with a second seed, which only the final does."""
        return all(self.get(settings, cell, 1) is not None for settings in finalists)

    def not_applicable(self, settings: Settings, cells: Sequence[Cell]) -> list[str]:
        """Returns the networks on which the settings raised an error."""
        failed = [cell.network for cell in cells if math.isnan(self.lost(settings, cell) or 0.0)]
        return list(dict.fromkeys(failed))

    def mean_of(self, column: str, settings: Settings, cells: Iterable[Cell]) -> float:
        """Returns the mean of a column over the rows there are, NaN without any."""
        measured = [self.get(settings, cell) for cell in cells]
        values = [row[column] for row in measured if row is not None and row["accuracy"] is not None]
        return float(np.mean(values)) if values else math.nan

    def excess(self, settings: Settings, rivals: Sequence[Settings], cells: Iterable[Cell]) -> list[float]:
        """Returns the points lost beyond the default's, a value for every cell in which seed 0 of both was trained.

        Where settings do not apply, they count as much as the worst of their rivals there.
        """
        differences = []
        for cell in cells:
            default, own = self.lost(DEFAULTS[settings.technique], cell), self.lost(settings, cell)
            if own is not None and math.isnan(own):
                own = max(self.all_lost_by(rivals, cell), default=None)
            if own is not None and default is not None and not math.isnan(default):
                differences.append(own - default)
        return differences

    def all_lost_by(self, rivals: Iterable[Settings], cell: Cell) -> list[float]:
        """Returns the points that several settings lose in one cell."""
        return [lost for rival in rivals for lost in self.all_lost(rival, [cell])]

    def rank(self, rivals: Iterable[Settings], cells: Sequence[Cell]) -> list[Settings]:
        """Sorts settings from the fewest points lost to the most; leaves out what has few rows."""
        rivals = list(dict.fromkeys(rivals))
        excess = {rival: self.excess(rival, rivals, cells) for rival in rivals}
        needed = max(1.0, _COVERAGE * max(map(len, excess.values()), default=0))
        ranked = [rival for rival in rivals if len(excess[rival]) >= needed]
        return sorted(ranked, key=lambda rival: float(np.mean(excess[rival])))

    def expected_seconds(self, jobs: Sequence[Job]) -> float:
        """Estimates how long trainings take in one process, by those of the same network and number of steps."""
        pace: dict[tuple[str, int], list[float]] = {}
        for row in self._rows.values():
            if row["accuracy"] is not None:
                pace.setdefault((row["network"], row["steps"]), []).append(row["seconds"])
        means = {key: float(np.mean(values)) for key, values in pace.items()}
        per_step = np.mean([seconds / steps for (_, steps), seconds in means.items()]) if means else math.nan
        return sum(means.get((job.cell.network, job.cell.steps), per_step * job.cell.steps) for job in jobs)

    def versions(self) -> list[str]:
        """Returns the digests of the package's sources that rows were trained with."""
        return sorted({row["code"] for row in self._rows.values()})


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in _KEY)
