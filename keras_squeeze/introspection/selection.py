"""Finds the compressible weights of a model, and those of them that a user's selection names."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_squeeze.introspection.layer_table import LayerSpec, spec_of, stored_variable
from keras_squeeze.introspection.variables import Variable, read, require_tensorflow

LayerSelector: TypeAlias = str | type | keras.Layer | Sequence | set | Callable[[keras.Layer], Any] | None
"""A selection: None, regular expression(s), layer class(es), layer(s), or a predicate `layer -> bool`."""


@dataclass(frozen=True, eq=False)
class CompressibleWeight:
    """One weight that can be compressed.

    Attributes:
        name: Name inside its layer, such as `"kernel"` or `"query/kernel"`.
        path: Path inside the model, such as `"encoder/attention/query/kernel"`.
        variable: The `keras.Variable` that stores it (never a computed tensor).
        input_axis: The axis that is summed over when the layer is applied; n:m patterns run along it.
        channel_axes: The axes of the outputs, negative; a scale per channel has an entry for each of theirs. Empty
            where a kernel of integers takes one scale only.
        depthwise: Whether it filters every channel by itself.
    """

    name: str
    path: str
    variable: keras.Variable
    input_axis: int
    channel_axes: tuple[int, ...] = (-1,)
    depthwise: bool = False

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes along which outputs lie."""
        return self.channel_axes or (-1,)


@dataclass(frozen=True, eq=False)
class CompressibleLayer:
    """A layer with a row in the table, where it stands in a model, and its weights.

    A multi-head attention or an LSTM is one such layer, with the weights of its parts.
    """

    path: str
    layer: keras.Layer
    weights: tuple[CompressibleWeight, ...]
    parents: tuple[keras.Layer, ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """What was found in a model.

    Attributes:
        layers: The compressible layers.
        skipped: `(path, reason)` of every other layer that has weights.
        unknown: The part of `skipped` whose class is not in the table although it has trainable weights.
    """

    layers: tuple[CompressibleLayer, ...]
    skipped: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...]

    @property
    def weights(self) -> list[CompressibleWeight]:
        return [weight for layer in self.layers for weight in layer.weights]


def find_layers(model: keras.Model) -> Selection:
    """Lists every compressible layer of a built model; a shared layer or weight is listed once.

    Args:
        model: Any built Keras model: Sequential, Functional, subclassed, nested.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model is not built, or Keras runs on another backend than TensorFlow.
    """
    require_tensorflow()
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {model!r} of type {type(model).__name__}")
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built, so it has no weights yet. Call it on a batch of data, call "
            "`model.build(input_shape)`, or begin a Sequential model with `keras.Input(shape)`."
        )
    finder = _Finder()
    finder.add(model, spec_of(model), model.name, ())
    finder.visit(model, "", ())
    return finder.selection()


def layers_with_paths(model: keras.Model) -> Iterator[tuple[str, keras.Layer]]:
    """Every layer inside a model, at any depth and once, with its path such as `"encoder/dense_1"`."""
    seen: set[int] = set()

    def visit(parent, prefix: str):
        for layer in parent._layers:
            if id(layer) not in seen:
                seen.add(id(layer))
                yield f"{prefix}{layer.name}", layer
                yield from visit(layer, f"{prefix}{layer.name}/")

    yield from visit(model, "")


def layer_weights(layer: keras.Layer) -> tuple[list[CompressibleWeight], list[tuple[str, str]]]:
    """The compressible weights of one built layer and of the layers in it, and `(path, reason)` of those skipped."""
    finder = _Finder()
    row = spec_of(layer)
    finder.add(layer, row, layer.name, ())
    if row is None or not row.whole:
        finder.visit(layer, f"{layer.name}/", ())
    selection = finder.selection()
    weights = [replace(weight, name=weight.path[len(layer.name) + 1 :]) for weight in selection.weights]
    return weights, list(selection.skipped)


