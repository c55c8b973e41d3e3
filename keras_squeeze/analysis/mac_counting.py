"""Counts the multiply-accumulates (MACs) of a whole model, without running it.

One symbolic call of the model shows which layer is called how often and on which shapes; the layer table knows
what a call costs. The model is left as it was found: its weights, its attributes, its losses, its functions.
"""

import contextlib
import functools
import inspect
import itertools
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_squeeze.introspection.layer_table import mac_formula

_GIVE_SHAPE = "Pass `input_shape=`, the shape of one example without the batch."


@dataclass(frozen=True)
class MacCount:
    """What one inference of a model multiplies.

    Attributes:
        by_layer: `id(layer)` -> weight name -> MACs of all its calls for a batch of one, for every layer that has
            a formula. None where the model could not be traced.
        problem: Why it could not be, in one line; empty where it could.
        failed: `(path, reason)` of layers that are called and whose formula raised an error.
    """

    by_layer: dict[int, dict[str, float]] | None
    problem: str = ""
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Example:
    """Tensor specifications that the model is called with; `batch` is the length of their first axis."""

    args: tuple
    kwargs: dict[str, Any]
    batch: int


class _UntraceableError(Exception):
    """What is computed cannot be known; the message is a sentence for the user."""


def count_macs(model: keras.Model, layers: Sequence[tuple[str, keras.Layer]], input_shape=None) -> MacCount:
    """Counts the multiply-accumulates of one inference, layer by layer.

    A layer inside a loop that TensorFlow runs (`tf.while_loop`, `keras.ops.scan`) counts as one call. Products
    outside of layers (`keras.ops.matmul`) and in layers without weights (`keras.layers.Dot`) are not seen.

    Args:
        model: A built Keras model.
        layers: `(path, layer)` of the layers to count; those without a formula are passed over.
        input_shape: Shape of one example without the batch, as in `keras.Input`; for several inputs a list of
            shapes, or a dict from the inputs' names to shapes. Needed where the model does not say.

    Returns:
        A `MacCount`. A model that cannot be traced is no error but a `problem`.

    Raises:
        ValueError: `input_shape` is not a shape, or contradicts the model's inputs.
    """
    shapes = None if input_shape is None else _checked(input_shape)
    countable = [(path, layer, formula) for path, layer in layers if (formula := mac_formula(layer))]
    try:
        examples = _examples(model, shapes)
    except Exception as error:  # what a model keeps of its inputs may be anything
        if shapes is not None and isinstance(error, ValueError):
            raise
        return MacCount(None, _one_line(error))
    problem = ""
    for example in examples:
        try:
            calls = _trace(model, [layer for _, layer, _ in countable], example)
            return _count(countable, calls, example.batch)
        except Exception as error:  # whatever the model's own code raises
            guessed = shapes is None and _symbolic_inputs(model) is None and not isinstance(error, _UntraceableError)
            problem = problem or _one_line(error) + guessed * f" (with guessed inputs). {_GIVE_SHAPE}"
    return MacCount(None, problem)


def _count(layers, calls, batch: int) -> MacCount:
    by_layer: dict[int, dict[str, float]] = {}
    failed = []
    for path, layer, formula in layers:
        macs = by_layer[id(layer)] = defaultdict(int)
        for inputs, outputs in calls[id(layer)]:
            try:
                for name, number in formula(layer, inputs, outputs).items():
                    macs[name] += number / batch if batch > 1 else number
            except Exception as error:  # a formula may be the user's
                if None in itertools.chain(*inputs, *outputs):
                    raise _UntraceableError(
                        f"'{path}' works on {inputs} -> {outputs}: a size that is known only when the model runs."
                    ) from None
                failed.append((path, _one_line(error)))
                macs.clear()
                break
    return MacCount(by_layer, failed=failed)


def _trace(model, layers, example: _Example) -> dict[int, list[tuple[list, list]]]:
    """Calls the model once on placeholders: `id(layer)` -> the input and output shapes of each of its calls."""
    import tensorflow as tf

    calls: dict[int, list] = {id(layer): [] for layer in layers}
    members = model._flatten_layers()
    wrappers = [layer for layer in members if isinstance(layer, keras.layers.Wrapper) and id(layer.layer) in calls]
    calls_of_wrappers: list[list] = [[] for _ in wrappers]
    with warnings.catch_warnings(), _left_as_found(members):
        warnings.simplefilter("ignore")  # the user saw them when the model was built
        for member in members:
            _forbid_building(member)
            if isinstance(member, keras.layers.TextVectorization):
                _keep_batch(member)
        for layer in layers:
            _record(layer, calls[id(layer)])
        for wrapper, wrapper_calls in zip(wrappers, calls_of_wrappers, strict=True):
            _record(wrapper, wrapper_calls)

        @tf.function(autograph=False)  # as Keras itself traces
        def inference(args, kwargs):
            model(*args, training=False, **kwargs)

        inference.get_concrete_function(example.args, example.kwargs)
    for wrapper, wrapper_calls in zip(wrappers, calls_of_wrappers, strict=True):
        if not calls[id(wrapper.layer)]:  # the wrapper computes for it
            calls[id(wrapper.layer)] = wrapper_calls
    return calls


