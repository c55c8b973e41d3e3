"""What to try first: configurations that a sensitivity profile says a model can bear."""

from collections.abc import Iterable
from typing import Any

from keras_squeeze.search.profiles import WHOLE, Sensitivity
from keras_squeeze.search.space import FLOAT_BITS, CompressionSpace, Dimension

# How much of the metric may be gone before training, from mild to strong. Training wins most of it back, so that the
# strong ones are what is near the front.
_LEVELS = (0.02, 0.1, 0.3, 0.6)


def first_configurations(profile: Sensitivity, space: CompressionSpace) -> list[dict[str, Any]]:
    """Configurations to begin a search with, from mild to strong.

    Each takes, of every kind of compression that varies, as much as costs the model the same part of its metric
    without training; the rest of the space keeps its defaults.

    Args:
        profile: Of the model, with the groups of the space where it has some.
        space: What may vary.

    Returns:
        `{hyperparameter: value}` for each.
    """
    found: list[dict[str, Any]] = []
    for level in _LEVELS:
        allowed = level * abs(profile.base) if profile.base else level
        for parts in _combinations(space):
            values: dict[str, Any] = {}
            for part in parts:
                values |= _PARTS[part](profile, space, allowed)
            if values and values not in found:
                found.append(values)
    return found


def _combinations(space: CompressionSpace) -> list[tuple[str, ...]]:
    """Which kinds are used together: all of them, and all but one of those that remove something."""
    varying = [name for name in _PARTS if getattr(space, name).varies]
    removing = [name for name in varying if name != "bits"]
    less = [tuple(name for name in varying if name != left_out) for left_out in removing] if len(removing) > 1 else []
    return [tuple(varying), *less]


def _neurons(profile: Sensitivity, space: CompressionSpace, allowed: float) -> dict[str, Any]:
    curves = profile[WHOLE]
    if "neurons" not in curves:
        return {}
    return {"neurons": nearest(space.neurons, profile.strongest(WHOLE, "neurons", allowed) or 0.0)}


def _sparsity(profile: Sensitivity, space: CompressionSpace, allowed: float) -> dict[str, Any]:
    """Of each group as much as it bears."""
    return {
        name: nearest(space.sparsity, profile.strongest(layer, "sparsity", allowed) or 0.0)
        for name, layer in _by_group(profile, space, "sparsity")
    }


def _bits(profile: Sensitivity, space: CompressionSpace, allowed: float) -> dict[str, Any]:
    found = {}
    for name, layer in _by_group(profile, space, "bits"):
        fewest = profile.strongest(layer, "bits", allowed)
        enough = [bits for bits in space.bits.choices if bits >= (FLOAT_BITS if fewest is None else fewest)]
        found[name] = min(enough, default=max(space.bits.choices))
    return found


_PARTS = {"neurons": _neurons, "sparsity": _sparsity, "bits": _bits}


def _by_group(profile: Sensitivity, space: CompressionSpace, kind: str) -> Iterable[tuple[str, str]]:
    """The names of the hyperparameters, and of the curves that say how much."""
    if not space.groups:
        return [(kind, WHOLE)]
    return [(f"{kind}/{group}", group) for group in space.groups if group in profile.layers]


def nearest(dimension: Dimension, value: float) -> float:
    """The value of a dimension that is nearest to another one."""
    if dimension.choices:
        return min(dimension.choices, key=lambda choice: abs(choice - value))
    value = min(max(value, dimension.low), dimension.high)
    if dimension.step:
        value = dimension.low + round((value - dimension.low) / dimension.step) * dimension.step
    return min(value, dimension.high)
