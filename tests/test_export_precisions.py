"""`export` in float16 and 4 bits, without zeros, with integers at its ends: what the file stores, and computes."""

import keras
import networks
import numpy as np
import pytest
from keras import layers
from tflite_files import PLAIN, integers_in, interpreter, operations, run, tensors

import keras_squeeze as ks
from keras_squeeze.deployment.inspecting import predict_file
from keras_squeeze.quantization.conversion import calibrate


def images(count=64):
    return np.random.default_rng(0).uniform(size=(count, 8, 8, 1)).astype("float32")


def calibrated(weights="int4", activations="int8", make=networks.residual_convnet):
    q = ks.quantize_aware(make(), weights, activations)
    if activations is not None:
        calibrate(q, images())
    return q


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def wrappers(q):
    return [layer for layer in q._flatten_layers() if isinstance(layer, ks.QuantizeAware)]


def nibbles(shape, data) -> np.ndarray:
    """Two values in a byte, the first in its lower half; the sign is the fourth bit."""
    halves = np.column_stack([data & 15, data >> 4]).reshape(-1)[: np.prod(shape)].astype(int)
    return (halves - 16 * (halves > 7)).reshape(shape)


def as_rows(integers):
    """A row for every output, outputs last as in Keras's kernels."""
    return integers.reshape(-1, integers.shape[-1]).T


def equal_up_to_sign(rows, expected) -> bool:
    """Batch normalization with a negative gamma turns the sign of an output around; the order within is the kernel's"""
    return rows.shape == expected.shape and all(
        np.array_equal(np.sort(row), np.sort(other)) or np.array_equal(np.sort(row), np.sort(-other))
        for row, other in zip(rows, expected, strict=True)
    )


def dense(*units, inputs=64):
    x = entry = keras.Input((inputs,))
    for number in units:
        x = layers.Dense(number, activation="relu", bias_initializer="random_normal")(x)
    return keras.Model(entry, layers.Dense(10)(x))


# float16


def test_float16_computes_with_weights_rounded_to_half(tmp_path):
    model = dense(64, 64)
    x = np.random.default_rng(0).normal(size=(16, 64)).astype("float32")
    result = ks.export(model, tmp_path / "model.tflite", precision="float16", calibration_data=x)
    assert result.precision == "float16"
    assert sorted(shape for shape, _ in tensors(result.path, "FLOAT16") if len(shape) > 1) == [
        [10, 64],
        [64, 64],
        [64, 64],
    ]
    rounded = keras.models.clone_model(model)
    rounded.set_weights([value.astype("float16").astype("float32") for value in model.get_weights()])
    actual = run(result.path, x)
    np.testing.assert_allclose(actual, outputs(rounded, x), atol=2e-6)
    assert np.abs(actual - outputs(model, x)).max() > 2e-5
    assert result.max_abs_error == pytest.approx(np.abs(actual - outputs(model, x)).max(), rel=0.1)


def test_float16_takes_half_the_bytes(tmp_path):
    whole = ks.export(dense(512, 512), tmp_path / "whole.tflite").num_bytes
    half = ks.export(dense(512, 512), tmp_path / "half.tflite", precision="float16").num_bytes
    assert 0.49 < half / whole < 0.51


def test_float16_of_a_quantized_model_has_weights_on_the_grid(tmp_path):
    q = calibrated("int4")
    x = images(16)
    result = ks.export(q, tmp_path / "model.tflite", precision="float16")
    expected = outputs(ks.finalize(q, activations="drop"), x)
    np.testing.assert_allclose(run(result.path, x), expected, atol=0.01 * np.ptp(expected))


def test_binary_inputs_in_float(tmp_path):
    inputs = keras.Input((8, 8, 1))
    x = layers.BatchNormalization()(layers.Conv2D(16, 3, name="first")(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Conv2D(16, 3, name="signs")(x))))
    q = ks.quantize_aware(model, {"signs": "xnor"})
    expected = outputs(q, images())
    for precision in ("float32", "float16"):  # rounding may flip a sign here and there, which shows in an output
        result = ks.export(q, tmp_path / "model.tflite", precision=precision, calibration_data=images())
        differences = np.abs(run(result.path, images()) - expected)
        assert np.median(differences) < 1e-3 * np.ptp(expected)
        assert result.max_abs_error < 0.2 * np.ptp(expected)


