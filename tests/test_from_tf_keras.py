"""Models of tf_keras as Keras 3 models: every kind of layer and of file, against the predictions of the original."""

import os
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import pytest
import tf_keras

import keras_squeeze as ks
from keras_squeeze import tfmot_compat
from keras_squeeze.tfmot_compat.isolation import import_tfmot

layers = tf_keras.layers
IMAGE, SEQUENCE = (8, 8, 3), (7, 4)


@pytest.fixture(scope="module")
def tfmot():
    return import_tfmot()


def randomize(model):
    rng = np.random.default_rng(3)
    for weight in model.weights:
        if weight.dtype.is_floating:
            weight.assign(rng.uniform(0.1, 1, weight.shape))
    return model


def sequential(*parts, shape=IMAGE):
    return randomize(tf_keras.Sequential([tf_keras.Input(shape), *parts]))


def inputs_of(model, indices=None):
    rng = np.random.default_rng(4)
    shapes = [(3, *tensor.shape[1:]) for tensor in model.inputs]
    if indices:
        return [rng.integers(1, indices, shape) for shape in shapes]
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def assert_same(old, new, indices=None):
    x = inputs_of(old, indices)
    x = x if len(x) > 1 else x[0]
    expected, found = (keras.tree.flatten(model(x, training=False)) for model in (old, new))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def migrate(model, indices=None, **options):
    new = tfmot_compat.from_tf_keras(model, **options)
    assert isinstance(new, keras.Model)
    assert new.name == model.name
    assert_same(model, new, indices)
    return new


# Layers.


def normalization(axis):
    layer = layers.Normalization(axis=axis)
    layer.adapt(np.random.default_rng(0).uniform(1, 3, (20, *IMAGE)))
    return layer


ON_IMAGES = {
    "convolution": lambda: layers.Conv2D(
        4, 3, strides=2, padding="same", activation="relu", kernel_regularizer="l2", kernel_constraint="max_norm"
    ),
    "groups": lambda: layers.Conv2D(6, 3, groups=3, use_bias=False),
    "depthwise": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
    "separable": lambda: layers.SeparableConv2D(5, 3, activation="tanh"),
    "transposed": lambda: layers.Conv2DTranspose(4, 3, strides=2),
    "batch_norm": lambda: layers.BatchNormalization(epsilon=0.01),
    "batch_norm_axis": lambda: layers.BatchNormalization(scale=False, axis=1),
    "layer_norm": lambda: layers.LayerNormalization(axis=[1, 2]),
    "group_norm": lambda: layers.GroupNormalization(3),
    "relu": lambda: layers.ReLU(6, 0.1),
    "leaky_relu": lambda: layers.LeakyReLU(0.2),
    "thresholded_relu": lambda: layers.ThresholdedReLU(0.4),
    "prelu": lambda: layers.PReLU(shared_axes=[1, 2]),
    "hard_sigmoid": lambda: layers.Activation("hard_sigmoid"),
    "gelu": lambda: layers.Activation("gelu"),
    "swish": lambda: layers.Activation("swish"),
    "softmax": lambda: layers.Softmax(axis=1),
    "pooling": lambda: layers.AveragePooling2D(3, padding="same"),
    "global_pooling": lambda: layers.GlobalAveragePooling2D(keepdims=True),
    "upsampling": lambda: layers.UpSampling2D(interpolation="bilinear"),
    "padding": lambda: layers.ZeroPadding2D(((1, 2), (0, 1))),
    "cropping": lambda: layers.Cropping2D(1),
    "dropout": lambda: layers.SpatialDropout2D(0.5),
    "reshape": lambda: layers.Reshape((64, 3)),
    "rescaling": lambda: layers.Rescaling(1 / 255, 0.5),
    "resizing": lambda: layers.Resizing(4, 4),
    "normalization_given": lambda: layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 2.0, 4.0]),
    "lambda": lambda: layers.Lambda(lambda x: 2 * x),
}
ON_SEQUENCES = {
    "lstm": lambda: layers.LSTM(5, return_sequences=True),
    "gru": lambda: layers.GRU(5),
    "gru_of_keras_1": lambda: layers.GRU(5, reset_after=False, recurrent_activation="hard_sigmoid"),
    "simple_rnn": lambda: layers.SimpleRNN(5),
    "bidirectional": lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True), merge_mode="sum"),
    "cells": lambda: layers.RNN([layers.LSTMCell(4), layers.GRUCell(3)]),
    "time_distributed": lambda: layers.TimeDistributed(layers.Dense(3)),
    "causal": lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
    "einsum": lambda: layers.EinsumDense("abc,cd->abd", (None, 5)),
}


