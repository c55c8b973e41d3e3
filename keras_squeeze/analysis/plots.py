"""Pictures of what compression did. matplotlib is imported when a picture is drawn."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


def plot_pruning(
    history: Mapping[str, Sequence[float]],
    path: str | pathlib.Path,
    *,
    metric: str = "val_accuracy",
    baseline: float | None = None,
) -> pathlib.Path:
    """Draws sparsity and a metric over the epochs of a `fit` with a pruning callback.

    Args:
        history: `model.fit(...).history`, with `sparsity` and `metric`, one value per epoch, in [0, 1].
        path: Where the picture goes; its suffix (`.png`, `.svg`, `.pdf`) chooses the format.
        metric: The metric to draw.
        baseline: The metric before pruning, drawn as a dashed line.

    Returns:
        The path.

    Raises:
        ValueError: `history` lacks `sparsity` or `metric`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    missing = [name for name in ("sparsity", metric) if name not in history]
    if missing:
        raise ValueError(f"`history` lacks {', '.join(missing)}. Received: {', '.join(history) or 'nothing'}")
    epochs = range(1, len(history["sparsity"]) + 1)
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)

    above.plot(epochs, history["sparsity"], marker="o", color="tab:blue")
    above.set(ylabel="sparsity", ylim=(0, 1), title="Gradual pruning")
    below.plot(epochs, history[metric], marker="o", color="tab:orange", label="while pruning")
    if baseline is not None:
        below.axhline(baseline, linestyle="--", color="grey", label="before pruning")
        below.legend(loc="lower right")
    below.set(ylabel=metric.replace("_", " "), xlabel="epoch")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
    return pathlib.Path(path)


def plot_widths(widths: Mapping[str, tuple[int, int]], path: str | pathlib.Path) -> pathlib.Path:
    """Draws how wide the layers were and are.

    Args:
        widths: `{layer path: (channels before, channels after)}`, such as `prune_neurons(...).widths`.
        path: Where the picture goes; its suffix (`.png`, `.svg`, `.pdf`) chooses the format.

    Returns:
        The path.

    Raises:
        ValueError: `widths` is empty.
    """
    from matplotlib.figure import Figure

    if not widths:
        raise ValueError("There are no widths to draw: no neuron was pruned.")
    before, after = zip(*widths.values(), strict=True)
    places = range(len(widths))
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(widths)), layout="constrained")
    axes = figure.subplots()
    axes.barh(places, before, color="lightgrey", label="before")
    axes.barh(places, after, color="tab:blue", label="after")
    for y, wide, narrow in zip(places, before, after, strict=True):
        axes.annotate(f" {wide} → {narrow}" if narrow < wide else f" {wide}", (wide, y), va="center")
    axes.set_yticks(places, labels=list(widths))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="channels", title="Neurons removed")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    return pathlib.Path(path)


@dataclass(frozen=True)
class Bars:
    """One quantity of everything that is compared.

    Attributes:
        title: What it is.
        values: One for each; None where unknown.
        labels: What is written beside each bar.
        spread: `(low, high)` of each, drawn as a whisker.
    """

    title: str
    values: Sequence[float | None]
    labels: Sequence[str]
    spread: Sequence[tuple[float, float]] | None = None


