"""Which weights of which layers are found and selected, and what is said about the others."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from keras_squeeze.introspection import layer_table
from keras_squeeze.introspection.layer_table import mac_formula, register_layer
from keras_squeeze.introspection.selection import CompressibleWeight, check_finite, find_layers, select_layers


def apply_alone(layer, *shape, dtype=None):
    """A model of one layer; attention attends to its own input."""
    x = keras.Input(shape, dtype=dtype)
    attends = isinstance(layer, (layers.MultiHeadAttention, layers.GroupQueryAttention))
    return keras.Model(x, layer(x, x) if attends else layer(x))


def paths(selected):
    return [weight.path for weight in selected.weights]


# The table. Every dimension of a test's weights has another size, so that a shape says which axis is which.

PROJECTIONS = [f"{part}/kernel" for part in ("query", "key", "value", "attention_output")]
SEPARABLE = ["depthwise_kernel", "pointwise_kernel"]


def of_cell(cell):
    return [f"{cell}/kernel", f"{cell}/recurrent_kernel"]


KINDS = {
    "Dense": (lambda: layers.Dense(3), (4,), ["kernel"]),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cd->abd", (4, 3)), (4, 6), ["kernel"]),
    "Conv1D": (lambda: layers.Conv1D(2, 3), (8, 4), ["kernel"]),
    "Conv2D": (lambda: layers.Conv2D(2, 3), (8, 8, 4), ["kernel"]),
    "Conv3D": (lambda: layers.Conv3D(2, 3), (8, 8, 8, 4), ["kernel"]),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(2, 3), (8, 4), ["kernel"]),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(2, 3), (8, 8, 4), ["kernel"]),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(2, 3), (8, 8, 8, 4), ["kernel"]),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3), (8, 4), ["kernel"]),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3), (8, 8, 4), ["kernel"]),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(2, 3), (8, 4), SEPARABLE),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(2, 3), (8, 8, 4), SEPARABLE),
    "Embedding": (lambda: layers.Embedding(5, 3), (4,), ["embeddings"]),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 3), (4, 6), PROJECTIONS),
    "GroupQueryAttention": (lambda: layers.GroupQueryAttention(5, 4, 2), (4, 6), PROJECTIONS),
    "LSTM": (lambda: layers.LSTM(3), (4, 6), of_cell("lstm_cell")),
    "GRU": (lambda: layers.GRU(3), (4, 6), of_cell("gru_cell")),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), (4, 6), of_cell("simple_rnn_cell")),
    "ConvLSTM1D": (lambda: layers.ConvLSTM1D(2, 3), (4, 8, 6), of_cell("conv_lstm_cell")),
    "ConvLSTM2D": (lambda: layers.ConvLSTM2D(2, 3), (4, 8, 8, 6), of_cell("conv_lstm_cell")),
    "ConvLSTM3D": (lambda: layers.ConvLSTM3D(2, 3), (2, 4, 4, 4, 6), of_cell("conv_lstm_cell")),
    "RNN of cells": (
        lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]),
        (4, 6),
        of_cell("stacked_rnn_cells/lstm_cell") + of_cell("stacked_rnn_cells/gru_cell"),
    ),
}
WRAPPED = {
    "Bidirectional": (
        lambda: layers.Bidirectional(layers.LSTM(3)),
        (4, 6),
        of_cell("forward_lstm/lstm_cell") + of_cell("backward_lstm/lstm_cell"),
    ),
    "TimeDistributed Dense": (lambda: layers.TimeDistributed(layers.Dense(3)), (4, 6), ["dense/kernel"]),
    "TimeDistributed Conv2D": (lambda: layers.TimeDistributed(layers.Conv2D(2, 3)), (4, 8, 8, 6), ["conv2d/kernel"]),
    "SpectralNormalization": (lambda: layers.SpectralNormalization(layers.Dense(3)), (6,), ["dense/kernel"]),
}


@pytest.mark.parametrize("kind", [*KINDS, *WRAPPED])
def test_the_weights_of_every_kind_of_layer(kind):
    make, shape, names = {**KINDS, **WRAPPED}[kind]
    layer = make()
    layer.name = "it"
    model = apply_alone(layer, *shape, dtype="int32" if kind == "Embedding" else None)
    found = find_layers(model)
    assert paths(found) == [f"it/{name}" for name in names]
    assert found.unknown == ()
    if kind in KINDS:  # one layer, with the weights of its parts; what a wrapper wraps is a layer of its own
        assert [weight.name for weight in found.layers[0].weights] == names
    trainable = {id(variable): variable for variable in model.trainable_variables}
    for entry in found.layers:
        for weight in entry.weights:
            assert trainable.pop(id(weight.variable)).name == weight.name.split("/")[-1]
            assert weight.path == f"{entry.path}/{weight.name}"
    assert {variable.name for variable in trainable.values()} <= {"bias"}


NO_WEIGHTS_WORTH_IT = [
    layers.BatchNormalization,
    layers.LayerNormalization,
    layers.GroupNormalization,
    layers.RMSNormalization,
    layers.PReLU,
]


@pytest.mark.parametrize("kind", NO_WEIGHTS_WORTH_IT, ids=lambda kind: kind.__name__)
def test_layers_that_are_left_alone_without_a_warning(kind):
    layer = kind(groups=2, name="it") if kind is layers.GroupNormalization else kind(name="it")
    found = find_layers(apply_alone(layer, 4))
    assert (found.layers, found.unknown) == ((), ())
    assert [path for path, _ in found.skipped] == ["it"]
    assert kind.__name__ in found.skipped[0][1]


def test_layers_without_weights_are_not_mentioned():
    found = find_layers(keras.Sequential([keras.Input((4,)), layers.ReLU(), layers.Dropout(0.5), layers.Dense(2)]))
    assert len(found.layers) == 1
    assert found.skipped == ()


# Input axes.


def reaches(layer, kernel, call, index):
    """Which outputs depend on one value of a kernel, where all inputs are one."""
    alone = np.zeros(kernel.shape, "float32")
    alone[tuple(index)] = 1
    kernel.assign(alone)
    return np.asarray(call(layer)) != 0


LINEAR = {
    "Dense": (lambda: layers.Dense(3), (5,)),
    "EinsumDense, last": (lambda: layers.EinsumDense("abc,cde->abde", (4, 3, 2)), (4, 5)),
    "EinsumDense, two axes": (lambda: layers.EinsumDense("abcd,cde->abe", (4, 3)), (4, 2, 5)),
    "EinsumDense, kernel reversed": (lambda: layers.EinsumDense("abc,dc->abd", (4, 3)), (4, 5)),
    "EinsumDense, input in the middle": (lambda: layers.EinsumDense("abc,dce->abde", (4, 3, 2)), (4, 5)),
    "EinsumDense, ellipsis": (lambda: layers.EinsumDense("...c,cd->...d", 3), (4, 5)),
    "EinsumDense, kernel per position": (lambda: layers.EinsumDense("abc,bcd->abd", (4, 3)), (4, 5)),
    "Conv1D": (lambda: layers.Conv1D(3, 2), (8, 5)),
    "Conv2D": (lambda: layers.Conv2D(3, 2), (8, 8, 5)),
    "Conv3D": (lambda: layers.Conv3D(3, 2), (8, 8, 8, 5)),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 2), (8, 5)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 2), (8, 8, 5)),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(3, 2), (4, 4, 4, 5)),
}


def assert_summed_over(layer, weight, shape):
    """All values along the input axis reach the same outputs, and there are as many of them as input features."""

    def call(layer):
        return layer(np.ones((1, *shape), "float32"))

    assert weight.variable.shape[weight.input_axis] == shape[-1]
    index = np.array([size - 1 for size in weight.variable.shape])
    last = reaches(layer, weight.variable, call, index)
    assert last.any()
    for position in range(shape[-1]):
        index[weight.input_axis] = position
        np.testing.assert_array_equal(reaches(layer, weight.variable, call, index), last)


@pytest.mark.parametrize(("make", "shape"), LINEAR.values(), ids=LINEAR)
def test_the_input_axis_is_the_one_that_is_summed_over(make, shape):
    layer = make()
    (weight,) = find_layers(apply_alone(layer, *shape)).weights
    assert_summed_over(layer, weight, shape)


@pytest.mark.parametrize(
    "attention", [lambda: layers.MultiHeadAttention(2, 3), lambda: layers.GroupQueryAttention(3, 4, 2)]
)
def test_the_input_axes_of_attention(attention):
    """The heads' values, the last axis but one of what enters the output projection, are summed over last."""
    layer = attention()
    found = find_layers(apply_alone(layer, 4, 7))
    projections = {part.name: part for part in layer._layers if isinstance(part, layers.EinsumDense)}
    for weight in found.weights:
        projection = projections[weight.name.split("/")[0]]
        enters = (4, *weight.variable.shape[:2]) if projection.name == "attention_output" else (4, 7)
        assert_summed_over(projection, weight, enters)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.LSTM(3), (4, 7)),
        (lambda: layers.GRU(3), (4, 7)),
        (lambda: layers.SimpleRNN(3), (4, 7)),
        (lambda: layers.ConvLSTM2D(3, 2), (4, 5, 5, 7)),
    ],
    ids=["LSTM", "GRU", "SimpleRNN", "ConvLSTM2D"],
)
def test_the_input_axes_of_recurrent_layers(make, shape):
    kernel, recurrent = find_layers(apply_alone(make(), *shape)).weights
    assert kernel.variable.shape[kernel.input_axis] == 7
    assert recurrent.variable.shape[recurrent.input_axis] == 3


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: layers.SeparableConv1D(3, 2), (8, 5)), (lambda: layers.SeparableConv2D(3, 2), (8, 8, 5))],
    ids=["SeparableConv1D", "SeparableConv2D"],
)
def test_the_input_axis_of_a_pointwise_convolution(make, shape):
    layer = make()
    _, pointwise = find_layers(apply_alone(layer, *shape)).weights
    assert_summed_over(layer, pointwise, shape)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (8, 5)),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 5)),
        (lambda: layers.SeparableConv1D(4, 3, depth_multiplier=2), (8, 5)),
        (lambda: layers.SeparableConv2D(4, 3, depth_multiplier=2), (8, 8, 5)),
    ],
    ids=["DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"],
)
def test_the_input_axis_of_a_depthwise_convolution_is_that_of_the_channels(make, shape):
    depthwise = find_layers(apply_alone(make(), *shape)).weights[0]
    assert depthwise.variable.shape[depthwise.input_axis] == 5


