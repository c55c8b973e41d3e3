"""Multiply-accumulates against arithmetic by hand, against a slow count of products, and TensorFlow's profiler."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_squeeze as ks


def macs(model, **options) -> int:
    report = ks.summarize(model, **options)
    assert report.total.macs is not None, report.notes
    assert report.total.macs == report.total.effective_macs  # nothing is zero in a new model
    return report.total.macs


def by_path(model, **options) -> dict[str, int]:
    return {layer.path: layer.macs for layer in ks.summarize(model, **options).layers}


def one_layer(shape, layer) -> keras.Model:
    return keras.Sequential([keras.Input(shape), layer])


def run_operations(model, shapes) -> dict[str, int]:
    """Float operations by kind as TensorFlow's own profiler counts them, for a batch of one."""
    specs = [tf.TensorSpec((1, *shape)) for shape in shapes]
    inference = tf.function(lambda *x: model(x[0] if len(x) == 1 else list(x), training=False), autograph=False)
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options.update(output="none", order_by="float_ops")
    node = tf.compat.v1.profiler.profile(inference.get_concrete_function(*specs).graph, cmd="op", options=options)
    found = {}
    while node.children:
        node = node.children[0]
        found[node.name] = node.float_ops
    return found


# Sizes that are all different, so that a formula that mixes two of them up is found out.
CASES = {
    "dense": (lambda: one_layer((5,), layers.Dense(3)), 5 * 3),
    "dense on a sequence": (lambda: one_layer((7, 5), layers.Dense(3)), 7 * 5 * 3),
    "einsum": (lambda: one_layer((7, 5), layers.EinsumDense("abc,cde->abde", (7, 2, 3))), 7 * 5 * 2 * 3),
    "einsum with dots": (lambda: one_layer((7, 4, 5), layers.EinsumDense("...x,xy->...y", 3)), 7 * 4 * 5 * 3),
    "einsum over two axes": (lambda: one_layer((7, 4, 5), layers.EinsumDense("abcd,cde->abe", (7, 3))), 7 * 4 * 5 * 3),
    "einsum per position": (lambda: one_layer((7, 5), layers.EinsumDense("abc,bcd->abd", (7, 3))), 7 * 5 * 3),
    # (9 - 4) // 2 + 1 = 3 positions
    "conv1d valid strides": (lambda: one_layer((9, 5), layers.Conv1D(6, 4, strides=2)), 3 * 4 * 5 * 6),
    "conv1d causal": (lambda: one_layer((9, 5), layers.Conv1D(6, 4, padding="causal")), 9 * 4 * 5 * 6),
    # dilation 2 widens a kernel of 3 to 5: 9 - 5 + 1 = 5 positions
    "conv1d dilated": (lambda: one_layer((9, 5), layers.Conv1D(6, 3, dilation_rate=2)), 5 * 3 * 5 * 6),
    # ceil(9 / 2) = 5 rows, ceil(7 / 2) = 4 columns
    "conv2d same": (
        lambda: one_layer((9, 7, 5), layers.Conv2D(6, (3, 2), strides=2, padding="same")),
        (5 * 4) * (3 * 2) * 5 * 6,
    ),
    # every filter sees 6 // 3 channels
    "conv2d groups": (lambda: one_layer((9, 7, 6), layers.Conv2D(12, 3, groups=3)), (7 * 5) * (3 * 3) * (6 // 3) * 12),
    "conv3d": (lambda: one_layer((5, 6, 7, 2), layers.Conv3D(3, 2)), (4 * 5 * 6) * (2 * 2 * 2) * 2 * 3),
    # transposed: every input position spreads the whole kernel
    "conv1d transpose": (lambda: one_layer((9, 5), layers.Conv1DTranspose(6, 4, strides=3)), 9 * 4 * 5 * 6),
    "conv2d transpose": (
        lambda: one_layer((4, 3, 5), layers.Conv2DTranspose(6, 2, strides=2, padding="same")),
        (4 * 3) * (2 * 2) * 5 * 6,
    ),
    "conv3d transpose": (
        lambda: one_layer((4, 3, 2, 5), layers.Conv3DTranspose(6, 2)),
        (4 * 3 * 2) * (2 * 2 * 2) * 5 * 6,
    ),
    "depthwise1d": (lambda: one_layer((9, 5), layers.DepthwiseConv1D(4, depth_multiplier=2)), 6 * 4 * 5 * 2),
    "depthwise2d": (
        lambda: one_layer((9, 7, 5), layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2)),
        (4 * 3) * (3 * 3) * 5 * 2,
    ),
    "separable1d": (
        lambda: one_layer((9, 5), layers.SeparableConv1D(6, 4, depth_multiplier=2)),
        6 * 4 * 5 * 2 + 6 * (5 * 2) * 6,
    ),
    "separable2d": (
        lambda: one_layer((9, 7, 5), layers.SeparableConv2D(6, 3, strides=2, padding="same")),
        (5 * 4) * (3 * 3) * 5 + (5 * 4) * 5 * 6,
    ),
    "embedding": (lambda: one_layer((9,), layers.Embedding(20, 4)), 0),
    # four gates, three gates, one; each multiplies the input and the state at every one of 7 steps
    "lstm": (lambda: one_layer((7, 5), layers.LSTM(3)), 7 * 4 * (5 + 3) * 3),
    "gru": (lambda: one_layer((7, 5), layers.GRU(3, return_sequences=True)), 7 * 3 * (5 + 3) * 3),
    "simple rnn": (lambda: one_layer((7, 5), layers.SimpleRNN(3, unroll=True)), 7 * (5 + 3) * 3),
    "stacked cells": (
        lambda: one_layer((7, 5), layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)])),
        7 * (4 * (5 + 3) * 3 + 3 * (3 + 2) * 2),
    ),
    "one step of a cell": (lambda: keras.Model(*cell_step()), 4 * (5 + 3) * 3),
    "bidirectional": (
        lambda: one_layer((7, 5), layers.Bidirectional(layers.LSTM(3, return_sequences=True))),
        2 * 7 * 4 * (5 + 3) * 3,
    ),
    "time distributed": (
        lambda: one_layer((4, 9, 7, 5), layers.TimeDistributed(layers.Conv2D(6, 3))),
        4 * (7 * 5) * (3 * 3) * 5 * 6,
    ),
    # the state has the size of the output, 7 x 5; both convolutions are computed there, for four gates
    "conv lstm 2d": (
        lambda: one_layer((4, 9, 7, 5), layers.ConvLSTM2D(2, 3)),
        4 * (7 * 5) * 4 * ((3 * 3) * 5 * 2 + (3 * 3) * 2 * 2),
    ),
    "conv lstm 1d sequences": (
        lambda: one_layer((4, 9, 5), layers.ConvLSTM1D(2, 3, padding="same", return_sequences=True)),
        4 * 9 * 4 * (3 * 5 * 2 + 3 * 2 * 2),
    ),
}


