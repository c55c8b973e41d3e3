"""`export`: the file that ships says what the trained model says, in integers, checked with the interpreter."""

import keras
import networks
import numpy as np
import pytest
from keras import layers
from tflite_files import integers_in, operations, run

import keras_squeeze as ks
from keras_squeeze.deployment.inspecting import predict_file
from keras_squeeze.quantization.conversion import calibrate


def trained(weights="int8", activations="int8", make=networks.residual_convnet):
    """A wrapped network that has seen some digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = (data.images[..., np.newaxis] / 16).astype("float32")[:256]
    q = ks.quantize_aware(make(), weights, activations)
    q.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    q.fit(x, data.target[:256], verbose=0)
    return q, x


def as_stored(layer, integers):
    """A kernel's integers as the file has them: outputs first."""
    return integers.transpose(3, 0, 1, 2) if isinstance(layer, layers.Conv2D) else integers.T


def equal_up_to_sign(stored, integers) -> bool:
    """Batch normalization with a negative gamma turns the sign of an output around."""
    stored = stored.reshape(len(integers), -1)
    integers = integers.reshape(len(integers), -1)
    return all(
        np.array_equal(row, expected) or np.array_equal(row, -expected)
        for row, expected in zip(stored.astype(int), integers, strict=True)
    )


@pytest.mark.parametrize(
    "weights",
    ["int8", "int4", "int2", "fixed8", "ternary", "binary", "binary_connect", ks.quantizers.LearnedStep(4)],
    ids=str,
)
def test_integer_kernels_only_with_the_integers_that_were_trained(weights, tmp_path):
    q, x = trained(weights)
    gamma = q.get_layer("norm_1").gamma
    gamma.assign(np.where(np.arange(gamma.shape[0]) % 3, gamma, -gamma))
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=x)
    assert result.float_ops == []
    assert result.precision == "int8"
    assert result.num_bytes == result.path.stat().st_size
    for name, reads, gives in operations(result.path):
        if name not in ("QUANTIZE", "DEQUANTIZE"):
            assert "float32" not in [*reads, *gives], name
    stored = integers_in(result.path)
    for wrapper in q.layers:
        if isinstance(wrapper, ks.QuantizeAware):
            expected = as_stored(wrapper.layer, wrapper.to_integers()["kernel"][0])
            same_size = [array for array in stored if array.size == expected.size and len(array) == len(expected)]
            assert any(equal_up_to_sign(array, expected) for array in same_size), wrapper.layer.name


@pytest.mark.parametrize("weights", ["int8", "int4", "ternary"])
def test_outputs_are_within_one_step_of_the_wrapped_model(weights, tmp_path):
    q, x = trained(weights)
    ks.export(q, tmp_path / "model.tflite")
    low, high = q.get_layer("logits").output_quantizer.range_state.numpy()
    step = (max(high, 0) - min(low, 0)) / 255
    expected = keras.ops.convert_to_numpy(q(x[:64], training=False))
    difference = np.abs(run(tmp_path / "model.tflite", x[:64]) - expected)
    assert np.mean(difference > 1.01 * step) < 0.01  # a rounding in an early layer can move two
    assert difference.max() < 4 * step


def test_the_result_tells_what_the_interpreter_gives(tmp_path):
    q, x = trained()
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=x[:8])
    expected = keras.ops.convert_to_numpy(q(x[:8], training=False))
    actual = run(tmp_path / "model.tflite", x[:8])
    assert result.max_abs_error == pytest.approx(np.abs(actual - expected).max(), abs=1e-6)
    assert result.agreement == np.mean(actual.argmax(-1) == expected.argmax(-1))
    assert str(result.num_bytes // 1000) in str(result)


def test_float_is_exact(tmp_path):
    model = networks.residual_convnet()
    result = ks.export(model, tmp_path / "model.tflite")
    assert result.precision == "float32"
    assert result.max_abs_error < 1e-5
    assert result.agreement == 1
    assert result.float_ops == []


def test_float_of_a_quantized_model_has_weights_on_the_grid(tmp_path):
    q, x = trained("int4")
    result = ks.export(q, tmp_path / "model.tflite", precision="float32")
    assert result.precision == "float32"
    expected = keras.ops.convert_to_numpy(ks.finalize(q, activations="drop")(x[:8], training=False))
    np.testing.assert_allclose(run(result.path, x[:8]), expected, atol=1e-4)


def test_int8_is_a_quarter_of_float(tmp_path):
    inputs = keras.Input((64,))
    model = keras.Model(inputs, layers.Dense(10)(layers.Dense(512, activation="relu")(layers.Dense(512)(inputs))))
    x = np.random.default_rng(0).normal(size=(32, 64)).astype("float32")
    whole = ks.export(model, tmp_path / "float.tflite").num_bytes
    small = ks.export(model, tmp_path / "int8.tflite", precision="int8", calibration_data=x).num_bytes
    assert small < 0.27 * whole


def test_after_training_needs_data(tmp_path):
    model = networks.residual_convnet()
    with pytest.raises(ValueError, match="calibration_data"):
        ks.export(model, tmp_path / "model.tflite", precision="int8")
    with pytest.raises(ValueError, match="empty"):
        ks.export(model, tmp_path / "model.tflite", precision="int8", calibration_data=np.zeros((0, 8, 8, 1)))


def test_ranges_that_are_not_known(tmp_path):
    with pytest.raises(ValueError, match=r"seen no data.*calibration_data"):
        ks.export(ks.quantize_aware(networks.residual_convnet()), tmp_path / "model.tflite")


def test_a_model_that_has_seen_no_data_is_calibrated(tmp_path):
    q = ks.quantize_aware(networks.residual_convnet())
    x = np.random.default_rng(0).uniform(size=(32, 8, 8, 1)).astype("float32")
    assert ks.export(q, tmp_path / "model.tflite", calibration_data=x).float_ops == []


def test_activations_that_no_kernel_takes(tmp_path):
    q, x = trained("int8", "int4")
    with pytest.raises(ValueError, match=r"activations of 8 bits.*quantized_relu \(4 bits\)"):
        ks.export(q, tmp_path / "model.tflite", calibration_data=x)


def test_layers_wrapped_by_hand(tmp_path):
    q = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            ks.FakeQuantize("int8"),
            ks.QuantizeAware(layers.Conv2D(4, 3, activation="relu"), "int4"),
            layers.Flatten(),
            ks.QuantizeAware(layers.Dense(3)),
        ]
    )
    x = np.random.default_rng(0).uniform(size=(32, 8, 8, 1)).astype("float32")
    calibrate(q, x)
    assert ks.export(q, tmp_path / "model.tflite", calibration_data=x).float_ops == []