def test_the_input_axes_of_both_tables_of_a_reversible_embedding():
    model = apply_alone(layers.ReversibleEmbedding(5, 3, tie_weights=False, name="it"), 4, dtype="int32")
    table, reverse = find_layers(model).weights
    assert table.variable.shape[table.input_axis] == 5  # a row per token: the product with a one-hot vector
    assert reverse.variable.shape[reverse.input_axis] == 3


# Models.


def two_blocks():
    """Two nested models, each with a layer of its own and one that they share."""
    shared = layers.Dense(6, name="shared")
    blocks = []
    for name in ("first", "second"):
        x = keras.Input((6,))
        blocks.append(keras.Model(x, shared(layers.Dense(6, name=f"own_{name}")(x)), name=name))
    x = keras.Input((6,))
    return keras.Model(x, layers.Dense(2, name="head")(blocks[1](blocks[0](x))), name="whole")


def test_nested_models_are_walked_and_a_shared_layer_is_listed_once():
    assert paths(find_layers(two_blocks())) == [
        "first/own_first/kernel",
        "first/shared/kernel",
        "second/own_second/kernel",
        "head/kernel",
    ]


@pytest.mark.parametrize(("block", "own"), [("first", "first/own_first"), ("second", "second/own_second")])
def test_a_shared_layer_is_selected_through_either_of_its_owners(block, own):
    model = two_blocks()
    chosen = select_layers(model, model.get_layer(block))
    assert sorted(paths(chosen)) == sorted([f"{own}/kernel", "first/shared/kernel"])


