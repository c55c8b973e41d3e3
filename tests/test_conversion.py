"""`quantize_aware` and `finalize`: where wrappers and quantizers stand, and that the function stays."""

import keras
import networks
import numpy as np
import pytest
from keras import layers

import keras_squeeze as ks
from keras_squeeze.quantization.conversion import calibrate
from keras_squeeze.quantization.fake_quantize import FakeQuantize


def names(model):
    return [layer.name for layer in model.layers]


def levels(kernel) -> int:
    """The most distinct values of an output channel."""
    channels = kernel.reshape(-1, kernel.shape[-1]).T
    return max(len(np.unique(channel)) for channel in channels)


def images(model, count=4, seed=0):
    rng = np.random.default_rng(seed)
    batch = [rng.normal(size=(count, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
    return batch if len(batch) > 1 else batch[0]


def outputs(model, batch):
    return [keras.ops.convert_to_numpy(part) for part in keras.tree.flatten(model(batch, training=False))]


def assert_same(first, second, batch, tolerance=1e-5):
    for one, other in zip(outputs(first, batch), outputs(second, batch), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)


def text_classifier():
    inputs = keras.Input((12,))
    x = layers.Embedding(30, 8, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.LSTM(6, dropout=0.1))(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="classes")(x))


def transformer():
    inputs = keras.Input((10,), dtype="int32")
    x = layers.Embedding(30, 16)(inputs)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 8)(x, x))
        hidden = layers.Dense(32, activation="gelu")(x)
        x = layers.LayerNormalization()(layers.Add()([x, layers.Dense(16)(hidden)]))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


def u_net():
    inputs = x = keras.Input((16, 16, 3))

    def block(x, filters):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization()(x))

    skips = []
    for filters in (4, 8):
        x = block(x, filters)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = block(x, 8)
    for filters, skip in zip((8, 4), reversed(skips), strict=True):
        x = block(layers.Concatenate()([layers.Conv2DTranspose(filters, 2, 2)(x), skip]), filters)
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x))


def two_towers():
    """A nested model that is called twice, two inputs, two outputs."""
    tower = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, activation="relu", name="c"), layers.Flatten()]
    )
    first, second = keras.Input((8, 8, 3), name="first"), keras.Input((8, 8, 3), name="second")
    joined = layers.Concatenate()([tower(first), tower(second)])
    return keras.Model([first, second], [layers.Dense(2, name="a")(joined), layers.Dense(3, name="b")(joined)])


MODELS = [networks.small_convnet, networks.residual_convnet, text_classifier, transformer, u_net, two_towers]


@pytest.mark.parametrize("weights", ["int8", "binary", ks.quantizers.LearnedStep(4)], ids=str)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore:.*left in float")
def test_converts_trains_one_step_and_finalizes(make, weights, tmp_path):
    model = make()
    batch = images(model)
    if len(model.inputs[0].shape) == 2:
        batch = np.abs(batch * 5).astype(int)
    q = ks.quantize_aware(model, weights)
    assert len(q.outputs) == len(model.outputs)
    targets = [np.zeros_like(part) for part in outputs(q, batch)]
    q.compile("sgd", ["mse"] * len(targets))
    q.train_on_batch(batch, targets if len(targets) > 1 else targets[0])
    plain = ks.finalize(q)
    assert_same(plain, q, batch)
    dropped = ks.finalize(q, activations="drop")
    assert names(dropped) == names(model)
    assert [w.shape for w in dropped.weights] == [w.shape for w in model.weights]
    q.save(tmp_path / "q.keras")
    assert_same(keras.models.load_model(tmp_path / "q.keras"), q, batch, tolerance=0)
    plain.save(tmp_path / "plain.keras")
    assert_same(keras.models.load_model(tmp_path / "plain.keras"), plain, batch, tolerance=0)


@pytest.mark.parametrize("family", ["MobileNetV2", "ResNet50V2", "EfficientNetB0", "DenseNet121"])
@pytest.mark.filterwarnings("ignore:.*left in float")
def test_families_of_keras_applications(family):
    build = getattr(keras.applications, family)
    model = build(weights=None, input_shape=(32, 32, 3), classes=5)
    q = ks.quantize_aware(model)
    calibrate(q, images(model))
    assert_same(ks.finalize(q), q, images(model))
    dropped = ks.finalize(q, activations="drop")
    assert names(dropped) == names(model)
    assert len(q.trainable_weights) == len(model.trainable_weights)