def test_data_for_several_inputs(tmp_path):
    one, two = keras.Input((4,), name="one"), keras.Input((6,), name="two")
    model = keras.Model({"one": one, "two": two}, layers.Concatenate()([layers.Dense(3)(one), layers.Dense(3)(two)]))
    rng = np.random.default_rng(0)
    data = {"one": rng.normal(size=(32, 4)).astype("float32"), "two": rng.normal(size=(32, 6)).astype("float32")}
    assert ks.export(model, tmp_path / "a.tflite", precision="int8", calibration_data=data).max_abs_error < 0.1
    listed = keras.Model([one, two], model.outputs)
    data = list(data.values())
    assert ks.export(listed, tmp_path / "b.tflite", precision="int8", calibration_data=data).max_abs_error < 0.1


def test_a_schedule_that_has_not_ended(tmp_path):
    q, _ = trained()
    for layer in q._flatten_layers():
        if layer.name == "quantized_relu":
            layer.mix.assign(0.5)
    with pytest.raises(ValueError, match="still mixed with float"):
        ks.export(q, tmp_path / "model.tflite")


def test_a_quantized_layer_left_in_float_is_an_error(tmp_path):
    inputs = keras.Input((6, 6, 6, 2))
    q = ks.quantize_aware(keras.Model(inputs, layers.Conv3D(3, 2)(inputs)))
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 6, 2)).astype("float32")
    calibrate(q, x)
    path = tmp_path / "model.tflite"
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=r"weights in float or on another grid: conv3d/kernel.*allow_float"):
        ks.export(q, path, calibration_data=x)
    assert path.read_bytes() == b"earlier"
    assert any(name.startswith("CONV_3D") for name in ks.export(q, path, allow_float=True).float_ops)
    assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.Dense(5, activation="relu"), (7,)),
        (lambda: layers.Dense(5, activation="softmax"), (7,)),
        (lambda: layers.Dense(5), (3, 7)),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 3)),
        (lambda: layers.Conv2D(4, 3, strides=2, padding="same", activation="relu6"), (8, 8, 3)),
        (lambda: layers.Conv2D(4, 3, groups=2, dilation_rate=2), (8, 8, 4)),
        (lambda: layers.Conv1D(4, 3), (8, 3)),
        (lambda: layers.Conv2DTranspose(4, 3), (6, 6, 3)),
        (lambda: layers.TimeDistributed(layers.Dense(4)), (5, 3)),
        (lambda: layers.EinsumDense("abc,cd->abd", output_shape=(4, 6)), (4, 5)),
    ],
)
def test_kinds_of_layers_in_integers(layer, shape, tmp_path):
    inputs = keras.Input(shape)
    q = ks.quantize_aware(keras.Model(inputs, layer()(inputs)))
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype("float32")
    calibrate(q, x)
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=x)
    assert result.float_ops == []
    spread = np.ptp(keras.ops.convert_to_numpy(q(x)))
    assert result.max_abs_error <= spread / 100