def test_a_layer_in_a_nested_model_that_is_itself_shared():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="deep")], name="inner")
    first = keras.Sequential([keras.Input((4,)), inner], name="first")
    second = keras.Sequential([keras.Input((4,)), inner], name="second")
    model = keras.Sequential([keras.Input((4,)), first, second])
    assert paths(find_layers(model)) == ["first/inner/deep/kernel"]
    for owner in (first, second, inner, model):
        assert paths(select_layers(model, owner)) == ["first/inner/deep/kernel"]


def test_a_weight_that_two_layers_share_is_listed_once():
    first, second = layers.Dense(4, name="a"), layers.Dense(4, name="b")
    model = keras.Sequential([keras.Input((4,)), first, second])
    second._tracker.unlock()
    second._kernel = first._kernel
    assert paths(find_layers(model)) == ["a/kernel"]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.first = layers.Dense(5, name="first")
        self.rest = [layers.Dense(4, name="second"), layers.LayerNormalization(), layers.Dense(2, name="third")]

    def call(self, x):
        x = self.first(x)
        for layer in self.rest:
            x = layer(x)
        return x


def test_a_subclassed_model_once_it_was_called():
    model = Subclassed()
    with pytest.raises(ValueError, match="'subclassed' is not built"):
        find_layers(model)
    model(np.ones((1, 6)))
    assert paths(find_layers(model)) == ["first/kernel", "second/kernel", "third/kernel"]