@pytest.mark.parametrize("make", ON_IMAGES.values(), ids=ON_IMAGES)
def test_layers_on_images(make):
    migrate(sequential(make()))


@pytest.mark.parametrize("make", ON_SEQUENCES.values(), ids=ON_SEQUENCES)
def test_layers_on_sequences(make):
    migrate(sequential(make(), shape=SEQUENCE))


def test_an_adapted_normalization():
    new = migrate(tf_keras.Sequential([tf_keras.Input(IMAGE), normalization(-1)]))
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(new)) is not None


def test_embedding_and_mask():
    migrate(sequential(layers.Embedding(9, 4, mask_zero=True), layers.LSTM(3), shape=(6,)), indices=9)


def test_volumes():
    migrate(sequential(layers.Conv3D(2, 2), shape=(5, 5, 5, 2)))
    migrate(sequential(layers.ConvLSTM2D(3, 2), shape=(3, 5, 5, 2)))


def test_frozen_layers_stay_frozen():
    model = sequential(layers.Dense(4, name="frozen"), layers.Dense(3, name="free"), shape=(5,))
    model.get_layer("frozen").trainable = False
    new = migrate(model)
    assert [variable.path.split("/")[-2] for variable in new.trainable_variables] == ["free", "free"]


# Graphs.


def test_functions_of_tensorflow_between_layers():
    import tensorflow as tf

    image = tf_keras.Input(IMAGE)
    one, other = layers.Conv2D(4, 3)(image), layers.Conv2D(4, 3)(image)
    x = tf.nn.relu(one + other) * 2.0 - 0.5
    x = tf.concat([x, one], axis=-1)
    x = tf.reduce_mean(x, axis=[1, 2])[:, :4]
    x = tf.transpose(tf.reshape(x, (-1, 2, 2)), [0, 2, 1])
    x = tf.clip_by_value(tf.matmul(1.0 - x, x) / 3.0, -1, 1) ** 2
    x = tf.nn.softmax(tf.squeeze(tf.expand_dims(tf.cast(x, "float32"), -1), -1))
    x = tf.pad(x, [[0, 0], [1, 1], [0, 0]])
    model = randomize(tf_keras.Model(image, tf.stack([x, -tf.sigmoid(x)], axis=1)))
    migrate(model)