def cell_step():
    inputs = keras.Input((5,))
    states = [keras.ops.zeros_like(inputs[:, :3])] * 2
    return inputs, layers.LSTMCell(3)(inputs, states)[0]


@pytest.mark.parametrize("case", CASES)
def test_macs_by_hand(case):
    make, expected = CASES[case]
    assert macs(make()) == expected


def test_self_attention():
    steps, width, heads, key, value = 7, 10, 2, 3, 4
    inputs = keras.Input((steps, width))
    attention = layers.MultiHeadAttention(heads, key, value_dim=value)
    projections = steps * width * heads * (key + key + value) + steps * (heads * value) * width
    scores_and_sum = heads * steps * steps * (key + value)
    assert macs(keras.Model(inputs, attention(inputs, inputs))) == projections + scores_and_sum


@pytest.mark.parametrize("keywords", [False, True])
def test_cross_attention_of_three_inputs(keywords):
    long, short, heads, key, value, out = 7, 4, 2, 3, 5, 6
    query_width, key_width, value_width = 10, 8, 9
    q, v, k = (
        keras.Input(shape, name=name)
        for name, shape in (("q", (long, query_width)), ("v", (short, value_width)), ("k", (short, key_width)))
    )
    attention = layers.MultiHeadAttention(heads, key, value_dim=value, output_shape=out)
    outputs = attention(key=k, value=v, query=q) if keywords else attention(q, v, k)
    by_hand = (
        long * query_width * heads * key
        + short * key_width * heads * key
        + short * value_width * heads * value
        + heads * long * short * (key + value)
        + long * heads * value * out
    )
    assert macs(keras.Model([q, v, k], outputs)) == by_hand


