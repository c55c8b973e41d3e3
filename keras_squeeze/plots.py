"""Pictures of what compression did. matplotlib is imported when a picture is drawn."""

import pathlib
from collections.abc import Mapping, Sequence


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
    for place, wide, narrow in zip(places, before, after, strict=True):
        axes.annotate(f" {wide} → {narrow}" if narrow < wide else f" {wide}", (wide, place), va="center")
    axes.set_yticks(places, labels=list(widths))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="channels", title="Neurons removed")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    return pathlib.Path(path)