def test_nested_and_shared_layers_and_named_inputs():
    inner = tf_keras.Sequential([tf_keras.Input((8,)), layers.Dense(4, activation="relu"), layers.Dense(4)])
    shared = layers.Dense(4)
    a, b = tf_keras.Input((8,), name="a"), tf_keras.Input((8,), name="b")
    old = randomize(tf_keras.Model({"a": a, "b": b}, [inner(a) + inner(b) + shared(a), shared(b)]))
    new = tfmot_compat.from_tf_keras(old)
    x = {name: np.random.default_rng(1).standard_normal((5, 8)).astype("float32") for name in "ab"}
    for expected, found in zip(old.predict(x, verbose=0), new.predict(x, verbose=0), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert new.count_params() == old.count_params()


def test_attention_and_states():
    one, other = tf_keras.Input((6, 8)), tf_keras.Input((4, 8))
    migrate(randomize(tf_keras.Model([one, other], layers.MultiHeadAttention(2, 4, value_dim=3)(one, other))))
    outputs, *states = layers.LSTM(3, return_state=True, return_sequences=True)(one)
    decoded = layers.LSTM(3)(other, initial_state=states)
    migrate(randomize(tf_keras.Model([one, other], [decoded, outputs])))


def test_custom_objects(tmp_path):
    @tf_keras.utils.register_keras_serializable("test")
    class Doubled(layers.Layer):
        def call(self, inputs):
            return 2 * inputs

    class DoubledInKeras3(keras.layers.Layer):
        def call(self, inputs):
            return 2 * inputs

    model = sequential(Doubled(name="twice"), layers.Dense(2), shape=(4,))
    with pytest.raises(ValueError, match=r"twice: a class of yours; .*custom_objects=.*'Doubled'"):
        tfmot_compat.from_tf_keras(model)
    migrate(model, custom_objects={"Doubled": DoubledInKeras3})

    def bump(x):
        return x * x

    model = sequential(layers.Dense(3, activation=bump), shape=(4,))
    model.save(tmp_path / "function.keras")
    assert_same(model, tfmot_compat.from_tf_keras(tmp_path / "function.keras", custom_objects={"bump": bump}))


# Files.


def small_net():
    return sequential(
        layers.Conv2D(4, 3, activation="relu", name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.Flatten(),
        layers.Dense(5, name="dense"),
    )


@pytest.fixture(params=["model.h5", "model.keras", "saved_model"])
def file(request, tmp_path):
    return tmp_path / request.param


@pytest.fixture
def quiet():
    """What tf_keras and tfmot warn of when they write and read their own files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quiet")
def test_plain_files(file):
    model = small_net()
    model.save(file)
    assert_same(model, tfmot_compat.from_tf_keras(str(file)))


@pytest.fixture(scope="module")
def pruned(tfmot):
    """Pruned by tfmot for a few steps on random labels; and training went on a step after the last mask."""
    tf_keras.utils.set_random_seed(0)
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.2, 0.75, 1, 5, frequency=2)
    model = tfmot.sparsity.keras.prune_low_magnitude(small_net(), pruning_schedule=schedule)
    model.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((48, *IMAGE)).astype("float32"), rng.integers(5, size=48)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
    model.train_on_batch(x, y)  # which leaves weights behind that are not masked
    return model


def zeros(model):
    return {layer.name: int((layer.kernel.numpy() == 0).sum()) for layer in model.layers if hasattr(layer, "kernel")}


def expected_zeros(model):
    return {name: round(0.75 * weight) for name, weight in {"conv": 108, "dense": 720}.items()}


def test_a_pruned_model(pruned):
    new = migrate(pruned)
    assert [layer.name for layer in new.layers] == [layer.layer.name for layer in pruned.layers]
    assert zeros(new) == expected_zeros(pruned)


def test_a_stripped_model(pruned, tfmot):
    pruned.predict(np.zeros((1, *IMAGE)), verbose=0)  # tfmot masks in the forward pass
    new = migrate(tfmot.sparsity.keras.strip_pruning(pruned))
    assert zeros(new) == expected_zeros(pruned)


@pytest.mark.usefixtures("quiet")
def test_files_of_pruned_models(pruned, file):
    pruned.save(file)
    new = tfmot_compat.from_tf_keras(file)
    assert_same(pruned, new)
    assert zeros(new) == expected_zeros(pruned)


def test_the_new_model_trains_on_sparse_and_is_saved(pruned, tmp_path):
    new = tfmot_compat.from_tf_keras(pruned)
    new.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).standard_normal((32, *IMAGE)).astype("float32")
    new.fit(x, np.arange(32) % 5, verbose=0, callbacks=[ks.KeepSparsity()])
    assert zeros(new) == expected_zeros(pruned)
    new.save(tmp_path / "new.keras")
    assert_same(pruned, tfmot_compat.from_tf_keras(pruned))
    loaded = keras.models.load_model(tmp_path / "new.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), new.predict(x, verbose=0))


def test_what_keras_3_lacks_loads_without_a_scope(tmp_path):
    new = migrate(sequential(layers.Activation("hard_sigmoid"), shape=(4,)))
    new.save(tmp_path / "hard.keras")
    x = np.linspace(-4, 4, 12, dtype="float32").reshape(3, 4)
    loaded = keras.models.load_model(tmp_path / "hard.keras")
    np.testing.assert_array_equal(loaded(x), np.clip(np.float32(0.2) * x + np.float32(0.5), 0, 1))


# What is refused.


@pytest.mark.usefixtures("quiet")
def test_a_quantized_model(tfmot, tmp_path):
    model = tfmot.quantization.keras.quantize_model(sequential(layers.Dense(3), shape=(4,)))
    with pytest.raises(ValueError, match=r"was quantized by tfmot, .*Bring the float model over.*Received"):
        tfmot_compat.from_tf_keras(model)
    model.save(tmp_path / "quantized.h5")
    with pytest.raises(ValueError, match="was quantized by tfmot"):
        tfmot_compat.from_tf_keras(tmp_path / "quantized.h5")


def test_layers_without_a_counterpart_are_all_named():
    import tensorflow as tf

    inputs = tf_keras.Input((7, 4))
    outputs = layers.LocallyConnected1D(3, 2, name="local")(tf.math.cumsum(inputs))
    outputs = layers.BatchNormalization(axis=[1, 2], name="both")(outputs)
    with pytest.raises(ValueError, match=r"tf\.math\.cumsum.*local: Keras 3 has no Locally.*both: .*one axis"):
        tfmot_compat.from_tf_keras(tf_keras.Model(inputs, outputs))


def test_other_things(tmp_path):
    class Subclassed(tf_keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="Keras 3 model already"):
        tfmot_compat.from_tf_keras(keras.Sequential())
    with pytest.raises(TypeError, match=r"must be a model of tf_keras, or a path. Received: 3"):
        tfmot_compat.from_tf_keras(3)
    with pytest.raises(ValueError, match="subclassed"):
        tfmot_compat.from_tf_keras(Subclassed())
    with pytest.raises(ValueError, match="not built"):
        tfmot_compat.from_tf_keras(tf_keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="no such file"):
        tfmot_compat.from_tf_keras(tmp_path / "none.h5")
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save(tmp_path / "three.keras")
    with pytest.raises(ValueError, match=r"A file of Keras 3 is loaded by keras\.models\.load_model"):
        tfmot_compat.from_tf_keras(tmp_path / "three.keras")


# Isolation.


def test_the_process_is_left_as_it_was(tmp_path):
    """Needs a process of its own: which Keras `tf.keras` is, is settled once."""
    model = small_net()
    model.save(tmp_path / "model.keras")
    program = f"""
        import os, sys
        import keras_squeeze as ks
        assert not {{"tf_keras", "tensorflow_model_optimization", "keras_squeeze.tfmot_compat"}} & sys.modules.keys()
        import numpy as np, keras
        from keras_squeeze import tfmot_compat
        from keras_squeeze.tfmot_compat.isolation import import_tfmot
        assert not {{"tf_keras", "tensorflow_model_optimization"}} & sys.modules.keys()
        model = tfmot_compat.from_tf_keras({str(tmp_path / "model.keras")!r})
        schedule = import_tfmot().sparsity.keras.PolynomialDecay(0.0, 0.5, 0, 3, frequency=1)
        model.compile("sgd", "mse")
        x, y = np.ones((8, 8, 8, 3)), np.ones((8, 5))
        model.fit(x, y, epochs=4, verbose=0, callbacks=[ks.MagnitudePruning(schedule)])
        pruned = tfmot_compat.sparsity.keras.prune_low_magnitude(model, pruning_schedule=schedule)
        pruned.compile("sgd", "mse")
        pruned.fit(x, y, epochs=4, verbose=0, callbacks=[tfmot_compat.sparsity.keras.UpdatePruningStep()])
        import tensorflow as tf
        assert tf.keras.__version__.startswith("3."), tf.keras.__version__
        assert isinstance(model, tf.keras.Model)
        assert "TF_USE_LEGACY_KERAS" not in os.environ
        os.environ["TF_USE_LEGACY_KERAS"] = "0"
        import_tfmot()
        assert os.environ["TF_USE_LEGACY_KERAS"] == "0"
    """
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
