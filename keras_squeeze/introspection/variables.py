"""Values of variables, and the backend that holds them."""

import contextlib
from collections.abc import Iterable, Iterator

import keras
import numpy as np
from keras.src.backend import Variable as Variable  # the exported `keras.Variable` was a subclass of it until Keras 3.8


def read(variable: keras.Variable) -> np.ndarray:
    """Returns a variable's value as a read-only array that shares its memory; do not keep it while the model trains."""
    import tensorflow as tf

    return np.asarray(tf.convert_to_tensor(variable.value))


@contextlib.contextmanager
def changed(changes: Iterable[tuple[keras.Variable, np.ndarray]]) -> Iterator[None]:
    """Gives variables other values inside a `with` block."""
    changes = list(changes)
    before = [(variable, np.array(read(variable))) for variable, _ in changes]
    try:
        for variable, value in changes:
            variable.assign(value)
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def recurrent_states(layer: keras.Layer) -> list[Variable]:
    """Returns the states of stateful recurrent layers, which Keras does not list among their variables."""
    states = [getattr(part, "states", None) for part in layer._flatten_layers()]
    return [state for state in keras.tree.flatten(states) if isinstance(state, Variable)]


def require_tensorflow() -> None:
    """Raises a `ValueError` unless Keras runs on TensorFlow, the backend that this package is tested on."""
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "keras_squeeze runs on Keras's TensorFlow backend. Received: KERAS_BACKEND="
            f"{keras.backend.backend()!r}. Set the environment variable KERAS_BACKEND=tensorflow before Keras "
            "is imported."
        )
