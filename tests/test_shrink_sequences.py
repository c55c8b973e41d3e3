"""Recurrent layers, attention and normalizations lose neurons, and predict what they predicted."""

import keras
import numpy as np
import pytest
import sequence_networks
from random_graphs import predictions, randomize
from sequence_networks import FEATURES, NETWORKS, STEPS

import keras_squeeze as ks

layers = keras.layers


def inputs_of(model, batch=4):
    rng = np.random.default_rng(0)
    shapes = [(batch, *tensor.shape[1:]) for tensor in model.inputs]
    return [
        rng.integers(0, sequence_networks.WORDS, shape) if "int" in tensor.dtype else rng.normal(size=shape)
        for tensor, shape in zip(model.inputs, shapes, strict=True)
    ]


def assert_same(model, small, tolerance=1e-4):
    inputs = [np.asarray(x, t.dtype) for x, t in zip(inputs_of(model), model.inputs, strict=True)]
    for expected, actual in zip(predictions(model, inputs), predictions(small, inputs), strict=True):
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def pruned(model, fraction=0.5, **options):
    randomize(model, 5)
    how = {"criterion": "random", "allocation": "uniform", "round_to": 1, **options}
    return ks.prune_neurons(model, fraction, **how)


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_and_smaller(name, tmp_path):
    model = NETWORKS[name]()
    report = pruned(model)
    small = ks.shrink(model)
    assert_same(model, small)
    assert small.count_params() < 0.75 * model.count_params()
    assert f"leave {small.count_params():,} of {model.count_params():,} parameters" in " ".join(report.notes)
    assert ks.shrink(small).count_params() == small.count_params()
    small.save(tmp_path / "small.keras")
    assert_same(small, keras.models.load_model(tmp_path / "small.keras"), 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("criterion", ["l2", "geometric_median", "apoz", "taylor"])
def test_criteria(name, criterion):
    """Whatever is chosen: each kind of neuron that can go loses some, and none is lost altogether."""
    model = NETWORKS[name]()
    model.compile("sgd", "mse")
    data = (inputs_of(model), np.zeros((4, *model.output_shape[1:])))
    data = (data[0][0] if len(data[0]) == 1 else tuple(data[0]), data[1])
    report = pruned(model, criterion=criterion, data=data)
    assert report.widths
    assert all(0 < after < before for before, after in report.widths.values())
    assert_same(model, ks.shrink(model))


@pytest.mark.parametrize("name", ["LSTM classifier", "transformer, RMS"])
def test_pruned_while_it_trains(name):
    model = NETWORKS[name]()
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    (x,) = inputs_of(model, 64)
    y = np.arange(64) % 3
    model.fit(x, y, epochs=3, batch_size=16, callbacks=[ks.NeuronPruning(0.5, round_to=2)], verbose=0)
    small = ks.shrink(model)
    assert_same(model, small)
    assert small.count_params() < 0.7 * model.count_params()
    small.fit(x, y, verbose=0)


# Recurrent layers by hand.


def test_a_unit_is_a_column_of_every_gate_and_a_row():
    model = NETWORKS["LSTM"]()
    randomize(model, 5)
    lower = model.get_layer("lower")
    kernel, recurrent_kernel, bias = (np.array(w) for w in lower.get_weights())
    gone = [1, 4, 6]
    columns = [gate * 8 + unit for gate in range(4) for unit in gone]
    masked = [kernel.copy(), recurrent_kernel.copy(), bias.copy()]
    for weight in masked:
        weight[..., columns] = 0
    lower.set_weights(masked)
    small = ks.shrink(model)
    kept = [column for column in range(32) if column not in columns]
    rows = [unit for unit in range(8) if unit not in gone]
    expected = kernel[:, kept], recurrent_kernel[rows][:, kept], bias[kept]
    for weight, value in zip(small.get_layer("lower").get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert_same(model, small)


def test_only_the_candidate_must_be_zero():
    """Gates that move do no harm: nothing comes into the state."""
    model = NETWORKS["GRU"]()
    randomize(model, 5)
    lower = model.get_layer("lower")
    weights = [np.array(weight) for weight in lower.get_weights()]
    for weight in weights:
        weight[..., 16 + 3] = 0
    lower.set_weights(weights)
    small = ks.shrink(model)
    assert small.get_layer("lower").units == 7
    assert_same(model, small)


@pytest.mark.parametrize(("activation", "units"), [("tanh", 4), ("sigmoid", 8), ("softplus", 8)])
def test_units_stay_that_do_not_stay_zero(activation, units):
    inputs = keras.Input((STEPS, FEATURES))
    x = layers.LSTM(8, activation=activation, return_sequences=True, name="lstm")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(8, activation="relu")(x)))
    report = pruned(model)
    small = ks.shrink(model)
    assert small.get_layer("lstm").units == units
    assert_same(model, small)
    assert ("lstm" in report.widths) == (units < 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: layers.LSTM(8, stateful=True, name="lstm")(x), "lstm is stateful"),
        (lambda x: layers.GRU(8, activation="softmax", name="gru")(x), "gru (GRU) mixes"),
        (lambda x: layers.RNN(_Cell(8), name="own")(x), "own (RNN) mixes"),
        (lambda x: layers.RNN([layers.GRUCell(4), _BareCell(8)], name="own")(x), "own (RNN) mixes"),
        (lambda x: _OwnLoop(8, name="own")(x), "_OwnLoop has no channel rule"),
        (lambda x: _OwnScores(2, 4, name="own")(x, x), "_OwnScores has no channel rule"),
        (lambda x: layers.LSTM(8, name="lstm")(x, initial_state=[np.ones((2, 8)), np.ones((2, 8))]), "a given state"),
    ],
)
def test_what_is_not_understood_stays(make, words):
    inputs = keras.Input(batch_shape=(2, STEPS, FEATURES))
    x = make(layers.Dense(8, activation="relu", name="before")(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(8, activation="relu", name="after")(x)))
    report = pruned(model)
    assert any(words in reason for _, reason in report.frozen)
    assert "after" in report.widths
    small = ks.shrink(model)
    x = np.random.default_rng(0).normal(size=(2, STEPS, FEATURES)).astype("float32")
    np.testing.assert_allclose(small(x), model(x), atol=1e-5)


