"""What `sensitivity` found: a metric against sparsity, removed neurons and bits, and what follows from it."""

import html
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from keras_squeeze import checks
from keras_squeeze.analysis.plots import Falls, plot_falls
from keras_squeeze.analysis.tables import group_by_reason, render_text

KINDS = ("sparsity", "neurons", "bits")
WHOLE = "all"
"""What the curve of all the layers together is called."""

_TITLES = {"sparsity": "sparsity of the weights", "neurons": "neurons removed", "bits": "bits of the weights"}


@dataclass(frozen=True)
class Curve:
    """The metric of a model of which one layer, or one group of layers, is compressed.

    Attributes:
        layer: The layer's path or the group's name; `"all"` for all of them together.
        kind: `"sparsity"`, the fraction of zeros among its weights; `"neurons"`, the fraction of its neurons that is
            zero; `"bits"`, what its weights are rounded to.
        values: How much, from the mildest to the strongest: fractions ascend, bits descend.
        scores: The metric at each of them.
    """

    layer: str
    kind: str
    values: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """How much each layer of a model minds being compressed; prints as tables.

    Attributes:
        metric: The name of the metric.
        direction: `"max"` or `"min"`: which way it is better.
        base: The metric of the model as it is.
        examples: How many examples it was computed on.
        curves: A `Curve` for every layer and kind; `profile["conv"]["bits"]` is one of them.
        skipped: `(path, reason)` of layers that could not be compressed, or not in this way.
    """

    metric: str
    direction: str
    base: float
    examples: int
    curves: list[Curve]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __getitem__(self, layer: str) -> dict[str, Curve]:
        """`{kind: curve}` of a layer, a group, or `"all"`."""
        curves = {curve.kind: curve for curve in self.curves if curve.layer == layer}
        if not curves:
            raise KeyError(f"There is no curve of {layer!r}; there are those of {', '.join([*self.layers, WHOLE])}.")
        return curves

    @property
    def layers(self) -> list[str]:
        """The layers or groups that have curves, in the model's order, without `"all"`."""
        return list(dict.fromkeys(curve.layer for curve in self.curves if curve.layer != WHOLE))

    @property
    def kinds(self) -> list[str]:
        """The kinds of compression that were measured."""
        present = {curve.kind for curve in self.curves}
        return [kind for kind in KINDS if kind in present]

    def drop(self, layer: str, kind: str, value: float) -> float:
        """How much worse the metric becomes: the points of accuracy lost, the loss gained; negative: it improves.

        Args:
            layer: A layer, a group, or `"all"`.
            kind: `"sparsity"`, `"neurons"` or `"bits"`.
            value: One of those that were measured.

        Raises:
            KeyError: there is no such curve.
            ValueError: it was not measured at this value.
        """
        curve = self._curve(layer, kind)
        for curve_value, score in zip(curve.values, curve.scores, strict=True):
            if math.isclose(curve_value, value, rel_tol=1e-9):
                return self._worse_by(score)
        measured = ", ".join(f"{curve_value:g}" for curve_value in curve.values)
        raise ValueError(f"The {kind} of {layer} was measured at {measured}. Received: value={value!r}")

    def strongest(self, layer: str, kind: str, max_drop: float) -> float | None:
        """The strongest compression of one layer with which the metric drops by no more than `max_drop`.

        A curve that recovers does not count as such: what is milder must be within `max_drop` as well. Fractions are
        interpolated linearly between those that were measured, from 0 on; bits are not.

        Args:
            layer: A layer, a group, or `"all"`.
            kind: `"sparsity"`, `"neurons"` or `"bits"`.
            max_drop: How much worse the metric may become, in its own units: 0.02 is two points of accuracy.

        Returns:
            A fraction, or a number of bits; None where even the most bits that were tried lose more.

        Raises:
            KeyError: there is no such curve.
            ValueError: `max_drop` is no number from 0 on.
        """
        if not checks.is_number(max_drop) or not max_drop >= 0:
            raise ValueError(f"`max_drop` must be a number, at least 0. Received: max_drop={max_drop!r}")
        curve = self._curve(layer, kind)
        best, best_drop = (None, 0.0) if kind == "bits" else (0.0, 0.0)
        for value, drop in zip(curve.values, map(self._worse_by, curve.scores), strict=True):
            if drop > max_drop:
                if best is None or kind == "bits":
                    return best
                return best + (value - best) * (max_drop - best_drop) / (drop - best_drop)
            best, best_drop = value, max(best_drop, drop)
        return best

    def tolerance(self, kind: str, max_drop: float) -> dict[str, float | None]:
        """How far every layer can be compressed alone: the beginning of a recipe. See `strongest`.

        Drops add up, more or less, when several layers are compressed at once.

        Args:
            kind: `"sparsity"`, `"neurons"` or `"bits"`.
            max_drop: How much worse the metric may become, in its own units: 0.02 is two points of accuracy.

        Returns:
            `{layer: fraction or bits}`, without `"all"` and without layers that have no such curve.

        Raises:
            ValueError: an unknown kind, or `max_drop` is no number from 0 on.

        Example:

        ```python
        tolerance = profile.tolerance("sparsity", 0.01)
        by_path = {f"^{re.escape(path)}$": sparsity for path, sparsity in tolerance.items()}
        ks.prune_weights(model, by_path, allocation="uniform")
        ```
        """
        return {curve.layer: self.strongest(curve.layer, kind, max_drop) for curve in self._of_layers(kind)}

    def most_sensitive(self, kind: str) -> list[str]:
        """The layers by how much the metric drops, on average over what was tried; the worst first.

        Raises:
            ValueError: an unknown kind.
        """
        means = {curve.layer: _mean(map(self._worse_by, curve.scores)) for curve in self._of_layers(kind)}
        return sorted(means, key=lambda layer: -means[layer])

    def to_dict(self) -> dict:
        """The profile as dicts, lists, strings and numbers; a score that is not finite is None."""
        curves = [{**asdict(curve), "scores": [_finite(score) for score in curve.scores]} for curve in self.curves]
        listed = [{**curve, "values": list(curve["values"])} for curve in curves]
        return {**vars(self), "curves": listed, "skipped": [list(entry) for entry in self.skipped]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Sensitivity":
        """The profile that `to_dict` or `json.loads(profile.to_json())` gives."""
        try:
            curves = [
                Curve(
                    curve["layer"],
                    curve["kind"],
                    tuple(curve["values"]),
                    tuple(math.nan if score is None else score for score in curve["scores"]),
                )
                for curve in content["curves"]
            ]
            skipped = [(path, reason) for path, reason in content["skipped"]]
            return cls(**{**content, "curves": curves, "skipped": skipped})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"This is not what `Sensitivity.to_dict` gives: {error!r}. Received: {str(content)[:200]}"
            ) from None

    def to_json(self, **kwargs) -> str:
        """The profile as JSON; the arguments are those of `json.dumps`, such as `indent=2`."""
        return json.dumps(self.to_dict(), **kwargs)

    def to_dataframe(self):
        """A `pandas.DataFrame` with a row for everything that was tried."""
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("`to_dataframe` needs pandas: pip install pandas") from None
        rows = [
            (curve.layer, curve.kind, value, score, self._worse_by(score))
            for curve in self.curves
            for value, score in zip(curve.values, curve.scores, strict=True)
        ]
        return pd.DataFrame(rows, columns=["layer", "kind", "value", self.metric, "drop"])

    def plot(self, path: str | pathlib.Path) -> pathlib.Path:
        """Draws a panel for each kind of compression: a line for every layer or, for many layers, a heat map.

        Args:
            path: Where the picture goes; its suffix (`.png`, `.svg`, `.pdf`) chooses the format.

        Returns:
            The path.
        """
        panels = []
        for kind in self.kinds:
            curves = [curve for curve in self.curves if curve.kind == kind]
            labels = [_value(kind, value).partition(" ")[0] for value in curves[0].values]
            scores = {curve.layer: curve.scores for curve in curves}
            panels.append(Falls(_TITLES[kind], curves[0].values, labels, scores, begins_at_zero=kind != "bits"))
        names = [WHOLE, *self.layers]
        return plot_falls(
            names, panels, path, metric=self.metric, base=self.base, worse_by=self._worse_by, text=self._score
        )

    def __str__(self) -> str:
        from rich.console import Group

        return render_text(lambda box: Group(*self._tables(box)), self._remarks())

    def __rich_console__(self, console, options):
        from rich.box import SIMPLE_HEAD
        from rich.text import Text

        yield from self._tables(SIMPLE_HEAD)
        yield from (Text(line, style="dim") for line in self._remarks())

    def _repr_html_(self) -> str:
        tables = []
        for kind in self.kinds:
            head, *rows = self._rows(kind)
            lines = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
            columns = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            caption = f"<caption>{html.escape(f'{self.metric}, {_TITLES[kind]}')}</caption>"
            tables.append(f"<table>{caption}<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table>")
        return "".join(tables) + "".join(f"<p>{html.escape(line)}</p>" for line in self._remarks())

    def _tables(self, box) -> Iterable:
        from rich.table import Table
        from rich.text import Text

        for kind in self.kinds:
            head, *rows, whole = self._rows(kind)
            title = Text(f"{self.metric}, {_TITLES[kind]}")
            table = Table(title=title, title_justify="left", box=box, show_footer=True, collapse_padding=True)
            for index, (name, footer) in enumerate(zip(head, whole, strict=True)):
                shape: dict = {"justify": "right", "no_wrap": True} if index else {"overflow": "fold", "min_width": 12}
                table.add_column(name, footer=Text(footer, style="bold"), **shape)
            for row in rows:
                table.add_row(*map(Text, row))
            yield table

    def _rows(self, kind: str) -> list[list[str]]:
        """The table of a kind: its head, a row for each layer, and that of all of them."""
        of_layers, whole = self._of_layers(kind), self._curve(WHOLE, kind)
        head = ["layer", *(_value(kind, value) for value in whole.values)]
        return [head, *([curve.layer, *map(self._score, curve.scores)] for curve in (*of_layers, whole))]

    def _remarks(self) -> list[str]:
        return [
            f"{self.metric} of {self.examples:,} examples: {self._score(self.base)} as it is; one layer compressed at "
            f"a time, without training; {WHOLE}: all of them",
            *group_by_reason("skipped", self.skipped),
        ]

    def _score(self, value: float) -> str:
        is_fraction = self.metric.split("_")[-1] in ("accuracy", "acc")
        return f"{value:.1%}" if is_fraction else f"{value:#.3g}"

    def _worse_by(self, score: float) -> float:
        drop = self.base - score if self.direction == "max" else score - self.base
        return math.inf if math.isnan(drop) else drop

    def _curve(self, layer: str, kind: str) -> Curve:
        self._check(kind)
        curves = self[layer]
        if kind not in curves:
            reasons = [reason for path, reason in self.skipped if path == layer]
            raise KeyError(f"There is no curve of {layer!r} by {kind}; {'; '.join(reasons) or 'it was not asked for'}.")
        return curves[kind]

    def _of_layers(self, kind: str) -> list[Curve]:
        self._check(kind)
        return [curve for curve in self.curves if curve.kind == kind and curve.layer != WHOLE]

    def _check(self, kind: str) -> None:
        checks.one_of("kind", kind, self.kinds)


def _value(kind: str, value: float) -> str:
    if kind == "bits":
        return "1 bit" if value == 1 else f"{value:g} bits"
    return f"{100 * value:.3g}%"


def _mean(numbers: Iterable[float]) -> float:
    values: Sequence[float] = list(numbers)
    return sum(values) / len(values)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