def test_two_inputs_and_two_outputs(tmp_path):
    first, second = keras.Input((4,), name="zebra"), keras.Input((6,), name="ant")
    joined = layers.Concatenate()([layers.Dense(5)(first), layers.Dense(7)(second)])
    model = keras.Model([first, second], [layers.Dense(3, name="b")(joined), layers.Dense(2, name="a")(joined)])
    result = ks.export(model, tmp_path / "model.tflite")
    assert result.max_abs_error < 1e-5
    rng = np.random.default_rng(0)
    data = ([rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 6)).astype("float32")],)
    assert ks.export(model, tmp_path / "int8.tflite", precision="int8", calibration_data=data).agreement > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "model.onnx"}, r"must end in .tflite.*model.onnx"),
        ({"path": "nowhere/model.tflite"}, "no directory"),
        ({"precision": "int7"}, r"'float32', 'float16', 'int8', 'int4'.*int7"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    arguments = {"path": "model.tflite", **arguments}
    with pytest.raises(ValueError, match=message):
        ks.export(networks.small_convnet(), tmp_path / arguments.pop("path"), **arguments)


def test_no_model(tmp_path):
    with pytest.raises(TypeError, match="must be a `keras"):
        ks.export(layers.Dense(3), tmp_path / "model.tflite")


def test_the_comparison_is_with_the_model_that_was_given(tmp_path):
    """An outlier in the data makes the grid of the inputs so coarse that answers change: that has to show."""
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    x = np.random.default_rng(0).normal(size=(256, 8)).astype("float32")
    x[200] = 1000  # not among the samples that are compared
    result = ks.export(model, tmp_path / "model.tflite", precision="int8", calibration_data=x)
    expected = keras.ops.convert_to_numpy(model(x[:64]))
    assert result.max_abs_error == pytest.approx(np.abs(run(result.path, x[:64]) - expected).max(), rel=1e-4)
    assert result.max_abs_error > 0.1


def test_an_embedding_has_the_integers_that_were_trained(tmp_path):
    inputs = keras.Input((6,), dtype="int32")
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Embedding(20, 4, name="table")(inputs))))
    for weights in ("int8", "int4"):
        q = ks.quantize_aware(model, weights)
        x = np.random.default_rng(0).integers(20, size=(16, 6)).astype("int32")
        calibrate(q, x)
        result = ks.export(q, tmp_path / "model.tflite", calibration_data=x)
        expected = q.get_layer("quantized_table").to_integers()["embeddings"][0]
        assert any(np.array_equal(stored, expected) for stored in integers_in(result.path))


def test_one_dimensional_convolutions_of_few_bits(tmp_path):
    inputs = keras.Input((12, 3))
    model = keras.Model(inputs, layers.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu")(inputs))
    q = ks.quantize_aware(model, "int4")
    x = np.random.default_rng(0).normal(size=(16, 12, 3)).astype("float32")
    calibrate(q, x)
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=x)
    assert result.other_integers == []
    assert result.max_abs_error < 0.1


@pytest.mark.parametrize(
    ("layer", "shape", "weights"),
    [
        (lambda: layers.LSTM(4), (5, 3), "int8"),
        (lambda: layers.Conv2DTranspose(4, 3), (6, 6, 3), "int4"),
        (lambda: layers.Dense(4), (6,), ks.quantizers.Affine(16)),
        (lambda: layers.Dense(4), (6,), ks.quantizers.FixedPoint(8, integer_bits=-4)),
    ],
)
def test_other_integers_than_were_trained_are_an_error(layer, shape, weights, tmp_path):
    inputs = keras.Input(shape)
    q = ks.quantize_aware(keras.Model(inputs, layer()(inputs)), weights)
    x = np.random.default_rng(0).normal(size=(16, *shape)).astype("float32")
    calibrate(q, x)
    with pytest.raises(ValueError, match="weights in float or on another grid"):
        ks.export(q, tmp_path / "model.tflite", calibration_data=x)
    assert ks.export(q, tmp_path / "model.tflite", calibration_data=x, allow_float=True).other_integers


def test_a_layer_derived_from_dense_is_called_as_it_is(tmp_path):
    class Scaled(layers.Dense):
        def call(self, x):
            return 3 * super().call(x)

    inputs = keras.Input((6,))
    q = ks.quantize_aware(keras.Model(inputs, Scaled(4)(inputs)))
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    calibrate(q, x)
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=x, allow_float=True)
    assert result.max_abs_error < 0.1


def test_what_is_left_out_may_compute_in_float(tmp_path):
    q = ks.quantize_aware(networks.residual_convnet(), layers="outer|hidden|logits")
    x = np.random.default_rng(0).uniform(size=(16, 8, 8, 1)).astype("float32")
    calibrate(q, x)
    result = ks.export(q, tmp_path / "model.tflite", calibration_data=x)
    assert any(name.startswith("CONV_2D") for name in result.float_ops)
    assert result.other_integers == []


def test_ranges_cover_the_calibration_data(tmp_path):
    """Also what comes in a later batch only."""
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(16, activation="relu"), layers.Dense(1)])
    x = np.concatenate([rng.normal(size=(320, 4)), 20 * rng.normal(size=(32, 4))]).astype("float32")
    path = tmp_path / "model.tflite"
    ks.export(model, path, precision="int8", calibration_data=x)
    expected = model.predict(x, verbose=0)
    (actual,) = predict_file(path, [x])
    assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


def test_calibration_data_of_another_shape(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"does not fit.*\(8, 8, 1\).*Received: \(8, 8\)"):
        ks.export(model, tmp_path / "model.tflite", calibration_data=np.zeros((5, 8, 8), "float32"))
