"""`compare`: models and files side by side, each measured on the file that ships."""

import contextlib
import gzip
import html
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras

from keras_squeeze import checks
from keras_squeeze.analysis.plots import Bars, plot_bars
from keras_squeeze.analysis.report import summarize
from keras_squeeze.analysis.tables import WIDTH, format_bytes, render_text
from keras_squeeze.data import lists_to_arrays
from keras_squeeze.deployment.litert import export
from keras_squeeze.deployment.loading import load_model
from keras_squeeze.evaluation.latency import Latency, measure_latencies
from keras_squeeze.evaluation.scoring import Judge, find_judge, predictions
from keras_squeeze.progress import progress_bar

_NARROW = ("name", "size", "latency", "ratio")


@dataclass(frozen=True)
class ComparisonRow:
    """One model or file of a `Comparison`.

    Attributes:
        name: As the user calls it.
        kind: What it is: `"model"`, `".keras"`, `"packed"`, or `".tflite"`.
        precision: `"float32"` or `"int8"`, what it computes with; None for a `.tflite` file.
        parameters: Number of values in all its weights; None for a `.tflite` file.
        macs: Multiply-accumulates of one inference; None where unknown.
        energy_pj: Estimated energy of one inference in picojoules; None where unknown.
        num_bytes: Size of the file that ships: the file itself or, of a model, the `.tflite` that `export` writes.
        gzip_bytes: Size of that file once it is gzipped.
        latency: Of its `.tflite`, with `ratio` to the first row.
        score: The metric on the data, of what its `.tflite` predicts; None without data.
    """

    name: str
    kind: str
    precision: str | None
    parameters: int | None
    macs: int | None
    energy_pj: float | None
    num_bytes: int
    gzip_bytes: int
    latency: Latency
    score: float | None

    def to_dict(self) -> dict:
        """The row as strings and numbers, without a dict in it."""
        flat = {**asdict(self), **{f"latency_{name}": value for name, value in asdict(self.latency).items()}}
        del flat["latency"]
        return flat


