"""A bar on standard error for what takes long; nothing is shown where that is no terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator

_SECONDS_BETWEEN = 0.1


@contextlib.contextmanager
def progress_bar(title: str, total: float | None = None, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Shows how far a piece of work is, and removes the bar when it is done.

    Args:
        title: What is being done.
        total: How much there is to do; None where that is not known.
        quiet: Whether the bar is drawn only when something advances, so that nothing runs beside what is measured.

    Returns:
        A context manager that gives a function `advance(amount=1, *, title=None, total=None)`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, auto_refresh=not quiet) as bar:
        task = bar.add_task(title, total=total)
        drawn = time.monotonic()

        def advance(amount: float = 1, *, title: str | None = None, total: float | None = None) -> None:
            nonlocal drawn
            bar.update(task, advance=amount, description=title, total=total)
            if quiet and time.monotonic() - drawn > _SECONDS_BETWEEN:
                bar.refresh()
                drawn = time.monotonic()

        yield advance
