"""What TensorFlow's functions between the layers of a tf_keras model become in Keras 3."""

import inspect
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_squeeze.tfmot_compat.layer_conversion import CannotConvert

# The arguments have the names that they have in TensorFlow.
_UNARY: dict[str, Callable] = {
    **{f"math.{name}": getattr(ops, name) for name in ("abs", "exp", "log", "sqrt", "square", "negative", "floor")},
    **{f"math.{name}": getattr(ops, name) for name in ("sin", "cos", "tanh", "sigmoid", "rsqrt", "softplus", "round")},
    **{f"nn.{name}": getattr(ops, name) for name in ("relu", "relu6", "softplus", "selu", "softsign")},
    **{f"nn.{name}": getattr(ops, name) for name in ("tanh", "sigmoid")},
    "identity": lambda x: x,
    "stop_gradient": ops.stop_gradient,
}
_BINARY: dict[str, Callable] = {
    **{f"math.{name}": getattr(ops, name) for name in ("add", "subtract", "multiply", "maximum", "minimum")},
    "__operators__.add": ops.add,
    "math.divide": ops.true_divide,
    "math.pow": ops.power,
    "math.truediv": ops.true_divide,
}


def _pad(tensor, paddings, mode="CONSTANT", constant_values=0):
    return ops.pad(tensor, paddings, mode.lower(), **({"constant_values": constant_values} if constant_values else {}))


def _matmul(a, b, transpose_a=False, transpose_b=False):
    a, b = (ops.swapaxes(x, -1, -2) if swap else x for x, swap in ((a, transpose_a), (b, transpose_b)))
    return ops.matmul(a, b)


def _reducing(reduce: Callable) -> Callable:
    return lambda input_tensor, axis=None, keepdims=False: reduce(input_tensor, axis=axis, keepdims=keepdims)


_OTHERS: dict[str, Callable] = {
    **{f"math.reduce_{name}": _reducing(getattr(ops, name)) for name in ("mean", "sum", "max", "min")},
    "cast": lambda x, dtype: ops.cast(x, dtype if isinstance(dtype, str) else dtype.name),
    "clip_by_value": lambda t, clip_value_min, clip_value_max: ops.clip(t, clip_value_min, clip_value_max),
    "concat": lambda values, axis: ops.concatenate(values, axis),
    "expand_dims": lambda input, axis: ops.expand_dims(input, axis),
    "linalg.matmul": _matmul,
    "nn.elu": lambda features: ops.elu(features),
    "nn.gelu": lambda features, approximate=False: ops.gelu(features, approximate=approximate),
    "nn.leaky_relu": lambda features, alpha=0.2: ops.leaky_relu(features, alpha),
    "nn.silu": lambda features, beta=1.0: ops.multiply(features, ops.sigmoid(ops.multiply(features, beta))),
    "nn.softmax": lambda logits, axis=-1: ops.softmax(logits, axis=-1 if axis is None else axis),
    "pad": _pad,
    "reshape": lambda tensor, shape: ops.reshape(tensor, tuple(shape)),
    "squeeze": lambda input, axis=None: ops.squeeze(input, axis=axis),
    "stack": lambda values, axis=0: ops.stack(values, axis),
    "transpose": lambda a, perm=None: ops.transpose(a, perm),
}
_SLICING = "__operators__.getitem"
_UNUSED = ("name", "conjugate", "squeeze_dims")


def is_operation(layer) -> bool:
    """Whether a layer of tf_keras is a function of TensorFlow's."""
    return type(layer).__name__ in ("TFOpLambda", "SlicingOpLambda")


def check_operation(layer) -> None:
    """Raises `CannotConvert` where a function is not known here."""
    symbol = _symbol(layer)
    if symbol != _SLICING and not any(symbol in table for table in (_UNARY, _BINARY, _OTHERS)):
        raise CannotConvert(f"the function tf.{layer.symbol}")


def call_operation(layer, args: tuple, kwargs: dict) -> Any:
    """The output of a `TFOpLambda` or a `SlicingOpLambda` of tf_keras, computed by Keras 3.

    Args:
        layer: The layer of tf_keras.
        args, kwargs: What it is called with, tensors of Keras 3 in the place of those of tf_keras.

    Raises:
        ValueError: it is called with arguments that are not known here.
    """
    symbol = _symbol(layer)
    if symbol == _SLICING:
        return args[0][tuple(_slice(part) for part in _sequence(args[1]))]
    arguments = inspect.signature(layer.function).bind(*args, **kwargs).arguments
    named = {name: _plain(value) for name, value in arguments.items() if name not in _UNUSED and value is not None}
    if symbol not in _OTHERS:
        return {**_UNARY, **_BINARY}[symbol](*named.values())
    if not named.keys() <= inspect.signature(_OTHERS[symbol]).parameters.keys():
        raise ValueError(
            f"'{layer.name}': tf.{layer.symbol} is called with arguments that are not known here. Received: {named}. "
            "Build the model in Keras 3 and copy its weights."
        )
    return _OTHERS[symbol](**named)


def _symbol(layer) -> str:
    return layer.symbol.removeprefix("compat.v1.")


def _sequence(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _slice(part):
    return slice(part["start"], part["stop"], part["step"]) if isinstance(part, dict) else part


def _plain(value):
    """A constant of TensorFlow's as an array."""
    return value.numpy() if hasattr(value, "numpy") and not hasattr(value, "_keras_history") else value
