"""`sensitivity`: every score is that of a copy which was compressed by hand and evaluated by Keras."""

import io
import json
import re
from dataclasses import replace

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_squeeze as ks
from keras_squeeze.evaluation.layer_sensitivity import sensitivity
from keras_squeeze.evaluation.sensitivity_profile import Curve, Sensitivity

FEW = {"sparsities": (0.5, 0.9), "bits": (4, 1), "neurons": (0.5,)}  # what is tried where the values do not matter


@pytest.fixture(scope="module")
def model(digits):
    x, y = digits
    model = networks.small_convnet()
    model.fit(x[:1000], y[:1000], epochs=4, batch_size=32, verbose=0)
    return model


@pytest.fixture(scope="module")
def data(digits):
    return digits[0][1000:1400], digits[1][1000:1400]


@pytest.fixture(scope="module")
def profile(model, data):
    return sensitivity(model, data)


def copy_of(model) -> keras.Model:
    """The same network with the same weights, not compiled."""
    new = type(model).from_config(model.get_config())
    new.set_weights(model.get_weights())
    return new


def compiled(model, **options) -> keras.Model:
    options = {"metrics": ["accuracy"], **options}
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


@pytest.fixture(scope="module")
def judge(model, data):
    """The accuracy that Keras finds for a copy of the module's model: by its weights, so that it compiles once."""
    one = compiled(copy_of(model))

    def accuracy_of(copy) -> float:
        one.set_weights(copy.get_weights())
        return accuracy(one, data)

    return accuracy_of


def accuracy(model, data) -> float:
    return model.evaluate(*data, verbose=0, return_dict=True)["accuracy"]


def on_grid(kernel, bits: int) -> np.ndarray:
    """The grid from its definition: for one bit sign times mean magnitude, else the largest value is the last step."""
    axes = tuple(range(kernel.ndim - 1))
    if bits == 1:
        return np.where(kernel < 0, -1, 1) * np.abs(kernel).mean(axes)
    scale = np.abs(kernel).max(axes) / (2 ** (bits - 1) - 1)
    return np.round(kernel / scale) * scale


def state_of(model) -> list[np.ndarray]:
    return [np.array(v) for v in (*model.variables, *model.metrics_variables, *model.optimizer.variables)]


def assert_same(before, after):
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert one.tobytes() == other.tobytes()


def hand_made(base, direction, **curves) -> Sensitivity:
    """`name="kind: value score, value score"`; the curve of all layers is that of the first."""
    made = []
    for name, text in curves.items():
        kind, points = text.split(": ")
        values, scores = zip(*(map(float, point.split()) for point in points.split(", ")), strict=True)
        made.append(Curve(name, kind, values, scores))
    return Sensitivity("accuracy", direction, base, 10, [*made, replace(made[0], layer="all")])


def test_pruned_layers(model, judge, profile):
    copy = copy_of(model)
    for path in ("conv", "hidden", "logits"):
        assert profile[path]["sparsity"].values == (0.5, 0.7, 0.8, 0.9, 0.95)
        for index, sparsity in ((1, 0.7), (3, 0.9)):
            copy.set_weights(model.get_weights())
            ks.prune_weights(copy, sparsity, layers=f"^{path}$", allocation="uniform")
            assert profile[path]["sparsity"].scores[index] == pytest.approx(judge(copy), abs=1e-6), (path, sparsity)


def test_quantized_layers(model, judge, profile):
    copy = copy_of(model)
    for path in ("conv", "hidden", "logits"):
        for bits, score in zip((8, 4, 3, 2, 1), profile[path]["bits"].scores, strict=True):
            copy.set_weights(model.get_weights())
            kernel = copy.get_layer(path).kernel
            kernel.assign(on_grid(kernel.numpy(), bits))
            assert score == pytest.approx(judge(copy), abs=0.003), (path, bits)


