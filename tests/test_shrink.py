"""`shrink(m)` predicts what `m` predicts: every kind of layer, every family of models, random graphs."""

import keras
import numpy as np
import pytest
from random_graphs import predictions, random_inputs, random_model, randomize

import keras_squeeze as ks

layers = keras.layers


def assert_same(model, small, inputs, tolerance=1e-4):
    for expected, actual in zip(predictions(model, inputs), predictions(small, inputs), strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def check(model, fraction=0.5, *, smaller=True, **options):
    """Prunes a model with random weights; the shrunk one must predict the same with fewer parameters."""
    randomize(model, seed=5)
    ks.prune_neurons(model, fraction, **{"round_to": 1, "criterion": "random", **options})
    small = ks.shrink(model)
    assert_same(model, small, random_inputs(model))
    assert (small.count_params() < model.count_params()) == smaller
    assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]
    return small


# The laws.

SMALLEST = {
    "VGG16": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "InceptionV3": 75,
    "InceptionResNetV2": 75,
    "Xception": 71,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "DenseNet121": 32,
    "NASNetMobile": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "ConvNeXtTiny": 32,
}


@pytest.mark.parametrize("family", SMALLEST)
def test_the_families_of_keras_applications(family, tmp_path):
    size = SMALLEST[family]
    build = getattr(keras.applications, family)
    options = {"include_top": True, "classifier_activation": None, "classes": 10}
    model = build(weights=None, input_shape=(size, size, 3), **options)
    randomize_statistics(model)
    report = ks.prune_neurons(model, 0.5)
    small = ks.shrink(model)
    images = [np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype("float32")]
    assert_same(model, small, images)
    before, after = ks.summarize(model).total, ks.summarize(small).total
    assert after.parameters < 0.75 * before.parameters
    assert after.macs < 0.75 * before.macs
    assert f"{after.parameters:,} of {before.parameters:,} parameters" in str(report)

    small.save(tmp_path / "small.keras")
    reloaded = keras.models.load_model(tmp_path / "small.keras")
    assert_same(small, reloaded, images, tolerance=1e-6)


def randomize_statistics(model):
    """Keeps the scale of the initial kernels, which the depth of these models needs."""
    rng = np.random.default_rng(1)
    for variable in model.weights:
        name = variable.name.rpartition("/")[2]
        if name in ("gamma", "moving_variance") and len(variable.shape) == 1:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif name in ("beta", "bias", "moving_mean"):
            variable.assign(rng.normal(0, 0.1, variable.shape))


@pytest.mark.parametrize("seed", range(50))
def test_random_graphs(seed):
    model = random_model(seed)
    rng = np.random.default_rng(seed)
    ks.prune_neurons(model, rng.uniform(0.1, 0.9), criterion="random", round_to=int(rng.choice([1, 2, 4])))
    small = ks.shrink(model)
    inputs = random_inputs(model)
    assert_same(model, small, inputs)
    again = ks.shrink(small)
    assert again.count_params() == small.count_params()


# Kinds of graph.


def test_u_net():
    inputs = keras.Input((16, 16, 3))
    skips, x = [], inputs
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        skips.append(x)
        x = layers.MaxPooling2D(2)(x)
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    for filters, skip in ((16, skips[1]), (8, skips[0])):
        x = layers.Conv2DTranspose(filters, 2, strides=2)(x)
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(layers.Concatenate()([x, skip]))
    model = keras.Model(inputs, layers.Conv2D(1, 1)(x))
    small = check(model, allocation="uniform")
    assert small.count_params() < 0.3 * model.count_params()  # half the inputs and half the outputs of nearly all


def test_two_inputs_and_two_outputs():
    a, b = keras.Input((8, 8, 3), name="image"), keras.Input((5,), name="numbers")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(16, 3, activation="relu")(a))
    x = layers.Concatenate()([x, layers.Dense(8, activation="tanh")(b)])
    x = layers.Dense(12, activation="relu")(x)
    model = keras.Model({"image": a, "numbers": b}, {"one": layers.Dense(2)(x), "two": layers.Dense(3)(x)})
    small = ks.shrink(_pruned(model))
    data = {"image": np.ones((2, 8, 8, 3), "float32"), "numbers": np.ones((2, 5), "float32")}
    expected, actual = model(data), small(data)
    assert set(actual) == {"one", "two"}
    for name in expected:
        np.testing.assert_allclose(actual[name].numpy(), expected[name].numpy(), rtol=1e-4, atol=1e-5)