class _OwnLoop(layers.LSTM):
    def inner_loop(self, *args, **kwargs):
        return keras.tree.map_structure(lambda tensor: tensor + 1.0, super().inner_loop(*args, **kwargs))


class _OwnScores(layers.MultiHeadAttention):
    def _compute_attention(self, *args, **kwargs):
        output, scores = super()._compute_attention(*args, **kwargs)
        return keras.ops.flip(output + 1.0, -1), scores


class _BareCell(layers.Layer):
    """All that `RNN` asks for, and no more."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, inputs, states):
        output = inputs @ self.kernel + states[0]
        return output, [output]


class _Cell(layers.LSTMCell):
    def call(self, inputs, states, training=False):
        output, states = super().call(inputs, states, training)
        return output + 1.0, states


def test_masking_sees_the_same_steps():
    """A channel that is always 3 says that no step is masked; one that is always the value says nothing."""

    def build(constant):
        inputs = keras.Input((STEPS, FEATURES))
        dense = layers.Dense(4, activation="relu", name="dense")
        x = layers.LSTM(4, return_sequences=True)(layers.Masking(0.0)(dense(inputs)))
        model = keras.Model(inputs, layers.Dense(3, name="head")(x))
        randomize(model, 5)
        kernel, bias = (np.array(weight) for weight in dense.get_weights())
        kernel[:, 1:], bias[1:] = 0, -1
        kernel[:, 2], bias[2] = 0, constant
        bias[0] = -0.5  # now and then all channels are zero, unless one is 3
        dense.set_weights([kernel, bias])
        return model

    for constant in (0.0, 3.0):
        model = build(constant)
        small = ks.shrink(model)
        assert_same(model, small)
        assert small.get_layer("dense").units == (1 if constant == 0.0 else 2)


# Attention by hand.


def test_narrower_keys_leave_the_scores_what_they_are():
    inputs = keras.Input((STEPS, FEATURES))
    attention = layers.MultiHeadAttention(2, 8, name="attention")
    x, scores = attention(inputs, inputs, return_attention_scores=True)
    model = keras.Model(inputs, [x, scores])
    randomize(model, 5)
    for dense in (attention.query_dense, attention.key_dense):
        kernel, bias = (np.array(weight) for weight in dense.get_weights())
        kernel[..., [0, 3, 5]], bias[..., [0, 3, 5]] = 0, 0
        dense.set_weights([kernel, bias])
    small = ks.shrink(model)
    assert small.get_layer("attention").key_dim == 5
    assert small.get_layer("attention").num_heads == 2  # the scores are an output
    assert_same(model, small)
    expected = np.array(attention.query_dense.kernel)[..., [1, 2, 4, 6, 7]] * np.sqrt(5 / 8)
    np.testing.assert_allclose(small.get_layer("attention").query_dense.kernel, expected, rtol=1e-6)


def test_whole_heads_whatever_the_rounding():
    model = NETWORKS["transformer"]()
    report = pruned(model, round_to=8)
    heads = [widths for path, widths in report.widths.items() if path.endswith("/heads")]
    assert heads == [(4, 2), (4, 2)]
    assert all(after % 8 == 0 for path, (_, after) in report.widths.items() if not path.endswith("/heads"))


def test_masks_along_two_axes_meet():
    """Half the heads and half the width of a kernel: three quarters of it are zero."""
    model = NETWORKS["cross attention"]()
    pruned(model)
    query = model.get_layer("cross").query_dense.kernel
    assert np.mean(np.any(np.asarray(query) != 0, axis=0)) == 0.25


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_masks(rank):
    inputs, mask = keras.Input((STEPS, FEATURES)), keras.Input((STEPS,) * 2 if rank == 3 else (2, STEPS, STEPS))
    x = layers.Dense(8, activation="relu", name="before")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x, attention_mask=keras.ops.greater(mask, 0.0))
    model = keras.Model([inputs, mask], layers.Dense(3)(layers.ReLU()(x)))
    report = pruned(model)
    assert ("attention/heads" in report.widths) == (rank == 3)
    assert_same(model, ks.shrink(model))


def test_masked_words_are_passed_over_by_attention():
    words = keras.Input((STEPS,), dtype="int32")
    x = layers.Embedding(sequence_networks.WORDS, 16, mask_zero=True)(words)
    x = layers.MultiHeadAttention(2, 4, name="heads")(x, x)
    x = layers.Attention(name="attention")([layers.Dense(16)(x), x])
    model = keras.Model(words, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    pruned(model)
    small = ks.shrink(model)
    assert_same(model, small)
    assert small.count_params() < 0.5 * model.count_params()


# Normalizations.


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_root_mean_square_normalization_is_exact(epsilon):
    inputs = keras.Input((FEATURES,))
    x = layers.RMSNormalization(epsilon=epsilon, name="norm")(layers.Dense(16, name="before")(inputs))
    model = keras.Model(inputs, layers.Dense(3)(x))
    pruned(model)
    small = ks.shrink(model)
    assert_same(model, small, 1e-6)
    assert small.get_layer("before").units == 8
    assert small.get_layer("norm").epsilon == pytest.approx(2 * epsilon)


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
def test_a_normalization_that_leaves_the_mean_leaves_constants():
    """Over time, each channel on its own: a constant is divided by the root of epsilon, and is not zero."""
    inputs = keras.Input((STEPS, FEATURES))
    dense = layers.Dense(4, activation="relu", name="dense")
    norm = layers.LayerNormalization(axis=1, rms_scaling=True)
    model = keras.Model(inputs, layers.Dense(3, name="head")(norm(dense(inputs))))
    randomize(model, 5)
    kernel, bias = (np.array(weight) for weight in dense.get_weights())
    kernel[:, 1], bias[1] = 0, 2
    dense.set_weights([kernel, bias])
    assert_same(model, ks.shrink(model))


def test_whole_groups_are_normalized_as_before():
    inputs = keras.Input((6, 6, 3))
    x = layers.GroupNormalization(groups=4, name="norm")(layers.Conv2D(16, 3, name="before")(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    report = pruned(model)
    assert report.widths["before"] == (16, 8)
    small = ks.shrink(model)
    assert small.get_layer("norm").groups == 2
    assert_same(model, small)


def test_inexact_is_measured_and_then_so():
    model = NETWORKS["transformer"]()
    (x,) = inputs_of(model, 32)
    report = pruned(model, allow_inexact=True, data=x)
    (note,) = (note for note in report.notes if note.startswith("inexact when shrunk: layer_normalization"))
    assert_same(model, ks.shrink(model))  # exact, as long as nothing else is asked for
    small = ks.shrink(model, allow_inexact=True)
    assert small.count_params() < 0.6 * ks.shrink(model).count_params()
    before, after = (np.asarray(each(x, training=False)) for each in (model, small))
    assert f"up to {np.abs(before - after).max() / np.abs(before).max():.2g} of the largest, on data" in note


def test_inexact_without_data_for_any_length():
    inputs = keras.Input((None, FEATURES), name="x")
    x = layers.LayerNormalization(name="norm")(layers.Dense(8, name="before")(inputs))
    model = keras.Model({"x": inputs}, layers.Dense(3)(layers.GRU(8)(layers.Conv1D(8, 3)(x))))
    report = pruned(model, allow_inexact=True)
    (note,) = (note for note in report.notes if note.startswith("inexact"))
    assert "of the largest, on random inputs" in note
    small = ks.shrink(model, allow_inexact=True)
    assert f"shrink(model, allow_inexact=True) will leave {small.count_params():,} of" in " ".join(report.notes)


# What is promised.


@pytest.mark.parametrize("name", ["transformer", "cross attention", "grouped queries", "grouped queries, one key head"])
def test_the_macs_that_are_promised_are_left(name):
    """Scores and weighted sums, which have no kernel, shrink with heads and widths."""
    model = NETWORKS[name]()
    before = ks.summarize(model).total.macs
    report = pruned(model)
    after = ks.summarize(ks.shrink(model)).total.macs
    assert after < 0.6 * before
    assert f"{after:,} of {before:,} MACs" in " ".join(report.notes)


def test_a_budget_of_macs_is_met():
    model = NETWORKS["grouped queries"]()
    before = ks.summarize(model).total.macs
    randomize(model, 5)
    ks.prune_neurons(
        model, target_macs=0.5, round_to=1, allocation="global"
    )  # one after the other: not many to choose from
    assert 0.4 * before < ks.summarize(ks.shrink(model)).total.macs <= 0.5 * before


# What could go.


@pytest.mark.parametrize("name", ["LSTM classifier", "transformer", "encoder and decoder", "mixer"])
def test_the_overview_counts_what_goes(name):
    """All that is free goes where it is asked for: every kind of neuron keeps one, those that are not free stay."""
    model = NETWORKS[name]()
    overview = ks.prunable_neurons(model)
    report = pruned(model, 0.99, max_layer_fraction=1.0)
    small = ks.prunable_neurons(ks.shrink(model))
    left = {layer.path: layer.neurons for layer in small.layers}
    for layer in overview.layers:
        assert layer.free + sum(layer.kept.values()) == layer.neurons
        assert (layer.path in report.widths) == bool(layer.free)
        assert left[layer.path] >= layer.neurons - layer.free
        assert left[layer.path] == layer.neurons - layer.free + (layer.free > 0) or layer.free < layer.neurons
    assert f"{overview.free:,} of {overview.neurons:,} neurons can be removed" in str(overview)


def test_the_overview_names_what_is_not_known():
    inputs = keras.Input((6, 6, 2))
    x = layers.ConvLSTM1D(4, 3, name="unknown")(layers.Reshape((6, 6, 2))(inputs))
    overview = ks.prunable_neurons(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    assert overview.opaque == {"unknown": "ConvLSTM1D has no channel rule"}
    assert "unknown: not known: ConvLSTM1D has no channel rule" in str(overview)
    model = keras.Sequential([keras.Input((6, 2)), layers.LSTM(8, activation="softmax", name="odd"), layers.Dense(3)])
    assert ks.prunable_neurons(model).opaque == {"odd": "this LSTM mixes channels"}
    with pytest.raises(ValueError, match="odd: this LSTM mixes channels"):
        ks.prune_neurons(model, 0.5)


def test_the_overview_names_what_keeps_neurons():
    overview = ks.prunable_neurons(NETWORKS["transformer"]())
    embedded = next(layer for layer in overview.layers if layer.path == "embedded")
    assert embedded.free == 0
    ((reason, count),) = embedded.kept.items()
    assert count == 16
    assert reason.startswith("layer_normalization normalizes over it")
    assert overview.to_dict()["layers"][0]["path"] == "embedded"
    free = ks.prunable_neurons(NETWORKS["transformer"](), allow_inexact=True)
    assert free.free > overview.free