@pytest.mark.filterwarnings("ignore:`build:UserWarning")
def test_a_layer_that_no_call_has_reached():
    model = Subclassed()
    model.spare = layers.Dense(3, name="spare")
    model(np.ones((1, 6)))
    assert dict(find_layers(model).skipped)["spare"] == "not built: no call of the model has reached it"


def test_a_sequential_model_without_an_input_is_not_built():
    with pytest.raises(ValueError, match=r"is not built.*keras\.Input\(shape\)"):
        find_layers(keras.Sequential([layers.Dense(2)]))


@pytest.mark.parametrize("thing", [None, "model.keras", layers.Dense(2)])
def test_what_is_no_model(thing):
    with pytest.raises(TypeError, match=r"`model` must be a `keras\.Model`. Received: "):
        find_layers(thing)


def test_another_backend(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"KERAS_BACKEND='jax'.*KERAS_BACKEND=tensorflow"):
        find_layers(keras.Sequential([keras.Input((4,)), layers.Dense(2)]))


# Weights that are stored differently.


def two_dense():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, name="a"), layers.Dense(2, name="b")])


def test_under_lora_the_weight_is_what_is_stored():
    model = two_dense()
    model.get_layer("a").enable_lora(2)
    first, _ = find_layers(model).weights
    assert first.path == "a/kernel"
    assert isinstance(first.variable, keras.Variable)
    before = first.variable.numpy()
    model.get_layer("a").lora_kernel_b.assign(np.ones((2, 3)))
    np.testing.assert_array_equal(first.variable.numpy(), before)
    assert np.any(model.get_layer("a").kernel != before)


def test_lora_freezes_it():
    model = two_dense()
    model.get_layer("a").enable_lora(2)
    chosen = select_layers(model, trainable_only=True)
    assert paths(chosen) == ["b/kernel"]
    assert chosen.skipped == (("a/kernel", "frozen (trainable=False)"),)


def test_integers_are_skipped_with_a_reason():
    model = two_dense()
    model.get_layer("a").quantize("int8")
    found = find_layers(model)
    assert paths(found) == ["b/kernel"]
    assert found.unknown == ()
    ((path, reason),) = found.skipped
    assert path == "a/kernel"
    assert "int8" in reason


def test_frozen_layers_only_where_they_may_be():
    model = two_dense()
    model.get_layer("a").trainable = False
    assert paths(select_layers(model)) == ["a/kernel", "b/kernel"]
    chosen = select_layers(model, trainable_only=True)
    assert paths(chosen) == ["b/kernel"]
    assert chosen.skipped == (("a/kernel", "frozen (trainable=False)"),)
    with pytest.raises(ValueError, match=r"Nothing to compress.*a/kernel: frozen"):
        select_layers(model, "a", trainable_only=True)


# Custom layers.


class Adapter(layers.Layer):
    def build(self, shape):
        self.down = self.add_weight(shape=(shape[-1], 2), name="down")
        self.up = self.add_weight(shape=(2, shape[-1]), name="up")

    def call(self, x):
        return x + x @ self.down @ self.up


class NamedDense(layers.Dense):
    """A subclass that changes nothing."""


@pytest.fixture
def adapted(monkeypatch):
    """A model with a custom layer; what a test registers is forgotten after it."""
    monkeypatch.setattr(layer_table, "_TABLE", dict(layer_table._TABLE))
    return keras.Sequential([keras.Input((4,)), layers.Dense(4, name="dense"), Adapter(name="adapter")])


def test_an_unknown_layer_is_skipped_with_a_reason(adapted):
    found = find_layers(adapted)
    assert paths(found) == ["dense/kernel"]
    assert found.unknown == ("adapter",)
    ((path, reason),) = found.skipped
    assert path == "adapter"
    assert "Adapter is not in the layer table" in reason
    assert "register_layer(Adapter" in reason


