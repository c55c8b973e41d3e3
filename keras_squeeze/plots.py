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
