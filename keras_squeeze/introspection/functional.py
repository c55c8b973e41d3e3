"""Functional models as graphs: their calls in order, and building them anew, layer by layer."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

import keras


def functional_of(layer):
    """The functional model that a layer is or, if it is a Sequential model, has; else None."""
    if isinstance(layer, keras.Sequential):
        return layer._functional
    return layer if isinstance(layer, keras.Model) and hasattr(layer, "_nodes_by_depth") else None


def require_graph(model, instead: str):
    """The functional model of a model.

    Args:
        model: What a user passed.
        instead: What to do where the model is subclassed, a sentence.

    Raises:
        TypeError: it is no Keras model.
        ValueError: it has no graph: it is not built, or it is subclassed.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {model!r} of type {type(model).__name__}")
    functional = functional_of(model)
    if functional is not None:
        return functional
    if isinstance(model, keras.Sequential):
        raise ValueError(
            f"Model '{model.name}' is not built, so it has no weights yet. Begin it with `keras.Input(shape)`, call "
            "`model.build(input_shape)`, or call it on a batch of data."
        )
    raise ValueError(
        f"Model '{model.name}' of class {type(model).__name__} is subclassed: Keras knows its layers, but not how they "
        f"are connected. {instead}"
    )


def nodes_of(functional) -> Iterator[Any]:
    """The calls of a functional model, each after those that it needs, without its inputs."""
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        yield from (node for node in functional._nodes_by_depth[depth] if not node.is_input)


class Rebuilder:
    """Builds a model anew, layer by layer, under the same names; shared layers stay shared, nested models nested.

    A subclass says what takes the place of a layer (`make`), what comes after one (`following`), and what a call
    becomes (`call`).
    """

    def __init__(self):
        self._made: dict[int, tuple[Any, Any]] = {}  # old and new

    def rebuild(self, model):
        """The new model for a Functional or Sequential one."""
        if isinstance(model, keras.Sequential):
            return self._sequential(model)
        made = {}
        for tensor in model.inputs:
            made[id(tensor)] = self._followed(tensor._keras_history[0], [self.input(tensor).output])[0]
        for node in nodes_of(model):
            outputs = self._followed(node.operation, self.call(node, made))
            made.update((id(old), new) for old, new in zip(node.output_tensors, outputs, strict=True))
        inputs, outputs = model._inputs_struct, model._outputs_struct
        outputs = keras.tree.map_structure(lambda tensor: made[id(tensor)], outputs)
        inputs = keras.tree.map_structure(lambda tensor: self.input(tensor).output, inputs)
        return _construct(type(model), inputs, outputs, model)

    def layer(self, layer):
        """The new layer for an old one, always the same."""
        if id(layer) not in self._made:
            new = self.rebuild(layer) if functional_of(layer) is not None else self.make(layer)
            self._made[id(layer)] = layer, new
        return self._made[id(layer)][1]

    def input(self, tensor):
        """The input layer for an input tensor, always the same."""
        layer = tensor._keras_history[0]
        if id(layer) not in self._made:
            self._made[id(layer)] = layer, self.make_input(tensor)
        return self._made[id(layer)][1]

    def variables(self) -> list[tuple[Any, Any]]:
        """Every variable of the old model beside that of the new one."""
        pairs = {}
        for old, new in self._made.values():
            if isinstance(old, keras.Layer) and new.built and functional_of(old) is None:
                old, new = self.counterparts(old, new)
                pairs.update({id(v): (v, w) for v, w in zip(old.variables, new.variables, strict=True)})
        return list(pairs.values())

    def make(self, layer):
        """What takes the place of a layer."""
        return copy_layer(layer, self.options(layer))

    def make_input(self, tensor):
        """What takes the place of an input."""
        layer = tensor._keras_history[0]
        return type(layer).from_config(layer.get_config())

    def options(self, layer) -> dict[str, Any]:
        """Entries of a layer's config, or arguments of an operation's call, that change."""
        return {}

    def skips(self, operation) -> bool:
        """Whether a layer or an operation with one input is left out."""
        return False

    def following(self, layer) -> list[keras.Layer]:
        """New layers that come right after a layer (its first output); the same ones at every call."""
        return []

    def call(self, node, made: dict) -> list:
        """The outputs of a call; `made`: the new tensor of each old one, by identity."""
        if self.skips(node.operation):
            return [made[id(tensor)] for tensor in node.input_tensors]
        args, kwargs = node.arguments.fill_in(made)
        options = self.options(node.operation)
        if options and not isinstance(node.operation, keras.Layer):
            bound = inspect.signature(node.operation.call).bind(*args, **kwargs)
            bound.arguments.update((name, value) for name, value in options.items() if name in bound.arguments)
            args, kwargs = bound.args, bound.kwargs
        return keras.tree.flatten(self.layer(node.operation)(*args, **kwargs))

    def counterparts(self, old, new):
        """The layers whose variables belong together, for a layer and what took its place."""
        return old, new

    def _followed(self, layer, outputs: list) -> list:
        for extra in self.following(layer):
            outputs = [extra(outputs[0]), *outputs[1:]]
        return outputs

    def _sequential(self, model):
        new = type(model)(name=model.name)
        new.add(self.input(model.inputs[0]))
        for layer in (model.inputs[0]._keras_history[0], *model.layers):
            if not isinstance(layer, keras.layers.InputLayer) and not self.skips(layer):
                new.add(self.layer(layer))
            for extra in self.following(layer):
                new.add(extra)
        return _frozen_like(model, new)


