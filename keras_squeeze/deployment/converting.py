"""A model as the content of a `.tflite` file: traced by TensorFlow, and taken through its converter."""

import contextlib
import logging
import warnings

import keras
import numpy as np

from keras_squeeze.deployment.editing import edit
from keras_squeeze.introspection.functional import functional_of, nodes_of
from keras_squeeze.introspection.variables import read, require_tensorflow
from keras_squeeze.quantization.fake_quantize import converting
from keras_squeeze.quantization.placement import only_reader
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware

_INPUT = "input_{}"  # what an input is called until it gets the name of the model's
_FIXED = "Recurrent layers need a fixed number of examples: pass batch_size=1."
_WHOLE = 'If it computes in half precision, build it with the dtype policy "float32" and load its weights.'


def convert(model: keras.Model, *, batch_size: int | None = 1) -> bytes:
    """The model as the content of a `.tflite` file in float32; see `trace` for the errors."""
    return convert_traced(model, trace(model, batch_size=batch_size))


def trace(model: keras.Model, *, integers: bool = False, batch_size: int | None = 1):
    """The model as a function of TensorFlow's that the converter takes.

    Args:
        model: A built model.
        integers: Whether quantizers are traced as what the converter turns into integers.
        batch_size: Of the inputs; None leaves it open.

    Raises:
        ValueError: it is not built, or leaves a size of its inputs open.
    """
    import tensorflow as tf

    require_tensorflow()
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            f"Model '{model.name}' has no inputs of a known shape: build it with `keras.Input(shape)`; a subclassed "
            "one as `inputs = keras.Input(shape); keras.Model(inputs, model(inputs))`."
        )
    for tensor in inputs:
        if None in tensor.shape[1:]:
            raise ValueError(
                f"Input '{tensor.name}' of model '{model.name}' has shape {tensor.shape}: a file needs to know every "
                "size. "
                "Rebuild the model with an input of a fixed shape."
            )
    specs = [
        tf.TensorSpec((batch_size, *tensor.shape[1:]), tensor.dtype, name=_INPUT.format(place))
        for place, tensor in enumerate(inputs)
    ]
    structure = getattr(model, "_inputs_struct", None)
    packed = keras.tree.pack_sequence_as(structure, specs) if structure is not None else specs[0]

    def predict(tensors):
        if not integers:
            return keras.tree.flatten(model(tensors, training=False))
        with converting(), without_zero_gammas(model):
            return keras.tree.flatten(model(tensors, training=False))

    return tf.function(predict).get_concrete_function(packed)


def convert_traced(model: keras.Model, function, *, precision: str = "float32", sparse: bool = False, **edits) -> bytes:
    """Takes what `trace` made through the converter.

    Args:
        model: The model whose inputs and outputs give the file its names.
        function: What `trace` returned for it, or for a model that was made from it.
        precision: `"float32"`; `"float16"`: weights are stored in float16; `"int8"`: `function` was traced with
            `integers=True`.
        sparse: Whether weights with many zeros are stored without them.
        edits: What is changed afterwards; see `keras_squeeze.deployment.editing.edit`.
    """
    import tensorflow as tf

    with _quiet():
        # Without a second argument, the model: it would leave variables in the graph, and LiteRT compute nonsense.
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    converter.optimizations = [] if precision == "float32" else [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if sparse:
        converter.optimizations.append(tf.lite.Optimize.EXPERIMENTAL_SPARSITY)
    with _quiet():
        try:
            content = converter.convert()
        except Exception as problem:
            if type(problem).__name__ != "ConverterError":
                raise
            reason = str(problem).strip().splitlines()[0].rsplit("error: ", 1)[-1][:300]
            is_open = any(tensor.shape.rank and tensor.shape[0] is None for tensor in function.inputs)
            raise ValueError(
                f"The converter cannot take model '{model.name}': {reason}. {_FIXED if is_open else _WHOLE}"
            ) from None
    return edit(content, inputs=input_names(model), outputs=output_names(model), **edits)


def input_names(model: keras.Model) -> list[str]:
    """What a file calls the model's inputs, in the order of `model.inputs`."""
    return [tensor.name for tensor in model.inputs]


def output_names(model: keras.Model) -> list[str]:
    """What a file calls the model's outputs: the keys of a dict, else the names of the layers that give them."""
    structure = getattr(functional_of(model), "_outputs_struct", None)
    if isinstance(structure, dict) and len(structure) == len(model.outputs):
        names = keras.tree.flatten(type(structure)((name, name) for name in structure))
    else:
        names = [tensor._keras_history[0].name for tensor in model.outputs]
    return [
        f"{name}_{names[:place].count(name)}" if name in names[:place] else name for place, name in enumerate(names)
    ]


@contextlib.contextmanager
def _quiet():
    """Keeps back what the converter says to all who do not give it a model, or data for its own quantization."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def zero_gammas(model) -> list[tuple[QuantizeAware, keras.layers.BatchNormalization]]:
    """Quantized layers with the batch normalization that follows, where that has a gamma of exactly zero.

    The converter would multiply it into the scales of the weights, cannot, and would write a kernel in float.
    """
    nodes = _all_nodes(model)
    calls = [id(node.operation) for node in nodes]
    return [
        (node.operation, reader)
        for level in _levels(model)
        for node, reader in only_reader(level)
        if isinstance(node.operation, QuantizeAware)
        and calls.count(id(node.operation)) == 1
        and isinstance(reader, keras.layers.BatchNormalization)
        and reader.gamma is not None
        and not np.all(read(reader.gamma))
    ]


def without_zero_gammas(model):
    """A scope in which the model computes the same, with other values for some variables, and no gamma is zero.

    A gamma of zero makes an output the constant beta, whatever its weights are. With weights of zero and a moving mean
    that equals the bias, so does any other gamma.
    """
    import tensorflow as tf

    changes: list[tuple[keras.Variable, object]] = []
    with tf.init_scope():
        for wrapper, norm in zero_gammas(model):
            changes += _with_other_gamma(wrapper, norm)
    return keras.StatelessScope(state_mapping=changes) if changes else contextlib.nullcontext()


def _with_other_gamma(wrapper: QuantizeAware, norm) -> list[tuple[keras.Variable, object]]:
    weight, quantize, gamma = wrapper.quantized_weights[-1], wrapper.weight_quantizers[-1], read(norm.gamma)
    kernel = read(weight.variable)
    axes = {axis % kernel.ndim for axis in weight.channel_axes}
    shape = [length if axis in axes else 1 for axis, length in enumerate(kernel.shape)]
    if np.prod(shape) != gamma.size:
        return []
    zero = (gamma == 0).reshape(shape)
    kernel = np.where(zero, np.float32(0), kernel)
    integers, scale, zero_point = quantize.to_integers(kernel)
    if np.any(np.where(zero, scale * (integers - zero_point), 0)):
        return []  # zero is not on the grid
    bias = getattr(wrapper.layer, "bias", None)
    values = [
        (weight.variable, kernel),
        (norm.gamma, np.where(gamma == 0, np.float32(1), gamma)),
        (norm.moving_mean, np.where(gamma == 0, 0 if bias is None else read(bias), read(norm.moving_mean))),
    ]
    return [(variable, keras.ops.convert_to_tensor(value, variable.dtype)) for variable, value in values]


def _levels(model) -> list:
    """A model, and the models nested in it."""
    inner = [node.operation for node in nodes_of(functional_of(model)) if functional_of(node.operation) is not None]
    return [model, *(level for part in inner for level in _levels(part))]


def _all_nodes(model) -> list:
    return [node for level in _levels(model) for node in nodes_of(functional_of(level))]