def plot_bars(names: Sequence[str], panels: Sequence[Bars], path: str | pathlib.Path) -> pathlib.Path:
    """Draws a panel for each quantity, side by side, and in it a bar for each of what is compared.

    Args:
        names: What is compared; the first one is drawn in gray, as what the others are compared with.
        panels: The quantities.
        path: Where the picture goes; its suffix (`.png`, `.svg`, `.pdf`) chooses the format.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    places = range(len(names))
    figure = Figure(figsize=(1 + 2.9 * len(panels), 1 + 0.42 * len(names)), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True):
        values = [value or 0 for value in panel.values]
        axes.barh(places, values, height=0.7, color=["lightgrey", *["tab:blue"] * (len(names) - 1)])
        ends = list(values)
        if panel.spread:
            ends = [max(value, high) for value, (_, high) in zip(values, panel.spread, strict=True)]
            axes.hlines(places, *zip(*panel.spread, strict=True), color="black", linewidth=1)
        for y, (end, label) in enumerate(zip(ends, panel.labels, strict=True)):
            axes.annotate(f" {label}", (max(end, 0), y), va="center", fontsize=9)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlim(min(0, *values), 1.75 * max(*ends, 0) or 1)
        axes.set_xticks([])
        axes.tick_params(left=False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_yticks(places, labels=list(names))
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
    return pathlib.Path(path)


@dataclass(frozen=True)
class FrontPoint:
    """A finished trial in a picture of a front.

    Attributes:
        x, y: Its two metrics.
        on_front: Whether it is one of the best trade-offs.
    """

    x: float
    y: float
    on_front: bool


def plot_front(
    points: Sequence[FrontPoint],
    path: str | pathlib.Path,
    *,
    labels: tuple[str, str],
    before: tuple[float, float] | None = None,
    limits: Sequence[tuple[str, float]] = (),
) -> pathlib.Path:
    """Draws finished trials, the front among them as a line, and what the search began with.

    Args:
        points: The trials.
        path: Where the picture goes; its suffix (`.png`, `.svg`, `.pdf`) chooses the format.
        labels: Of the axes.
        before: The model that the search began with, as `(x, y)`.
        limits: Budgets, as `("x" or "y", value)`.

    Returns:
        The path.

    Raises:
        ValueError: there is no point.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    if not points:
        raise ValueError("There is no finished trial to draw.")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    others = [point for point in points if not point.on_front]
    front = sorted((point for point in points if point.on_front), key=lambda point: point.x)
    axes.scatter([p.x for p in others], [p.y for p in others], color="lightgrey", label="trials")
    axes.plot([p.x for p in front], [p.y for p in front], marker="o", color="tab:blue", label="best trade-offs")
    if before is not None:
        axes.scatter(*before, marker="*", s=150, color="black", label="before")
    for axis, value in limits:
        line = axes.axvline if axis == "x" else axes.axhline
        line(value, linestyle="--", color="tab:red", label="budget")
    every = [*points, *([FrontPoint(*before, False)] if before else [])]
    if min(point.x for point in every) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1 else f"{value:,.0f}")
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
    if all(0 <= point.y <= 1 for point in every):
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set(xlabel=labels[0].replace("_", " "), ylabel=labels[1].replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return pathlib.Path(path)


_FEW = 8  # lines that can be told apart in one panel
_WIDE = 20.0  # a ratio of values from which on a logarithmic axis shows more
_DARK = 0.55  # the part of a color map from which on text is white
_OUTLIERS = 0.98  # the quantile from which on everything has the darkest color


@dataclass(frozen=True)
class Falls:
    """How a metric falls with one way to compress.

    Attributes:
        title: What is compressed.
        values: How much, from the mildest to the strongest.
        labels: How these are written.
        scores: The metric at each of them, for each of what is compressed.
        begins_at_zero: Whether the values are fractions, and the metric at zero is that of the model as it is; else
            the values are drawn evenly spaced.
    """

    title: str
    values: Sequence[float]
    labels: Sequence[str]
    scores: Mapping[str, Sequence[float]]
    begins_at_zero: bool


def plot_falls(
    names: Sequence[str],
    panels: Sequence[Falls],
    path: str | pathlib.Path,
    *,
    metric: str,
    base: float,
    worse_by: Callable[[float], float],
    text: Callable[[float], str],
) -> pathlib.Path:
    """Draws how a metric falls, a panel for each way to compress: lines or, for many names, heat maps.

    Args:
        names: What is compressed; the first one, all of it together, is drawn in black.
        panels: The ways to compress.
        path: Where the picture goes; its suffix (`.png`, `.svg`, `.pdf`) chooses the format.
        metric: Its name.
        base: The metric without compression.
        worse_by: How much worse than that a value of the metric is; negative: better.
        text: How a value of the metric is written.

    Returns:
        The path.
    """
    title = metric.replace("_", " ")
    if len(names) - 1 <= _FEW:
        figure = _draw_lines(names, panels, title, base, text)
    else:
        figure = _draw_heat_maps(names, panels, f"{title}: {text(base)} as it is", worse_by, text)
    figure.savefig(path, dpi=150)
    return pathlib.Path(path)


def _draw_lines(names, panels: Sequence[Falls], title: str, base: float, text: Callable[[float], str]):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(1 + 3.6 * len(panels), 3.9 + 0.12 * len(names)), layout="constrained")
    colors = ["black", *(f"C{index}" for index in range(len(names) - 1))]
    all_scores = [score for panel in panels for scores in panel.scores.values() for score in scores]
    for panel, axes in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True):
        places = list(panel.values) if panel.begins_at_zero else list(range(1, len(panel.values) + 1))
        for name, color in reversed(list(zip(names, colors, strict=True))):
            if name in panel.scores:
                width = 2.2 if name == names[0] else 1.4
                style = {"color": color, "linewidth": width, "marker": "o", "markersize": 3.5}
                axes.plot([0, *places], [base, *panel.scores[name]], label=name, **style)
        axes.axhline(base, linestyle="--", linewidth=1, color="grey", zorder=0)
        if panel.begins_at_zero:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        else:
            axes.set_xticks([0, *places], labels=["as it is", *panel.labels])
        axes.set_xlabel(panel.title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if min(base, *all_scores) > 0 and max(all_scores) > _WIDE * base:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    figure.axes[0].set_ylabel(title)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    shown = [name for name in names if name in lines]
    figure.legend([lines[name] for name in shown], shown, loc="outside lower center", ncols=min(len(shown), 5))
    return figure


def _draw_heat_maps(names, panels: Sequence[Falls], title: str, worse_by, text: Callable[[float], str]):
    import numpy as np
    from matplotlib.figure import Figure

    widths = [len(panel.values) for panel in panels]
    figure = Figure(figsize=(2.2 + 0.55 * sum(widths), 1.4 + 0.24 * len(names)), layout="constrained")
    drops = [
        {name: [max(worse_by(score), 0.0) for score in scores] for name, scores in panel.scores.items()}
        for panel in panels
    ]
    finite = [drop for panel in drops for row in panel.values() for drop in row if np.isfinite(drop)]
    darkest = float(np.quantile(finite, _OUTLIERS)) or 1.0 if finite else 1.0
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, dropped, axes in zip(panels, drops, all_axes, strict=True):
        missing = [np.nan] * len(panel.values)
        shades = np.minimum([dropped.get(name, missing) for name in names], darkest)
        axes.imshow(shades, cmap="Reds", vmin=0, vmax=darkest, aspect="auto")
        for (row, column), shade in np.ndenumerate(shades):
            label = text(panel.scores[names[row]][column]) if names[row] in panel.scores else "-"
            style = {"fontsize": 6.5, "color": "white" if shade > _DARK * darkest else "black"}
            axes.annotate(label, (column, row), ha="center", va="center", **style)
        axes.axhline(0.5, color="black", linewidth=1)
        axes.set_xticks(range(len(panel.values)), labels=list(panel.labels), fontsize=8)
        axes.set_title(panel.title, fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    all_axes[0].set_yticks(range(len(names)), labels=list(names), fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