def _pruned(model, fraction=0.5):
    randomize(model, 3)
    ks.prune_neurons(model, fraction, round_to=1)
    return model


def test_a_nested_model_whose_input_becomes_narrower():
    body = keras.Sequential([keras.Input((8, 8, 8)), layers.Conv2D(16, 3), layers.ReLU()], name="body")
    inputs = keras.Input((8, 8, 3))
    x = body(layers.Conv2D(8, 3, padding="same", name="stem")(inputs))
    small = check(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))), allocation="uniform")
    assert small.get_layer("body").input_shape == (None, 8, 8, 4)
    assert small.get_layer("body").layers[0].filters == 8


def test_a_shared_layer_is_shared_afterwards():
    shared = layers.Dense(8, activation="relu", name="shared")
    a, b = keras.Input((6,)), keras.Input((6,))
    model = keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([shared(a), shared(b)])))
    small = check(model)
    assert len(small.get_layer("shared")._inbound_nodes) == 2


def test_a_layer_shared_between_a_model_and_a_nested_one_stays_shared():
    shared = layers.Dense(8, activation="relu", name="shared")
    inner_input = keras.Input((6,))
    inner = keras.Model(inner_input, shared(inner_input), name="inner")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(2)(layers.Add()([inner(inputs), shared(inputs)])))
    small = check(model)
    assert small.get_layer("inner").get_layer("shared") is small.get_layer("shared")


def test_shuffled_groups_are_pruned_evenly():
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(16, 1)(inputs)
    x = layers.Conv2D(16, 3, groups=4, name="grouped")(x)
    x = layers.Reshape((6, 6, 4, 4))(x)
    x = layers.Reshape((6, 6, 16))(layers.Permute((1, 2, 4, 3))(x))
    x = layers.Conv2D(16, 3, groups=4)(x)
    small = check(keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x))))
    assert small.get_layer("grouped").groups == 4


@pytest.mark.parametrize("kind", ["wrapper", "lambda"])
def test_what_has_no_rule_is_left_alone_and_named(kind):
    inputs = keras.Input((6, 4))
    x = layers.Dense(8, name="before")(inputs)
    x = {
        "wrapper": layers.SpectralNormalization(layers.Dense(5), name="opaque"),
        "lambda": layers.Lambda(lambda x: x[..., ::-1], name="opaque"),
    }[kind](x)
    x = layers.Dense(8, activation="relu", name="after")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    randomize(model, 1)
    report = ks.prune_neurons(model, 0.5, round_to=1)
    assert report.widths == {"after": (8, 4)}
    (reason,) = (reason for path, reason in report.frozen if path == "before")
    assert "opaque" in reason
    assert "no channel rule" in reason
    assert_same(model, ks.shrink(model), random_inputs(model))


# What is provably constant.


def test_neurons_that_died_in_training_go():
    """A zero kernel and a negative bias behind a ReLU; a gamma of zero whose beta becomes part of the next bias."""
    inputs = keras.Input((6, 6, 2))
    first = layers.Conv2D(4, 3, activation="relu", name="first")
    norm = layers.BatchNormalization(name="norm")
    x = norm(layers.Conv2D(5, 1, name="second")(first(inputs)))
    model = keras.Model(inputs, layers.Conv2D(3, 3, name="last")(x))
    randomize(model, 2)
    kernel, bias = first.get_weights()
    kernel[..., 1], bias[1] = 0, -0.5
    first.set_weights([kernel, bias])
    norm.gamma.assign(np.where(np.arange(5) == 3, 0, norm.gamma.numpy()))
    small = ks.shrink(model)
    assert (small.get_layer("first").filters, small.get_layer("second").filters) == (3, 4)
    assert_same(model, small, random_inputs(model))


