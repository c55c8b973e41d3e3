"""What to try first: configurations that a sensitivity profile says a model can bear."""

from collections.abc import Iterable
from typing import Any

from keras_squeeze.search.profiles import WHOLE, Sensitivity
from keras_squeeze.search.space import FLOAT_BITS, CompressionSpace, Dimension

# How much of the metric may be gone before training. Training wins most of it back, so that what is near the front
# looks bad before it.
_LEVELS = (0.6, 0.85)


def first_configurations(profile: Sensitivity, space: CompressionSpace) -> list[dict[str, Any]]:
    """Configurations to begin a search with.

    Neurons and sparsity are what costs the model, each alone, a certain part of its metric without training; with them
    every number of bits is tried, since training recovers nearly all of what rounding costs, and the sparsity without
    the neurons, too. The rest of the space keeps its defaults.

    Args:
        profile: Of the model, with the groups of the space where it has some.
        space: What may vary.

    Returns:
        `{hyperparameter: value}` for each.
    """
    found: list[dict[str, Any]] = []
    for level in _LEVELS:
        allowed = level * abs(profile.base) if profile.base else level
        removed = _neurons(profile, space, allowed) | _sparsity(profile, space, allowed)
        kept = {**removed, "neurons": nearest(space.neurons, 0.0)} if space.neurons.varies else removed
        for bits in _bits(space):
            for values in ({**bits, **removed}, {**bits, **kept}):
                if values and values not in found:
                    found.append(values)
    return found


def _neurons(profile: Sensitivity, space: CompressionSpace, allowed: float) -> dict[str, Any]:
    if not space.neurons.varies or "neurons" not in profile[WHOLE]:
        return {}
    return {"neurons": nearest(space.neurons, profile.strongest(WHOLE, "neurons", allowed) or 0.0)}


def _sparsity(profile: Sensitivity, space: CompressionSpace, allowed: float) -> dict[str, Any]:
    """Of each group as much as it bears."""
    if not space.sparsity.varies:
        return {}
    return {
        name: nearest(space.sparsity, profile.strongest(layer, "sparsity", allowed) or 0.0)
        for name, layer in _by_group(profile, space)
    }


def _by_group(profile: Sensitivity, space: CompressionSpace) -> Iterable[tuple[str, str]]:
    """The names of the hyperparameters, and of the curves that say how much."""
    if not space.groups:
        return [("sparsity", WHOLE)]
    return [(f"sparsity/{group}", group) for group in space.groups if group in profile.layers]


def _bits(space: CompressionSpace) -> list[dict[str, Any]]:
    """Every number below that of floats, the same for all groups."""
    if not space.bits.varies:
        return [{}]
    names = [f"bits/{group}" for group in space.groups] or ["bits"]
    return [dict.fromkeys(names, bits) for bits in space.bits.choices if bits != FLOAT_BITS]


def nearest(dimension: Dimension, value: float) -> float:
    """The value of a dimension that is nearest to another one."""
    if dimension.choices:
        return min(dimension.choices, key=lambda choice: abs(choice - value))
    value = min(max(value, dimension.low), dimension.high)
    if dimension.step:
        value = dimension.low + round((value - dimension.low) / dimension.step) * dimension.step
    return min(value, dimension.high)