@dataclass(frozen=True)
class Comparison:
    """Models and files side by side; prints as a table.

    Attributes:
        rows: A `ComparisonRow` for each, in the order in which they were given; ratios are to the first.
        metric: What `score` is: the name of the metric; None without data.
        examples: How many examples it was computed on.
        num_threads: Threads that LiteRT used while it was timed.
    """

    rows: list[ComparisonRow]
    metric: str | None
    examples: int
    num_threads: int

    def __getitem__(self, name: str) -> ComparisonRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"There is no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")

    def __iter__(self) -> Iterator[ComparisonRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict:
        """The comparison as dicts, lists, strings and numbers."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}

    def to_json(self, **kwargs) -> str:
        """The comparison as JSON; the arguments are those of `json.dumps`, such as `indent=2`."""
        return json.dumps(self.to_dict(), **kwargs)

    def to_dataframe(self):
        """A `pandas.DataFrame` with a row for each model or file."""
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("`to_dataframe` needs pandas: pip install pandas") from None
        return pd.DataFrame([row.to_dict() for row in self.rows])

    def plot(self, path: str | pathlib.Path) -> pathlib.Path:
        """Draws a bar for each row: size, latency, MACs and the metric, beside those of the first row.

        Args:
            path: Where the picture goes; its suffix (`.png`, `.svg`, `.pdf`) chooses the format.

        Returns:
            The path.
        """
        latencies = [row.latency for row in self.rows]
        spread = [(latency.p10_ms, latency.p90_ms) for latency in latencies]
        ratios = [latency.ratio for latency in latencies]
        panels = [
            _bars("size of the file", [row.num_bytes for row in self.rows], format_bytes),
            _bars("latency", [latency.median_ms for latency in latencies], _milliseconds, ratios, spread),
        ]
        if any(row.macs for row in self.rows):
            panels.append(_bars("MACs", [row.macs for row in self.rows], _count))
        if self.metric is not None:
            panels.append(_bars(self.metric, [row.score for row in self.rows], self._score, [None] * len(self.rows)))
        return plot_bars([row.name for row in self.rows], panels, path)

    def __str__(self) -> str:
        return render_text(lambda box: self._table(self._columns(), box), self._remarks())

    def __rich_console__(self, console, options):
        from rich.box import SIMPLE_HEAD
        from rich.text import Text

        columns = self._columns()
        narrow = [name for name in columns if name in (*_NARROW, self.metric)]
        yield self._table(columns if options.max_width >= WIDTH else narrow, SIMPLE_HEAD)
        yield from (Text(line, style="dim") for line in self._remarks())

    def _repr_html_(self) -> str:
        columns = self._columns()
        rows = ([self._cells(row)[name] for name in columns] for row in self.rows)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        remarks = "".join(f"<p>{html.escape(line)}</p>" for line in self._remarks())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{remarks}"

    def _columns(self) -> list[str]:
        """Those of which anything is known."""
        rows = [self._cells(row) for row in self.rows]
        return [name for name in rows[0] if any(cells[name] != "-" for cells in rows)]

    def _cells(self, row: ComparisonRow) -> dict[str, str]:
        cells = {
            "name": row.name,
            "kind": f"{row.kind}, {row.precision}" if row.precision else row.kind,
            "parameters": _or_dash(row.parameters, _count),
            "MACs": _or_dash(row.macs, _count),
            "energy": _or_dash(row.energy_pj, _joules),
            "size": format_bytes(row.num_bytes),
            "gzipped": format_bytes(row.gzip_bytes),
            "latency": _milliseconds(row.latency.median_ms),
            "ratio": f"{row.latency.ratio:.2f}",
        }
        return cells if self.metric is None else {**cells, self.metric: _or_dash(row.score, self._score)}

    def _score(self, value: float) -> str:
        return f"{value:.1%}" if self.metric == "accuracy" else f"{value:.4g}"

    def _table(self, columns: Iterable[str], box):
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box, collapse_padding=True)
        for name in columns:
            words = name in ("name", "kind")
            table.add_column(Text(name), **({"overflow": "fold"} if words else {"justify": "right", "no_wrap": True}))
        for row in self.rows:
            table.add_row(*(Text(self._cells(row)[name]) for name in columns))
        return table

    def _remarks(self) -> list[str]:
        threads = "one thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        lines = [
            f"latency: in LiteRT, {threads}, a batch of one; median of {self.rows[0].latency.runs} inferences of each, "
            "in turn; ratio: to the first row",
            "size: of the file that ships; of a model, the .tflite that it becomes",
            "energy: of one inference, an estimate, on hardware that skips zeros",
        ]
        judged = f"{self.metric}: of what LiteRT computes for {self.examples:,} examples"
        return lines if self.metric is None else [*lines, judged]


def compare(
    models: Mapping[str, Any], data=None, *, metric=None, num_threads: int = 1, runs: int = 50, safe_mode: bool = True
) -> Comparison:
    """Puts models and files side by side: parameters, bytes, latency and, on data, how good their answers are.

    Nothing is estimated where it can be measured: bytes are those of the file that ships, and LiteRT says how long an
    inference takes and what it answers. Files take turns while they are timed.

    Args:
        models: `{name: model}`, where a model is a Keras model, or the path of a `.tflite` file, of a `.keras` file,
            or of what `save_packed` wrote. The first one is what the others are compared with. A Keras model, also one
            from a file, is exported as it was trained: in int8 where it has quantizers, else in float32.
        data: `(x, y)`, for several inputs with a list or dict of arrays as `x`, or a `tf.data.Dataset` of batches of
            that. Without, no metric.
        metric: None: the fraction of right answers or, where `y` is no classes, the mean absolute error. Classes are
            integers, one-hot rows or, for a single output, 0 and 1; that output is a probability where all are between
            0 and 1, else a logit. Or the name of a Keras metric or loss, such an object, or any function
            `(y_true, y_pred) -> number`.
        num_threads: Threads that LiteRT may use while it is timed.
        runs: Inferences of each to time, after a few that are not.
        safe_mode: False lets a `.keras` file bring Python code of its own and run it.

    Returns:
        A `Comparison`: print it, or use `.rows`, `["name"]`, `.to_dict()`, `.to_json()`, `.to_dataframe()`,
        `.plot(path)`.

    Raises:
        TypeError: `models` is no dict of models and paths, or `data` can be read only once.
        ValueError: there is no such file or metric, a model cannot be exported, the data does not fit, or a number is
            below 1. The message says which model.

    Example:

    ```python
    small = ks.shrink(model)
    print(ks.compare({"before": model, "after": small, "int8": "model.tflite"}, data=(x_test, y_test)))
    ```
    """
    _check(models, data)
    data = lists_to_arrays(data)
    checks.positive_int("num_threads", num_threads)
    checks.positive_int("runs", runs)
    judge = find_judge(metric)
    with tempfile.TemporaryDirectory() as folder:
        entries = []
        with progress_bar("preparing", total=len(models)) as advance:
            for index, (name, model) in enumerate(models.items()):
                advance(0, title=f"preparing {name}")
                with _named(name):
                    entries.append(_entry(name, model, pathlib.Path(folder, f"{index}.tflite"), safe_mode))
                advance()
        metric_name, examples, scores = _scores(entries, data, judge)
        latencies = measure_latencies({x.name: x.tflite for x in entries}, num_threads=num_threads, runs=runs)
        rows = [
            ComparisonRow(**entry.facts, latency=latencies[entry.name], score=score)
            for entry, score in zip(entries, scores, strict=True)
        ]
    return Comparison(rows, metric_name, examples, num_threads)


@dataclass(frozen=True)
class _Entry:
    """What is known of a row before anything is run: the file that is run, and the columns."""

    tflite: pathlib.Path
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        return self.facts["name"]


@contextlib.contextmanager
def _named(name: str):
    """Begins the message of an error with the name of the row."""
    try:
        yield
    except (ValueError, TypeError) as error:
        error_class = TypeError if isinstance(error, TypeError) else ValueError
        raise error_class(f"{name}: {error}") from None


def _check(models, data) -> None:
    if not isinstance(models, Mapping):
        raise TypeError(f"`models` must be a dict from names to models or paths. Received: {models!r}")
    if not models:
        raise ValueError("`models` is empty: pass at least one model or path. Received: {}")
    for name, model in models.items():
        if not isinstance(name, str):
            raise TypeError(f"The names in `models` must be strings. Received: {name!r}")
        if not isinstance(model, (keras.Model, str, os.PathLike)):
            raise TypeError(f"{name}: expected a `keras.Model` or the path of a file. Received: {model!r}")
        if not isinstance(model, keras.Model) and not pathlib.Path(model).is_file():
            raise ValueError(f"{name}: there is no file {model}. Pass a .tflite, .keras or packed file, or a model.")
    if isinstance(data, Iterator):
        raise TypeError(
            "`data` is read once for every model, and an iterator or generator is empty after the first. Pass arrays "
            f"(x, y) or a tf.data.Dataset. Received: {data!r}"
        )


def _entry(name: str, item, tflite: pathlib.Path, safe_mode: bool) -> _Entry:
    """Reads or exports one row."""
    facts: dict[str, Any] = dict.fromkeys(("precision", "parameters", "macs", "energy_pj"))
    facts |= {"name": name, "kind": "model"}
    ships = tflite
    if not isinstance(item, keras.Model):
        ships = pathlib.Path(item)
        facts["kind"] = ships.suffix if ships.suffix in (".tflite", ".keras") else "packed"
    if facts["kind"] == ".tflite":
        tflite = ships
    else:
        model = item if isinstance(item, keras.Model) else load_model(ships, safe_mode=safe_mode)
        facts["precision"] = export(model, tflite).precision
        total = summarize(model).total
        facts |= {"parameters": total.parameters, "macs": total.macs, "energy_pj": total.energy_pj}
    content = ships.read_bytes()
    facts |= {"num_bytes": len(content), "gzip_bytes": len(gzip.compress(content))}
    return _Entry(tflite, facts)


def _scores(entries: list[_Entry], data, judge: Judge) -> tuple[str | None, int, list[float | None]]:
    """The name of the metric, the number of examples, and the metric of each."""
    if data is None:
        return None, 0, [None] * len(entries)
    names: list[str] = []
    scores: list[float | None] = []
    counts: list[int] = []
    total = len(entries) * len(keras.tree.flatten(data)[0]) if isinstance(data, (tuple, list)) else None
    with progress_bar("predicting", total=total) as advance:
        for entry in entries:
            advance(0, title=f"predicting with {entry.name}")
            with _named(entry.name):
                y_true, outputs = predictions(entry.tflite, data, advance)
                name, score = judge(y_true, outputs[0] if len(outputs) == 1 else outputs)
            names.append(name)
            scores.append(score)
            counts.append(len(outputs[0]))
    if len(set(names)) > 1:
        metrics = ", ".join(f"{entry.name}: {name}" for entry, name in zip(entries, names, strict=True))
        raise ValueError(f"Their outputs are of different kinds: pass one `metric`. Received: {metrics}")
    return names[0], counts[0], scores


def _bars(title: str, values: list, text: Callable[[Any], str], ratios: list | None = None, spread=None) -> Bars:
    """Bars with their values, and how many times the first one they are: by default the values over the first."""
    if ratios is None:
        ratios = [value / values[0] if value and values[0] else None for value in values]
    times = ["", *(f"  {ratio:.2f} x" if ratio else "" for ratio in ratios[1:])]
    labels = ["unknown" if value is None else text(value) for value in values]
    return Bars(title, values, [label + more for label, more in zip(labels, times, strict=True)], spread)


def _or_dash(value, text) -> str:
    return "-" if value is None else text(value)


def _count(number: float) -> str:
    return f"{number:,}"


def _milliseconds(number: float) -> str:
    return f"{number:,.1f} ms" if number >= 100 else f"{number:.3g} ms"


def _joules(picojoules: float) -> str:
    for unit, size in (("mJ", 1e9), ("uJ", 1e6), ("nJ", 1e3)):
        if picojoules >= size:
            return f"{picojoules / size:,.3g} {unit}"
    return f"{picojoules:.3g} pJ"