def test_attention_along_one_of_two_axes():
    rows, columns, width, heads, key = 5, 7, 6, 2, 3
    inputs = keras.Input((rows, columns, width))
    attention = layers.MultiHeadAttention(heads, key, attention_axes=2)
    projections = 4 * rows * columns * width * heads * key
    assert macs(keras.Model(inputs, attention(inputs, inputs))) == projections + rows * heads * columns**2 * 2 * key


def test_attention_on_masked_text():
    tokens, width, heads, key = 6, 8, 2, 3
    inputs = keras.Input((tokens,), dtype="int32")
    x = layers.Embedding(20, width, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.MultiHeadAttention(heads, key)(x, x))
    assert macs(model) == 4 * tokens * width * heads * key + heads * tokens**2 * 2 * key


def test_grouped_query_attention():
    long, short, width, head, heads, groups = 7, 4, 10, 3, 6, 2
    query, value = keras.Input((long, width)), keras.Input((short, width))
    outputs = layers.GroupQueryAttention(head, heads, groups)(query, value)
    projections = 2 * long * width * heads * head + 2 * short * width * groups * head
    assert macs(keras.Model([query, value], outputs)) == projections + heads * long * short * 2 * head


@pytest.mark.skipif(not hasattr(layers, "ReversibleEmbedding"), reason="newer Keras")
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_projects_back_onto_its_vocabulary(tied):
    tokens, vocabulary, width = 6, 20, 4
    inputs = keras.Input((tokens,), dtype="int32")
    embedding = layers.ReversibleEmbedding(vocabulary, width, tie_weights=tied)
    model = keras.Model(inputs, embedding(embedding(inputs), reverse=True))
    assert macs(model) == tokens * width * vocabulary
    assert ks.summarize(model).notes == []


def test_words_folded_into_the_batch():
    """The first axis of a layer inside a model is not always a batch of one."""
    words, letters, width, units = 5, 7, 4, 3
    inputs = keras.Input((words, letters, width))
    x = keras.ops.reshape(inputs, (-1, letters, width))
    model = keras.Model(inputs, layers.LSTM(units)(x))
    assert macs(model) == words * letters * 4 * (width + units) * units


def test_a_shared_layer_counts_every_call_and_its_weights_once():
    shared = layers.Dense(4, name="shared")
    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], shared(shared(a)) + shared(b))
    (layer,) = ks.summarize(model).layers
    assert layer.macs == 3 * 4 * 4
    assert layer.parameters == 4 * 4 + 4


def test_a_nested_model_called_twice():
    inner = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(2, 3, name="conv"), layers.Flatten()], name="inner")
    a, b = keras.Input((6, 6, 3), name="a"), keras.Input((6, 6, 3), name="b")
    joined = layers.Concatenate()([inner(a), inner(b)])
    model = keras.Model({"a": a, "b": b}, layers.Dense(5, name="head")(joined))
    convolution = (4 * 4) * (3 * 3) * 3 * 2
    assert by_path(model) == {"inner/conv": 2 * convolution, "head": 2 * (4 * 4 * 2) * 5}