def test_weights_that_float16_does_not_hold_are_an_error(tmp_path):
    model = dense(8)
    kernel = model.layers[1].kernel
    kernel.assign(kernel + 1e5)
    path = tmp_path / "model.tflite"
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=r"other outputs than the model.*float16"):
        ks.export(model, path, precision="float16")
    assert path.read_bytes() == b"earlier"
    assert ks.export(model, path, precision="float32").agreement == 1


def test_a_file_that_disagrees_is_an_error(tmp_path):
    class Forgetful(layers.Layer):
        """Computes something else the second time."""

        def build(self, shape):
            self.calls = 0

        def call(self, x):
            self.calls += 1
            return x * self.calls

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Forgetful()(inputs))
    with pytest.raises(ValueError, match="other outputs than the model"):
        ks.export(model, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


# int4


@pytest.mark.parametrize(
    "weights",
    ["int4", ks.quantizers.LearnedStep(4), "int2", "ternary", "fixed4", ks.quantizers.LearnedStep(3)],
    ids=str,
)
def test_integers_of_four_bits_are_those_that_were_trained(weights, tmp_path):
    q = calibrated({"stem|inner|outer|hidden|logits": weights})
    for layer in wrappers(q):
        kernel = layer.layer.kernel
        kernel.assign(kernel + 0.05 * np.random.default_rng(1).normal(size=kernel.shape))
        layer.begin()
    gamma = q.get_layer("norm_1").gamma
    gamma.assign(np.where(np.arange(gamma.shape[0]) % 3, gamma, -gamma))
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=images())
    assert (result.precision, result.float_ops, result.other_integers, result.notes) == ("int4", [], [], [])
    stored = [nibbles(shape, data) for shape, data in tensors(result.path, "INT4")]
    assert len(stored) == 5
    for wrapper in wrappers(q):
        expected = as_rows(wrapper.to_integers()["kernel"][0])
        assert any(equal_up_to_sign(array.reshape(len(array), -1), expected) for array in stored), wrapper.name
    for name, reads, gives in operations(result.path):
        assert name in ("QUANTIZE", "DEQUANTIZE") or "float32" not in [*reads, *gives]


def test_four_bits_compute_what_eight_compute(tmp_path):
    q = calibrated("int4")
    small = ks.export(q, tmp_path / "four.tflite", precision="int4", calibration_data=images())
    large = ks.export(q, tmp_path / "eight.tflite", precision="int8", calibration_data=images())
    assert small.num_bytes < large.num_bytes
    four, eight = (run(file.path, images(16), experimental_op_resolver_type=PLAIN) for file in (small, large))
    np.testing.assert_array_equal(four, eight)
    low, high = q.get_layer("logits").output_quantizer.range_state.numpy()
    step = (max(high, 0) - min(low, 0)) / 255
    four, eight = (run(file.path, images(16)) for file in (small, large))  # with kernels that round otherwise
    np.testing.assert_allclose(four, eight, atol=2.01 * step)


@pytest.mark.parametrize("data", [False, True])
def test_four_bits_are_an_eighth(data, tmp_path):
    model = dense(512, 512)
    x = np.random.default_rng(0).normal(size=(16, 64)).astype("float32") if data else None
    whole = ks.export(model, tmp_path / "whole.tflite")
    small = ks.export(model, tmp_path / "small.tflite", precision="int4", calibration_data=x)
    kernels = sum(values.size for shape, values in tensors(whole.path, "FLOAT32") if len(shape) > 1)
    assert 8 * sum(values.size for _, values in tensors(small.path, "INT4")) == kernels
    assert small.num_bytes < 0.16 * whole.num_bytes


@pytest.mark.parametrize("weights", ["int4", ks.quantizers.LearnedStep(4), "ternary"], ids=str)
def test_weights_of_four_bits_with_activations_in_float(weights, tmp_path):
    q = calibrated({"stem|inner|outer|hidden|logits": weights}, None)
    x = images(16)
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=x)
    np.testing.assert_allclose(run(result.path, x), outputs(q, x), atol=1e-5)
    stored = [nibbles(shape, data) for shape, data in tensors(result.path, "INT4")]
    for wrapper in wrappers(q):
        expected = as_rows(wrapper.to_integers()["kernel"][0])
        assert any(equal_up_to_sign(array.reshape(len(array), -1), expected) for array in stored), wrapper.name
    assert "no quantizers" in result.notes[0]