def test_the_model_stays_as_it_is():
    model = networks.residual_convnet()
    before = [weight.copy() for weight in model.get_weights()]
    q = ks.quantize_aware(model)
    q.compile("sgd", "mse")
    q.fit(images(model), np.zeros((4, 10)), verbose=0)
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))


def test_weights_only_is_the_model_on_quantized_weights():
    model = networks.residual_convnet()
    q = ks.quantize_aware(model, "int4", None)
    assert not any(isinstance(layer, FakeQuantize) for layer in q.layers)
    by_hand = keras.models.clone_model(model)
    by_hand.set_weights(model.get_weights())
    for layer in by_hand.layers:
        if hasattr(layer, "kernel"):
            integers, scale, zero_point = ks.quantizers.get("int4").to_integers(layer.kernel)
            layer.kernel.assign(scale * (integers - zero_point))
    assert_same(q, by_hand, images(model))


def quantized_outputs(q) -> set[str]:
    """The layers after which values are rounded, by their names in the original model."""
    found = {layer.name.removeprefix("quantized_") for layer in q.layers if isinstance(layer, FakeQuantize)}
    wrapped = [layer for layer in q.layers if isinstance(layer, ks.QuantizeAware)]
    return found | {layer.layer.name for layer in wrapped if layer.output_quantizer is not None}


def test_quantizers_stand_where_integer_kernels_round():
    q = ks.quantize_aware(networks.residual_convnet())
    # Not after the stem, the norms and `inner`: they are one with the ReLU that follows. `hidden` is a sigmoid, which
    # is computed apart from its product.
    expected = {"input_layer", "relu", "activation", "outer", "add", "hidden", "hidden_activation", "logits"}
    assert quantized_outputs(q) == expected


def test_a_layer_that_two_read_is_rounded_for_both():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="conv")(inputs)
    model = keras.Model(inputs, layers.Add(name="sum")([x, layers.ReLU(name="relu")(x)]))
    assert quantized_outputs(ks.quantize_aware(model)) >= {"conv", "relu", "sum"}


def test_what_stays_in_float_hands_over_rounded_values():
    inputs = keras.Input((8, 8, 3))
    x = layers.Rescaling(1 / 255, name="rescaling")(inputs)
    model = keras.Model(inputs, layers.Conv2D(4, 3, name="conv")(x))
    with pytest.warns(UserWarning, match="left in float: rescaling"):
        q = ks.quantize_aware(model)
    assert quantized_outputs(q) == {"rescaling", "conv"}


def test_indices_are_never_quantized():
    q = ks.quantize_aware(text_classifier())
    assert "input_layer" not in quantized_outputs(q)


def test_operators_between_tensors_are_rounded():
    inputs = keras.Input((6,))
    one = layers.Dense(4, name="one")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="last")(one + layers.Dense(4, name="two")(inputs)))
    q = ks.quantize_aware(model)
    assert any(name.startswith("add") for name in quantized_outputs(q))


def test_the_first_and_the_last_layer_keep_eight_bits():
    q = ks.quantize_aware(networks.residual_convnet(), "ternary")
    bits = {layer.layer.name: layer.weight_quantizer.bits for layer in q.layers if isinstance(layer, ks.QuantizeAware)}
    assert bits == {"stem": 8, "inner": 2, "outer": 2, "hidden": 2, "logits": 8}


def test_the_first_and_the_last_layer_of_nested_models():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(5, name="first"), layers.Dense(5, name="second")])
    model = keras.Sequential([keras.Input((6,)), inner, layers.Dense(5, name="third"), layers.Dense(2, name="last")])
    q = ks.quantize_aware(model, "binary")
    wrappers = [layer for layer in q._flatten_layers() if isinstance(layer, ks.QuantizeAware)]
    assert {w.layer.name: w.weight_quantizer.bits for w in wrappers} == {"first": 8, "second": 1, "third": 1, "last": 8}


@pytest.mark.parametrize("activations", ["int4", ks.quantizers.LearnedStep(4)], ids=str)
def test_activations_keep_eight_bits_at_the_ends_of_the_model(activations):
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(5, name="inner"), layers.Dense(3, name="last")])
    inputs = keras.Input((6,), name="start")
    hidden = layers.ReLU(name="relu")(layers.Dense(6, name="first")(inputs))
    q = ks.quantize_aware(keras.Model(inputs, inner(hidden)), "int4", activations)
    found = {}
    for layer in q._flatten_layers():
        if isinstance(layer, ks.QuantizeAware) and layer.output_quantizer is not None:
            found[layer.layer.name] = layer.output_quantizer.quantizer.bits
        elif isinstance(layer, FakeQuantize) and layer.name.startswith("quantized_"):
            found[layer.name.removeprefix("quantized_")] = layer.quantizer.bits
    assert found == {"start": 8, "relu": 4, "inner": 4, "last": 8}


