"""`export` of models with open batches, several ends, recurrent layers; and Keras's own export of finalized models."""

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tflite_files import interpreter, run

import keras_squeeze as ks
from keras_squeeze.quantization.conversion import calibrate


def images(count=64):
    return np.random.default_rng(0).uniform(size=(count, 8, 8, 1)).astype("float32")


def two_by_two(structure="list"):
    zebra, ant = keras.Input((4,), name="zebra"), keras.Input((6,), name="ant")
    joined = layers.Concatenate()([layers.Dense(5)(zebra), layers.Dense(7)(ant)])
    b, a = layers.Dense(3, name="b")(joined), layers.Dense(3, name="a")(joined)
    if structure == "list":
        return keras.Model([zebra, ant], [b, a])
    return keras.Model({"zebra": zebra, "ant": ant}, {"second": b, "first": a})


def pairs(count=16):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 4)).astype("float32"), rng.normal(size=(count, 6)).astype("float32")


# batches


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_any_number_of_examples(precision, tmp_path):
    model = networks.residual_convnet()
    options = {"precision": precision, "calibration_data": images()}
    one = ks.export(model, tmp_path / "one.tflite", **options)
    many = ks.export(model, tmp_path / "many.tflite", **options, batch_size=None)
    assert many.float_ops == []
    for size in (1, 5, 16):
        file = interpreter(many.path)
        (entry,) = file.get_input_details()
        file.resize_tensor_input(entry["index"], (size, 8, 8, 1))
        file.allocate_tensors()
        file.set_tensor(entry["index"], images(size))
        file.invoke()
        actual = file.get_tensor(file.get_output_details()[0]["index"])
        step = np.ptp(actual) / 100 if precision.startswith("int") else 1e-5
        np.testing.assert_allclose(actual, run(one.path, images(size)), atol=step)


def test_a_fixed_number_of_examples(tmp_path):
    model = networks.residual_convnet()
    result = ks.export(model, tmp_path / "model.tflite", batch_size=6)  # sixteen samples are compared: six, six, four
    assert list(interpreter(result.path).get_input_details()[0]["shape"]) == [6, 8, 8, 1]
    assert result.max_abs_error < 1e-5
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=r"`batch_size` must be None or an int.*Received"):
            ks.export(model, tmp_path / "model.tflite", batch_size=wrong)


# names


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("structure", ["list", "dict"])
def test_names_of_inputs_and_outputs(structure, precision, tmp_path):
    model = two_by_two(structure)
    zebra, ant = pairs()
    data = [zebra, ant] if structure == "list" else {"zebra": zebra, "ant": ant}
    result = ks.export(model, tmp_path / "model.tflite", precision=precision, calibration_data=data)
    expected = model(data, training=False)
    if structure == "list":
        expected = dict(zip("ba", expected, strict=True))
    runner = interpreter(result.path).get_signature_runner()
    for row in range(3):
        actual = runner(zebra=zebra[row : row + 1], ant=ant[row : row + 1])
        assert actual.keys() == expected.keys()
        for name, values in actual.items():
            wanted = keras.ops.convert_to_numpy(expected[name])
            bound = {"float32": 1e-5, "float16": 1e-2, "int8": 0.1, "int4": 1}[precision] * np.abs(wanted).max()
            np.testing.assert_allclose(values[0], wanted[row], atol=bound)
    assert result.max_abs_error < {"float32": 1e-5, "float16": 1e-2, "int8": 0.1, "int4": 2}[precision]


def test_names_with_integers_at_the_ends(tmp_path):
    data = list(pairs())
    options = {"precision": "int8", "calibration_data": data}
    floats = ks.export(two_by_two(), tmp_path / "floats.tflite", **options)
    result = ks.export(two_by_two(), tmp_path / "model.tflite", **options, integer_io=True)
    assert floats.max_abs_error < 0.1
    runner = interpreter(result.path).get_signature_runner()
    entries = runner.get_input_details()
    assert {name: (detail["dtype"], detail["shape"][1]) for name, detail in entries.items()} == {
        "zebra": (np.int8, 4),
        "ant": (np.int8, 6),
    }
    assert runner.get_output_details().keys() == {"a", "b"}


def test_outputs_of_one_layer(tmp_path):
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, layers.LSTM(4, return_state=True, name="memory")(inputs))
    x = np.random.default_rng(0).normal(size=(16, 5, 3)).astype("float32")
    result = ks.export(model, tmp_path / "model.tflite", calibration_data=x)
    actual = interpreter(result.path).get_signature_runner()(**{model.inputs[0].name: x[:1]})
    assert actual.keys() == {"memory", "memory_1", "memory_2"}
    for name, expected in zip(sorted(actual), model(x[:1]), strict=True):
        np.testing.assert_allclose(actual[name], expected, atol=1e-5)


# recurrent layers


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.LSTM(8),
        lambda: layers.GRU(8),
        lambda: layers.Bidirectional(layers.LSTM(8, return_sequences=True)),
        lambda: layers.RNN([layers.LSTMCell(8), layers.GRUCell(6)]),
    ],
)
def test_recurrent_layers(layer, precision, tmp_path):
    inputs = keras.Input((7, 3))
    model = keras.Model(inputs, layers.Dense(2)(layer()(inputs)))
    x = np.random.default_rng(0).normal(size=(16, 7, 3)).astype("float32")
    result = ks.export(model, tmp_path / "model.tflite", precision=precision, calibration_data=x)
    expected = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(run(result.path, x), expected, atol=1e-5 if precision == "float32" else 5e-3)


def test_recurrent_layers_need_a_fixed_batch(tmp_path):
    inputs = keras.Input((7, 3))
    model = keras.Model(inputs, layers.LSTM(4)(inputs))
    with pytest.raises(ValueError, match=r"converter cannot take model.*fixed number of examples: pass batch_size=1"):
        ks.export(model, tmp_path / "model.tflite", batch_size=None)
    result = ks.export(model, tmp_path / "model.tflite", batch_size=5)
    assert result.max_abs_error < 1e-5


def test_quantized_recurrent_weights(tmp_path):
    inputs = keras.Input((7, 3))
    q = ks.quantize_aware(keras.Model(inputs, layers.Dense(2)(layers.LSTM(8)(inputs))), "int4", None)
    x = np.random.default_rng(0).normal(size=(16, 7, 3)).astype("float32")
    result = ks.export(q, tmp_path / "model.tflite", precision="float32", calibration_data=x)
    np.testing.assert_allclose(run(result.path, x), keras.ops.convert_to_numpy(q(x)), atol=1e-5)


# Keras's own export


@pytest.mark.parametrize("activations", ["keep", "drop"])
def test_a_saved_model_of_a_finalized_one(activations, tmp_path):
    q = ks.quantize_aware(networks.residual_convnet(), "int4")
    calibrate(q, images())
    plain = ks.finalize(q, activations=activations)
    plain.export(str(tmp_path / "saved"), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    expected = keras.ops.convert_to_numpy(plain(images(16), training=False))
    np.testing.assert_allclose(loaded.serve(images(16)), expected, atol=1e-5)
    exact = keras.ops.convert_to_numpy(q(images(16), training=False))
    assert (np.abs(expected - exact).max() < 1e-5) == (activations == "keep")
