"""The files of a search: each is there whole or not at all, and says to which search it belongs."""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from keras_squeeze.atomic_write import write_file


def save_json(path: str | pathlib.Path, content: Any) -> None:
    """Writes a file that a kill in the middle leaves as it was."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content).encode())


def load_json(path: pathlib.Path) -> Any:
    """Reads a file of a search.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Restore it, or pass `overwrite=True` to begin a new search in its place."
        ) from None


def load_trials(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The states of all trials, in the order of their names; a folder without `trial.json` was not begun."""
    return [load_json(path) for path in sorted(folder.glob("trial_*/trial.json"))]


def check_same_objectives(folder: pathlib.Path, stored: Any, objectives: Sequence[Sequence[str]]) -> None:
    """Raises `ValueError` where a directory holds a search for something else."""
    if stored is None or sorted(map(list, stored)) != sorted(map(list, objectives)):
        was = ", ".join(f"{direction} {name}" for name, direction in stored or []) or "another oracle's"
        now = ", ".join(f"{direction} {name}" for name, direction in objectives)
        raise ValueError(f"{_another(folder)} Its objectives are: {was}. Received: {now}.")


def check_same_space(folder: pathlib.Path, stored: Iterable, given: Iterable, *, complete: bool) -> None:
    """Raises `ValueError` where a directory holds a search through another space, naming the differences.

    Args:
        folder: Where it is.
        stored: Its hyperparameters.
        given: Those of the search that is to go on there.
        complete: Whether `given` are all, so that a stored one that is not among them is a difference, too.
    """
    before, now = _described(stored), _described(given)
    changes = [f"{name} is new" for name in now if name not in before]
    changes += [
        f"{name} was {before[name]}, not {now[name]}" for name in now if before.get(name, now[name]) != now[name]
    ]
    changes += [f"{name} is missing" for name in before if complete and name not in now]
    if changes:
        raise ValueError(f"{_another(folder)} Its space differs. Received: {'; '.join(changes)}.")


def _another(folder: pathlib.Path) -> str:
    return (
        f"{folder} holds another search. Pass another `directory` or `project_name`, or `overwrite=True` to delete it."
    )


def _described(space: Iterable) -> dict[str, str]:
    """Each hyperparameter under its name and conditions, as text that is equal only for equal ones."""
    described = {}
    for hp in space:
        config = hp.get_config()
        conditions = config.pop("conditions")
        name = " ".join([config.pop("name"), *(json.dumps(x["config"], sort_keys=True) for x in conditions)])
        described[name] = f"{type(hp).__name__} {json.dumps(config, sort_keys=True)}"
    return described
