"""Configurations of a space of Keras Tuner's hyperparameters: what each may be, which are active, all in order."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


def filled(space: Sequence[Any], choose: Callable[[Any], Any]) -> dict[str, Any]:
    """Values for the active hyperparameters, parents before those that depend on them.

    Args:
        space: Keras Tuner's hyperparameters, in any order. Of several with one name, the first active one counts.
        choose: From a hyperparameter to its value.
    """
    values: dict[str, Any] = {}
    waiting = list(space)
    while waiting:
        active = next((hp for hp in waiting if is_active(hp, values)), None)
        if active is None:
            break
        values[active.name] = choose(active)
        waiting = [hp for hp in waiting if hp.name != active.name]
    return values


def is_active(hp, values: Mapping[str, Any]) -> bool:
    """Whether a hyperparameter counts beside these values."""
    return all(condition.is_active(values) for condition in hp.conditions)


def identity(values: Mapping[str, Any]) -> str:
    """Equal for equal configurations, whatever their order."""
    return repr(sorted(values.items()))


def configurations(space: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Every configuration, in order; nothing where there are infinitely many."""
    if any(allowed_values(hp) is None for hp in space):
        return
    path: list[int] = []
    while True:
        sizes: list[int] = []

        yield filled(space, functools.partial(_choose_along, path, sizes))
        path += [0] * (len(sizes) - len(path))
        while path and path[-1] == sizes[len(path) - 1] - 1:
            path.pop()
        if not path:
            return
        path[-1] += 1


def _choose_along(path: list[int], sizes: list[int], hp) -> Any:
    """The value that a path says, the first where it ends; notes how many there were to choose from."""
    allowed = finite_values(hp)
    sizes.append(len(allowed))
    return allowed[path[len(sizes) - 1] if len(sizes) <= len(path) else 0]


def allowed_values(hp) -> Sequence[Any] | None:
    """Everything that a hyperparameter can be, in order; None for a continuous one."""
    kind = type(hp).__name__
    if kind == "Fixed":
        return [hp.value]
    if kind == "Boolean":
        return [False, True]
    if kind == "Choice":
        values = list(dict.fromkeys(hp.values))
        return sorted(values) if hp.ordered else values
    if kind == "Int" and hp.sampling == "linear":
        return range(hp.min_value, hp.max_value + 1, hp.step)
    if hp.step is None:
        return range(hp.min_value, hp.max_value + 1) if kind == "Int" else None
    return _stepped(hp)


def finite_values(hp) -> Sequence[Any]:
    """Everything that a hyperparameter can be, where that is finite."""
    allowed = allowed_values(hp)
    if allowed is None:
        raise ValueError(f"{hp.name!r} is continuous. Received: {hp}")
    return allowed


def nearest(hp, value: Any) -> Any:
    """The allowed value that is closest: clipped to the range, on the grid; of words only the value itself.

    Raises:
        ValueError: there is none.
    """
    allowed = allowed_values(hp)
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if allowed is None and numeric:
        return float(min(max(value, hp.min_value), hp.max_value))
    if isinstance(allowed, range) and numeric:
        index = (min(max(value, allowed[0]), allowed[-1]) - allowed.start) / allowed.step
        return allowed[round(index)]
    if allowed is not None and isinstance(value, bool) == isinstance(allowed[0], bool) and value in allowed:
        return allowed[allowed.index(value)]
    if allowed is None or not numeric or not is_ordered(hp):
        raise ValueError(f"{hp.name!r} cannot be that: it is {allowed if allowed else 'a number'}. Received: {value!r}")
    return min(allowed, key=lambda other: abs(other - value))


def _stepped(hp) -> list[Any]:
    """The grid of a number with a step; Keras Tuner's own loses the last value to rounding."""
    low, high, step = hp.min_value, hp.max_value, hp.step
    if hp.sampling == "linear":
        grid = [low + index * step for index in range(math.floor((high - low) / step + 1e-9) + 1)]
    else:
        grid = [low * step**index for index in range(math.floor(math.log(high / low, step) + 1e-9) + 1)]
    if hp.sampling == "reverse_log":
        grid = [high + low - value for value in reversed(grid)]
    return [min(max(value, low), high) for value in grid]


def is_ordered(hp) -> bool:
    return type(hp).__name__ in ("Int", "Float") or (type(hp).__name__ == "Choice" and hp.ordered)


def is_smooth(hp) -> bool:
    """Whether it is drawn along its own scale, linear or logarithmic, and not as one of a few values."""
    return type(hp).__name__ in ("Int", "Float") and hp.step is None


def value_at(hp, fraction: float) -> Any:
    """The value at a fraction of its scale."""
    return min(max(hp.prob_to_value(fraction), hp.min_value), hp.max_value)