class Tied(layers.Dense):
    """Multiplies by the kernel of another layer."""

    def __init__(self, other, **kwargs):
        super().__init__(other.units, **kwargs)
        self._other = lambda: other

    def build(self, shape):
        self._kernel, self.bias = self._other().kernel, None


def test_two_layers_with_one_kernel():
    inputs = keras.Input((4,))
    first = layers.Dense(4, name="first")
    model = keras.Model(inputs, Tied(first, name="second")(first(inputs)))
    report = ks.summarize(model)
    assert [(layer.path, layer.macs) for layer in report.layers] == [("first", 4 * 4), ("second", 4 * 4)]
    assert [layer.parameters for layer in report.layers] == [4 * 4 + 4, 0]
    assert report.total.parameters == model.count_params()
    first.kernel.assign(np.tri(4))
    assert ks.summarize(model).total.effective_macs == 2 * 10  # of 16


def test_inputs_in_a_dict_of_other_types():
    text, table = keras.Input((6,), dtype="int32", name="text"), keras.Input((3,), name="table")
    x = layers.Flatten()(layers.Embedding(20, 4)(text))
    model = keras.Model({"text": text, "table": table}, layers.Dense(2)(layers.Concatenate()([x, table])))
    assert macs(model) == (6 * 4 + 3) * 2


def test_text_that_is_cut_into_tokens_in_the_model():
    cut = layers.TextVectorization(output_sequence_length=6, vocabulary=["a", "b"])
    model = keras.Sequential(
        [keras.Input((), dtype="string"), cut, layers.Embedding(4, 5), layers.Flatten(), layers.Dense(2)]
    )
    assert macs(model) == 6 * 5 * 2


class Subclassed(keras.Model):
    """Calls one layer twice, through a list that Keras tracks."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(4, name="a"), layers.Dense(4, name="b")]

    def call(self, x):
        return self.blocks[0](self.blocks[1](self.blocks[0](x)))


def test_a_subclassed_model_is_counted_for_what_it_was_built_with():
    model = Subclassed()
    model(np.ones((32, 4), "float32"))
    assert by_path(model) == {"a": 2 * 4 * 4, "b": 4 * 4}
    assert by_path(model, input_shape=(7, 4)) == {"a": 2 * 7 * 4 * 4, "b": 7 * 4 * 4}


class Reader(keras.Model):
    """Takes integers, which it does not say anywhere."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(9, 4)
        self.read = layers.LSTM(3, stateful=True)

    def call(self, tokens):
        return self.read(self.embed(keras.ops.bitwise_and(tokens, 7)))


def test_a_subclassed_model_of_integers_with_a_state():
    model = Reader()
    model(np.ones((6, 5), "int32"))
    before = [variable.numpy() for variable in model.variables]
    assert macs(model, input_shape=(5,)) == 5 * 4 * (4 + 3) * 3
    assert all(np.array_equal(a, b) for a, b in zip(before, [v.numpy() for v in model.variables], strict=True))