def select_layers(model: keras.Model, layers: LayerSelector = None, *, trainable_only: bool = False) -> Selection:
    """The compressible layers of a model that a selection names.

    Args:
        model: A built Keras model.
        layers: None (all that can be), a regular expression or list of them (`re.search` on the layer's path
            inside the model, such as `"encoder/dense_1"`), a layer class or tuple of them, a layer or list of
            layers, or a predicate `layer -> bool`. Naming a wrapper or a nested model selects what is in it.
        trainable_only: Leave out frozen weights, whose values training does not change.

    Raises:
        TypeError: `layers` is none of these.
        ValueError: nothing compressible matches, a regular expression does not compile, or a layer is not in
            the model.
    """
    everything = find_layers(model)
    matches = _matcher(model, layers)
    chosen, skipped = [], list(everything.skipped)
    for entry in everything.layers:
        if not matches(entry):
            continue
        usable = [w for w in entry.weights if w.variable.trainable or not trainable_only]
        skipped += [(w.path, "frozen (trainable=False)") for w in entry.weights if w not in usable]
        if usable:
            chosen.append(CompressibleLayer(entry.path, entry.layer, tuple(usable), entry.parents))
    if not chosen:
        raise ValueError(_nothing_selected(model, layers, everything, skipped))
    unknown = everything.unknown if layers is None else ()
    return Selection(tuple(chosen), tuple(skipped), unknown)


