"""Argument checks, with one form of message: what is allowed, and what was received."""

import math
import numbers
from collections.abc import Collection
from typing import Any, Literal, overload


@overload
def positive_int(name: str, value, *, optional: Literal[False] = False) -> int: ...


@overload
def positive_int(name: str, value, *, optional: bool) -> int | None: ...


def positive_int(name: str, value, *, optional: bool = False) -> int | None:
    """Returns an int of at least 1; with `optional`, None is allowed, too.

    Raises:
        ValueError: Anything else, bools included.
    """
    if optional and value is None:
        return None
    if not is_int(value) or value < 1:
        none = "None or " if optional else ""
        raise ValueError(f"`{name}` must be {none}an int, at least 1. Received: {name}={value!r}")
    return int(value)


def non_negative_int(name: str, value) -> int:
    """Returns an int of at least 0.

    Raises:
        ValueError: Anything else, bools included.
    """
    if not is_int(value) or value < 0:
        raise ValueError(f"`{name}` must be an int, at least 0. Received: {name}={value!r}")
    return int(value)


def non_negative_number(name: str, value) -> float:
    """Returns a finite number of at least 0, as it was received.

    Raises:
        TypeError: Not a number.
        ValueError: Negative, infinite or NaN.
    """
    return _number(name, value, "at least 0", is_number(value) and 0 <= value < math.inf)


def positive_number(name: str, value) -> float:
    """Returns a finite number above 0, as it was received.

    Raises:
        TypeError: Not a number.
        ValueError: Zero, negative, infinite or NaN.
    """
    return _number(name, value, "above 0", is_number(value) and 0 < value < math.inf)


def fraction(name: str, value) -> float:
    """Returns a number in [0, 1) as a float.

    Raises:
        TypeError: Not a number.
        ValueError: Out of range; the message tells a fraction from percent.
    """
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number in [0, 1). Received: {name}={value!r}")
    if not 0.0 <= value < 1.0:
        hint = f" Sparsity is a fraction: for {value:g} % pass {value / 100:g}." if 1.0 < value < 100 else ""
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={value}.{hint}")
    return float(value)


def one_of(name: str, value, choices: Collection) -> Any:
    """Returns a value that is among choices.

    Raises:
        ValueError: It is not.
    """
    if value not in tuple(choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={value!r}")
    return value


def boolean(name: str, value, *, optional: bool = False) -> bool | None:
    """Returns a bool; with `optional`, None is allowed, too.

    Raises:
        TypeError: Anything else.
    """
    if isinstance(value, bool) or (optional and value is None):
        return value
    raise TypeError(f"`{name}` must be a bool{' or None' if optional else ''}. Received: {name}={value!r}")


def is_int(value) -> bool:
    """Returns whether a value is an integer, NumPy's included; a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Returns whether a value can be read as a float, NumPy's included; a bool or a string cannot."""
    return hasattr(value, "__float__") and not isinstance(value, bool)


def _number(name: str, value, limit: str, is_allowed: bool) -> Any:
    if is_allowed:
        return value
    error = ValueError if is_number(value) else TypeError
    raise error(f"`{name}` must be a number, {limit}. Received: {name}={value!r}")