def test_only_where_all_layers_are_asked_for_is_an_unknown_one_worth_a_warning(adapted):
    assert select_layers(adapted).unknown == ("adapter",)
    assert select_layers(adapted, "dense").unknown == ()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (["down", "up"], {"down": -2, "up": -2}),
        (("up",), {"up": -2}),
        ("down", {"down": -2}),
        ({"down": 0, "up": 1}, {"down": 0, "up": 1}),
    ],
)
def test_a_registered_layer_is_found(adapted, weights, expected):
    register_layer(Adapter, weights)
    found = find_layers(adapted)
    (entry,) = [entry for entry in found.layers if entry.path == "adapter"]
    assert {weight.name: weight.input_axis for weight in entry.weights} == expected
    assert all(weight.variable is getattr(entry.layer, weight.name) for weight in entry.weights)
    assert found.unknown == ()


def test_a_layer_registered_without_weights_is_left_alone_without_a_warning(adapted):
    register_layer(Adapter, [])
    found = find_layers(adapted)
    assert paths(found) == ["dense/kernel"]
    assert found.unknown == ()
    assert [path for path, _ in found.skipped] == ["adapter"]


def test_a_registered_weight_that_the_layer_does_not_have_is_not_passed_over_in_silence(adapted):
    register_layer(Adapter, ["down", "upp"])
    said = [f"{path}: {reason}" for path, reason in find_layers(adapted).skipped]
    assert any("adapter" in line and "upp" in line for line in said)


def test_a_subclass_is_treated_as_its_base_until_it_is_registered(adapted):
    model = keras.Sequential([keras.Input((4,)), NamedDense(2, name="mine"), layers.Dense(2, name="dense")])
    assert paths(find_layers(model)) == ["mine/kernel", "dense/kernel"]
    register_layer(NamedDense, [])
    assert paths(find_layers(model)) == ["dense/kernel"]


def test_a_registered_mac_formula_is_used(adapted):
    def formula(layer, inputs, outputs):
        return {"down": 1}

    assert mac_formula(adapted.get_layer("adapter")) is None
    register_layer(Adapter, ["down"], macs=formula)
    assert mac_formula(adapted.get_layer("adapter")) is formula


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((dict, ["kernel"]), "`layer_class` must be a subclass of `keras.Layer`. Received: <class 'dict'>"),
        ((layers.Dense(2, name="instance"), ["kernel"]), "Received: <Dense name=instance"),
        ((Adapter, [3]), r"`weights` must be names.*Received: \[3\]"),
    ],
)
def test_bad_registrations(arguments, message):
    table = dict(layer_table._TABLE)
    with pytest.raises(TypeError, match=message):
        register_layer(*arguments)
    assert table == layer_table._TABLE