@pytest.mark.parametrize("count", [1, 2])
def test_where_all_layers_are_first_or_last_they_get_what_was_asked(count):
    model = keras.Sequential([keras.Input((6,)), *(layers.Dense(4) for _ in range(count))])
    q = ks.quantize_aware(model, "binary")
    assert all(w.weight_quantizer.bits == 1 for w in q.layers if isinstance(w, ks.QuantizeAware))


def test_a_dict_says_exactly_which_layer_gets_what():
    q = ks.quantize_aware(networks.residual_convnet(), {"stem|logits": "binary", "hidden": ks.quantizers.Affine(3)})
    bits = {layer.layer.name: layer.weight_quantizer.bits for layer in q.layers if isinstance(layer, ks.QuantizeAware)}
    assert bits == {"stem": 1, "logits": 1, "hidden": 3}


def test_a_selection_leaves_the_rest_alone():
    q = ks.quantize_aware(networks.residual_convnet(), layers="outer")
    assert [layer.layer.name for layer in q.layers if isinstance(layer, ks.QuantizeAware)] == ["outer"]


def test_shared_layers_stay_shared():
    inputs = keras.Input((6,))
    shared = layers.Dense(6, name="shared")
    model = keras.Model(inputs, shared(shared(inputs)))
    q = ks.quantize_aware(model)
    assert len([layer for layer in q.layers if isinstance(layer, ks.QuantizeAware)]) == 1
    assert len(q.trainable_weights) == len(model.trainable_weights)
    assert_same(ks.finalize(q), q, images(model))


def test_calibration_measures_the_ranges(digits):
    x, y = digits
    model = networks.residual_convnet()
    model.fit(x, y, epochs=2, verbose=0)
    q = ks.quantize_aware(model)
    calibrate(q, x[:256])
    state = q.get_layer("quantized_input_layer").range_state.numpy()
    np.testing.assert_allclose(state, [0, 1], atol=1e-6)
    agreement = np.mean(model.predict(x, verbose=0).argmax(-1) == q.predict(x, verbose=0).argmax(-1))
    assert agreement > 0.97
    with pytest.raises(ValueError, match="empty"):
        calibrate(q, x[:0])
    with pytest.raises(ValueError, match="no quantizers"):
        calibrate(model, x)
    with pytest.raises(ValueError, match=r"No range was found for quantized_input_layer.*NaN"):
        calibrate(q, np.full_like(x[:8], np.nan))