def test_layers_without_some_neurons(model, judge, data, profile):
    copy = copy_of(model)
    for path, index, fraction in (("conv", 0, 0.25), ("conv", 2, 0.75), ("hidden", 1, 0.5)):
        copy.set_weights(model.get_weights())
        ks.prune_neurons(copy, fraction, layers=path, round_to=1, criterion="l2")
        score = profile[path]["neurons"].scores[index]
        assert score == pytest.approx(judge(copy), abs=1e-6), (path, fraction)
    assert accuracy(compiled(ks.shrink(copy)), data) == pytest.approx(score, abs=1e-6)
    assert "neurons" not in profile["logits"]
    assert ("logits", "neurons: output of the model") in profile.skipped


def test_all_layers_at_once(model, judge, profile):
    pruned, quantized, narrow = copy_of(model), copy_of(model), copy_of(model)
    ks.prune_weights(pruned, 0.7, allocation="uniform")
    ks.prune_neurons(narrow, 0.5, round_to=1, allocation="uniform", criterion="l2")
    for layer in ("conv", "hidden", "logits"):
        kernel = quantized.get_layer(layer).kernel
        kernel.assign(on_grid(kernel.numpy(), 2))
    whole = profile["all"]
    assert whole["sparsity"].scores[1] == pytest.approx(judge(pruned), abs=1e-6)
    assert whole["neurons"].scores[1] == pytest.approx(judge(narrow), abs=1e-6)
    assert whole["bits"].scores[3] == pytest.approx(judge(quantized), abs=0.003)


def test_what_else_it_says(model, data, profile):
    assert (profile.metric, profile.direction, profile.examples) == ("accuracy", "max", 400)
    assert profile.base == pytest.approx(accuracy(model, data), abs=1e-6)
    assert profile.base > 0.85
    assert profile.layers == ["conv", "hidden", "logits"]
    assert profile.kinds == ["sparsity", "neurons", "bits"]
    assert profile["conv"]["bits"].values == (8, 4, 3, 2, 1)
    assert ("norm", "BatchNormalization has no weights worth compressing") in profile.skipped
    with pytest.raises(KeyError, match="'none'; there are those of conv, hidden, logits, all"):
        profile["none"]
    assert profile.drop("conv", "sparsity", 0.9) == profile.base - profile["conv"]["sparsity"].scores[3]
    with pytest.raises(ValueError, match=r"was measured at 0\.25, 0\.5, 0\.75\. Received: value=0\.6"):
        profile.drop("conv", "neurons", 0.6)
    with pytest.raises(KeyError, match=r"no curve of 'logits' by neurons; .*output of the model"):
        profile.drop("logits", "neurons", 0.5)