@pytest.mark.parametrize(("padding", "left"), [("valid", 3), ("same", 4)])
def test_a_constant_that_is_not_zero_goes_only_where_the_border_allows(padding, left):
    inputs = keras.Input((6, 6, 2))
    first = layers.Conv2D(4, 3, activation="sigmoid", name="first")
    model = keras.Model(inputs, layers.Conv2D(3, 3, padding=padding)(first(inputs)))
    randomize(model, 2)
    kernel, bias = first.get_weights()
    kernel[..., 2] = 0
    first.set_weights([kernel, bias])
    small = ks.shrink(model)
    assert small.get_layer("first").filters == left
    assert_same(model, small, random_inputs(model))


def test_neurons_that_cannot_be_folded_are_not_offered():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, activation="sigmoid", name="first")(inputs)
    model = keras.Model(inputs, layers.Conv2D(3, 3, padding="same", name="last")(x))
    with pytest.raises(ValueError, match="first: its output is constant but not zero, and last reads it with padding"):
        ks.prune_neurons(model, 0.5)


def test_constants_cascade():
    """Layers behind a layer that is all constant are constant; one neuron of each stays."""
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dense(6, "tanh"), layers.Dense(3)], name="chain"
    )
    randomize(model, 4)
    model.layers[0].kernel.assign(np.zeros((4, 6)))
    small = ks.shrink(model)
    assert [layer.units for layer in small.layers] == [1, 1, 3]
    assert_same(model, small, random_inputs(model))


def test_a_residual_branch_that_is_zero_goes_as_a_whole():
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    branch = layers.Conv2D(32, 3, padding="same", activation="relu", name="inner")(x)
    branch = layers.Conv2D(8, 3, padding="same", name="outer")(branch)
    x = layers.Add(name="add")([x, branch])
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    randomize(model, 1)
    model.compile("adam", "mse")
    data = random_inputs(model, batch=16)[0]
    model.fit(data, np.zeros((16, 2)), verbose=0)
    model.get_layer("outer").set_weights([np.zeros_like(w) for w in model.get_layer("outer").get_weights()])
    small = ks.shrink(model)
    assert {"inner", "outer"}.isdisjoint(layer.name for layer in small.layers)
    assert "add" in {layer.name for layer in small.layers}
    assert_same(model, small, [data])
    small.fit(data, np.zeros((16, 2)), verbose=0)


# What is kept.


def test_names_dtypes_regularizers_flags_and_compilation_are_kept():
    inputs = keras.Input((8, 8, 3), name="picture")
    x = layers.Conv2D(8, 3, kernel_regularizer=keras.regularizers.L2(0.1), kernel_initializer="he_normal", name="c")(
        inputs
    )
    x = layers.BatchNormalization(momentum=0.5, trainable=False, name="n")(x)
    x = layers.Dense(4, dtype="mixed_bfloat16", kernel_constraint="non_neg", name="d")(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Dense(2, name="out")(x), name="whole")
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
    _pruned(model)
    small = ks.shrink(model)
    assert (small.name, small.inputs[0].name) == ("whole", "picture")
    c, n, d = (small.get_layer(name) for name in "cnd")
    assert c.kernel_regularizer.l2 == pytest.approx(0.1)
    assert type(c.kernel_initializer) is keras.initializers.HeNormal
    assert n.momentum == 0.5
    assert not n.trainable
    assert d.dtype_policy.name == "mixed_bfloat16"
    assert type(d.kernel_constraint) is keras.constraints.NonNeg
    assert type(small.optimizer) is keras.optimizers.SGD
    assert small.loss == "mse"
    assert small.get_compile_config()["metrics"] == ["mae"]


def test_an_adapted_normalization_keeps_its_statistics():
    norm = layers.Normalization()
    norm.adapt(np.random.default_rng(0).normal(3, 5, (50, 4)))
    model = keras.Sequential([keras.Input((4,)), norm, layers.Dense(8, "relu"), layers.Dense(2)])
    ks.prune_neurons(model, 0.5, round_to=1)
    assert_same(model, ks.shrink(model), random_inputs(model))


def test_the_model_itself_is_left_as_it_was():
    model = _pruned(random_model(7))
    before = [v.numpy() for v in model.variables]
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    ks.shrink(model)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert nodes == [len(layer._inbound_nodes) for layer in model.layers]