class MoreInTraining(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.always, self.auxiliary = layers.Dense(3, name="always"), layers.Dense(3, name="auxiliary")

    def build(self, shape):
        self.always.build(shape)
        self.auxiliary.build(shape)

    def call(self, x, training=False):
        return self.always(x) + self.auxiliary(x) if training else self.always(x)


def test_what_is_counted_is_inference():
    assert macs(one_layer((4,), MoreInTraining())) == 4 * 3


class TwoArguments(keras.Model):
    def __init__(self):
        super().__init__()
        self.left, self.right = layers.Dense(3, name="left"), layers.Dense(3, name="right")

    def call(self, a, b):
        return self.left(a) + self.right(b)


@pytest.mark.parametrize("shape", [[(4,), (7,)], ((4,), (7,)), {"b": (7,), "a": (4,)}])
def test_a_subclassed_model_of_two_arguments(shape):
    model = TwoArguments()
    model(np.ones((2, 4)), np.ones((2, 7)))
    assert by_path(model, input_shape=shape) == {"left": 4 * 3, "right": 7 * 3}
    report = ks.summarize(model)  # Keras keeps the first argument's shape only
    assert report.total.macs is None
    assert "`input_shape=`" in report.notes[0]


@pytest.mark.parametrize(("shape", "steps"), [(5, 5), (None, 9)], ids=["length known", "length given"])
def test_a_stateful_model_has_a_batch_of_its_own(shape, steps):
    inputs = keras.Input((shape, 4), batch_size=6)
    x = layers.LSTM(3, stateful=True, return_sequences=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2)(x))
    assert macs(model, input_shape=(steps, 4)) == steps * 4 * (4 + 3) * 3 + steps * 3 * 2


def test_an_open_size_needs_an_input_shape():
    model = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 3, padding="same")])
    report = ks.summarize(model)
    assert report.total.macs is report.total.effective_macs is report.layers[0].macs is None
    assert "has shape (None, None, 3)" in str(report)
    assert "`input_shape=`" in str(report)
    assert macs(model, input_shape=(8, 6, 3)) == (8 * 6) * (3 * 3) * 3 * 4


@pytest.mark.parametrize("shape", [784, "x", int, (0,), (-4,), (None,), (True,), (4.0,), [(4,), "x"], {"a": None}])
def test_an_input_shape_that_is_none(shape):
    with pytest.raises(ValueError, match=r"must be the shape of one example without the batch.*Received: input_shape="):
        ks.summarize(one_layer((4,), layers.Dense(3)), input_shape=shape)


@pytest.mark.parametrize("shape", [(5,), (4, 4), (), [(4,), (4,)], {"other": (4,)}, [[(4,)]]])
def test_an_input_shape_of_another_model(shape):
    with pytest.raises(ValueError, match=r"does not fit this model's inputs.*: \(4,\)\. Received: input_shape="):
        ks.summarize(one_layer((4,), layers.Dense(3)), input_shape=shape)


def test_input_shapes_by_name_and_in_order():
    a, b = keras.Input((None, 4), name="a"), keras.Input((None, 4), name="b")
    model = keras.Model([a, b], [layers.Dense(3, name="left")(a), layers.Dense(2, name="right")(b)])
    expected = {"left": 5 * 4 * 3, "right": 6 * 4 * 2}
    assert by_path(model, input_shape=[(5, 4), (6, 4)]) == expected
    assert by_path(model, input_shape={"b": (6, 4), "a": (5, 4)}) == expected


@keras.saving.register_keras_serializable("test_macs")
class Scaled(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1], 2), name="scale", initializer="ones")

    def call(self, x):
        return keras.ops.matmul(x, self.scale)


class ScaledCounted(Scaled):
    """Registered with a formula."""


class ScaledWrong(Scaled):
    """Registered with a formula that raises."""


ks.register_layer(Scaled, ["scale"])
ks.register_layer(ScaledCounted, ["scale"], macs=lambda layer, inputs, outputs: {"scale": inputs[0][-1] * 2})
ks.register_layer(ScaledWrong, ["scale"], macs=lambda layer, inputs, outputs: {"scale": inputs[1]})


def test_custom_layers():
    model = keras.Sequential([keras.Input((4,)), ScaledCounted(name="counted")])
    assert macs(model) == 4 * 2
    report = ks.summarize(keras.Sequential([keras.Input((4,)), Scaled(name="plain")]))
    assert report.total.macs == 0
    assert report.notes == ["no MAC formula: plain"]
    report = ks.summarize(keras.Sequential([keras.Input((4,)), ScaledWrong(name="wrong")]))
    assert report.total.macs == 0
    assert report.notes == ["MACs not counted: wrong: IndexError: list index out of range"]