def compile_patterns(patterns: Iterable[str]) -> list[re.Pattern]:
    """Compiles regular expressions; one that does not compile is a `ValueError` that names it."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"Layers are selected by regular expressions, and this one does not compile: {error}. "
                f"Received: {pattern!r}"
            ) from None
    return compiled


def check_finite(weights: Iterable[CompressibleWeight]) -> None:
    """Raises a `ValueError` that names every weight with NaN or infinite values."""
    with np.errstate(invalid="ignore"):  # infinities of both signs add up to NaN
        bad = [w.path for w in weights if not np.isfinite(np.sum(read(w.variable), dtype="float64"))]
    if bad:
        raise ValueError(
            f"Weights must be finite to be compared. NaN or infinite values in: {', '.join(bad)}. Load a sound "
            "checkpoint, or train with a lower learning rate."
        )


class _Finder:
    """Walks a model depth first; a layer or weight that is met again is not listed again."""

    def __init__(self):
        self.found: dict[int, CompressibleLayer] = {}
        self.skipped: list[tuple[str, str]] = []
        self.unknown: list[str] = []
        self._seen_layers: set[int] = set()
        self._seen_weights: set[int] = set()

    def selection(self) -> Selection:
        return Selection(tuple(self.found.values()), tuple(self.skipped), tuple(self.unknown))

    def visit(self, parent, prefix: str, parents: tuple) -> None:
        for layer in parent._layers:
            row = spec_of(layer)
            if id(layer) not in self._seen_layers:
                self._seen_layers.add(id(layer))
                self.add(layer, row, f"{prefix}{layer.name}", parents)
            elif id(layer) in self.found:
                listed = self.found[id(layer)]
                self.found[id(layer)] = replace(listed, parents=(*listed.parents, *parents))
            if row is None or not row.whole:
                self.visit(layer, f"{prefix}{layer.name}/", (*parents, layer))

    def add(self, layer, row: LayerSpec | None, path: str, parents: tuple) -> None:
        weights = list(self._weights(layer, row, path, ""))
        refusal = next(filter(None, map(_refusal, parents)), None)
        if weights and refusal:
            self.skipped += [(weight.path, refusal) for weight in weights]
        elif weights:
            self.found[id(layer)] = CompressibleLayer(path, layer, tuple(weights), parents)
        elif row and not row.whole and not row.weights and not row.hidden and layer._trainable_variables:
            self.skipped.append((path, f"{type(layer).__name__} has no weights worth compressing"))

    def _weights(self, layer, row: LayerSpec | None, path: str, prefix: str) -> Iterator[CompressibleWeight]:
        """The weights that a row names; those that cannot be taken go to `skipped`."""
        if row is None:
            if layer._trainable_variables:
                self.unknown.append(path)
                self.skipped.append((path, _unknown_reason(layer)))
        elif row.whole:
            for part in layer._layers:
                part_row = spec_of(part) or (LayerSpec({}, whole=True) if part._layers else None)
                yield from self._weights(part, part_row, path, f"{prefix}{part.name}/")
        elif row.weights and not layer.built:
            self.skipped.append((path, "not built: no call of the model has reached it"))
        else:
            for name, axis in row.weights.items():
                variable = stored_variable(layer, name)
                if variable is None and row.registered:
                    self.skipped.append((f"{path}/{prefix}{name}", f"{type(layer).__name__} has no such weight"))
                if variable is None or id(variable) in self._seen_weights:
                    continue
                self._seen_weights.add(id(variable))
                reason = _unusable(layer, variable)
                if reason:
                    self.skipped.append((f"{path}/{prefix}{name}", reason))
                    continue
                channels = row.channels.get(name, (-1,))
                yield CompressibleWeight(
                    f"{prefix}{name}",
                    f"{path}/{prefix}{name}",
                    variable,
                    axis(layer) if callable(axis) else axis,
                    channels(layer) if callable(channels) else channels,
                    name in row.depthwise,
                )


def _refusal(parent) -> str | None:
    row = spec_of(parent)
    return row.refuses(parent) if row is not None and row.refuses is not None else None


def _unusable(layer, variable) -> str | None:
    if not isinstance(variable, Variable):
        return f"not a variable but a {type(variable).__name__}"
    if not keras.backend.is_float_dtype(variable.dtype):
        mode = getattr(layer, "quantization_mode", None)
        by = f" (quantized by Keras to {mode})" if mode else ""
        return f"holds integers of type {variable.dtype}{by}; only float weights can be pruned"
    return None


def _unknown_reason(layer) -> str:
    return (
        f"{type(layer).__name__} is not in the layer table; keras_squeeze.register_layer("
        f"{type(layer).__name__}, [names of its weights]) adds it"
    )


def _matcher(model, layers: LayerSelector) -> Callable[[CompressibleLayer], bool]:
    """Turns a selection into a test of one compressible layer."""
    if layers is None:
        return lambda entry: True
    items: list[Any] = list(layers) if isinstance(layers, (list, tuple, set)) else [layers]
    if items and all(isinstance(item, str) for item in items):
        patterns = compile_patterns(items)
        return lambda entry: any(pattern.search(entry.path) for pattern in patterns)
    if items and all(isinstance(item, type) for item in items):
        classes = tuple(items)
        return lambda entry: any(isinstance(owner, classes) for owner in (entry.layer, *entry.parents))
    if items and all(isinstance(item, keras.Layer) for item in items):
        _check_members(model, items)
        wanted = {id(item) for item in items}
        return lambda entry: any(id(owner) in wanted for owner in (entry.layer, *entry.parents, model))
    if callable(layers):
        return lambda entry: bool(layers(entry.layer))
    raise TypeError(
        "`layers` must be None, a regular expression or a list of them, a layer class or a tuple of them, a "
        f"layer or a list of layers, or a function `layer -> bool`. Received: {layers!r}"
    )


def _check_members(model, items) -> None:
    members = {id(layer) for layer in model._flatten_layers()}
    strangers = [item.name for item in items if id(item) not in members]
    if strangers:
        raise ValueError(
            f"`layers` names layers that are not in model '{model.name}': {', '.join(strangers)}. Pass layers "
            "of this very model (a cloned or reloaded model has layers of its own)."
        )


def _nothing_selected(model, layers, everything: Selection, skipped) -> str:
    paths = ", ".join(entry.path for entry in everything.layers[:10]) or "none"
    more = len(everything.layers) - 10
    reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped[:10])
    return (
        f"Nothing to compress in model '{model.name}': `layers` selects none of its compressible layers. "
        f"Received: layers={layers!r}. Compressible layers: {paths}{f' and {more} more' if more > 0 else ''}."
        + (f" Skipped: {reasons}." if reasons else "")
    )