def binary_network(*between):
    """Batch norm, what stands between, then a convolution that is neither the first nor the last layer."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="first"),
            layers.BatchNormalization(),
            *between,
            layers.Conv2D(4, 3, name="middle"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(2, name="last"),
        ]
    )


def test_the_published_order_binarizes_inputs():
    model = binary_network()
    q = ks.quantize_aware(model, "xnor")
    wrapper = next(layer for layer in q.layers if layer.name == "quantized_middle")
    assert wrapper.binary_inputs
    assert wrapper.output_quantizer is None
    assert not any(isinstance(layer, FakeQuantize) for layer in q.layers)


@pytest.mark.parametrize("between", [[layers.ReLU], [layers.ReLU, layers.MaxPooling2D]])
def test_the_sign_moves_before_a_relu(between):
    model = binary_network(*(make() for make in between))
    q = ks.quantize_aware(model, "xnor")
    assert not any(isinstance(layer, layers.ReLU) for layer in q.layers)
    without = binary_network(*(make() for make in between if make is not layers.ReLU))
    without.set_weights(model.get_weights())
    assert_same(q, ks.quantize_aware(without, "xnor"), images(model))


def test_a_sign_that_would_be_constant_is_refused():
    inputs = keras.Input((8,))
    x = layers.Dense(8, activation="relu", name="before")(inputs)
    x = layers.Dense(8, name="constant")(x)
    model = keras.Model(inputs, layers.Dense(2, name="last")(layers.BatchNormalization()(x)))
    with pytest.raises(ValueError, match=r"constant: its inputs are binarized.*'before'"):
        ks.quantize_aware(model, "xnor")
    ks.quantize_aware(model, "binary")  # only the weights: nothing to refuse


def test_a_relu_that_others_read_is_no_constant_to_move():
    inputs = keras.Input((8,))
    x = layers.ReLU(name="relu")(layers.BatchNormalization()(layers.Dense(8, name="first")(inputs)))
    y = layers.Add()([x, layers.Dense(8, name="middle")(x)])
    model = keras.Model(inputs, layers.Dense(2, name="last")(layers.BatchNormalization()(y)))
    with pytest.raises(ValueError, match=r"middle: its inputs are binarized.*'relu'"):
        ks.quantize_aware(model, "xnor")


class TestBadInput:
    def test_no_model(self):
        with pytest.raises(TypeError, match="must be a `keras"):
            ks.quantize_aware(layers.Dense(3))

    def test_not_built(self):
        with pytest.raises(ValueError, match="not built"):
            ks.quantize_aware(keras.Sequential([layers.Dense(3)]))

    def test_subclassed(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(3)

            def call(self, x):
                return self.dense(x)

        model = Own()
        model(np.zeros((1, 2)))
        with pytest.raises(ValueError, match=r"QuantizeAware\(keras.layers.Dense"):
            ks.quantize_aware(model)

    def test_twice(self):
        q = ks.quantize_aware(networks.small_convnet())
        with pytest.raises(ValueError, match="quantization-aware already"):
            ks.quantize_aware(q)

    def test_quantized_by_keras(self):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")])
        model.get_layer("dense").quantize("int8")
        with pytest.raises(ValueError, match="int8"):
            ks.quantize_aware(model)

    def test_unknown_names(self):
        model = networks.small_convnet()
        with pytest.raises(ValueError, match="'int8', 'int4'"):
            ks.quantize_aware(model, "int-8")
        with pytest.raises(ValueError, match=r"no selected layer matches 'nothing'"):
            ks.quantize_aware(model, {"nothing": "int8"})
        with pytest.raises(ValueError, match="selects none"):
            ks.quantize_aware(model, layers="nothing")
        with pytest.raises(ValueError, match=r"weights=\{\}"):
            ks.quantize_aware(model, {})
        with pytest.raises(ValueError, match="after a ReLU"):
            ks.quantize_aware(model, "int8", "binary")
        with pytest.raises(ValueError, match="weights=None"):
            ks.quantize_aware(model, None)
        with pytest.raises(ValueError, match="for weights"):
            ks.quantize_aware(model, "int8", "ternary")

    def test_weights_that_are_not_finite(self):
        model = networks.small_convnet()
        model.get_layer("hidden").kernel.assign(model.get_layer("hidden").kernel * np.nan)
        with pytest.raises(ValueError, match="hidden/kernel"):
            ks.quantize_aware(model)

    def test_pruned_weights_on_a_grid_without_zero(self):
        model = networks.residual_convnet()
        ks.prune_weights(model, 0.5, layers="inner")
        with pytest.raises(ValueError, match=r"inner/kernel \(50% zeros\).*ternary"):
            ks.quantize_aware(model, "binary")
        ks.quantize_aware(model, {"inner": "ternary", "outer": "binary"})

    def test_finalize(self):
        model = networks.small_convnet()
        with pytest.raises(ValueError, match="no `QuantizeAware` layers"):
            ks.finalize(model)
        with pytest.raises(ValueError, match='"keep" or "drop"'):
            ks.finalize(ks.quantize_aware(model), activations="remove")


def test_finalized_weights_are_on_their_grids():
    q = ks.quantize_aware(networks.residual_convnet(), "int4")
    plain = ks.finalize(q, activations="drop")
    for layer in q.layers:
        if isinstance(layer, ks.QuantizeAware):
            integers, scale, zero_point = layer.to_integers()["kernel"]
            kernel = plain.get_layer(layer.layer.name).kernel.numpy()
            np.testing.assert_allclose(kernel, scale * (integers - zero_point), atol=1e-7)
            assert levels(kernel) <= 15


def test_finalize_joins_what_was_split():
    model = networks.residual_convnet()
    q = ks.quantize_aware(model)
    assert any(layer.name == "hidden_activation" for layer in q.layers)
    hidden = ks.finalize(q, activations="drop").get_layer("hidden")
    assert hidden.activation is keras.activations.sigmoid


def test_finalize_keeps_the_compilation(digits):
    x, y = digits
    q = ks.quantize_aware(networks.small_convnet())
    q.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    q.fit(x, y, epochs=1, verbose=0)
    assert ks.finalize(q).evaluate(x, y, verbose=0) == pytest.approx(q.evaluate(x, y, verbose=0), abs=2e-3)


def test_a_model_of_its_own_class_keeps_its_training_step():
    class Own(keras.Model):
        def train_step(self, data):
            return {"mine": keras.ops.convert_to_tensor(7.0)}

    inputs = keras.Input((4,))
    model = Own(inputs, layers.Dense(2)(inputs))
    q = ks.quantize_aware(model)
    q.compile("sgd", "mse")
    assert q.fit(np.zeros((4, 4)), np.zeros((4, 2)), verbose=0).history["mine"] == [7.0]


def test_a_relu_that_is_called_twice_is_not_taken_away():
    inputs = keras.Input((8,))
    relu = layers.ReLU(name="shared")
    x = layers.BatchNormalization()(layers.Dense(8, name="first")(inputs))
    x = relu(layers.BatchNormalization()(layers.Dense(8, name="middle")(relu(x))))
    model = keras.Model(inputs, layers.Dense(2, name="last")(x))
    with pytest.raises(ValueError, match=r"middle: its inputs are binarized.*'shared'"):
        ks.quantize_aware(model, "xnor")


def test_a_product_with_a_number_can_be_negative():
    inputs = keras.Input((6,))
    x = layers.Dense(6, activation="relu", name="first")(inputs) * -1.0
    model = keras.Model(inputs, layers.Dense(2, name="last")(x))
    q = ks.quantize_aware(model, "int8", ks.quantizers.LearnedStep(8))
    after = next(layer for layer in q.layers if isinstance(layer, FakeQuantize) and "multiply" in layer.name)
    assert after.quantizer.signed


def test_an_activation_of_the_user_is_none_that_was_split_off():
    inputs = keras.Input((6,))
    x = layers.Dense(4, activation="relu", name="out")(inputs)
    model = keras.Model(inputs, layers.Activation("softmax", name="out_activation")(x))
    dropped = ks.finalize(ks.quantize_aware(model), activations="drop")
    assert names(dropped) == names(model)
    assert dropped.get_layer("out").activation is keras.activations.relu


def test_what_a_nested_model_gives_is_rounded():
    preparation = keras.Sequential([keras.Input((8, 8, 3)), layers.Rescaling(1 / 255, name="rescaling")])
    model = keras.Sequential([keras.Input((8, 8, 3)), preparation, layers.Conv2D(4, 3, name="conv")])
    with pytest.warns(UserWarning, match="left in float: sequential/rescaling"):
        q = ks.quantize_aware(model)
    assert any(layer.name == "quantized_rescaling" for layer in q._flatten_layers())


class Block(layers.Layer):
    """Made of parts that only a call builds."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one, self.two = layers.Dense(5, name="one"), layers.Dense(4, name="two")

    def call(self, x):
        return self.two(self.one(x))