@pytest.mark.parametrize("activations", [None, "int8"])
def test_integers_with_gaps_between_them(activations, tmp_path):
    """No step of a grid shows in weights that are all zero or at its ends: the trained integers decide."""
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, layers.Conv2D(4, 3, name="conv")(inputs))
    kernel = model.get_layer("conv").kernel
    kernel.assign(np.random.default_rng(0).integers(-1, 2, size=kernel.shape))
    q = ks.quantize_aware(model, "int4", activations)
    if activations:
        calibrate(q, images())
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=images())
    ((shape, data),) = tensors(result.path, "INT4")
    (wrapper,) = wrappers(q)
    expected = wrapper.to_integers()["kernel"][0].transpose(3, 0, 1, 2)
    assert set(np.unique(expected)) == {-7, 0, 7}
    np.testing.assert_array_equal(nibbles(shape, data), expected)


def test_four_bits_after_training(tmp_path):
    model = networks.residual_convnet()
    x = images()
    for data, activations in ((None, None), (x, "int8")):
        result = ks.export(model, tmp_path / "model.tflite", precision="int4", calibration_data=data)
        q = calibrated("int4", activations)
        stored = [nibbles(shape, values) for shape, values in tensors(result.path, "INT4")]
        for wrapper in wrappers(q):
            expected = as_rows(wrapper.to_integers()["kernel"][0])
            assert any(equal_up_to_sign(array.reshape(len(array), -1), expected) for array in stored), wrapper.name
        step = np.ptp(outputs(q, x)) / 255
        assert np.abs(run(result.path, x) - outputs(q, x)).max() < (4 * step if data is not None else 1e-5)
        assert result.max_abs_error > 0


def test_activations_of_four_bits_compute_in_float(tmp_path):
    q = calibrated("int4", "int4")
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=images())
    assert "no kernel for activations of 4 bits" in result.notes[0]
    x = images(16)
    np.testing.assert_allclose(
        run(result.path, x), outputs(ks.finalize(q, activations="drop"), x), rtol=1e-4, atol=1e-5
    )


def test_weights_of_eight_bits_are_not_made_four(tmp_path):
    with pytest.raises(ValueError, match=r"no weights of at most 4 bits.*finalize"):
        ks.export(calibrated("int8"), tmp_path / "model.tflite", precision="int4")


@pytest.mark.parametrize("activations", [None, "int8"])
def test_layers_of_eight_bits_stay_so(activations, tmp_path):
    q = calibrated({"inner|outer": "int4", "stem|hidden|logits": "int8"}, activations)
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=images())
    assert result.other_integers == []
    sizes = {layer.layer.name: layer.layer.kernel.shape for layer in wrappers(q)}
    count = {name: int(np.prod(shape)) for name, shape in sizes.items()}
    assert sorted(np.prod(shape) for shape, _ in tensors(result.path, "INT4")) == sorted(
        count[name] for name in ("inner", "outer")
    )
    stored = {np.prod(shape) for shape, _ in tensors(result.path, "INT8") if len(shape) > 1}
    assert {count[name] for name in ("stem", "hidden", "logits")} <= stored


def test_a_kernel_without_four_bits_keeps_eight(tmp_path):
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, padding="same", name="conv")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", name="depth")(x)
    q = ks.quantize_aware(keras.Model(inputs, layers.Conv2D(4, 1, name="point")(x)), "int4")
    data = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype("float32")
    calibrate(q, data)
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=data)
    assert [shape for shape, _ in tensors(result.path, "INT4")] == [[8, 3, 3, 3], [4, 8]]
    ((shape, kept),) = [found for found in tensors(result.path, "INT8") if len(found[0]) > 1]
    expected = q.get_layer("quantized_depth").to_integers()["kernel"][0]
    np.testing.assert_array_equal(kept.view("int8").reshape(shape)[0], expected[..., 0])
    assert "no fast kernel that reads 4: depth/kernel" in result.notes[0]
    assert (result.float_ops, result.other_integers) == ([], [])


