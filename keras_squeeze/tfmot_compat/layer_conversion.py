"""A layer of tf_keras as the layer of Keras 3 that computes the same."""

import inspect
from collections.abc import Mapping
from typing import Any

import keras

_WITHOUT_MEANING = (
    *("batch_input_shape", "implementation", "input_length", "query_shape", "key_shape", "value_shape", "dtype"),
    "trainable",
    *("depthwise_initializer", "depthwise_regularizer", "depthwise_constraint", "fused"),
)
_MUST_BE = {
    **{name: (value,) for name, value in (("groups", 1), ("time_major", False), ("renorm", False), ("causal", False))},
    "softmax_robust_masking": (False,),
    **dict.fromkeys(("virtual_batch_size", "adjustment", "reshuffle_each_iteration"), (None, False)),
    **{f"kernel_{name}": None for name in ("initializer", "regularizer", "constraint")},  # a depthwise layer has none
}


class CannotConvert(Exception):  # noqa: N818 - collected, and told by an error of another kind
    """Why a layer has no counterpart."""


def convert_layer(layer, custom: Mapping[str, Any]):
    """The counterpart of a layer, not built.

    Args:
        layer: A layer of tf_keras, no model.
        custom: Counterparts of the user's own classes and functions, by name.

    Raises:
        CannotConvert: it has none.
    """
    new = _convert(layer, custom)
    if not layer.trainable:
        new.trainable = False
    return new


@keras.saving.register_keras_serializable("keras_squeeze.tfmot_compat")
def hard_sigmoid_of_keras_2(x):
    """`clip(0.2 * x + 0.5, 0, 1)`; Keras 3 has another slope under the name of it."""
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


def _convert(layer, custom):
    name = type(layer).__name__
    if name in custom:
        return custom[name].from_config({**layer.get_config(), "dtype": _precision(layer)})
    if type(layer).__module__.partition(".")[0] not in ("keras", "tf_keras"):
        raise CannotConvert(f"a class of yours; pass its Keras 3 form: custom_objects={{{name!r}: ...}}")
    special = _SPECIAL.get(name)
    if special is not None:
        return special(layer, custom)
    return _by_config(layer, getattr(keras.layers, name, None), custom)


def _by_config(layer, layer_class, custom, **replaced):
    """A layer from a config of tf_keras: what Keras 3 does not know must not have a meaning."""
    if layer_class is None:
        raise CannotConvert(f"Keras 3 has no {type(layer).__name__}")
    known = _arguments_of(layer_class)
    config = {"dtype": _precision(layer)} if "dtype" in known else {}
    for name, value in {**layer.get_config(), **replaced}.items():
        if name in known and name not in ("dtype", "trainable"):
            config[name] = hard_sigmoid_of_keras_2 if value == "hard_sigmoid" else value
        elif name not in known and name not in _WITHOUT_MEANING and not _is_default(name, value):
            raise CannotConvert(f"{layer_class.__name__} of Keras 3 has no {name}={value!r}")
    config = {name: value for name, value in config.items() if not _is_unknown_initializer(name, value)}
    try:
        return layer_class.from_config(config)
    except Exception as error:  # whatever a config is refused for
        raise CannotConvert(f"{layer_class.__name__}: {error}") from None


def _arguments_of(layer_class) -> set[str]:
    """What a class can be made with, the options that it hands on to its base classes included."""
    known: set[str] = set()
    for base in layer_class.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        known.update(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return known


def _is_default(name: str, value) -> bool:
    allowed = _MUST_BE.get(name, (None,))
    return allowed is None or value in allowed


def _is_unknown_initializer(name: str, value) -> bool:
    """Weights get values anyway, so that one which is not known does not matter."""
    if not name.endswith("_initializer"):
        return False
    try:
        keras.initializers.get(value)
    except (TypeError, ValueError, ImportError):
        return True
    return False


def _precision(layer) -> str:
    policy = getattr(layer, "_dtype_policy", None)
    return getattr(policy, "name", None) or layer.dtype or "float32"


def _lambda(layer, custom):
    if not callable(layer.function):
        raise CannotConvert("its function is not there")
    return keras.layers.Lambda(
        layer.function, arguments=layer.arguments or {}, name=layer.name, dtype=_precision(layer)
    )


def _leaky_relu(layer, custom):
    return keras.layers.LeakyReLU(float(layer.alpha), name=layer.name, dtype=_precision(layer))


def _thresholded_relu(layer, custom):
    return keras.layers.ReLU(threshold=float(layer.theta), name=layer.name, dtype=_precision(layer))


def _batch_normalization(layer, custom):
    axis = list(layer.axis) if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if len(axis) != 1:
        raise CannotConvert(f"BatchNormalization of Keras 3 has one axis, not {axis}")
    return _by_config(layer, keras.layers.BatchNormalization, custom, axis=axis[0])


def _bidirectional(layer, custom):
    return keras.layers.Bidirectional(
        convert_layer(layer.forward_layer, custom),
        merge_mode=layer.merge_mode,
        backward_layer=convert_layer(layer.backward_layer, custom),
        name=layer.name,
    )


def _time_distributed(layer, custom):
    return keras.layers.TimeDistributed(convert_layer(layer.layer, custom), name=layer.name)


def _stacked_cells(layer, custom):
    return keras.layers.StackedRNNCells([convert_layer(cell, custom) for cell in layer.cells], name=layer.name)


def _rnn(layer, custom):
    options = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask")
    return keras.layers.RNN(
        convert_layer(layer.cell, custom),
        **{name: getattr(layer, name) for name in options if getattr(layer, name, None) is not None},
        name=layer.name,
    )


def _normalization(layer, custom):
    given = layer.input_mean is not None
    return keras.layers.Normalization(
        axis=layer.axis,
        mean=layer.input_mean if given else None,
        variance=layer.input_variance if given else None,
        invert=getattr(layer, "invert", False),
        name=layer.name,
        dtype=_precision(layer),
    )


def _input(layer, custom):
    if getattr(layer, "ragged", False):
        raise CannotConvert("Keras 3 has no ragged inputs")
    return keras.layers.InputLayer(
        batch_shape=tuple(layer._batch_input_shape), dtype=layer.dtype, sparse=bool(layer.sparse), name=layer.name
    )


_SPECIAL = {
    "BatchNormalization": _batch_normalization,
    "Bidirectional": _bidirectional,
    "InputLayer": _input,
    "Lambda": _lambda,
    "LeakyReLU": _leaky_relu,
    "Normalization": _normalization,
    "RNN": _rnn,
    "StackedRNNCells": _stacked_cells,
    "SyncBatchNormalization": _batch_normalization,
    "ThresholdedReLU": _thresholded_relu,
    "TimeDistributed": _time_distributed,
}
