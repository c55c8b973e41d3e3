"""Every form of data that `fit` takes is read as `(x, y, sample_weight)` batches; anything else is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_squeeze.data import batches, check_reusable, inputs_only, lists_to_arrays

X = np.arange(20, dtype="float32").reshape(10, 2)
Y = np.arange(10)
W = np.linspace(0, 1, 10, dtype="float32")


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(4 * index, 4 * index + 4)
        return X[part], Y[part]


def dataset(*parts):
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(4)


FORMS = {  # data, and what is in it besides x
    "array": (X, ()),
    "tensor": (tf.constant(X), ()),
    "tuple of one": ((X,), ()),
    "pair": ((X, Y), ("y",)),
    "list": ([X, Y], ("y",)),
    "triple": ((X, Y, W), ("y", "sample_weight")),
    "dataset of inputs": (dataset(X), ()),
    "dataset": (dataset(X, Y), ("y",)),
    "weighted dataset": (dataset(X, Y, W), ("y", "sample_weight")),
    "PyDataset": (Sequence(), ("y",)),
    "generator": (((X[start : start + 4], Y[start : start + 4]) for start in (0, 4, 8)), ("y",)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    data, extras = FORMS[form]
    found = list(batches(data, None, batch_size=4))
    x, y, weights = (list(column) for column in zip(*found, strict=True))
    assert [len(part) for part in x] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(x), X)
    for column, expected, name in ((y, Y, "y"), (weights, W, "sample_weight")):
        if name in extras:
            np.testing.assert_array_equal(np.concatenate(column), expected)
        else:
            assert column == [None] * 3


def test_structures_keep_their_form():
    ((x, y, _),) = batches(({"a": X, "b": [X, Y]}, [Y, {"c": X}]), None, batch_size=16)
    assert set(x) == {"a", "b"}
    np.testing.assert_array_equal(x["b"][1], Y)
    np.testing.assert_array_equal(y[1]["c"], X)


def test_the_number_of_batches():
    assert len(list(batches((X, Y), 2, batch_size=4))) == 2
    assert len(list(batches((X, Y), 9, batch_size=4))) == 3
    assert len(list(batches((X, Y), None))) == 1  # 32 at a time


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, ValueError, r"`data` is missing: pass data=\(x, y\)"),
        ("file.csv", TypeError, "Received: 'file.csv'"),
        (3, TypeError, "Received: 3"),
        ([], ValueError, r"`data` is empty.*Received: \[\]"),
        (iter(()), ValueError, "`data` is empty"),
        ((X, Y[:5]), ValueError, r"different lengths: 5, 10\."),
    ],
)
def test_anything_else(data, error, message):
    with pytest.raises(error, match=message):
        list(batches(data, None))


def test_inputs_alone():
    one = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    first, second = keras.Input((2,), name="first"), keras.Input((2,), name="second")
    two = keras.Model([first, second], keras.layers.Add()([first, second]))
    assert inputs_only(one, X) is X
    assert inputs_only(one, [X, Y]) == [X, Y]  # inputs and targets
    ((x, y, _),) = batches(inputs_only(two, [X, 2 * X]), None)
    np.testing.assert_array_equal(x[1], 2 * X)
    assert y is None
    ((x, y, _),) = batches(inputs_only(two, {"first": X, "second": X}), None)
    assert set(x) == {"first", "second"}
    assert y is None


def test_what_can_be_read_once_is_refused():
    for data in (iter([X]), (batch for batch in [X])):
        with pytest.raises(TypeError, match="Received: <"):
            check_reusable(data)
    for data in (X, (X, Y), dataset(X, Y), Sequence()):
        check_reusable(data)


def test_lists_of_numbers_become_arrays_and_lists_of_arrays_stay():
    x, y = lists_to_arrays(([[1.0, 2.0], [3.0, 4.0]], [0, 1]))
    np.testing.assert_array_equal(x, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(y, [0, 1])
    assert isinstance(x, np.ndarray)
    parts = [X, X]
    several, targets = lists_to_arrays((parts, Y))
    assert several is parts
    assert targets is Y
    assert lists_to_arrays(X) is X