def test_products_of_pixels_are_products(tmp_path):
    """LiteRT has a fast kernel of 4 bits for products, not for convolutions."""
    inputs = keras.Input((6, 6, 8))
    x = layers.Conv2D(8, 1, activation="relu")(inputs)
    model = keras.Model(inputs, layers.Dense(4)(layers.Flatten()(layers.Conv2D(4, 3)(x))))
    data = np.random.default_rng(0).normal(size=(16, 6, 6, 8)).astype("float32")
    result = ks.export(model, tmp_path / "model.tflite", precision="int4", calibration_data=data)
    names = [name for name, *_ in operations(result.path)]
    assert (names.count("FULLY_CONNECTED"), names.count("CONV_2D")) == (2, 1)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.Dense(5, activation="relu"), (7,)),
        (lambda: layers.Dense(5), (3, 7)),
        (lambda: layers.Conv2D(6, 1, activation="relu"), (8, 8, 3)),
        (lambda: layers.Conv2D(6, 1, strides=2), (8, 8, 3)),
        (lambda: layers.Conv2D(5, 3, strides=2, padding="same", activation="relu6"), (8, 8, 3)),
        (lambda: layers.Conv2D(4, 3, groups=2, dilation_rate=2), (8, 8, 4)),
        (lambda: layers.Conv1D(4, 3), (8, 3)),
    ],
)
def test_kinds_of_layers_in_four_bits(layer, shape, activations, tmp_path):
    inputs = keras.Input(shape)
    q = ks.quantize_aware(keras.Model(inputs, layer()(inputs)), "int4", activations)
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype("float32")
    if activations:
        calibrate(q, x)
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=x)
    assert len(tensors(result.path, "INT4")) == 1
    assert result.float_ops == []
    assert result.max_abs_error <= (np.ptp(outputs(q, x)) / 100 if activations else 1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "count"),
    [
        (lambda: layers.EinsumDense("abc,cd->abd", output_shape=(4, 6)), (4, 5), 1),
        (lambda: layers.SeparableConv2D(6, 3), (8, 8, 3), 2),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 3), 1),
        (lambda: layers.Conv2DTranspose(4, 3), (6, 6, 3), 1),
        (lambda: layers.Conv3D(3, 2), (6, 6, 6, 2), 1),
        (lambda: layers.TimeDistributed(layers.Dense(4)), (5, 3), 1),
        (lambda: layers.LSTM(4), (5, 3), 2),
        (lambda: layers.Bidirectional(layers.GRU(4)), (5, 3), 4),
    ],
)
def test_every_kind_of_layer_can_have_weights_of_four_bits(layer, shape, count, tmp_path):
    inputs = keras.Input(shape)
    q = ks.quantize_aware(keras.Model(inputs, layer()(inputs)), "int4", None)
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype("float32")
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=x)
    assert len(tensors(result.path, "INT4")) == count
    assert result.other_integers == []
    assert result.max_abs_error <= 1e-5


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_tables_of_embeddings_are_stored_as_integers(weights, tmp_path):
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Flatten()(layers.Embedding(20, 4, name="table")(inputs))
    q = ks.quantize_aware(
        keras.Model(inputs, layers.Dense(3, name="logits")(x)), {"table": weights, "logits": "int4"}, None
    )
    words = np.random.default_rng(0).integers(20, size=(16, 6)).astype("int32")
    result = ks.export(q, tmp_path / "model.tflite", precision="int4", calibration_data=words)
    assert result.max_abs_error < 1e-5
    expected = q.get_layer("quantized_table").to_integers()["embeddings"][0]
    if weights == "int4":
        stored = [nibbles(shape, data) for shape, data in tensors(result.path, "INT4")]
    else:
        stored = [data.view("int8").reshape(shape) for shape, data in tensors(result.path, "INT8")]
    assert any(np.array_equal(array, expected) for array in stored)


@pytest.mark.parametrize("layer", [lambda: layers.Dense(300), lambda: layers.Conv2D(300, 3)])
def test_weights_of_eight_bits_with_activations_in_float(layer, tmp_path):
    inputs = keras.Input((5, 5, 40))
    q = ks.quantize_aware(keras.Model(inputs, layer()(inputs)), "int8", None)
    x = np.random.default_rng(0).normal(size=(16, 5, 5, 40)).astype("float32")
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=x)
    whole = ks.export(q, tmp_path / "whole.tflite", precision="float32", calibration_data=x)
    assert result.num_bytes < 0.45 * whole.num_bytes
    np.testing.assert_allclose(run(result.path, x), outputs(q, x), atol=1e-4)
    expected = as_rows(wrappers(q)[0].to_integers()["kernel"][0])
    ((_, data),) = tensors(result.path, "INT8")
    assert equal_up_to_sign(data.view("int8").reshape(len(expected), -1), expected)


# sparse