def test_the_model_stays_as_it_is(model, data):
    model.evaluate(data[0][:100], data[1][:100], verbose=0)
    before = state_of(model)
    sensitivity(model, data, **FEW)
    assert_same(before, state_of(model))
    with pytest.raises(ValueError, match="not compiled with this metric"):
        sensitivity(model, data, metric="recall")
    assert_same(before, state_of(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_stays_as_it_is_when_interrupted(model, data, error, monkeypatch):
    before = state_of(model)
    calls = []
    evaluate = model.evaluate

    def interrupted(*args, **kwargs):
        calls.append(1)
        result = evaluate(*args, **kwargs)
        if len(calls) == 6:
            assert any(np.any(one != other) for one, other in zip(before, state_of(model), strict=True))
            raise error("in the middle")
        return result

    monkeypatch.setattr(model, "evaluate", interrupted, raising=False)
    with pytest.raises(error, match="in the middle"):
        sensitivity(model, data)
    assert len(calls) == 6
    monkeypatch.undo()
    assert_same(before, state_of(model))


def test_a_metric_that_raises(model, data):
    """In the middle of the second layer: the weights of the first one were changed and put back by then."""
    copy = copy_of(model)
    calls = []

    def picky(y_true, y_pred):
        calls.append(1)
        if len(calls) > 12:
            raise ArithmeticError("no more")
        return keras.ops.mean(y_pred, axis=-1)

    copy.compile("sgd", "sparse_categorical_crossentropy", metrics=[picky], run_eagerly=True)
    before = [np.array(v) for v in copy.weights]
    import keras_tuner

    with pytest.raises(ArithmeticError, match="no more"):
        sensitivity(copy, data, metric=keras_tuner.Objective("picky", "max"))
    assert len(calls) == 13
    assert_same(before, [np.array(v) for v in copy.weights])


def test_shared_and_nested_layers(digits):
    x, y = digits[0][:300], digits[1][:300]
    inputs = keras.Input((8, 8, 1))
    shared = layers.Dense(64, activation="relu", name="shared")
    block = keras.Sequential([keras.Input((64,)), layers.Dense(24, activation="relu", name="inner")], name="block")
    outputs = layers.Dense(10, activation="softmax", name="last")(block(shared(shared(layers.Flatten()(inputs)))))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=8, verbose=0)
    found = sensitivity(model, (x, y), **FEW)
    assert found.layers == ["shared", "block/inner", "last"]
    assert len([curve for curve in found.curves if curve.kind == "sparsity"]) == 4
    kernel = model.get_layer("shared").kernel
    before = kernel.numpy()
    kernel.assign(np.where(np.abs(before) >= np.sort(np.abs(before), axis=None)[-before.size // 2], before, 0))
    assert found["shared"]["sparsity"].scores[0] == pytest.approx(accuracy(model, (x, y)), abs=1e-6)
    kernel.assign(before)
    ks.prune_neurons(model, 0.5, layers="inner", round_to=1, criterion="l2")
    assert found["block/inner"]["neurons"].scores[0] == pytest.approx(accuracy(model, (x, y)), abs=1e-6)
    assert ("shared", "neurons") not in {(curve.layer, curve.kind) for curve in found.curves}


def test_neurons_that_a_sum_joins_and_groups(digits):
    data = digits[0][:200], digits[1][:200]
    model = networks.residual_convnet()
    alone = sensitivity(model, data, sparsities=(), bits=(), neurons=(0.5,))
    assert alone.layers == ["inner", "hidden"]
    reason = "neurons: they go only together: stem, outer; `groups` can put these together"
    assert [entry for entry in alone.skipped if entry[1] == reason] == [("stem", reason), ("outer", reason)]

    groups = {"sum": "stem|outer", "convolutions": "inner|outer", "dense": "hidden"}
    found = sensitivity(model, data, groups=groups, **FEW)
    assert found.layers == list(groups)
    assert ("logits", "belongs to no group") in found.skipped
    weights = model.get_weights()
    ks.prune_neurons(model, 0.5, layers=["stem", "outer"], round_to=1, criterion="l2")
    assert found["sum"]["neurons"].scores[0] == pytest.approx(accuracy(model, data), abs=1e-6)
    model.set_weights(weights)
    ks.prune_weights(model, 0.5, layers="inner", allocation="uniform")  # `outer` belongs to the first group
    assert found["convolutions"]["sparsity"].scores[0] == pytest.approx(accuracy(model, data), abs=1e-6)
    model.set_weights(weights)
    ks.prune_weights(model, 0.5, layers=["stem", "inner", "outer", "hidden"], allocation="uniform")
    assert found["all"]["sparsity"].scores[0] == pytest.approx(accuracy(model, data), abs=1e-6)

    listed = sensitivity(model, data, groups=["stem|outer", "hidden"], sparsities=(), neurons=(), bits=(2,))
    assert listed.layers == ["stem|outer", "hidden"]
    chosen = sensitivity(model, data, layers=layers.Dense, sparsities=(0.5,), neurons=(), bits=())
    assert chosen.layers == ["hidden", "logits"]
    part = sensitivity(model, data, layers="stem", sparsities=(0.5,), bits=())
    assert "not selected" in dict(part.skipped)["stem"]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.flatten = layers.Flatten()
        self.hidden = layers.Dense(16, activation="relu", name="hidden")
        self.last = layers.Dense(10, name="last")

    def call(self, inputs):
        return self.last(self.hidden(self.flatten(inputs)))


def test_a_subclassed_model(digits):
    x, y = digits[0][:200], digits[1][:200]
    model = Subclassed()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(x, y, epochs=10, verbose=0)
    before = [np.array(v) for v in model.weights]
    found = sensitivity(model, (x, y), **FEW)
    assert_same(before, [np.array(v) for v in model.weights])
    assert found.kinds == ["sparsity", "bits"]
    assert any("subclassed" in reason for path, reason in found.skipped if path == model.name)
    ks.prune_weights(model, 0.9, layers="hidden", allocation="uniform")
    assert found["hidden"]["sparsity"].scores[1] == pytest.approx(accuracy(model, (x, y)), abs=1e-6)


def test_regression(digits):
    """The number itself is to be told, by a network without metrics: its loss is looked at, and less is better."""
    x, y = digits[0][:300].reshape(300, 64), digits[1][:300, None].astype("float32")
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(32, activation="relu", name="one"), layers.Dense(1, name="two")]
    )
    model.compile("adam", "mse")
    model.fit(x, y, epochs=10, verbose=0)
    found = sensitivity(model, (x, y), **FEW)
    assert (found.metric, found.direction) == ("loss", "min")
    ks.prune_weights(model, 0.9, layers="one", allocation="uniform")
    score = model.evaluate(x, y, verbose=0)
    assert found["one"]["sparsity"].scores[1] == pytest.approx(score, rel=1e-4)
    assert found.drop("one", "sparsity", 0.9) == pytest.approx(score - found.base, rel=1e-4)
    assert found.drop("one", "sparsity", 0.9) > 0
    assert found.tolerance("sparsity", 1e9)["one"] == 0.9
    assert "%" not in str(found).splitlines()[3].replace("50%", "").replace("90%", "")


def test_data_of_several_kinds(model, digits):
    x, y = digits[0][:300], digits[1][:300]
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    few = {"sparsities": (0.8,), "bits": (), "neurons": ()}
    expected = sensitivity(model, (x, y), **few)
    assert expected["conv"]["sparsity"].scores[0] < expected.base
    for given in (dataset.batch(33), dataset.batch(300).repeat(), [x, y], (x.tolist(), y.tolist())):
        found = sensitivity(model, given, max_examples=300, **few)
        assert found.examples == 300
        for one, other in zip(found.curves, expected.curves, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-6)
    weights = (y == 3).astype("float32")
    model.evaluate(x, y, sample_weight=weights, verbose=0)
    weighted = sensitivity(model, (x, y, weights), metric="loss", **few)
    only = sensitivity(model, (x[y == 3], y[y == 3]), metric="loss", **few)
    assert weighted.base * len(y) == pytest.approx(only.base * sum(y == 3), rel=1e-4)


def test_shuffled_data_are_read_once(model, digits):
    dataset = tf.data.Dataset.from_tensor_slices(digits).shuffle(1000).batch(50)
    found = sensitivity(model, dataset, sparsities=(0.0,), bits=(), neurons=(), max_examples=120)
    assert found.examples == 120
    assert {curve.scores for curve in found.curves} == {(found.base,)}


def test_examples_are_spread_over_arrays(model, digits):
    x, y = digits
    order = np.argsort(y, kind="stable")
    found = sensitivity(model, (x[order], y[order]), sparsities=(0.5,), bits=(), neurons=(), max_examples=60)
    assert found.examples == 60
    chosen = order[np.linspace(0, len(y) - 1, 60).astype(int)]
    assert set(y[chosen]) == set(range(10))
    assert found.base == pytest.approx(accuracy(model, (x[chosen], y[chosen])), abs=1e-6)
    first = sensitivity(
        model,
        tf.data.Dataset.from_tensor_slices(digits).batch(25),
        sparsities=(0.5,),
        bits=(),
        neurons=(),
        max_examples=60,
    )
    assert first.examples == 60
    assert first.base == pytest.approx(accuracy(model, (x[:60], y[:60])), abs=1e-6)


def test_several_inputs_outputs_and_texts_of_any_length():
    rng = np.random.default_rng(0)
    a, b = keras.Input((None,), name="a", dtype="int32"), keras.Input((4,), name="b")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(20, 8, name="words")(a))
    x = layers.Concatenate()([x, layers.Dense(8, name="dense")(b)])
    outputs = {"one": layers.Dense(3, name="one")(x), "two": layers.Dense(1, name="two")(x)}
    model = keras.Model({"a": a, "b": b}, outputs)
    scc = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", {"one": scc, "two": "mse"}, metrics={"one": ["accuracy"], "two": ["mae"]})
    batches = [
        (
            {"a": rng.integers(0, 20, (10, length)), "b": rng.normal(size=(10, 4))},
            {"one": rng.integers(0, 3, 10), "two": rng.normal(size=(10, 1))},
        )
        for length in (5, 7, 9)
    ]
    dataset = tf.data.Dataset.from_generator(
        lambda: batches,
        output_signature=(
            {"a": tf.TensorSpec((None, None), tf.int32), "b": tf.TensorSpec((None, 4), tf.float32)},
            {"one": tf.TensorSpec((None,), tf.int32), "two": tf.TensorSpec((None, 1), tf.float32)},
        ),
    )
    found = sensitivity(model, dataset, max_examples=24, **FEW)
    assert (found.metric, found.direction, found.examples) == ("one_accuracy", "max", 24)
    other = sensitivity(model, dataset, metric="val_two_mae", **FEW)
    assert (other.metric, other.direction, other.examples) == ("two_mae", "min", 30)
    assert other.layers == ["words", "dense", "one", "two"]
    with pytest.raises(ValueError, match=r"It has loss, .*one_accuracy, .*Received: metric='accuracy'"):
        sensitivity(model, dataset, metric="accuracy", **FEW)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        (keras.metrics.MeanAbsoluteError(name="off"), "min"),
        (keras.metrics.R2Score(), "max"),
        (keras.metrics.CosineSimilarity(name="angle"), "max"),
        ("mae", "min"),
    ],
)
def test_the_direction_of_metrics(metric, direction):
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile(loss="mse", metrics=[metric])
    assert sensitivity(model, (x, x[:, :1]), sparsities=(0.5,), bits=(), neurons=()).direction == direction