def copy_layer(layer, options=None):
    """A layer of the same kind under the same name, not built; `options` change its config."""
    if isinstance(layer, keras.layers.Lambda):
        return _same_lambda(layer)
    if hasattr(layer, "get_vocabulary"):
        return layer  # its table is in no config and in no weight
    config = layer.get_config()
    # A function of the user's need not be registered: the new layer gets the very same one.
    functions = {name: getattr(layer, name, None) for name in config}
    config.update((name, value) for name, value in functions.items() if isinstance(value, types.FunctionType))
    config.update((name, value) for name, value in (options or {}).items() if name in config)
    try:
        return type(layer).from_config(dict(config))
    except (TypeError, ValueError):  # a config that says more than the layer's own constructor takes
        constructors = [vars(base)["__init__"] for base in type(layer).__mro__[:-1] if "__init__" in vars(base)]
        accepted = {"name", "trainable", "dtype"}.union(*(inspect.signature(each).parameters for each in constructors))
        return type(layer).from_config({name: value for name, value in config.items() if name in accepted})


def compile_like(model, new, optimizer=None) -> bool:
    """Compiles a new model like an old one; False where that is not compiled.

    Args:
        model: The old model.
        new: The new one.
        optimizer: By default one like the old model's, without its state.
    """
    if not getattr(model, "compiled", False) or model._compile_config is None:
        return False
    config = {name: _fresh(value) for name, value in model._compile_config.config.items()}
    optimizer = optimizer or type(model.optimizer).from_config(model.optimizer.get_config())
    new.compile(**{**config, "optimizer": optimizer})
    return True


def _construct(model_class, inputs, outputs, model):
    """A subclass of `keras.Model` with a training step of its own stays one, if it is made like a `Model`."""
    try:
        new = model_class(inputs=inputs, outputs=outputs, name=model.name)
    except TypeError:  # a backbone that is made from numbers of layers and the like
        new = keras.Model(inputs=inputs, outputs=outputs, name=model.name)
    return _frozen_like(model, new)


def _frozen_like(model, new):
    """Freezes a new model where the old one is. Saying that it is not would reach its layers, which may be."""
    if not model.trainable:
        new.trainable = False
    return new


def _same_lambda(layer):
    """A function in Python does not survive its config; the new layer gets the very same one."""
    new = keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.dtype_policy,
    )
    new.trainable = layer.trainable
    return new


def _fresh(value):
    """Metrics count, so that two models need two of them; a loss or a function may serve both."""
    if isinstance(value, keras.metrics.Metric):
        return type(value).from_config(value.get_config())
    if isinstance(value, dict):
        return {name: _fresh(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fresh(part) for part in value]
    return value