def pruned(sparsity, *units):
    model = dense(*units)
    ks.prune_weights(model, sparsity)
    return model


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_zeros_are_left_out_where_that_is_smaller(precision, tmp_path):
    model = pruned(0.9, 512, 512)
    x = np.random.default_rng(0).normal(size=(16, 64)).astype("float32")
    options = {"precision": precision, "calibration_data": x}
    result = ks.export(model, tmp_path / "sparse.tflite", **options)
    dense_result = ks.export(model, tmp_path / "dense.tflite", **options, sparse=False)
    assert result.sparse
    assert not dense_result.sparse
    assert result.num_bytes < 0.4 * dense_result.num_bytes
    assert f"{dense_result.num_bytes:,}" in result.notes[0]
    np.testing.assert_allclose(run(result.path, x), run(dense_result.path, x), atol=1e-5)
    np.testing.assert_allclose(run(result.path, x), outputs(model, x), atol=1e-5 if precision == "float32" else 1e-2)


def test_a_sparse_convolution(tmp_path):
    inputs = keras.Input((8, 8, 32))
    model = keras.Model(inputs, layers.Conv2D(64, 3)(layers.Conv2D(64, 1)(inputs)))
    ks.prune_weights(model, 0.9)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 32)).astype("float32")
    result = ks.export(model, tmp_path / "model.tflite", calibration_data=x)
    assert result.sparse
    np.testing.assert_allclose(run(result.path, x), outputs(model, x), atol=1e-4)


def test_few_zeros_stay(tmp_path):
    result = ks.export(pruned(0.2, 512), tmp_path / "model.tflite", sparse=True)
    assert not result.sparse
    assert "no weight has more than 30% zeros" in result.notes[0]
    assert ks.export(pruned(0.2, 512), tmp_path / "model.tflite").notes == []


def test_sparse_integers_run_or_the_dense_file_is_kept(tmp_path):
    model = pruned(0.9, 512, 512)
    x = np.random.default_rng(0).normal(size=(16, 64)).astype("float32")
    options = {"precision": "int8", "calibration_data": x}
    whole = ks.export(model, tmp_path / "dense.tflite", **options)
    result = ks.export(model, tmp_path / "sparse.tflite", **options, sparse=True)
    assert whole.notes == []
    assert len(result.notes) == 1
    np.testing.assert_array_equal(run(result.path, x), run(whole.path, x))
    assert result.sparse == (result.num_bytes < whole.num_bytes)
    assert ("Stored sparse" in result.notes[0]) == result.sparse


# integers at the ends


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integers_go_in_and_come_out(precision, tmp_path):
    q = calibrated("int4")
    options = {"precision": precision, "calibration_data": images()}
    floats = ks.export(q, tmp_path / "floats.tflite", **options)
    integers = ks.export(q, tmp_path / "integers.tflite", **options, integer_io=True)
    file = interpreter(integers.path)
    (entry,), (end,) = file.get_input_details(), file.get_output_details()
    assert (entry["dtype"], end["dtype"]) == (np.int8, np.int8)
    assert not {"QUANTIZE", "DEQUANTIZE"} & {name for name, *_ in operations(integers.path)}
    scale, zero_point = entry["quantization"]
    given = np.clip(np.rint(images(1) / scale) + zero_point, -128, 127).astype("int8")
    file.set_tensor(entry["index"], given)
    file.invoke()
    scale, zero_point = end["quantization"]
    actual = (file.get_tensor(end["index"]).astype("float32") - zero_point) * scale
    np.testing.assert_allclose(actual, run(floats.path, images(1)), atol=1e-6)
    np.testing.assert_allclose(predict_file(integers.path, [images(1)])[0], actual, atol=1e-6)
    assert integers.max_abs_error == pytest.approx(floats.max_abs_error, abs=1e-6)


def test_only_what_is_rounded_can_be_an_integer(tmp_path):
    inputs = keras.Input((6,), dtype="int32", name="words")
    vectors = layers.Flatten()(layers.Embedding(20, 4)(inputs))
    q = ks.quantize_aware(keras.Model(inputs, layers.Dense(3, name="logits")(vectors)))
    words = np.random.default_rng(0).integers(20, size=(16, 6)).astype("int32")
    calibrate(q, words)
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=words, integer_io=True)
    file = interpreter(result.path)
    assert file.get_input_details()[0]["dtype"] == np.int32
    assert file.get_output_details()[0]["dtype"] == np.int8
    with pytest.raises(ValueError, match=r"no integers at its ends.*float32"):
        ks.export(dense(8), tmp_path / "model.tflite", integer_io=True)


