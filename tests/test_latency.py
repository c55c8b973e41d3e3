"""Latency is that of the file that ships; what it runs is what the model computes."""

import keras
import numpy as np
import pytest

import keras_squeeze as ks
from keras_squeeze.deployment import latency

layers = keras.layers


def wide(units=1024):
    return keras.Sequential([keras.Input((256,)), layers.Dense(units), layers.Dense(units), layers.Dense(2)])


def test_a_model_and_its_file_and_the_spread(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(latency.convert(wide()))
    for subject in (wide(), path, str(path)):
        found = ks.measure_latency(subject, runs=20)
        assert 0 < found.p10_ms <= found.median_ms <= found.p90_ms
        assert found.runs == 20
    assert f"{found.median_ms:.3g} ms" in str(found)


def test_what_is_timed_is_the_model(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    a, b = keras.Input((4,), name="a"), keras.Input((6,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.Dense(3)(layers.Concatenate()([a, b])))
    path = tmp_path / "model.tflite"
    path.write_bytes(latency.convert(model))
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    data = {"a": np.ones((1, 4), "float32"), "b": np.full((1, 6), 2, "float32")}
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], data["a" if detail["shape"][1] == 4 else "b"])
    interpreter.invoke()
    (output,) = interpreter.get_output_details()
    np.testing.assert_allclose(interpreter.get_tensor(output["index"]), model(data).numpy(), rtol=1e-5)


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match=r"path of a \.tflite file or a `keras\.Model`"):
        ks.measure_latency(3)
    with pytest.raises(ValueError, match="There is no file"):
        ks.measure_latency(tmp_path / "missing.tflite")
    (tmp_path / "text.tflite").write_text("no model")
    with pytest.raises(ValueError, match="no model that LiteRT can run"):
        ks.measure_latency(tmp_path / "text.tflite")
    with pytest.raises(ValueError, match="`runs` must be an int, at least 1"):
        ks.measure_latency(wide(8), runs=0)
    open_length = keras.Sequential([keras.Input((None, 4)), layers.LSTM(3)])
    with pytest.raises(ValueError, match="needs to know every size"):
        ks.measure_latency(open_length)
    with pytest.raises(ValueError, match="no inputs of a known shape"):
        ks.measure_latency(keras.Sequential([layers.Dense(2)]))
