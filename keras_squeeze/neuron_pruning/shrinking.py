"""`shrink`: removes dead neurons physically. Fewer channels, the same function, an ordinary Keras model."""

import warnings
from collections.abc import Iterator

import keras
import numpy as np

from keras_squeeze.channel_graph.graph import ChannelGraph
from keras_squeeze.channel_graph.propagation import trace
from keras_squeeze.data import check_reusable
from keras_squeeze.introspection.functional import Rebuilder, compile_like
from keras_squeeze.introspection.variables import Variable, read
from keras_squeeze.reconstruction import compensation


def shrink(model: keras.Model, *, compensate=None, allow_inexact: bool = False) -> keras.Model:
    """Removes the neurons whose output is provably constant, whoever made them so.

    A neuron goes where everything that reads it sees a constant: zero, or a value that fits into the next bias. That
    holds for the neurons that `NeuronPruning` and `prune_neurons` masked, and for those that died in training. What
    the model predicts stays the same, to float rounding.

    Args:
        model: A built Functional or Sequential model. It stays as it is.
        compensate: Data (inputs, `(x, y)`, or a dataset of batches) to make up for what is removed with: the mean of
            what was pruned goes into the next bias, and batch normalizations measure their statistics anew. What the
            model predicts changes then: it comes nearer, in the mean square, to what it was before pruning. Compare
            the metric: a classifier without batch normalization may lose when much is removed at once. The first
            works for models that `prune_neurons` masked in this process and that were not trained since.
        allow_inexact: Remove masked neurons in front of a `LayerNormalization`, too, whose statistics change; what the
            model predicts changes with them.

    Returns:
        A new model with the same layer names, input and output shapes, compiled like the old one, the optimizer's state
        included, so that training goes on without a jump (but where the keys of an attention became narrower, whose
        queries are scaled for it). It is of the same class where that is made like a
        `keras.Model`, from inputs and outputs; attributes of your own are not copied, and a function of yours inside a
        `Lambda` that reads variables goes on to read those of the old model.

        A branch of a sum that is zero throughout goes as a whole. So shrink a network whose branches begin at zero
        (`gamma_initializer="zeros"`) only after it was trained.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: it is not built, or subclassed.

    Example:

    ```python
    ks.prune_neurons(model, 0.5)
    small = ks.shrink(model)
    ```
    """
    check_reusable(compensate)
    if compensate is not None and not compensation.has_something(model):
        warnings.warn(
            f"Model '{model.name}': nothing to compensate. It has no batch normalization, and was not masked by "
            "`prune_neurons` in this process, or was trained since.",
            stacklevel=2,
        )
    graph = trace(model, inexact=allow_inexact)
    classes = graph.classes()
    kept = kept_ids(graph, classes)
    shifts = [] if compensate is None else compensation.shifts(model, graph, kept, compensate)
    rebuilder = _Shrinker(graph, kept)
    small = rebuilder.rebuild(model)
    pairs = rebuilder.variables()
    _copy_weights(pairs, graph, kept, shifts)
    for layer in small._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with what it has derived from its weights
    if compensate is not None:
        compensation.recalibrate(small, compensate)
    _copy_compilation(model, small, {id(old): new for old, new in pairs}, graph, kept)
    return small


def kept_ids(graph: ChannelGraph, classes: np.ndarray) -> np.ndarray:
    """Boolean array over the ids of a graph: False for what can be removed without changing the function.

    Every weight keeps at least one entry along each axis.
    """
    alive = np.zeros(classes.max(initial=-1) + 1, bool)
    for neurons in (graph.frozen(classes), graph.blocked(classes)):
        alive[list(neurons)] = True
    for slices in graph.slices.values():
        neurons = classes[slices.ids]
        if neurons.size and not alive[neurons].any():
            alive[neurons[0]] = True
    return alive[classes]


_PARTS = {
    keras.layers.TimeDistributed: lambda layer: {"layer": layer.layer},
    keras.layers.Bidirectional: lambda layer: {"layer": layer.forward_layer, "backward_layer": layer.backward_layer},
    keras.layers.RNN: lambda layer: {"cell": layer.cell},
    keras.layers.StackedRNNCells: lambda layer: {"cells": layer.cells},
}
"""Layers that are made of others, by the arguments that these are."""