def test_a_metric_of_which_nothing_is_known():
    import keras_tuner

    def niceness(y_true, y_pred):
        return keras.ops.mean(y_pred, axis=-1)

    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile(loss="mse", metrics=[niceness])
    few = {"sparsities": (0.5,), "bits": (), "neurons": ()}
    with pytest.raises(ValueError, match=r'metric=keras_tuner\.Objective\(.niceness., "max"\), or "min"\. Received'):
        sensitivity(model, (x, x[:, :1]), **few)
    found = sensitivity(model, (x, x[:, :1]), metric=keras_tuner.Objective("val_niceness", "min"), **few)
    assert (found.metric, found.direction) == ("niceness", "min")


def test_stateful_layers_remember_what_they_did():
    model = keras.Sequential([keras.Input(batch_shape=(10, 5, 3)), layers.LSTM(4, stateful=True, name="lstm")])
    model.compile(loss="mse")
    x = np.random.default_rng(0).normal(size=(10, 5, 3)).astype("float32")
    model(x)
    before = [np.array(state) for state in model.get_layer("lstm").states]
    assert np.any(before[0] != 0)
    sensitivity(model, (x, x[:, 0, :1]), sparsities=(0.5,), bits=(), neurons=())
    assert_same(before, [np.array(state) for state in model.get_layer("lstm").states])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "recall"}, ValueError, "It has accuracy, loss|It has loss, accuracy"),
        ({"metric": 3}, TypeError, "`metric` must be a name.*Received: metric=3"),
        ({"sparsities": (0.5, 1.0)}, ValueError, r"`sparsities` must be in \[0, 1\).*Received"),
        ({"sparsities": (50,)}, ValueError, r"for 50 % pass 0\.5"),
        ({"sparsities": 0.5}, TypeError, r"`sparsities` must be a sequence of numbers.*Received: sparsities=0\.5"),
        ({"neurons": ("half",)}, TypeError, "`neurons` must be a number.*Received: neurons='half'"),
        ({"bits": (8, 0)}, ValueError, r"`bits` must be ints from 1 to 16\. Received: bits=\(8, 0\)"),
        ({"bits": (8, 4.5)}, ValueError, "`bits` must be ints"),
        ({"bits": "8"}, TypeError, "`bits` must be a sequence"),
        ({"sparsities": (), "bits": (), "neurons": ()}, ValueError, "nothing to try"),
        ({"layers": "none"}, ValueError, "selects none of its compressible layers"),
        ({"groups": "conv"}, TypeError, "`groups` must be .*Received: groups='conv'"),
        ({"groups": {}}, TypeError, "`groups` must be"),
        ({"groups": ["conv", "("]}, ValueError, r"does not compile.*Received: '\('"),
        ({"groups": {"a": "conv", "b": "con"}}, ValueError, "no selected layer is left for 'b'.*Received: groups="),
        ({"groups": {"all": "conv"}}, ValueError, "'all' is what all the layers together are called"),
        ({"max_examples": 0}, ValueError, "`max_examples` must be an int, at least 1. Received: max_examples=0"),
    ],
)
def test_bad_arguments(model, data, options, error, message):
    before = state_of(model)
    with pytest.raises(error, match=message):
        sensitivity(model, data, **options)
    assert_same(before, state_of(model))


