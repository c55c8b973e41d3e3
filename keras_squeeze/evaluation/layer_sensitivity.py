"""How the metric of a model falls when its layers are pruned or quantized one at a time, without training."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.analysis.tables import shorten
from keras_squeeze.data import batches, lists_to_arrays
from keras_squeeze.evaluation.metrics import check_compiled, find_metric
from keras_squeeze.evaluation.sensitivity_profile import WHOLE, Curve, Sensitivity
from keras_squeeze.introspection.functional import functional_of
from keras_squeeze.introspection.selection import (
    CompressibleLayer,
    CompressibleWeight,
    LayerSelector,
    check_finite,
    compile_patterns,
    select_layers,
)
from keras_squeeze.introspection.variables import changed, read, recurrent_states
from keras_squeeze.neuron_pruning import neuron_criteria
from keras_squeeze.neuron_pruning.neuron_allocation import Limits
from keras_squeeze.neuron_pruning.neuron_selection import NeuronSelector, Target
from keras_squeeze.neuron_pruning.neurons import Neurons
from keras_squeeze.progress import progress_bar
from keras_squeeze.quantizers import Affine, Binary
from keras_squeeze.weight_pruning.criteria import preserve_metrics
from keras_squeeze.weight_pruning.weight_groups import PruningMethod

_BATCH = 250
_MOST_BITS = 16

Units = dict[str, list[CompressibleLayer]]
"""What is compressed together, by name: each layer alone, the layers of a group, or all of them."""

Changes = list[tuple[keras.Variable, np.ndarray]]
"""Variables and their new values."""


def sensitivity(
    model: keras.Model,
    data,
    *,
    metric=None,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    bits: Sequence[int] = (8, 4, 3, 2, 1),
    neurons: Sequence[float] = (0.25, 0.5, 0.75),
    layers: LayerSelector = None,
    groups: Mapping[str, str] | Sequence[str] | None = None,
    max_examples: int = 1000,
) -> Sensitivity:
    """Finds out which layers mind being compressed: the metric of the model while one layer at a time is.

    Nothing is trained, so that it takes as long as some dozens of `evaluate` for each layer. What training wins back is
    not seen, but the order of the layers is: those that fall first are the ones to be careful with.

    A layer's weights are pruned by magnitude, its neurons by their norm (where the network allows to take them out),
    and its weights rounded to the grid that `quantize_aware` would give them: integers with a scale for each channel,
    for one bit the sign times the mean magnitude. The model is the same afterwards, also where this is interrupted.

    Args:
        model: A built, compiled model with the weights to look at. The neurons of subclassed models are left out.
        data: `(x, y)` or `(x, y, sample_weight)`, for several inputs with a list or dict of arrays as `x`; or a
            `tf.data.Dataset` of batches of that. It is read once, so that everything is judged on the same examples.
        metric: Name of a metric that the model is compiled with (`"val_accuracy"` is `"accuracy"`), or a
            `keras_tuner.Objective`, which says in which direction it is better. None: the first metric that is not a
            loss or, if there is none, the loss.
        sparsities: Fractions of zeros to try, in [0, 1).
        bits: Bits of the weights to try, 1 to 16.
        neurons: Fractions of the neurons to try, in [0, 1). An empty tuple leaves this or one of the others out.
        layers: Which layers, as in `MagnitudePruning`.
        groups: `{name: regular expression}`, or a list of expressions that are their own names: layers that are
            compressed together. A layer belongs to the first expression that is found in its path; others are left out.
        max_examples: Use at most so many examples: of arrays, spread evenly over them; of a dataset, the first ones.

    Returns:
        A `Sensitivity`: print it, or use `["conv"]`, `.tolerance(kind, max_drop)`, `.most_sensitive(kind)`,
        `.plot(path)`, `.to_json()`, `.to_dataframe()`. The curves called `"all"` are of all layers compressed at once.

    Raises:
        TypeError, ValueError: before anything is tried: a model that is not built or compiled, a metric that it does
            not have or of which the better direction is unknown, a selection that matches nothing, a number out of its
            range, data without targets or that can be read only once, weights or a metric that are not finite.

    Example:

    ```python
    profile = ks.sensitivity(model, (x_val, y_val))
    print(profile)
    profile.plot("sensitivity.png")
    profile.tolerance("sparsity", max_drop=0.01)
    ```
    """
    sparsities = _fractions("sparsities", sparsities)
    neurons = _fractions("neurons", neurons)
    bits = _bits(bits)
    if not (sparsities or neurons or bits):
        raise ValueError("There is nothing to try: `sparsities`, `neurons` and `bits` are all empty. Received: ()")
    selection = select_layers(model, layers)
    check_finite(selection.weights)
    check_compiled(model)
    units, left_out = _units(selection.layers, groups)
    dataset, examples = _dataset(data, max_examples)
    with _left_as_found(model):
        name, direction, base = _first_look(model, dataset, metric)
        trials, reasons = _trials(model, units, sparsities, neurons, bits)
        curves = _measured(trials, functools.partial(_evaluate, model, dataset, name))
    skipped = [*selection.skipped, *left_out, *reasons]
    return Sensitivity(name, direction, base, examples, curves, skipped)


@dataclass(frozen=True, eq=False)
class _Trial:
    """What becomes one curve: a function from a value to what the variables become."""

    layer: str
    kind: str
    values: tuple[float, ...]
    changes: Callable[[Any], Changes]


def _trials(model, units: Units, sparsities, neurons, bits) -> tuple[list[_Trial], list[tuple[str, str]]]:
    """All trials, and `(path, reason)` of those whose neurons cannot go."""
    whole = list(dict.fromkeys(entry for entries in units.values() for entry in entries))
    selectors: dict[str, NeuronSelector] = {}
    reasons: list[tuple[str, str]] = []
    if neurons:
        selectors, reasons = _selectors(model, {**units, WHOLE: whole})
    trials = []
    for name, entries in {**units, WHOLE: whole}.items():
        weights = [weight for entry in entries for weight in entry.weights]
        if sparsities:
            trials.append(_Trial(name, "sparsity", sparsities, functools.partial(_pruned, model, weights)))
        if name in selectors:
            changes = functools.partial(_without_neurons, selectors[name])
            trials.append(_Trial(name, "neurons", neurons, changes))
        if bits:
            trials.append(_Trial(name, "bits", bits, functools.partial(_on_grid, weights)))
    return trials, reasons


def _measured(trials: list[_Trial], evaluate: Callable[[], float]) -> list[Curve]:
    curves = []
    with progress_bar("sensitivity", total=sum(len(trial.values) for trial in trials)) as advance:
        for trial in trials:
            advance(0, title=f"{trial.layer}: {trial.kind}")
            scores = []
            for value in trial.values:
                with changed(trial.changes(value)):
                    scores.append(evaluate())
                advance()
            curves.append(Curve(trial.layer, trial.kind, trial.values, tuple(scores)))
    return curves


def _pruned(model, weights: list[CompressibleWeight], sparsity: float) -> Changes:
    """Weights without their smallest values, every weight alike."""
    masks = PruningMethod.make("uniform", "unstructured", "magnitude", None).masks(model, weights, sparsity)
    pairs = zip(weights, masks, strict=True)
    return [(weight.variable, np.where(mask, read(weight.variable), 0)) for weight, mask in pairs]


def _on_grid(weights: list[CompressibleWeight], bits: int) -> Changes:
    """Weights rounded to what integers of so many bits stand for."""
    quantizer = Binary() if bits == 1 else Affine(bits).for_weights()
    changes = []
    for weight in weights:
        parts = quantizer.to_integers(read(weight.variable), channels=weight.channel_axes)
        integers, scale, zero_point = parts
        changes.append((weight.variable, scale * (integers - zero_point)))
    return changes


def _without_neurons(selector: NeuronSelector, fraction: float) -> Changes:
    """Everything that computes neurons, zero in those that go."""
    changes: dict[int, tuple[keras.Variable, np.ndarray]] = {}
    for variable, mask in selector.neurons.masks(selector.select(fraction)):
        values = changes[id(variable)][1] if id(variable) in changes else read(variable)
        changes[id(variable)] = variable, np.where(mask, values, 0)
    return list(changes.values())


def _selectors(model, units: Units) -> tuple[dict[str, NeuronSelector], list[tuple[str, str]]]:
    """What chooses the neurons of each unit, and why there is nothing to choose in others."""
    if functional_of(model) is None:
        return {}, [(model.name, "neurons: the model is subclassed, so that it is not known how its layers connect")]
    selectors, reasons = {}, []
    everything = Neurons(model, [entry.layer for entry in units[WHOLE]])
    for name, entries in units.items():
        neurons = everything if name == WHOLE else Neurons(model, [entry.layer for entry in entries])
        reason = None if neurons.groups else _why_they_stay(neurons, everything, [entry.path for entry in entries])
        if reason is None:
            try:  # the target is a fraction that `select` is asked for, of all
                limits, criterion = Limits(1, 1, 1.0), neuron_criteria.get("l2")
                selectors[name] = NeuronSelector(neurons, Target("neurons", 1.0), limits, "uniform", criterion, None)
            except ValueError:
                reason = "it has only one"
        if reason is not None and name != WHOLE:
            reasons.append((name, f"neurons: {reason}"))
    return selectors, reasons


def _why_they_stay(found: Neurons, everything: Neurons, paths: list[str]) -> str:
    joined = {path: None for group in everything.groups if set(group.paths) & set(paths) for path in group.paths}
    if joined:
        return f"they go only together: {shorten(list(joined))}; `groups` can put these together"
    reasons = [reason for path, reason in found.frozen if path in paths]
    if not reasons:
        return "it has none of its own"
    causes = [reason for reason in reasons if reason != "not selected"]
    return "; ".join(dict.fromkeys(causes)) or "they go only together with those of layers that are not selected"


def _units(entries: Sequence[CompressibleLayer], groups) -> tuple[Units, list[tuple[str, str]]]:
    """What is compressed together, and `(path, reason)` of layers that belong to nothing."""
    if groups is None:
        units: Units = {entry.path: [entry] for entry in entries}
    else:
        patterns = dict(zip(_names(groups), compile_patterns(_expressions(groups)), strict=True))
        units = {name: [] for name in patterns}
        for entry in entries:
            first = next((name for name, pattern in patterns.items() if pattern.search(entry.path)), None)
            if first is not None:
                units[first].append(entry)
    empty = [name for name, members in units.items() if not members]
    if empty:
        raise ValueError(
            f"`groups`: no selected layer is left for {', '.join(map(repr, empty))}; a layer belongs to the first "
            f"expression that is found in its path. Layers: {', '.join(entry.path for entry in entries)}. Received: "
            f"groups={groups!r}"
        )
    if WHOLE in units:
        raise ValueError(
            f"{WHOLE!r} is what all the layers together are called: give groups other names, and a layer of this name "
            f'another one with groups={{"name": "^{WHOLE}$", ...}}. Received: {", ".join(units)}'
        )
    members = {id(entry) for members in units.values() for entry in members}
    return units, [(entry.path, "belongs to no group") for entry in entries if id(entry) not in members]


def _names(groups) -> list[str]:
    if isinstance(groups, str) or not isinstance(groups, (Mapping, list, tuple)) or not groups:
        raise TypeError(
            "`groups` must be {name: regular expression} or a list of regular expressions. Received: "
            f"groups={groups!r}"
        )
    return list(groups)


def _expressions(groups) -> list[str]:
    return list(groups.values() if isinstance(groups, Mapping) else groups)


@contextlib.contextmanager
def _left_as_found(model):
    """Whatever is evaluated in here leaves no trace: not in weights, metrics, or what recurrent layers remember."""
    states = [variable for variable in (*model.variables, *recurrent_states(model)) if not variable.trainable]
    with preserve_metrics(model), changed([(variable, np.array(read(variable))) for variable in states]):
        yield


def _evaluate(model, dataset, name: str) -> float:
    return float(model.evaluate(dataset, verbose=0, return_dict=True)[name])


def _first_look(model, dataset, metric) -> tuple[str, str, float]:
    """The name of the metric, the direction in which it is better, and what it is for the model as it is."""
    values = model.evaluate(dataset, verbose=0, return_dict=True)
    name, direction = find_metric(model, values, metric)
    base = float(values[name])
    if not np.isfinite(base):
        raise ValueError(f"The metric of the model as it is must be finite. Received: {name}={base}")
    return name, direction, base


def _dataset(data, max_examples: int) -> tuple[Any, int]:
    """Batches as `evaluate` takes them, held in memory, and how many examples they have."""
    import tensorflow as tf

    checks.positive_int("max_examples", max_examples)
    if isinstance(data, Iterator):
        raise TypeError(
            "`data` must be arrays (x, y) or a tf.data.Dataset, so that it can be read again. Received an iterator or "
            f"generator: {data!r}"
        )
    parts, count = [], 0
    for batch in batches(_thinned(lists_to_arrays(data), max_examples), None, _BATCH):
        part = _without_blanks(batch, max_examples - count)
        parts.append(part)
        count += len(keras.tree.flatten(part)[0])
        if count >= max_examples:
            break
    shapes = {tuple(array.shape[1:] for array in keras.tree.flatten(part)) for part in parts}
    if len(shapes) == 1:
        merged = keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)
        return tf.data.Dataset.from_tensor_slices(merged).batch(_BATCH).cache(), count
    single = map(tf.data.Dataset.from_tensors, parts)  # such as texts of another length in every batch
    return functools.reduce(lambda one, other: one.concatenate(other), single).cache(), count


def _thinned(data, max_examples: int):
    """Arrays with so many examples at most, spread evenly: those at the beginning may be of one class."""
    if not isinstance(data, (tuple, list)):
        return data
    sizes = {len(array) for array in keras.tree.flatten(data) if hasattr(array, "shape")}
    if len(sizes) != 1 or max(sizes) <= max_examples:
        return data
    chosen = np.linspace(0, max(sizes) - 1, max_examples).astype(int)
    return keras.tree.map_structure(lambda array: None if array is None else np.asarray(array)[chosen], data)


def _without_blanks(batch: tuple, most: int) -> tuple:
    """The first examples of a batch as arrays: inputs, targets and, where they are given, sample weights."""
    x, y, weights = batch
    if y is None:
        raise ValueError("`data` must be inputs and targets: (x, y), or batches of that. Received: inputs alone")
    parts = (x, y) if weights is None else batch
    arrays = keras.tree.map_structure(lambda array: keras.ops.convert_to_numpy(array)[:most], parts)
    return tuple(tuple(part) if isinstance(part, list) else part for part in arrays)


def _fractions(name: str, values) -> tuple[float, ...]:
    return tuple(sorted({checks.fraction(name, value) for value in _listed(name, values)}))


def _bits(values) -> tuple[int, ...]:
    for value in _listed("bits", values):
        if not checks.is_int(value) or not 1 <= value <= _MOST_BITS:
            raise ValueError(f"`bits` must be ints from 1 to {_MOST_BITS}. Received: bits={values!r}")
    return tuple(sorted({int(value) for value in values}, reverse=True))


def _listed(name: str, values) -> list:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` must be a sequence of numbers; () leaves it out. Received: {name}={values!r}")
    return list(values)
