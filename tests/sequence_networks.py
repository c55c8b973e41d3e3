"""Networks over sequences: recurrent layers and attention in the ways that people build with them."""

import keras

layers = keras.layers

STEPS, FEATURES, WORDS = 6, 5, 11


def _inputs():
    return keras.Input((STEPS, FEATURES), name="sequence")


def _named(inputs, outputs, name):
    return keras.Model(inputs, outputs, name=name)


def lstm_classifier():
    words = keras.Input((STEPS,), dtype="int32", name="words")
    x = layers.Embedding(WORDS, 16, name="embedding")(words)
    x = layers.LSTM(16, name="lstm")(x)
    return _named(words, layers.Dense(3)(layers.Dense(16, activation="relu", name="hidden")(x)), "lstm_classifier")


def gru_tagger():
    words = keras.Input((STEPS,), dtype="int32", name="words")
    x = layers.Embedding(WORDS, 16, mask_zero=True, name="embedding")(words)
    x = layers.Bidirectional(layers.GRU(8, return_sequences=True), name="both")(x)
    return _named(words, layers.TimeDistributed(layers.Dense(4))(x), "gru_tagger")


def recurrent(layer, **options):
    """Two of a kind, one on the other, between dense layers."""

    def build():
        inputs = _inputs()
        x = layers.Dense(12, activation="relu", name="before")(inputs)
        x = layer(8, return_sequences=True, name="lower", **options)(x)
        x = layer(8, name="upper", **options)(x)
        return _named(inputs, layers.Dense(3)(x), layer.__name__)

    return build


def bidirectional(merge_mode):
    def build():
        inputs = _inputs()
        both = layers.Bidirectional(layers.LSTM(8, return_sequences=True), merge_mode=merge_mode, name="both")
        x = both(inputs)
        x = layers.Concatenate()(x) if merge_mode is None else x
        return _named(inputs, layers.Dense(3)(layers.GlobalMaxPooling1D()(x)), f"bidirectional_{merge_mode}")

    return build


def two_kinds_of_direction():
    inputs = _inputs()
    backward = layers.GRU(8, go_backwards=True, name="backward")
    x = layers.Bidirectional(layers.LSTM(8, name="forward"), backward_layer=backward, name="both")(inputs)
    return _named(inputs, layers.Dense(3)(x), "two_kinds_of_direction")


def stacked_cells():
    inputs = _inputs()
    cells = [layers.LSTMCell(8), layers.GRUCell(12), layers.SimpleRNNCell(8)]
    x = layers.RNN(cells, return_sequences=True, name="cells")(inputs)
    x = layers.RNN(layers.LSTMCell(8), name="one_cell")(x)
    return _named(inputs, layers.Dense(3)(x), "stacked_cells")


def stacked_states():
    """A stack hands its states on, those of each cell to the same cell of another one."""
    inputs = _inputs()
    cells = [[layers.LSTMCell(8), layers.GRUCell(12)] for _ in range(2)]
    x, *states = layers.RNN(cells[0], return_sequences=True, return_state=True, name="first")(inputs)
    x = layers.RNN(cells[1], name="second")(x, initial_state=states)
    return _named(inputs, layers.Dense(3)(x), "stacked_states")


def masked_decoder():
    """`Concatenate` puts masks together, over the channels."""
    words = keras.Input((STEPS,), dtype="int32", name="words")
    x = layers.Embedding(WORDS, 16, mask_zero=True)(words)
    lstm = layers.LSTM(8, return_sequences=True, name="lstm")(x)
    gru = layers.GRU(8, return_sequences=True, name="gru")(x)
    context = layers.Attention()([lstm, gru])
    x = layers.Concatenate()([lstm, context, x])
    return _named(words, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)), "masked_decoder")


def largest_over_time():
    inputs = _inputs()
    x = layers.LSTM(8, return_sequences=True, name="lstm")(inputs)
    x = layers.LayerNormalization(axis=1, center=False)(x)
    x = keras.ops.concatenate([keras.ops.max(x, axis=1), keras.ops.mean(x, axis=1)], axis=-1)
    return _named(inputs, layers.Dense(3)(x), "largest_over_time")


def grouped_query_from_two():
    inputs = _inputs()
    query, value = layers.Dense(8, name="query")(inputs), layers.Dense(8, activation="relu", name="value")(inputs)
    x = layers.GroupQueryAttention(4, 6, 2, name="attention")(query, value)
    return _named(inputs, layers.Dense(3)(x), "grouped_query_from_two")


def concatenated_scores():
    inputs = _inputs()
    x = layers.Dense(8, activation="relu", name="before")(inputs)
    x = layers.Attention(score_mode="concat", use_scale=True)([layers.Dense(8)(x), x])
    return _named(inputs, layers.Dense(3)(x), "concatenated_scores")


def encoder_decoder():
    """States go from one to the other, and the decoder attends to the encoder."""
    source, target = _inputs(), keras.Input((4, FEATURES), name="target")
    encoded, h, c = layers.LSTM(8, return_sequences=True, return_state=True, name="encoder")(source)
    decoded = layers.LSTM(8, return_sequences=True, name="decoder")(target, initial_state=[h, c])
    context = layers.Attention(name="attention")([decoded, encoded])
    x = layers.Concatenate()([decoded, context])
    return _named([source, target], layers.Dense(3)(layers.Dense(12, activation="relu")(x)), "encoder_decoder")


