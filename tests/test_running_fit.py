"""The callbacks of the `fit` that is running are found from inside of it, and nothing is found outside."""

import keras
import numpy as np

from keras_squeeze.introspection.running_fit import callback_lists


class Watching(keras.callbacks.Callback):
    """Keeps what is found at the beginning of training and in every batch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_begin(self, logs=None):
        self.found.append([running.callbacks for running in callback_lists()])


def compiled():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


X, Y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")


def test_a_callback_finds_the_others():
    watching, other = Watching(), keras.callbacks.Callback()
    compiled().fit(X, Y, verbose=0, callbacks=[watching, other])
    ((callbacks,),) = ({tuple(map(id, found)) for found in lists} for lists in watching.found)
    assert {id(watching), id(other)} <= set(callbacks)


def test_of_a_fit_inside_another_the_inner_one_comes_first():
    inner = Watching()
    outer = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: compiled().fit(X, Y, verbose=0, callbacks=[inner])
    )
    compiled().fit(X, Y, verbose=0, callbacks=[outer])
    (lists,) = inner.found
    assert inner in lists[0]
    assert outer in lists[-1]
    assert outer not in lists[0]


def test_outside_of_fit_there_is_none():
    assert list(callback_lists()) == []
