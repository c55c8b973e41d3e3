"""What to try first: configurations that a sensitivity profile says a model can bear."""

from collections.abc import Iterable
from typing import Any

from keras_squeeze.evaluation.sensitivity_profile import WHOLE, Sensitivity
from keras_squeeze.search.space import FLOAT_BITS, CompressionSpace, Dimension

# How much of the metric may be gone before training, which wins most of it back: what ends near the front looks bad
# before it.
_MILD, _STRONG, _STRONGEST = 0.3, 0.6, 0.85


def first_configurations(profile: Sensitivity, space: CompressionSpace) -> list[dict[str, Any]]:
    """Configurations to begin a search with.

    A few neurons and many weights go, or many neurons and a few weights, or no neurons and many weights; how many is
    what costs the model, each alone, a certain part of its metric without training. With each of these every number of
    bits is tried, since training recovers nearly all of what rounding costs. The rest of the space keeps its defaults.

    Args:
        profile: Of the model, with the groups of the space where it has some.
        space: What may vary.

    Returns:
        `{hyperparameter: value}` for each.
    """
    many = _sparsity(profile, space, _STRONG, half_of_the_rest=True)
    removed = [
        {**_neurons(profile, space, _MILD), **many},
        {**_neurons(profile, space, _STRONGEST), **_sparsity(profile, space, _MILD)},
        {**_neurons(profile, space, 0.0), **many},
    ]
    configurations: list[dict[str, Any]] = []
    for bits in _bits(space):
        for values in ({**bits, **part} for part in removed):
            if values and values not in configurations:
                configurations.append(values)
    return configurations


def _neurons(profile: Sensitivity, space: CompressionSpace, part: float) -> dict[str, Any]:
    if not space.neurons.varies or "neurons" not in profile[WHOLE]:
        return {}
    fraction = profile.strongest(WHOLE, "neurons", part * abs(profile.base)) if part else 0.0
    return {"neurons": nearest(space.neurons, fraction or 0.0)}


def _sparsity(profile: Sensitivity, space: CompressionSpace, part: float, *, half_of_the_rest=False) -> dict[str, Any]:
    """Of each group as much as it bears, or of what it then has left the half as well."""
    if not space.sparsity.varies:
        return {}
    fractions = {}
    for name, layer in _by_group(profile, space):
        sparsity = profile.strongest(layer, "sparsity", part * abs(profile.base)) or 0.0
        fractions[name] = nearest(space.sparsity, (1 + sparsity) / 2 if half_of_the_rest else sparsity)
    return fractions


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