class WithOwnWeight(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.dense = layers.Dense(3, name="dense")
        self.scale = self.add_weight(shape=(3, 3), name="scale")

    def call(self, x):
        return self.dense(x) @ self.scale


def test_weights_of_the_model_itself_are_unknown():
    model = WithOwnWeight()
    model(np.ones((1, 4)))
    found = find_layers(model)
    assert paths(found) == ["dense/kernel"]
    assert len(found.unknown) == 1
    assert "WithOwnWeight" in found.skipped[0][1]


# `layers=`


def zoo():
    body = keras.Sequential(
        [keras.Input((6, 3)), layers.Conv1D(5, 2, name="conv"), layers.LSTM(4, name="lstm")], name="body"
    )
    return keras.Sequential(
        [
            keras.Input((6, 3)),
            body,
            layers.Dense(4, name="dense_1"),
            layers.BatchNormalization(name="norm"),
            NamedDense(4, name="dense_2"),
            layers.SpectralNormalization(layers.Dense(2, name="inner"), name="wrapper"),
        ],
        name="zoo",
    )


EVERYTHING = ["body/conv", "body/lstm", "dense_1", "dense_2", "wrapper/inner"]


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda model: None, EVERYTHING),
        (lambda model: "dense", ["dense_1", "dense_2"]),
        (lambda model: "^body/", ["body/conv", "body/lstm"]),
        (lambda model: r"(conv|_1)$", ["body/conv", "dense_1"]),
        (lambda model: ["_2$", "lstm"], ["body/lstm", "dense_2"]),
        (lambda model: ("_2$", "nowhere"), ["dense_2"]),
        (lambda model: layers.Conv1D, ["body/conv"]),
        (lambda model: layers.Dense, ["dense_1", "dense_2", "wrapper/inner"]),
        (lambda model: NamedDense, ["dense_2"]),
        (lambda model: (layers.LSTM, NamedDense), ["body/lstm", "dense_2"]),
        (lambda model: [layers.LSTM, NamedDense], ["body/lstm", "dense_2"]),
        (lambda model: layers.SpectralNormalization, ["wrapper/inner"]),
        (lambda model: keras.Sequential, ["body/conv", "body/lstm"]),
        (lambda model: model.get_layer("dense_2"), ["dense_2"]),
        (lambda model: [model.get_layer("dense_2"), model.get_layer("body").layers[0]], ["body/conv", "dense_2"]),
        (lambda model: model.get_layer("wrapper"), ["wrapper/inner"]),
        (lambda model: model.get_layer("wrapper").layer, ["wrapper/inner"]),
        (lambda model: [model.get_layer("body"), model.get_layer("norm")], ["body/conv", "body/lstm"]),
        (lambda model: model, EVERYTHING),
        (lambda model: lambda layer: getattr(layer, "units", 0) == 4, ["body/lstm", "dense_1", "dense_2"]),
        (lambda model: lambda layer: layer.name.startswith("i"), ["wrapper/inner"]),
    ],
)
def test_each_form_of_selection(choose, expected):
    model = zoo()
    chosen = select_layers(model, choose(model))
    assert [entry.path for entry in chosen.layers] == expected


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ("nowhere", ValueError, "'zoo'.*Received: layers='nowhere'.*body/conv, body/lstm, dense_1, dense_2, wrapper"),
        (["nowhere", "never"], ValueError, r"Received: layers=\['nowhere', 'never'\]"),
        ("norm", ValueError, "Skipped: norm: BatchNormalization has no weights worth compressing"),
        (layers.Conv3D, ValueError, "Nothing to compress.*Conv3D"),
        (lambda layer: False, ValueError, "Nothing to compress.*function"),
        ("(", ValueError, r"does not compile.*Received: '\('"),
        (["dense", "[a"], ValueError, r"Received: '\[a'"),
        ([], TypeError, r"`layers` must be None, a regular expression.*Received: \[\]"),
        (3, TypeError, "Received: 3"),
        ([None], TypeError, r"Received: \[None\]"),
        (["dense", layers.Dense], TypeError, "Received: .*'dense'"),
    ],
)
def test_bad_selections(chosen, error, message):
    with pytest.raises(error, match=message):
        select_layers(zoo(), chosen)


def test_layers_of_another_model_are_all_named():
    model, other = zoo(), two_dense()
    with pytest.raises(ValueError, match=r"not in model 'zoo': a, b. Pass layers of this very model"):
        select_layers(model, [other.get_layer("a"), model.get_layer("dense_1"), other.get_layer("b")])


def test_of_many_layers_an_error_lists_only_some():
    model = keras.Sequential([keras.Input((2,)), *[layers.Dense(2, name=f"d{i}") for i in range(13)]])
    with pytest.raises(ValueError, match=re.escape("d8, d9 and 3 more.")):
        select_layers(model, "nowhere")


# Values that are no numbers.


def weight_with(name, *values):
    array = np.ones((3, 3), "float32")
    array.flat[: len(values)] = values
    return CompressibleWeight("kernel", f"{name}/kernel", keras.Variable(array), -2)


def test_finite_weights_pass():
    check_finite([weight_with("a", 0.0, -0.0, 3e38, 3e38), weight_with("b", -3e38, 1e-45)])


def test_every_weight_that_is_not_finite_is_named():
    weights = [
        weight_with("nan", np.nan),
        weight_with("sound", 1.0),
        weight_with("plus", np.inf),
        weight_with("minus", -np.inf),
    ]
    with pytest.raises(ValueError, match=r"in: nan/kernel, plus/kernel, minus/kernel\."):
        check_finite(weights)


def test_infinities_of_both_signs():
    with pytest.raises(ValueError, match=r"in: both/kernel\."):
        check_finite([weight_with("both", np.inf, -np.inf)])
