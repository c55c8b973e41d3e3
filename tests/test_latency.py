"""Latency is that of the file that ships; what it runs is what the model computes."""

import keras
import numpy as np
import pytest

import keras_squeeze as ks
from keras_squeeze.deployment.converting import convert
from keras_squeeze.evaluation import latency

layers = keras.layers


def wide(units=1024):
    return keras.Sequential([keras.Input((256,)), layers.Dense(units), layers.Dense(units), layers.Dense(2)])


def test_a_model_and_its_file_and_the_spread(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(convert(wide()))
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
    path.write_bytes(convert(model))
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    data = {"a": np.ones((1, 4), "float32"), "b": np.full((1, 6), 2, "float32")}
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], data["a" if detail["shape"][1] == 4 else "b"])
    interpreter.invoke()
    (output,) = interpreter.get_output_details()
    np.testing.assert_allclose(interpreter.get_tensor(output["index"]), model(data).numpy(), rtol=1e-5)


def test_they_take_turns_forwards_and_backwards():
    calls = []
    times = latency._times_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], 3, lambda: calls.append("|"))
    assert "".join(calls[2 * latency._WARM_UP_RUNS :]) == "aabb|bbaa|aabb|"  # the first of two is not timed
    assert times.shape == (2, 3)
    assert (times > 0).all()


def test_the_ratio_is_of_times_in_the_same_round():
    first, own = np.array([1.0, 2.0, 10.0]), np.array([3.0, 2.0, 20.0])
    found = latency._latency(own, first)
    assert (found.median_ms, found.ratio, found.runs) == (3, 2, 3)
    assert "; 2 of the first" in str(found)
    assert latency._latency(first, first).ratio == 1
    assert "of the first" not in str(latency._latency(first, first))


def test_a_larger_file_takes_longer_beside_the_first(tmp_path):
    path = tmp_path / "small.tflite"
    ks.export(wide(8), path)
    found = ks.measure_latencies({"small": path, "large": wide(), "the same": str(path)}, runs=20)
    assert list(found) == ["small", "large", "the same"]
    assert found["small"].ratio == 1
    assert found["large"].ratio > 2
    assert found["the same"].ratio < found["large"].ratio
    assert {entry.runs for entry in found.values()} == {20}


def test_a_model_is_measured_as_it_was_trained():
    x = np.random.default_rng(0).random((32, 256)).astype("float32")
    q = ks.quantize_aware(wide(16))
    with pytest.raises(ValueError, match="has seen no data"):
        ks.measure_latency(q)
    q.compile("sgd", "mse")
    q.fit(x, np.zeros((32, 2)), verbose=0)
    for model, expected in ((wide(16), np.float32), (q, np.int8)):
        interpreter = latency.prepare(model).__self__
        (kernel,) = (d for d in interpreter.get_tensor_details() if tuple(d["shape"]) == (16, 256))
        assert kernel["dtype"] == expected


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match="a dict from names"):
        ks.measure_latencies([wide(8)])
    with pytest.raises(ValueError, match="`models` is empty"):
        ks.measure_latencies({})
    with pytest.raises(ValueError, match="`num_threads` must be an int, at least 1"):
        ks.measure_latencies({"a": wide(8)}, num_threads=True)
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