class _Shrinker(Rebuilder):
    """Builds a model anew with fewer channels, from edited configs."""

    def __init__(self, graph: ChannelGraph, kept: np.ndarray):
        super().__init__()
        self._graph = graph
        self._kept = kept

    def make(self, layer):
        parts = _PARTS.get(type(layer))
        if parts is None:
            return super().make(layer)
        config = layer.get_config()
        return type(layer)(**{**config, **{name: self._new(part) for name, part in parts(layer).items()}})

    def _new(self, part):
        return [self.layer(each) for each in part] if isinstance(part, list) else self.layer(part)

    def make_input(self, tensor):
        """Inputs of a nested model are as wide as what enters there."""
        layer = tensor._keras_history[0]
        config = layer.get_config()
        channels = self._graph.inputs.get(id(tensor))
        if channels is not None and len(channels.ids):
            shape = list(config["batch_shape"])
            shape[channels.axis] = int(np.count_nonzero(self._kept[channels.ids]))
            config["batch_shape"] = shape
        return type(layer).from_config(config)

    def options(self, layer):
        """What depends on the neurons that are kept, such as the number of filters or the bounds of a slice."""
        return {name: make(self._kept[ids]) for name, (ids, make) in self._graph.options.get(id(layer), {}).items()}

    def call(self, node, made):
        if id(node) not in self._graph.droppable:
            return super().call(node, made)
        # A sum without the branches that are zero; what only they need is then no part of the model.
        dropped = self._graph.droppable[id(node)]
        remaining = [made[id(tensor)] for i, tensor in enumerate(node.input_tensors) if i not in dropped]
        if len(remaining) > 1:
            return [self.layer(node.operation)(remaining)]
        return [keras.layers.Identity(name=node.operation.name, dtype=remaining[0].dtype)(remaining[0])]


# Weights.


def _copy_weights(pairs, graph: ChannelGraph, kept: np.ndarray, shifts: list[compensation.Shift]) -> None:
    values = {id(old): _sliced(old, np.asarray(read(old)), graph, kept) for old, _ in pairs}
    for bias, shift in [*_folded(graph, kept), *shifts]:
        if id(bias) in values:
            if len(bias.shape) > 1:  # a GRU's: the first row is added to what the input contributes
                shift = np.stack([shift, np.zeros_like(shift)])
            values[id(bias)] = values[id(bias)] + _sliced(bias, shift, graph, kept)
    for old, _ in pairs:
        if id(old) in graph.rescaled:
            ids, factor = graph.rescaled[id(old)]
            values[id(old)] = values[id(old)] * factor(kept[ids])
    for old, new in pairs:
        if values[id(old)].shape != tuple(new.shape):
            raise RuntimeError(
                f"{old.path} should shrink to {values[id(old)].shape}, but its layer made {tuple(new.shape)}: the "
                "channel rule of its layer does not say which entry of its config depends on the neurons."
            )
        new.assign(values[id(old)].astype(old.dtype))


def _folded(graph: ChannelGraph, kept: np.ndarray) -> Iterator[compensation.Shift]:
    """What the constants add up to that are removed."""
    for fold in graph.folds:
        constants = np.where(kept[fold.ids], 0.0, fold.constants)
        if constants.any():
            kernel = np.moveaxis(graph.value(fold.kernel), (fold.in_axis, fold.out_axis), (-2, -1))
            yield fold.bias, np.einsum("kio,i->o", kernel.reshape(-1, *kernel.shape[-2:]), constants)


def _sliced(variable, values: np.ndarray, graph: ChannelGraph, kept: np.ndarray) -> np.ndarray:
    for axis in range(values.ndim):
        slices = graph.slices.get((id(variable), axis))
        if slices is not None:
            values = np.compress(kept[slices.ids], values, axis=axis)
    return values


# Compilation.


def _copy_compilation(model, small, new_of: dict, graph: ChannelGraph, kept: np.ndarray) -> None:
    """Compiles the new model like the old one, with the state of its optimizer.

    `new_of`: the new variable of each old one, by identity.
    """
    if not compile_like(model, small) or not model.optimizer.built:
        return
    optimizer = small.optimizer
    optimizer.build(small.trainable_variables)
    old, new = (getattr(each, "inner_optimizer", each) for each in (model.optimizer, optimizer))
    places = {id(variable): place for place, variable in enumerate(new._trainable_variables)}
    for name, group in _slots(old).items():
        for variable, slot in zip(old._trainable_variables, group, strict=True):
            if slot is None or id(new_of.get(id(variable))) not in places:
                continue
            target = vars(new)[name][places[id(new_of[id(variable)])]]
            value = np.asarray(read(slot))
            if value.shape == tuple(variable.shape):
                value = _sliced(variable, value, graph, kept)
            if value.shape == tuple(target.shape):  # others, such as row and column averages, begin anew
                target.assign(value)
    for name, value in vars(old).items():
        if isinstance(value, Variable):  # the count of steps, the learning rate
            getattr(new, name).assign(read(value))


def _slots(optimizer) -> dict[str, list]:
    """The lists in which an optimizer keeps a variable for each trainable variable of the model, by name."""
    size = len(optimizer._trainable_variables)
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and len(value) == size
        and name != "_trainable_variables"
        and all(slot is None or isinstance(slot, Variable) for slot in value)
    }
