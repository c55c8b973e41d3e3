"""Random models of many kinds of layer: for the law that `shrink(m)` predicts what `m` predicts."""

import keras
import numpy as np

layers = keras.layers
SIZE = 8


def randomize(model, seed: int) -> None:
    """Random weights and normalization statistics: those of a fresh model hide mistakes."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "variance" in variable.name or variable.name == "gamma":
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif len(variable.shape) < 2:
            variable.assign(rng.normal(0, 0.3, variable.shape))
        else:
            fan_in = max(np.prod(variable.shape) // variable.shape[-1], 1)
            variable.assign(rng.normal(0, 1.5 / np.sqrt(fan_in), variable.shape))


def random_model(seed: int) -> keras.Model:
    """A model with one or two inputs and outputs; its images have `SIZE` by `SIZE` pixels."""
    rng = np.random.default_rng(seed)
    inputs = [keras.Input((SIZE, SIZE, int(rng.integers(1, 4)))) for _ in range(rng.integers(1, 3))]
    tensors = [layers.Conv2D(int(rng.integers(2, 5)) * 4, 3, padding="same")(tensor) for tensor in inputs]
    for _ in range(rng.integers(4, 10)):
        step = STEPS[rng.integers(len(STEPS))]
        tensor = tensors[rng.integers(len(tensors))]
        found = step(rng, tensor, [other for other in tensors if other.shape == tensor.shape])
        tensors += [found] if found is not None else []
    outputs = [_head(rng, tensors[-1])]
    if len(inputs) > 1 or rng.random() < 0.3:
        unused = [layers.GlobalAveragePooling2D()(tensor) for tensor in tensors[:2]]
        outputs.append(layers.Dense(3)(layers.Concatenate()(unused) if len(unused) > 1 else unused[0]))
    model = keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs)
    randomize(model, seed)
    return model


def random_inputs(model, seed: int = 0, batch: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]


def predictions(model, inputs) -> list[np.ndarray]:
    outputs = model(inputs if len(inputs) > 1 else inputs[0], training=False)
    return [np.asarray(keras.ops.convert_to_numpy(tensor)) for tensor in keras.tree.flatten(outputs)]


def _activation(rng):
    return str(rng.choice(["linear", "relu", "sigmoid", "swish", "tanh", "elu", "softplus"]))


def _padding(rng, tensor):
    return "valid" if tensor.shape[1] > 4 and rng.random() < 0.4 else "same"


def convolution(rng, tensor, same):
    groups = int(rng.choice([1, 1, 2, 4]))
    return layers.Conv2D(
        int(rng.integers(1, 5)) * 4,
        int(rng.choice([1, 3])),
        padding=_padding(rng, tensor),
        groups=groups,
        use_bias=bool(rng.random() < 0.7),
        activation=_activation(rng),
    )(tensor)


def depthwise(rng, tensor, same):
    return layers.DepthwiseConv2D(
        3,
        padding=_padding(rng, tensor),
        depth_multiplier=int(rng.integers(1, 3)),
        use_bias=bool(rng.random() < 0.7),
        activation=_activation(rng),
    )(tensor)


def channel_groups(rng, tensor, same):
    return layers.Conv2D(2 * tensor.shape[-1], 3, padding="same", groups=tensor.shape[-1])(tensor)


def separable(rng, tensor, same):
    return layers.SeparableConv2D(
        8, 3, padding=_padding(rng, tensor), depth_multiplier=int(rng.integers(1, 3)), activation=_activation(rng)
    )(tensor)


def transposed(rng, tensor, same):
    if tensor.shape[1] > 8:
        return None
    return layers.Conv2DTranspose(8, 3, strides=int(rng.integers(1, 3)), padding="same")(tensor)


def batch_norm(rng, tensor, same):
    scale, center = bool(rng.random() < 0.7), bool(rng.random() < 0.7)
    return layers.ReLU()(layers.BatchNormalization(scale=scale, center=center)(tensor))


def other_norm(rng, tensor, same):
    kind = rng.integers(5)
    if kind == 0:
        return layers.LayerNormalization()(tensor)
    if kind == 1:
        return layers.GroupNormalization(groups=-1)(tensor)
    if kind == 2:
        return layers.GroupNormalization(groups=2 if tensor.shape[-1] % 2 == 0 else 1)(tensor)
    if kind == 3:
        return layers.RMSNormalization(epsilon=0.01)(tensor)
    return layers.UnitNormalization()(tensor)


def elementwise(rng, tensor, same):
    kind = rng.integers(7)
    if kind == 0:
        return layers.PReLU(shared_axes=[1, 2] if rng.random() < 0.5 else None)(tensor)
    if kind == 1:
        return layers.LeakyReLU()(tensor)
    if kind == 2:
        return layers.Dropout(0.5)(tensor)
    if kind == 3:
        return 2.0 * tensor + 1.0
    if kind == 4:
        return keras.ops.tanh(tensor) / 2.0
    if kind == 5:
        return layers.Rescaling(0.5, 0.25)(tensor)
    return layers.Activation(_activation(rng))(tensor)


def space(rng, tensor, same):
    size = tensor.shape[1]
    kind = rng.integers(6)
    if kind == 0 and size >= 4:
        return layers.MaxPooling2D(2, padding=str(rng.choice(["same", "valid"])))(tensor)
    if kind == 1 and size >= 4:
        return layers.AveragePooling2D(2, padding=str(rng.choice(["same", "valid"])))(tensor)
    if kind == 2 and size <= 8:
        return layers.ZeroPadding2D()(tensor)
    if kind == 3 and size >= 5:
        return layers.Cropping2D()(tensor)
    if kind == 4 and size <= 8:
        return layers.UpSampling2D(interpolation=str(rng.choice(["nearest", "bilinear"])))(tensor)
    return layers.Permute((2, 1, 3))(tensor)


def merged(rng, tensor, same):
    if len(same) < 2:
        same = [tensor, layers.Conv2D(tensor.shape[-1], 3, padding="same")(tensor)]
    pair = [same[0], same[-1]]
    kind = rng.integers(7)
    if kind < 5:
        return [layers.Add, layers.Multiply, layers.Average, layers.Maximum, layers.Subtract][kind]()(pair)
    return pair[0] + pair[1] if kind == 5 else layers.Concatenate()(pair)


def concatenated_in_space(rng, tensor, same):
    return layers.Concatenate(axis=1)([tensor, tensor]) if tensor.shape[1] <= 8 else None


def squeeze_and_excite(rng, tensor, same):
    channels = tensor.shape[-1]
    gate = layers.GlobalAveragePooling2D(keepdims=True)(tensor)
    gate = layers.Conv2D(max(channels // 2, 1), 1, activation="relu")(gate)
    return layers.Multiply()([tensor, layers.Conv2D(channels, 1, activation="sigmoid")(gate)])


def spatial_attention(rng, tensor, same):
    return layers.Multiply()([tensor, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(tensor)])


def split_and_shuffle(rng, tensor, same):
    height, width, channels = tensor.shape[1:]
    if channels % 2:
        return None
    if rng.random() < 0.5:
        left, right = keras.ops.split(tensor, 2, axis=-1)
    else:
        left, right = tensor[..., : channels // 2], tensor[..., channels // 2 :]
    right = layers.Conv2D(channels // 2, 3, padding="same", activation="relu")(right)
    joined = layers.Concatenate()([left, right])
    shuffled = layers.Reshape((height, width, 2, channels // 2))(joined)
    return layers.Reshape((height, width, channels))(layers.Permute((1, 2, 4, 3))(shuffled))


def nested(rng, tensor, same):
    inner = keras.Sequential(
        [keras.Input(tensor.shape[1:]), layers.Conv2D(8, 1, activation="relu"), layers.Conv2D(8, 1)]
    )
    return layers.Add()([inner(tensor), inner(tensor)]) if rng.random() < 0.3 else inner(tensor)


def shared(rng, tensor, same):
    layer = layers.Conv2D(tensor.shape[-1], 3, padding="same", activation=_activation(rng))
    return layer(layer(tensor))


def over_time(rng, tensor, same):
    inner = layers.Conv1D(8, 1, activation=_activation(rng)) if rng.random() < 0.5 else layers.Dense(8)
    return layers.TimeDistributed(inner)(tensor)


def dense_block(rng, tensor, same):
    new = layers.Conv2D(4, 3, padding="same", use_bias=False)(layers.ReLU()(layers.BatchNormalization()(tensor)))
    return layers.Concatenate()([tensor, new])


def einsum(rng, tensor, same):
    equation = "abcd,de->abce" if rng.random() < 0.5 else "...d,de->...e"
    output = (*tensor.shape[1:3], 8) if equation[0] == "a" else 8
    return layers.EinsumDense(equation, output, bias_axes="e", activation=_activation(rng))(tensor)


def unknown(rng, tensor, same):
    return layers.Lambda(lambda x: x[:, ::-1] * 0.5)(tensor)


def recurrent(rng, tensor, same):
    height, width, channels = tensor.shape[1:]
    if height * width > 64:
        return None
    sequence = layers.Reshape((height * width, channels))(tensor)
    options = {"return_sequences": True, "use_bias": bool(rng.random() < 0.7), "go_backwards": bool(rng.random() < 0.3)}
    kind = rng.integers(5)
    if kind == 0:
        found = layers.LSTM(4, activation=str(rng.choice(["tanh", "softsign", "sigmoid"])), **options)(sequence)
    elif kind == 1:
        found = layers.GRU(4, reset_after=bool(rng.random() < 0.5), **options)(sequence)
    elif kind == 2:
        merge_mode = str(rng.choice(["concat", "sum", "mul", "ave"]))
        kinds = [layers.LSTM, layers.GRU, layers.SimpleRNN]
        inner = kinds[rng.integers(3)](4, return_sequences=True)
        found = layers.Bidirectional(inner, merge_mode=merge_mode)(sequence)
    elif kind == 3:
        cells = [layers.LSTMCell(4), layers.GRUCell(8), layers.SimpleRNNCell(4)]
        found = layers.RNN(cells[: rng.integers(1, 4)], return_sequences=True)(sequence)
    else:
        _, h, c = layers.LSTM(4, return_state=True)(sequence)
        found = layers.LSTM(4, return_sequences=True)(sequence, initial_state=[h, c])
    return layers.Reshape((height, width, found.shape[-1]))(found)


def attention(rng, tensor, same):
    height, width, channels = tensor.shape[1:]
    if height * width > 64:
        return None
    sequence = layers.Reshape((height * width, channels))(tensor)
    kind = rng.integers(5)
    if kind == 0:
        layer = layers.MultiHeadAttention(int(rng.integers(1, 5)), 4, value_dim=int(rng.choice([2, 4])))
        found = layers.Add()([sequence, layer(sequence, sequence)])
    elif kind == 1:
        memory = layers.Dense(8, activation=_activation(rng))(sequence)
        found = layers.MultiHeadAttention(2, 4, output_shape=8, use_bias=bool(rng.random() < 0.5))(sequence, memory)
    elif kind == 2:
        found = layers.GroupQueryAttention(4, 4, int(rng.choice([1, 2, 4])))(sequence, sequence)
    elif kind == 3:
        query = layers.Dense(channels)(sequence)
        kinds = [layers.Attention, layers.AdditiveAttention]
        found = kinds[rng.integers(2)]()([query, sequence])
    else:
        normed = layers.RMSNormalization()(sequence)
        found = layers.Add()([sequence, layers.MultiHeadAttention(2, 4)(normed, normed)])
    return layers.Reshape((height, width, found.shape[-1]))(found)


STEPS = [
    convolution,
    convolution,
    depthwise,
    channel_groups,
    separable,
    transposed,
    batch_norm,
    batch_norm,
    other_norm,
    elementwise,
    elementwise,
    space,
    merged,
    merged,
    concatenated_in_space,
    squeeze_and_excite,
    spatial_attention,
    split_and_shuffle,
    nested,
    shared,
    over_time,
    dense_block,
    einsum,
    unknown,
    recurrent,
    attention,
]


def _head(rng, tensor):
    features = (layers.Flatten() if rng.random() < 0.5 else layers.GlobalMaxPooling2D())(tensor)
    hidden = layers.Dense(int(rng.integers(4, 12)), activation=_activation(rng))(features)
    return layers.Dense(3, activation=str(rng.choice(["linear", "softmax"])))(hidden)