def test_bad_data_and_models(model, data):
    x, y = data
    with pytest.raises(ValueError, match=r"must be inputs and targets.*Received: inputs alone"):
        sensitivity(model, x)
    with pytest.raises(TypeError, match="so that it can be read again"):
        sensitivity(model, iter([data]))
    with pytest.raises(ValueError, match="different lengths"):
        sensitivity(model, (x, y[:-1]))
    with pytest.raises(ValueError, match="`data` is empty"):
        sensitivity(model, (x[:0], y[:0]))
    with pytest.raises(TypeError, match="must be arrays"):
        sensitivity(model, "digits.npz")
    with pytest.raises(TypeError, match=r"`model` must be a `keras\.Model`"):
        sensitivity("model.keras", data)
    with pytest.raises(ValueError, match=r"is not compiled.*model\.compile\(optimizer, loss, metrics"):
        sensitivity(copy_of(model), data)
    copy = compiled(copy_of(model))
    copy.get_layer("hidden").kernel.assign(np.full((288, 32), np.nan))
    with pytest.raises(ValueError, match="NaN or infinite values in: hidden/kernel"):
        sensitivity(copy, data)
    copy = compiled(copy_of(model))
    copy.get_layer("logits").bias.assign(np.full(10, np.nan))
    with pytest.raises(ValueError, match=r"must be finite\. Received: loss=nan"):
        sensitivity(copy, data, metric="loss")