def test_an_output_that_is_given_twice(tmp_path):
    inputs = keras.Input((6,))
    x = layers.Dense(3, name="logits")(inputs)
    data = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    options = {"precision": "int8", "calibration_data": data, "integer_io": True}
    result = ks.export(keras.Model(inputs, [x, x]), tmp_path / "model.tflite", **options)
    assert interpreter(result.path).get_signature_runner().get_output_details().keys() == {"logits", "logits_1"}
    assert result.max_abs_error < 0.1


def test_an_end_in_float(tmp_path):
    q = ks.quantize_aware(networks.residual_convnet(), layers="outer|hidden|logits")
    calibrate(q, images())
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match=r"Input '.*' is not rounded before it is used.*integer_io=False"):
        ks.export(q, path, calibration_data=images(), integer_io=True)
    assert not path.exists()


# what is left of the zero gammas


def masked(q, gamma_only=False):
    """One neuron with a gamma of exactly zero, as a mask leaves it or set by hand."""
    stem, norm = q.get_layer("quantized_stem").layer, q.get_layer("norm_1")
    one = np.arange(16) != 3
    norm.gamma.assign(norm.gamma * one)
    norm.moving_mean.assign(np.where(one, 0.05, -5))
    norm.beta.assign(np.linspace(-1, 1, 16))
    if not gamma_only:
        stem.kernel.assign(stem.kernel * one)
        norm.beta.assign(norm.beta * one)
    return q


@pytest.mark.parametrize("gamma_only", [False, True])
@pytest.mark.parametrize("weights", ["int8", "int4", ks.quantizers.LearnedStep(4), "ternary"], ids=str)
def test_a_gamma_of_zero(weights, gamma_only, tmp_path):
    q = masked(ks.quantize_aware(networks.residual_convnet(), weights), gamma_only)
    calibrate(q, images())
    before = [value.copy() for value in q.get_weights()]
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=images())
    assert result.float_ops == []
    low, high = q.get_layer("logits").output_quantizer.range_state.numpy()
    assert result.max_abs_error < 4 * (max(high, 0) - min(low, 0)) / 255
    for value, other in zip(before, q.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)


def test_neurons_that_were_masked_and_not_removed(tmp_path):
    model = networks.residual_convnet()
    ks.prune_neurons(model, 0.4, round_to=1)
    assert not model.get_layer("norm_1").gamma.numpy().all()
    nested = keras.Sequential([keras.Input((8, 8, 1)), model])
    for outer in (model, nested):
        result = ks.export(outer, tmp_path / "model.tflite", precision="int8", calibration_data=images())
        assert (result.float_ops, result.other_integers) == ([], [])
        assert result.max_abs_error < np.ptp(outputs(model, images(16))) / 30


def test_a_gamma_of_zero_on_a_grid_without_zero(tmp_path):
    q = masked(ks.quantize_aware(networks.residual_convnet(), {"stem": "binary_connect"}))
    calibrate(q, images())
    with pytest.raises(ValueError, match=r"gamma of zero \('norm_1'\): keras_squeeze.shrink"):
        ks.export(q, tmp_path / "model.tflite", calibration_data=images())


@pytest.mark.parametrize("weights", ["int8", "ternary"])
def test_weights_that_are_all_zero(weights, tmp_path):
    """Their scale may be next to zero, and a bias in its multiples would not fit."""
    q = ks.quantize_aware(networks.residual_convnet(), {"stem|inner|outer|hidden|logits": weights})
    inner = q.get_layer("quantized_inner").layer  # its batch normalization has no gamma
    inner.kernel.assign(inner.kernel * (np.arange(32) != 3))
    q.get_layer("norm_2").beta.assign(np.where(np.arange(32) == 3, 3, 0))
    hidden = q.get_layer("quantized_hidden").layer
    hidden.kernel.assign(hidden.kernel * (np.arange(32) != 5))
    hidden.bias.assign(np.where(np.arange(32) == 5, 5, 0))
    calibrate(q, images())
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=images())
    assert result.float_ops == []
    low, high = q.get_layer("logits").output_quantizer.range_state.numpy()
    assert result.max_abs_error < 4 * (max(high, 0) - min(low, 0)) / 255
    assert len(integers_in(result.path)) >= 5
