"""`shrink`: removes dead neurons physically. Fewer channels, the same function, an ordinary Keras model."""

import inspect
import types
from typing import Any

import keras
import numpy as np

from keras_squeeze.pruning.channels import ChannelGraph
from keras_squeeze.pruning.labelling import functional_of, nodes_of, trace
from keras_squeeze.selection import Variable, read


def shrink(model: keras.Model) -> keras.Model:
    """Removes the neurons whose output is provably constant, whoever made them so.

    A neuron goes where everything that reads it sees a constant: zero, or a value that fits into the next bias. That
    holds for the neurons that `NeuronPruning` and `prune_neurons` masked, and for those that died in training. What
    the model predicts stays the same, to float rounding.

    Args:
        model: A built Functional or Sequential model. It stays as it is.

    Returns:
        A new model with the same layer names, input and output shapes, compiled like the old one, the optimizer's state
        included, so that training goes on without a jump. It is of the same class where that is made like a
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
    graph = trace(model)
    classes = graph.classes()
    kept = kept_ids(graph, classes)
    rebuilder = _Rebuilder(graph, kept)
    small = rebuilder.rebuild(model)
    pairs = rebuilder.variables()
    _copy_weights(pairs, graph, kept)
    for layer in small._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with what it has derived from its weights
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


class _Rebuilder:
    """Builds a model anew, layer by layer, from edited configs."""

    def __init__(self, graph: ChannelGraph, kept: np.ndarray):
        self._graph = graph
        self._kept = kept
        self._made: dict[int, tuple[Any, Any]] = {}  # old and new; shared layers stay shared

    def rebuild(self, model):
        if isinstance(model, keras.Sequential):
            return self._sequential(model)
        made = {id(tensor): self._input(tensor).output for tensor in model.inputs}
        for node in nodes_of(model):
            if id(node) in self._graph.droppable:
                outputs = [self._shorter_sum(node, made)]
            else:
                args, kwargs = node.arguments.fill_in(made)
                args, kwargs = self._edited_arguments(node.operation, args, kwargs)
                outputs = keras.tree.flatten(self.layer(node.operation)(*args, **kwargs))
            made.update((id(old), new) for old, new in zip(node.output_tensors, outputs, strict=True))
        inputs, outputs = (
            keras.tree.map_structure(lambda tensor: made[id(tensor)], structure)
            for structure in (model._inputs_struct, model._outputs_struct)
        )
        return _construct(type(model), inputs, outputs, model)

    def layer(self, layer):
        """The new layer for an old one, always the same."""
        if id(layer) not in self._made:
            self._made[id(layer)] = layer, self._make(layer)
        return self._made[id(layer)][1]

    def variables(self) -> list[tuple[Any, Any]]:
        """Every variable of the old model beside that of the new one."""
        pairs = {}
        for old, new in self._made.values():
            if isinstance(old, keras.Layer) and new.built and functional_of(old) is None:
                pairs.update({id(v): (v, w) for v, w in zip(old.variables, new.variables, strict=True)})
        return list(pairs.values())

    def _shorter_sum(self, node, made):
        """A sum without the branches that are zero; what only they need is then no part of the model."""
        dropped = self._graph.droppable[id(node)]
        left = [made[id(tensor)] for i, tensor in enumerate(node.input_tensors) if i not in dropped]
        if len(left) > 1:
            return self.layer(node.operation)(left)
        return keras.layers.Identity(name=node.operation.name, dtype=left[0].dtype)(left[0])

    def _make(self, layer):
        if functional_of(layer) is not None:
            return self.rebuild(layer)
        if isinstance(layer, keras.layers.Lambda):
            return _same_lambda(layer)
        if type(layer) is keras.layers.TimeDistributed:
            return keras.layers.TimeDistributed(self.layer(layer.layer), name=layer.name, dtype=layer.dtype_policy)
        if hasattr(layer, "get_vocabulary"):
            return layer  # its table is in no config and in no weight
        config = layer.get_config()
        # A function of the user's need not be registered: the new layer gets the very same one.
        functions = {name: getattr(layer, name, None) for name in config}
        config.update((name, value) for name, value in functions.items() if isinstance(value, types.FunctionType))
        config.update((name, value) for name, value in self._options(layer) if name in config)
        return type(layer).from_config(config)

    def _options(self, layer):
        """What depends on the neurons that are kept, by name."""
        return [(name, make(self._kept[ids])) for name, (ids, make) in self._graph.options.get(id(layer), {}).items()]

    def _edited_arguments(self, operation, args, kwargs):
        """Where an argument of a call depends on the neurons, such as the bounds of a slice."""
        options = self._options(operation)
        if not options or isinstance(operation, keras.layers.Layer):
            return args, kwargs
        bound = inspect.signature(operation.call).bind(*args, **kwargs)
        bound.arguments.update((name, value) for name, value in options if name in bound.arguments)
        return bound.args, bound.kwargs

    def _input(self, tensor):
        """The input layer for an input tensor; those of a nested model are as wide as what enters there."""
        layer = tensor._keras_history[0]
        config = layer.get_config()
        channels = self._graph.inputs.get(id(tensor))
        if channels is not None and len(channels.ids):
            shape = list(config["batch_shape"])
            shape[channels.axis] = int(np.count_nonzero(self._kept[channels.ids]))
            config["batch_shape"] = shape
        return type(layer).from_config(config)

    def _sequential(self, model):
        small = type(model)(name=model.name)
        small.add(self._input(model.inputs[0]))
        for layer in model.layers:
            small.add(self.layer(layer))
        small.trainable = model.trainable
        return small


def _construct(model_class, inputs, outputs, model):
    """A subclass of `keras.Model` with a training step of its own stays one, if it is made like a `Model`."""
    parameters = inspect.signature(model_class.__init__).parameters
    takes_tensors = {"inputs", "outputs"} <= parameters.keys() or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )
    if not takes_tensors:
        model_class = keras.Model
    small = model_class(inputs=inputs, outputs=outputs, name=model.name)
    small.trainable = model.trainable
    return small


def _same_lambda(layer):
    """A function in Python does not survive its config; the new layer gets the very same one."""
    small = keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.dtype_policy,
    )
    small.trainable = layer.trainable
    return small


# Weights.


def _copy_weights(pairs, graph: ChannelGraph, kept: np.ndarray) -> None:
    values = {id(old): _sliced(old, np.asarray(read(old)), graph, kept) for old, _ in pairs}
    for fold in graph.folds:
        constants = np.where(kept[fold.ids], 0.0, fold.constants)
        if constants.any() and id(fold.bias) in values:
            kernel = np.moveaxis(graph.value(fold.kernel), (fold.in_axis, fold.out_axis), (-2, -1))
            shift = np.einsum("kio,i->o", kernel.reshape(-1, *kernel.shape[-2:]), constants)
            values[id(fold.bias)] = values[id(fold.bias)] + _sliced(fold.bias, shift, graph, kept)
    for old, new in pairs:
        if values[id(old)].shape != tuple(new.shape):
            raise RuntimeError(
                f"{old.path} should shrink to {values[id(old)].shape}, but its layer made {tuple(new.shape)}: the "
                "channel rule of its layer does not say which entry of its config depends on the neurons."
            )
        new.assign(values[id(old)].astype(old.dtype))


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
    if not getattr(model, "compiled", False) or model._compile_config is None:
        return
    config = {name: _fresh(value) for name, value in model._compile_config.config.items()}
    optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    small.compile(**{**config, "optimizer": optimizer})
    if not model.optimizer.built:
        return
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


def _fresh(value):
    """Metrics count, so that two models need two of them; a loss or a function may serve both."""
    if isinstance(value, keras.metrics.Metric):
        return type(value).from_config(value.get_config())
    if isinstance(value, dict):
        return {name: _fresh(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fresh(part) for part in value]
    return value