def test_tolerance_of_hand_made_curves():
    found = hand_made(
        0.9,
        "max",
        a="sparsity: 0.5 0.9, 0.7 0.85, 0.9 0.45",
        b="sparsity: 0.5 0.5, 0.7 0.9, 0.9 0.1",
        c="sparsity: 0.5 0.95, 0.7 0.9, 0.9 0.89",
    )
    assert found.tolerance("sparsity", 0) == {"a": 0.5, "b": 0.0, "c": 0.7}
    assert found.tolerance("sparsity", 0.02) == pytest.approx({"a": 0.58, "b": 0.025, "c": 0.9})
    assert found.tolerance("sparsity", 0.25) == pytest.approx({"a": 0.8, "b": 0.3125, "c": 0.9})
    assert found.tolerance("sparsity", 0.4) == pytest.approx({"a": 0.7 + 0.2 * 0.35 / 0.4, "b": 0.7, "c": 0.9})
    assert found.tolerance("sparsity", 1) == {"a": 0.9, "b": 0.9, "c": 0.9}
    assert found.most_sensitive("sparsity") == ["b", "a", "c"]

    found = hand_made(1.0, "min", a="bits: 8 1.0, 4 1.5, 2 1.2, 1 9", b="bits: 8 1.1, 4 1.1, 2 1.1, 1 nan")
    assert found.tolerance("bits", 0) == {"a": 8, "b": None}
    assert found.tolerance("bits", 0.3) == {"a": 8, "b": 2}  # at 4 bits `a` is worse than at 2
    assert found.tolerance("bits", 0.5) == {"a": 2, "b": 2}
    assert found.tolerance("bits", 100) == {"a": 1, "b": 2}
    assert found.most_sensitive("bits") == ["b", "a"]
    for bad in (-0.1, "1", True, float("nan")):
        with pytest.raises(ValueError, match="`max_drop` must be a number, at least 0"):
            found.tolerance("bits", bad)
    with pytest.raises(ValueError, match=r"`kind` must be one of 'bits'\. Received: kind='sparsity'"):
        found.tolerance("sparsity", 0.1)