def test_a_model_with_nothing_to_remove_comes_back_the_same():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu"), layers.Dense(3)])
    small = ks.shrink(model)
    assert small is not model
    assert_same(model, small, random_inputs(model), tolerance=0)


def test_a_subclass_with_its_own_training_step_stays_one():
    class Mine(keras.Model):
        def train_step(self, data):
            return {"mine": 1.0}

    inputs = keras.Input((4,))
    model = Mine(inputs, layers.Dense(2)(layers.Dense(8, "relu")(inputs)))
    assert type(ks.shrink(_pruned(model))) is Mine


def test_a_subclass_that_is_made_from_numbers_becomes_a_model():
    class Backbone(keras.Model):
        def __init__(self, width, **kwargs):
            inputs = keras.Input((4,))
            super().__init__(inputs, layers.Dense(2)(layers.Dense(width, "relu")(inputs)), **kwargs)

    model = _pruned(Backbone(8))
    small = ks.shrink(model)
    assert type(small) is keras.Model or type(small).__name__ == "Functional"
    assert_same(model, small, random_inputs(model))


class Wordy(layers.Dense):
    """Its config says more than its constructor takes."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)

    def get_config(self):
        return {**super().get_config(), "doubled": 2 * self.units}


def test_a_layer_whose_config_says_too_much_is_made_again():
    inputs = keras.Input((4,))
    model = _pruned(keras.Model(inputs, layers.Dense(2)(Wordy(8, activation="relu", name="wordy")(inputs))))
    small = ks.shrink(model)
    assert small.get_layer("wordy").units == 4
    assert_same(model, small, random_inputs(model))


# Rules of users.


class Scale(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale


def scale_rule(layer, inputs, graph):
    (x,) = inputs
    graph.follow(layer.scale, 0, x.ids)
    return x.with_constants(x.constants * graph.value(layer.scale, x.ids))


def scaled_model():
    inputs = keras.Input((4,))
    x = Scale(name="scale")(layers.Dense(8, name="before")(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))


def test_a_registered_rule(monkeypatch):
    from keras_squeeze.channel_graph import rules as channel_rules

    monkeypatch.setattr(channel_rules, "_RULES", dict(channel_rules._RULES))
    with pytest.raises(ValueError, match="read by scale: Scale has no channel rule"):
        ks.prune_neurons(scaled_model(), 0.5)
    ks.register_channel_rule(Scale, scale_rule)
    small = check(scaled_model())
    assert small.get_layer("scale").scale.shape == (4,)


def test_bad_rules():
    with pytest.raises(TypeError, match="must be a class of Keras layers"):
        ks.register_channel_rule(Scale(), scale_rule)
    with pytest.raises(TypeError, match="must be a function"):
        ks.register_channel_rule(Scale, "rule")


def test_inexact_only_when_asked_and_said():
    def model():
        inputs = keras.Input((5,))
        x = layers.LayerNormalization(name="norm")(layers.Dense(16, name="before")(inputs))
        x = layers.Dense(8, activation="relu", name="after")(x)
        return keras.Model(inputs, layers.Dense(2)(x))

    report = ks.prune_neurons(model(), 0.5, round_to=1)
    assert set(report.widths) == {"after"}
    assert any(path == "before" and "allow_inexact=True" in reason for path, reason in report.frozen)
    inexact = model()
    report = ks.prune_neurons(inexact, 0.5, allow_inexact=True, round_to=1, allocation="uniform")
    assert any(note.startswith("inexact when shrunk: norm; predictions then change by") for note in report.notes)
    assert report.widths["before"] == (16, 8)


def test_an_operation_with_an_array_for_the_channels_freezes_them():
    """Five channels: as many as the tensor has with which it is tried whether an operation is elementwise."""
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(5, 3, name="before")(inputs)
    x = keras.ops.batch_normalization(x, np.ones(5, "float32"), np.ones(5, "float32"), axis=-1)
    x = layers.Conv2D(8, 1, activation="relu", name="after")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    randomize(model, 1)
    assert set(ks.prune_neurons(model, 0.5, round_to=1).widths) == {"after"}
    assert_same(model, ks.shrink(model), random_inputs(model))


# What looks like something that it is not.


class Reversed(layers.Dense):
    def call(self, x):
        return keras.ops.flip(super().call(x), -1)


class Standardized(layers.Conv1D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - keras.ops.mean(kernel, axis=(0, 1), keepdims=True))


def minus_the_smallest(x):
    return x - keras.ops.min(x, axis=-1, keepdims=True)


TRAPS = {
    "subclass with its own call": lambda x: Reversed(16)(x),
    "subclass with its own convolution": lambda x: Standardized(16, 1)(x),
    "cumsum over channels": lambda x: keras.ops.cumsum(x, axis=-1),
    "cumsum over time": lambda x: keras.ops.cumsum(x, axis=1),
    "triangle": lambda x: keras.ops.triu(x),
    "sparsemax": lambda x: layers.Activation("sparsemax")(x),
    "function that mixes": lambda x: layers.Dense(16, activation=minus_the_smallest)(x),
    "where": lambda x: keras.ops.where(x > 0.5, x, 0.1),
    "power of a number": lambda x: keras.ops.power(2.0, x),
    "roll": lambda x: keras.ops.roll(x, 1, axis=1),
    "dropout in training": lambda x: layers.Dropout(0.0)(x, training=True),
    "batch statistics": lambda x: layers.BatchNormalization()(x, training=True),
    "time distributed norm": lambda x: layers.TimeDistributed(layers.BatchNormalization())(x),
    "time distributed twice": lambda x: layers.TimeDistributed(layers.TimeDistributed(layers.Dense(16)))(
        layers.Reshape((6, 1, 16))(x)
    ),
    "logarithm": lambda x: keras.ops.log(keras.ops.abs(x) + 1.0),
    "repeated": lambda x: layers.RepeatVector(3)(layers.GlobalMaxPooling1D()(x)),
}


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap, activation):
    inputs = keras.Input((6, 5))
    x = TRAPS[trap](layers.Dense(16, activation=activation, name="before")(inputs))
    x = layers.Dense(16, activation="relu", name="after")(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    randomize(model, 3)
    before = model.get_layer("before")
    kernel, bias = before.get_weights()
    kernel[:, :3] = 0  # constant, whatever the graph says of it
    before.set_weights([kernel, bias])
    ks.prune_neurons(model, 0.5, round_to=1)
    assert_same(model, ks.shrink(model), random_inputs(model))


def test_a_reshape_into_the_batch_freezes():
    inputs = keras.Input((6, 12))
    x = keras.ops.reshape(layers.Dense(12, name="before")(inputs), (-1, 12))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(8, name="after")(x)))
    assert set(ks.prune_neurons(model, 0.5, round_to=1).widths) == {"after"}


def test_lora_is_left_alone():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16, name="tuned"), layers.Dense(8), layers.Dense(2)])
    model.get_layer("tuned").enable_lora(2)
    report = ks.prune_neurons(model, 0.5, round_to=1)
    assert ("tuned", "computed by tuned: it has LoRA weights") not in report.frozen  # no neuron of it is known
    assert_same(model, ks.shrink(model), random_inputs(model))


def test_padding_to_an_aspect_ratio_is_no_constant():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, padding="same", activation="sigmoid")(inputs)
    x = layers.GlobalAveragePooling2D()(layers.Resizing(16, 8, pad_to_aspect_ratio=True)(x))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(8)(x)))
    randomize(model, 1)
    ks.prune_neurons(model, 0.5, round_to=1)
    assert_same(model, ks.shrink(model), random_inputs(model))


def test_an_adapted_vocabulary_is_kept():
    lookup = layers.IntegerLookup(output_mode="one_hot")
    lookup.adapt([3, 5, 7])
    inputs = keras.Input((1,), dtype="int64")
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(8)(lookup(inputs))))
    ks.prune_neurons(model, 0.5, round_to=1)
    assert_same(model, ks.shrink(model), [np.array([[3], [7], [9]])])


def test_a_rule_that_returns_nothing_is_named(monkeypatch):
    from keras_squeeze.channel_graph import rules as channel_rules

    monkeypatch.setattr(channel_rules, "_RULES", {**channel_rules._RULES, Scale: lambda layer, inputs, graph: None})
    with pytest.raises(TypeError, match="scale: the channel rule of Scale must return"):
        ks.prune_neurons(scaled_model(), 0.5)