def test_a_layer_made_of_others_is_wrapped_as_a_whole():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, Block(name="block")(inputs))
    q = ks.quantize_aware(model, "int4", None)
    wrapper = next(layer for layer in q.layers if isinstance(layer, ks.QuantizeAware))
    assert set(wrapper.to_integers()) == {"one/kernel", "two/kernel"}
    assert_same(ks.finalize(q), q, images(model))
    with pytest.raises(ValueError, match="'block' is wrapped as a whole"):
        ks.quantize_aware(model, {"block/one": "int8", "block/two": "int4"})
    with pytest.raises(ValueError, match="'block' is wrapped as a whole"):
        ks.quantize_aware(model, layers="block/one")


def test_outputs_keep_their_names():
    inputs = keras.Input((6,))
    outputs = [layers.Dense(2, name="a")(inputs), layers.Dense(3, activation="softmax", name="b")(inputs)]
    model = keras.Model(inputs, outputs)
    q = ks.quantize_aware(model)
    assert q.output_names == ["a", "b"]
    q.compile("sgd", {"a": "mse", "b": "categorical_crossentropy"})
    q.fit(images(model), {"a": np.zeros((4, 2)), "b": np.eye(4, 3)}, verbose=0)
    assert_same(ks.finalize(q), q, images(model))
    assert ks.finalize(q, activations="drop").output_names == ["a", "b"]


def test_finalize_in_mid_schedule_is_refused():
    q = ks.quantize_aware(networks.small_convnet())
    schedule = ks.QuantizationSchedule(delay=10, freeze=20)
    schedule.attach(q, None, total_steps=100)
    with pytest.raises(ValueError, match="still mixed with float"):
        ks.finalize(q)


def test_a_wrapper_inside_of_another_layer():
    inputs = keras.Input((3, 6))
    model = keras.Model(inputs, layers.TimeDistributed(ks.QuantizeAware(layers.Dense(4)))(inputs))
    with pytest.raises(ValueError, match=r"Wrap the outer layer instead"):
        ks.finalize(model)