def test_tolerance_grows_with_the_drop_and_makes_a_recipe(model, judge, profile):
    for kind, sign in (("sparsity", 1), ("neurons", 1), ("bits", -1)):
        steps = [profile.tolerance(kind, drop) for drop in np.linspace(0, 1, 30)]
        for layer in steps[0]:
            values = [sign * (step[layer] if step[layer] is not None else 32) for step in steps]
            assert values == sorted(values)
    recipe = {f"^{re.escape(path)}$": part for path, part in profile.tolerance("sparsity", 0.01).items()}
    copy = copy_of(model)
    ks.prune_weights(copy, recipe, allocation="uniform")
    assert profile.base - judge(copy) < 0.1
    assert ks.summarize(copy).total.sparsity > 0.2


def test_it_can_be_written_down(profile):
    content = json.loads(profile.to_json())
    assert Sensitivity.from_dict(content) == profile
    assert content == profile.to_dict()
    frame = profile.to_dataframe()
    assert len(frame) == 4 * 10 + 3 * 3
    row = frame[(frame.layer == "conv") & (frame.kind == "bits") & (frame.value == 2)].iloc[0]
    assert row["accuracy"] == profile["conv"]["bits"].scores[3]
    assert row["drop"] == profile.drop("conv", "bits", 2)
    lost = hand_made(1.0, "min", a="sparsity: 0.5 2, 0.9 inf")
    text = lost.to_json()
    json.loads(text, parse_constant=pytest.fail)  # neither NaN nor Infinity
    assert Sensitivity.from_dict(json.loads(text)).drop("a", "sparsity", 0.9) == float("inf")
    with pytest.raises(ValueError, match=r"not what `Sensitivity\.to_dict` gives.*Received"):
        Sensitivity.from_dict({"metric": "loss"})


def test_it_can_be_shown(profile):
    text = str(profile)
    assert text.count("accuracy, ") == 3
    line = next(line for line in text.splitlines() if line.split()[:1] == ["conv"])
    assert line.split()[1:] == [f"{score:.1%}" for score in profile["conv"]["sparsity"].scores]
    assert "1 bit" in text
    assert f"accuracy of 400 examples: {profile.base:.1%} as it is" in text
    assert "output of the model" in text
    assert max(map(len, text.splitlines())) <= 120
    assert text.isascii()
    assert profile._repr_html_().count("<tr>") == 3 * 2 + 3 + 3 + 2

    from rich.console import Console

    console = Console(width=60, record=True, file=io.StringIO())
    console.print(profile)
    assert "hidden" in console.export_text()


def test_the_picture(profile, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = profile.plot(tmp_path / "lines.svg").read_text()
        assert all(f">{name}<" in svg for name in ("all", "conv", "hidden", "logits", "accuracy"))
        assert all(
            f">{title}<" in svg for title in ("sparsity of the weights", "neurons removed", "bits of the weights")
        )
        many = {f"layer_{index}": "sparsity: 0.5 0.9, 0.9 0.3" for index in range(12)}
        many["other"] = "bits: 8 0.9, 2 nan"
        found = hand_made(0.9, "max", **many)
        svg = found.plot(tmp_path / "heat.svg").read_text()
    assert all(f">layer_{index}<" in svg for index in range(12))
    assert svg.count(">30.0%<") == 13
    assert profile.plot(tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")
    diverged = hand_made(
        0.1, "min", a="bits: 8 3, 4 nan, 1 inf", **{f"b{i}": "bits: 8 nan, 4 nan, 1 inf" for i in "12"}
    )
    assert diverged.plot(tmp_path / "diverged.png").stat().st_size > 1000
    worse = hand_made(0.1, "min", a="neurons: 0.5 3, 0.9 40000")
    assert worse.plot(tmp_path / "log.png").stat().st_size > 1000