class MinimalCell(keras.layers.Layer):
    """The recurrent cell of Keras's own guide."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(self.units, self.units), name="recurrent_kernel")

    def call(self, inputs, states):
        state = keras.ops.matmul(inputs, self.kernel) + keras.ops.matmul(states[0], self.recurrent_kernel)
        return state, [state]


def test_a_recurrent_layer_around_a_custom_cell():
    assert macs(one_layer((7, 5), layers.RNN(MinimalCell(3)))) == 7 * (5 + 3) * 3


def test_a_model_that_cannot_be_traced_is_no_error():
    class Picky(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            if tf.is_symbolic_tensor(x):
                raise RuntimeError("eager only")
            return self.dense(x)

        def build(self, shape):
            self.dense.build(shape)

    model = Picky()
    model(np.ones((3, 4)))
    report = ks.summarize(model)
    assert report.total.macs is None
    assert report.total.parameters == 4 * 2 + 2
    assert "RuntimeError" in report.notes[0]
    assert "eager only" in report.notes[0]


def test_a_layer_that_was_never_built_is_not_built_by_counting():
    class Growing(keras.Model):
        def __init__(self):
            super().__init__()
            self.always, self.later = layers.Dense(4), layers.Dense(2, name="later")
            self.grown = False

        def build(self, shape):
            self.always.build(shape)

        def call(self, x):
            return self.later(self.always(x)) if self.grown else self.always(x)

    model = Growing()
    model(np.ones((3, 4)))
    model.grown = True
    report = ks.summarize(model)
    assert not model.later.built
    assert model.later.weights == []
    assert "'later' is not built" in report.notes[0]
    assert model(np.ones((3, 4))).shape == (3, 2)


def test_a_size_that_only_the_values_decide():
    inputs = keras.Input((6, 4))
    masked = layers.Lambda(lambda x: tf.boolean_mask(x, x[..., 0] > 0), output_shape=(4,))(inputs)
    report = ks.summarize(keras.Model(inputs, layers.Dense(2, name="after")(masked)))
    assert report.total.macs is None
    assert "'after' works on [(None, 4)] -> [(None, 2)]: a size that is known only when" in report.notes[0]


def test_products_of_a_convolution_counted_one_by_one():
    rows, columns, channels, filters, size, stride = 7, 6, 3, 2, 3, 2
    products = 0
    for _row in range(0, rows - size + 1, stride):
        for _column in range(0, columns - size + 1, stride):
            for _filter in range(filters):
                products += len(np.ones((size, size, channels)).reshape(-1))
    assert macs(one_layer((rows, columns, channels), layers.Conv2D(filters, size, strides=stride))) == products


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((9,), lambda: [layers.Dense(5, use_bias=False)]),
        ((9, 7, 3), lambda: [layers.Conv2D(4, 3, padding="same"), layers.Conv2D(6, 2, strides=2)]),
        ((9, 7, 3), lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2), layers.Conv2D(6, 1)]),
        ((9, 7, 3), lambda: [layers.SeparableConv2D(6, 3), layers.Flatten(), layers.Dense(4)]),
    ],
)
def test_macs_are_half_the_float_operations_that_tensorflow_counts(shape, make):
    model = keras.Sequential([keras.Input(shape), *make()])
    found = run_operations(model, [shape])
    products = sum(found.get(name, 0) for name in ("MatMul", "Conv2D", "DepthwiseConv2dNative"))
    assert macs(model) == products // 2


def test_a_whole_mobilenet_against_tensorflow():
    shape = (96, 96, 3)
    model = keras.applications.MobileNetV2(input_shape=shape, alpha=0.35, weights=None)
    found = run_operations(model, [shape])
    products = sum(found[name] for name in ("MatMul", "Conv2D", "DepthwiseConv2dNative"))
    report = ks.summarize(model)
    assert report.total.macs == products // 2
    assert report.total.parameters == model.count_params()