def additive_attention():
    inputs = _inputs()
    x = layers.GRU(8, return_sequences=True, name="gru")(inputs)
    query = layers.Dense(8, name="query")(x)
    x = layers.AdditiveAttention(name="attention")([query, x])
    return _named(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)), "additive_attention")


def bidirectional_states():
    inputs = _inputs()
    x, *states = layers.Bidirectional(layers.GRU(8, return_state=True, return_sequences=True), name="first")(inputs)
    x = layers.Bidirectional(layers.GRU(8), name="second")(x, initial_state=states)
    return _named(inputs, layers.Dense(3)(x), "bidirectional_states")


def time_distributed_lstm():
    inputs = keras.Input((3, STEPS, FEATURES))
    x = layers.TimeDistributed(layers.LSTM(8, name="inner"), name="outer")(layers.Dense(8, name="before")(inputs))
    return _named(inputs, layers.Dense(3)(layers.GRU(8, name="over")(x)), "time_distributed_lstm")


def _encoder_block(x, norm, heads=4, key_dim=16, **options):
    model = x.shape[-1]
    normed = norm()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(heads, key_dim, **options)(normed, normed)])
    hidden = layers.Dense(2 * model, activation="gelu")(norm()(x))
    return layers.Add()([x, layers.Dense(model)(hidden)])


def transformer(norm=layers.LayerNormalization, **options):
    def build():
        inputs = _inputs()
        x = layers.Dense(16, name="embedded")(inputs)
        for _ in range(2):
            x = _encoder_block(x, norm, **options)
        x = layers.GlobalAveragePooling1D()(norm()(x))
        return _named(inputs, layers.Dense(3)(x), "transformer")

    return build


def cross_attention():
    source, target = _inputs(), keras.Input((4, FEATURES), name="target")
    memory = layers.Dense(16, activation="relu", name="memory")(source)
    x = layers.Dense(16, name="queries")(target)
    x = layers.MultiHeadAttention(4, 8, value_dim=16, output_shape=24, name="cross")(x, memory)
    return _named([source, target], layers.Dense(3)(layers.ReLU()(x)), "cross_attention")


def grouped_query(key_heads):
    def build():
        inputs = _inputs()
        x = layers.Dense(16, activation="relu", name="before")(inputs)
        x = layers.Add()([x, layers.GroupQueryAttention(16, 8, key_heads, name="attention")(x, x)])
        return _named(inputs, layers.Dense(3)(layers.GlobalMaxPooling1D()(x)), f"grouped_query_{key_heads}")

    return build


def vision_transformer():
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 2, strides=2, name="patches")(inputs)
    x = layers.Reshape((16, 16))(x)
    for _ in range(2):
        x = _encoder_block(x, layers.LayerNormalization)
    return _named(inputs, layers.Dense(10)(layers.Flatten()(layers.LayerNormalization()(x))), "vision_transformer")


def mixer():
    """MLPs over places and over channels in turn (Tolstikhin et al. 2021)."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Reshape((16, 16))(layers.Conv2D(16, 2, strides=2, name="patches")(inputs))
    for _ in range(2):
        mixed = layers.Permute((2, 1))(layers.LayerNormalization()(x))
        mixed = layers.Dense(16)(layers.Dense(32, activation="gelu")(mixed))
        x = layers.Add()([x, layers.Permute((2, 1))(mixed)])
        mixed = layers.Dense(32, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(16)(mixed)])
    return _named(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)), "mixer")


NETWORKS = {
    "LSTM classifier": lstm_classifier,
    "GRU tagger": gru_tagger,
    "LSTM": recurrent(layers.LSTM),
    "LSTM without bias": recurrent(layers.LSTM, use_bias=False),
    "LSTM, relu": recurrent(layers.LSTM, activation="relu", unroll=True),
    "GRU": recurrent(layers.GRU),
    "GRU, reset before": recurrent(layers.GRU, reset_after=False, go_backwards=True),
    "GRU without bias": recurrent(layers.GRU, use_bias=False),
    "simple": recurrent(layers.SimpleRNN),
    "Bidirectional, concat": bidirectional("concat"),
    "Bidirectional, sum": bidirectional("sum"),
    "Bidirectional, mul": bidirectional("mul"),
    "Bidirectional, ave": bidirectional("ave"),
    "Bidirectional, None": bidirectional(None),
    "Bidirectional, two kinds": two_kinds_of_direction,
    "Bidirectional, states": bidirectional_states,
    "cells": stacked_cells,
    "cells, states": stacked_states,
    "masks put together": masked_decoder,
    "largest over time": largest_over_time,
    "grouped queries, from two": grouped_query_from_two,
    "concatenated scores": concatenated_scores,
    "encoder and decoder": encoder_decoder,
    "additive attention": additive_attention,
    "TimeDistributed LSTM": time_distributed_lstm,
    "transformer": transformer(),
    "transformer, RMS": transformer(layers.RMSNormalization),
    "transformer without bias": transformer(layers.RMSNormalization, use_bias=False, value_dim=8),
    "cross attention": cross_attention,
    "grouped queries": grouped_query(2),
    "grouped queries, one key head": grouped_query(1),
    "grouped queries, as many key heads": grouped_query(8),
    "vision transformer": vision_transformer,
    "mixer": mixer,
}
