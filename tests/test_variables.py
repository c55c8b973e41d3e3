"""Values of variables: read without a copy, changed for a while; states that Keras does not list."""

import keras
import numpy as np
import pytest

from keras_squeeze.introspection.variables import changed, read, recurrent_states


def test_a_value_is_read_and_cannot_be_written():
    variable = keras.Variable(np.arange(6.0).reshape(2, 3))
    value = read(variable)
    np.testing.assert_array_equal(value, [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match="read-only"):
        value[0, 0] = 7


def test_values_come_back_after_an_error_too():
    first, second = keras.Variable([1.0, 2.0]), keras.Variable([3.0])

    def interrupted():
        with changed([(first, np.array([5.0, 6.0])), (second, np.array([7.0]))]):
            np.testing.assert_array_equal(read(first), [5, 6])
            np.testing.assert_array_equal(read(second), [7])
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    np.testing.assert_array_equal(read(first), [1, 2])
    np.testing.assert_array_equal(read(second), [3])


def test_states_of_stateful_layers_only():
    inputs = keras.Input((4, 3), batch_size=2)
    x = keras.layers.LSTM(5, return_sequences=True, stateful=True)(inputs)
    model = keras.Model(inputs, keras.layers.GRU(2)(x))
    model(np.ones((2, 4, 3), "float32"))
    states = recurrent_states(model)
    assert [tuple(state.shape) for state in states] == [(2, 5), (2, 5)]
    assert all(np.any(read(state)) for state in states)
    listed = {id(variable) for variable in model.variables}
    assert not listed & {id(state) for state in states}