@contextlib.contextmanager
def _left_as_found(layers) -> Iterator[None]:
    """Gives layers their attributes and losses back; a call clears losses, and may cache graph tensors."""
    states = [(layer, dict(vars(layer)), list(layer._losses), set(layer._loss_ids)) for layer in layers]
    try:
        yield
    finally:
        for layer, attributes, losses, loss_ids in states:
            # Past Keras's attribute tracking, which would take these for new attributes.
            for name in vars(layer).keys() - attributes.keys():
                del vars(layer)[name]
            vars(layer).update(attributes)
            layer._losses.clear()
            layer._losses.extend(losses)
            layer._loss_ids.clear()
            layer._loss_ids.update(loss_ids)


def _forbid_building(layer) -> None:
    """A layer that no call has reached yet would create its weights now."""
    if layer.built or getattr(layer.build, "_is_default", False):
        return

    def build(*args, **kwargs):
        raise _UntraceableError(f"layer '{layer.name}' is not built. Call the model on a batch of data first.")

    vars(layer)["build"] = build


def _record(layer, calls: list) -> None:
    """Notes the shapes of every call. Keras calls `quantized_call` in place of `call` after `quantize`."""
    signature = inspect.signature(layer.call)

    def noting(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            outputs = method(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            inputs = [value for name, value in arguments.items() if not name.endswith("mask")]
            calls.append((_tensor_shapes(inputs), _tensor_shapes(outputs)))
            return outputs

        return call

    for name in ("call", "quantized_call"):
        vars(layer)[name] = noting(getattr(layer, name))


def _keep_batch(layer) -> None:
    """TensorFlow loses the length of the batch where strings become tokens."""
    method = layer.call

    @functools.wraps(method)
    def call(inputs, *args, **kwargs):
        outputs = method(inputs, *args, **kwargs)
        if hasattr(outputs, "set_shape"):
            outputs.set_shape([inputs.shape[0], *outputs.shape[1:]])
        return outputs

    vars(layer)["call"] = call


def _tensor_shapes(values) -> list[tuple]:
    tensors = [value for value in keras.tree.flatten(values) if keras.ops.is_tensor(value)]
    return [(None,) if tensor.shape.rank is None else tuple(tensor.shape) for tensor in tensors]


def _examples(model, shapes) -> list[_Example]:
    """The inputs to try, in this order."""
    inputs = _symbolic_inputs(model)
    if inputs is not None:
        return [_symbolic_example(inputs, shapes)]
    recorded = 1
    if shapes is None:
        args, kwargs, recorded = _recorded_arguments(model)
    else:
        args, kwargs = _given_arguments(model, shapes)
    return [
        _Example(_specs(args, batch, dtype), _specs(kwargs, batch, dtype), batch)
        for batch in dict.fromkeys((_stateful_batch(model) or 1, recorded))
        for dtype in dict.fromkeys((model.input_dtype, "int32", "string"))
    ]


def _stateful_batch(model) -> int | None:
    """A stateful recurrent layer takes batches of one length only."""
    stateful = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    states = [state for layer in stateful for state in keras.tree.flatten(getattr(layer, "states", None) or [])]
    return next((state.shape[0] for state in states if getattr(state, "shape", None)), None)


def _symbolic_inputs(model):
    """The inputs of a Sequential or Functional model in their structure; None for a subclassed model."""
    if isinstance(model, keras.Sequential):
        inputs = getattr(model, "inputs", None)
        return inputs[0] if inputs else None
    return getattr(model, "_inputs_struct", None)


def _symbolic_example(structure, shapes) -> _Example:
    tensors = keras.tree.flatten(structure)
    batch = next((tensor.shape[0] for tensor in tensors if tensor.shape and tensor.shape[0]), 1)
    names = _input_names(structure, tensors)
    shapes_by_name = {name: tuple(tensor.shape[1:]) for name, tensor in zip(names, tensors, strict=True)}
    if shapes is not None:
        shapes_by_name = _given_shapes(shapes_by_name, shapes)
    for name, shape in shapes_by_name.items():
        if None in shape:
            raise _UntraceableError(f"input '{name}' has shape {shape}, and the MACs depend on it. {_GIVE_SHAPE}")
    specs = [
        _spec((batch, *shapes_by_name[name]), tensor.dtype, tensor.sparse)
        for name, tensor in zip(names, tensors, strict=True)
    ]
    return _Example((keras.tree.pack_sequence_as(structure, specs),), {}, batch)


def _input_names(structure, tensors) -> list[str]:
    keys = {id(tensor): key for key, tensor in structure.items()} if isinstance(structure, dict) else {}
    return [keys.get(id(tensor), tensor.name) for tensor in tensors]


def _given_shapes(known: dict[str, tuple], shapes) -> dict[str, tuple]:
    """The user's shapes by input name, checked against what the model says."""
    example_shapes: Any = [shapes] if _is_shape(shapes) else shapes
    if not isinstance(example_shapes, dict) and len(example_shapes) == len(known):
        example_shapes = dict(zip(known, example_shapes, strict=True))
    fits = (
        isinstance(example_shapes, dict)
        and example_shapes.keys() == known.keys()
        and all(
            _is_shape(example_shapes[name]) and len(example_shapes[name]) == len(shape) for name, shape in known.items()
        )
        and all(
            size in (None, new) for name in known for size, new in zip(known[name], example_shapes[name], strict=True)
        )
    )
    if not fits:
        expected = ", ".join(f"'{name}': {shape}" for name, shape in known.items())
        raise ValueError(
            f"`input_shape` does not fit this model's inputs, which are, without the batch: {expected}. Received: "
            f"input_shape={shapes!r}"
        )
    return example_shapes


def _recorded_arguments(model):
    """What a subclassed model was built with, without the batch, and the length of that batch."""
    recorded = getattr(model, "_build_shapes_dict", None) or {}
    recorded = {name: shape for name, shape in recorded.items() if shape is not None}
    if not recorded:
        raise _UntraceableError(f"the input shape of model '{model.name}' is not known. {_GIVE_SHAPE}")
    batches: list[int | None] = []

    def without_batch(shape):
        if None in shape[1:]:
            raise _UntraceableError(f"model '{model.name}' was built for shape {shape}. {_GIVE_SHAPE}")
        batches.extend(shape[:1])
        return shape[1:]

    shapes = {name.removesuffix("_shape"): _map_shapes(without_batch, shape) for name, shape in recorded.items()}
    batch = next(filter(None, batches), 1)
    return (tuple(shapes.values()), {}, batch) if len(shapes) == 1 else ((), shapes, batch)


def _given_arguments(model, shapes) -> tuple[tuple, dict]:
    """How the user's shapes become arguments of a subclassed model: one, one each, or by keyword."""
    parameters = inspect.signature(model.call).parameters
    if isinstance(shapes, dict) and shapes.keys() <= parameters.keys():
        return (), shapes
    required = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if isinstance(shapes, list) and len(shapes) == len(required) > 1:
        return tuple(shapes), {}
    return (shapes,), {}


def _checked(input_shape):
    """`input_shape` with tuples for shapes and lists for sequences of them."""
    try:
        shapes = _map_shapes(lambda shape: shape, input_shape)
        sizes = [size for shape in _flat_shapes(shapes) for size in shape]
    except TypeError:
        sizes = [0]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            "`input_shape` must be the shape of one example without the batch, such as (32, 32, 3) or (784,), or a "
            "list or dict of shapes for several inputs; every size a whole number of at least 1. Received: "
            f"input_shape={input_shape!r}"
        )
    return shapes


def _is_shape(value) -> bool:
    return isinstance(value, (tuple, list)) and all(
        size is None or (hasattr(size, "__index__") and not isinstance(size, bool)) for size in value
    )


def _map_shapes(function, shapes):
    """Applies a function to every shape of a nested structure, and makes it one of plain tuples, lists, dicts."""
    if _is_shape(shapes):
        return function(tuple(size if size is None else int(size) for size in shapes))
    if isinstance(shapes, dict):
        return {name: _map_shapes(function, shape) for name, shape in shapes.items()}
    if isinstance(shapes, (tuple, list)):
        return [_map_shapes(function, shape) for shape in shapes]
    raise TypeError(f"not a shape: {shapes!r}")


def _flat_shapes(shapes) -> list[tuple]:
    flat: list[tuple] = []
    _map_shapes(flat.append, shapes)
    return flat


def _specs(shapes, batch: int, dtype):
    """Specifications in the structure of `shapes`, a tuple or a dict of arguments."""
    if isinstance(shapes, tuple):
        return tuple(_map_shapes(lambda shape: _spec((batch, *shape), dtype), argument) for argument in shapes)
    return {name: _specs((argument,), batch, dtype)[0] for name, argument in shapes.items()}


def _spec(shape, dtype, sparse: bool = False):
    import tensorflow as tf

    return tf.SparseTensorSpec(shape, dtype) if sparse else tf.TensorSpec(shape, dtype)


def _one_line(error: Exception) -> str:
    """An error's message without Keras's colors and its list of arguments."""
    text = re.sub(r"\x1b\[\d+m", "", str(error)).partition("Arguments received by")[0]
    prefix = "" if isinstance(error, _UntraceableError) else f"{type(error).__name__}: "
    return prefix + textwrap.shorten(text, 240, placeholder=" ...")
