"""tfmot's API on Keras 3: against the real tfmot, mask by mask; and tfmot's guides with one import changed."""

import inspect
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import keras_squeeze as ks
from keras_squeeze import tfmot_compat
from keras_squeeze.tfmot_compat.isolation import import_tfmot
from keras_squeeze.tfmot_compat.namespaces import Refusal

sparsity, quantization = tfmot_compat.sparsity.keras, tfmot_compat.quantization.keras
layers = keras.layers


@pytest.fixture(scope="module")
def tfmot():
    return import_tfmot()


@pytest.fixture(scope="module")
def data(digits):
    x, y = digits
    return x[:640], y[:640]


def net(library=keras):
    layers = library.layers
    return library.Sequential(
        [
            library.Input((8, 8, 1)),
            layers.Conv2D(8, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Flatten(name="flatten"),
            layers.Dense(24, activation="relu", name="hidden"),
            layers.Dense(10, name="logits"),
        ]
    )


def compiled(model, optimizer="adam"):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def fit(model, data, epochs=1, callbacks=(), **options):
    return model.fit(
        *data, batch_size=32, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks), **options
    )


def zeros(layer):
    return float(np.mean(kernel_of(layer) == 0))


def kernel_of(layer):
    return keras.ops.convert_to_numpy((layer.layer if isinstance(layer, sparsity.PruneLowMagnitude) else layer).kernel)


def wrapped(model):
    return [layer for layer in model.layers if isinstance(layer, sparsity.PruneLowMagnitude) and layer.prunes]


def accuracy(model, data):
    return model.evaluate(*data, verbose=0)[1]


# Masks, against the real tfmot.


class Recorder(sparsity.UpdatePruningStep):
    """Keeps the weights before every change of masks, and the masks after it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def update(self, step):
        before = [kernel_of(layer).copy() for layer in wrapped(self.model)]
        super().update(step)
        masks = [layer.pruning_vars[0][1] for layer in wrapped(self.model)]
        self.seen.append((step, before, masks))


@pytest.fixture(scope="module")
def oracle(tfmot):
    """`(schedule, weights, options)` -> the real tfmot's pruning of weights, their masks, and its step."""
    from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning

    def make(schedule, shapes, block_size=(1, 1), block_pooling_type="AVG", sparsity_m_by_n=None):
        step = tf.Variable(1)
        triples = [(tf.Variable(tf.zeros(s)), tf.Variable(tf.ones(s)), tf.Variable(0.0)) for s in shapes]
        pruning = Pruning(lambda: step, triples, schedule, block_size, block_pooling_type, sparsity_m_by_n)
        return pruning, triples, step

    return make


RUNS = {
    "decay": ("PolynomialDecay", (0.1, 0.8, 3, 33), {"frequency": 5}, {}),
    "every_step": ("PolynomialDecay", (0.0, 0.9, 0, 30), {"frequency": 1, "power": 2}, {}),
    "constant": ("ConstantSparsity", (0.6, 4), {"frequency": 10}, {}),
    "from_the_start": ("ConstantSparsity", (0.6, 0), {"frequency": 10}, {}),
    "blocks": (
        "PolynomialDecay",
        (0.0, 0.5, 1, 21),
        {"frequency": 4},
        {"block_size": (2, 2), "block_pooling_type": "MAX"},
    ),
    "n_of_m": ("ConstantSparsity", (0.5, 0), {"frequency": 10}, {"sparsity_m_by_n": (2, 4)}),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_masks_are_those_of_tfmot_at_every_update(run, tfmot, oracle, data):
    """Both see the same weights: those of this run, before each of its steps."""
    name, times, options, pattern = run
    schedule = getattr(tfmot.sparsity.keras, name)(*times, **options)
    blocks = "block_size" in pattern
    dense = [layers.Flatten(), layers.Dense(24, activation="relu"), layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *dense]) if blocks else net()
    pruned = compiled(sparsity.prune_low_magnitude(model, pruning_schedule=schedule, **pattern))
    recorder = Recorder()
    fit(pruned, data, 2, [recorder])
    theirs, triples, step = oracle(schedule, [kernel_of(layer).shape for layer in wrapped(pruned)], **pattern)
    seen = {step: (before, masks) for step, before, masks in recorder.seen}
    updates = 0
    for now in range(1, 41):
        step.assign(now)
        is_update = bool(now == 1 if "sparsity_m_by_n" in pattern else schedule(tf.constant(now))[0])
        assert not is_update or now - 1 in seen or updates > 0, f"step {now} was left out"
        if now - 1 not in seen:
            continue
        before, masks = seen[now - 1]
        updates += is_update
        for (weight, _, _), values in zip(triples, before, strict=True):
            weight.assign(values)
        theirs.conditional_mask_update()
        for (_, mask, _), ours in zip(triples, masks, strict=True):
            np.testing.assert_array_equal(ours, mask.numpy().astype(bool), err_msg=f"step {now}")
    assert updates
    for layer, (_, mask, _) in zip(wrapped(pruned), triples, strict=True):
        assert np.count_nonzero(kernel_of(layer)) == np.count_nonzero(mask)


def test_a_whole_run_beside_tfmot(tfmot, data):
    """Both libraries train the same network from the same weights on the same batches, each by itself."""
    pruned = {}
    start = net().get_weights()
    for library, keras_of_it, api in (("theirs", tf_keras, tfmot.sparsity.keras), ("ours", keras, sparsity)):
        model = net(keras_of_it)
        model.set_weights(start)
        schedule = api.PolynomialDecay(0.2, 0.8, 2, 32, frequency=5)
        model = api.prune_low_magnitude(model, pruning_schedule=schedule)
        loss = keras_of_it.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras_of_it.optimizers.SGD(0.05), loss)
        fit(model, data, 2, [api.UpdatePruningStep()])
        pruned[library] = api.strip_pruning(model)
    for theirs, ours in zip(pruned["theirs"].layers, pruned["ours"].layers, strict=True):
        assert theirs.name == ours.name
        if hasattr(theirs, "kernel"):
            a, b = theirs.kernel.numpy(), ours.kernel.numpy()
            assert (a == 0).sum() == (b == 0).sum()
            assert np.mean((a == 0) == (b == 0)) > 0.99  # the two Keras round some sums differently
            np.testing.assert_allclose(a, b, atol=1e-3)


SCHEDULES = [
    ("PolynomialDecay", {"initial_sparsity": 0.0, "final_sparsity": 0.9, "begin_step": 10, "end_step": 110}),
    ("PolynomialDecay", {"initial_sparsity": 0.3, "final_sparsity": 0.87, "begin_step": 0, "end_step": 37, "power": 2}),
    (
        "PolynomialDecay",
        {"initial_sparsity": 0.5, "final_sparsity": 0.8, "begin_step": 3, "end_step": 4, "frequency": 7},
    ),
    ("ConstantSparsity", {"target_sparsity": 0.6, "begin_step": 5, "frequency": 10}),
    ("ConstantSparsity", {"target_sparsity": 0.6, "begin_step": 0, "end_step": 30, "frequency": 7}),
]


@pytest.mark.parametrize(("name", "arguments"), SCHEDULES)
def test_schedules_are_those_of_tfmot_bit_for_bit(name, arguments, tfmot):
    ours, theirs = getattr(sparsity, name)(**arguments), getattr(tfmot.sparsity.keras, name)(**arguments)
    for step in range(120):
        for one, other in zip(ours(step), theirs(tf.constant(step)), strict=True):
            assert np.asarray(one) == np.asarray(other), step
    assert ours.get_config() == theirs.get_config()


# The public names of tfmot.


def modules(module, path=()):
    """Every public module below one, with the names on the way."""
    yield module, path
    for name, member in vars(module).items():
        if _is_module_of_tfmot(member) and not name.startswith("_"):
            yield from modules(member, (*path, name))


def _is_module_of_tfmot(member):
    return isinstance(member, types.ModuleType) and member.__name__.startswith("tensorflow_model_optimization")


@pytest.mark.parametrize("name", ["sparsity", "quantization", "clustering", "experimental"])
def test_every_public_name_is_there(name, tfmot):
    found = set()
    for module, path in modules(getattr(tfmot, name), (name,)):
        for public, member in vars(module).items():
            is_import = isinstance(member, types.ModuleType) and not _is_module_of_tfmot(member)
            if public.startswith("_") or is_import:
                continue
            ours = tfmot_compat
            for part in (*path, public):
                ours = getattr(ours, part)
            found.add(type(ours))
            if isinstance(ours, Refusal):
                assert_refuses(ours, ".".join((*path, public)))
            elif not isinstance(ours, types.ModuleType):
                assert ours.__doc__
    assert (Refusal in found) == (name != "sparsity")


def assert_refuses(refusal, path):
    with pytest.raises(NotImplementedError, match=rf"tfmot\.{path} is not part of .*keras_squeeze.*Received: .*\(3\)"):
        refusal(3)
    with pytest.raises(NotImplementedError, match=r"Received: a class derived from"):
        types.new_class("Mine", (refusal,))
    with pytest.raises(NotImplementedError, match=r"Received: .*\.LINEAR"):
        _ = refusal.LINEAR
    assert not isinstance(3, refusal)
    assert not hasattr(refusal, "__wrapped__")


@pytest.mark.parametrize(
    "path",
    [
        *(f"sparsity.keras.{name}" for name in ("prune_low_magnitude", "strip_pruning", "prune_scope")),
        *(f"sparsity.keras.{name}" for name in ("PolynomialDecay", "ConstantSparsity")),
        *(f"sparsity.keras.{name}" for name in ("UpdatePruningStep", "PruningSummaries")),
        *(f"quantization.keras.quantize_{name}" for name in ("model", "apply", "annotate_layer", "annotate_model")),
        "quantization.keras.quantize_scope",
        "quantization.keras.default_8bit.Default8BitQuantizeScheme",
        "quantization.keras.experimental.default_n_bit.DefaultNBitQuantizeScheme",
    ],
)
def test_arguments_and_defaults_are_those_of_tfmot(path, tfmot):
    ours, theirs = tfmot_compat, tfmot
    for part in path.split("."):
        ours, theirs = getattr(ours, part), getattr(theirs, part)
    ours, theirs = (inspect.signature(function).parameters for function in (ours, theirs))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        if not hasattr(parameter.default, "__dict__"):  # schedules and schemes are other objects
            assert ours[name].default == parameter.default


def test_namespaces_can_be_imported_from():
    from keras_squeeze.tfmot_compat.experimental.combine import Default8BitPrunePreserveQuantizeScheme  # noqa: F401
    from keras_squeeze.tfmot_compat.sparsity.keras import prune_low_magnitude

    from keras_squeeze.tfmot_compat.sparsity import keras as one

    assert prune_low_magnitude is one.prune_low_magnitude is sparsity.prune_low_magnitude
    assert tfmot_compat.__version__ == "0.8.1"


# The guide to pruning.


def test_guide_pruning_of_a_whole_model(data, tmp_path):
    model = compiled(net())
    fit(model, data, 4)
    before = accuracy(model, data)
    steps = np.ceil(len(data[0]) / 32).astype(np.int32) * 4
    schedule = sparsity.PolynomialDecay(
        initial_sparsity=0.5, final_sparsity=0.8, begin_step=0, end_step=steps, frequency=8
    )
    pruned = compiled(sparsity.prune_low_magnitude(model, pruning_schedule=schedule))
    callbacks = [sparsity.UpdatePruningStep(), sparsity.PruningSummaries(log_dir=str(tmp_path))]
    history = fit(pruned, data, 4, callbacks).history
    assert history["sparsity"][-1] == pytest.approx(0.8, abs=0.01)
    assert accuracy(pruned, data) > before - 0.1
    final = sparsity.strip_pruning(pruned)
    assert [type(layer) for layer in final.layers] == [type(layer) for layer in model.layers]
    assert [layer.name for layer in final.layers] == [layer.name for layer in model.layers]
    for layer in final.layers:
        if hasattr(layer, "kernel"):
            assert zeros(layer) == pytest.approx(0.8, abs=0.01)
    np.testing.assert_array_equal(final(data[0]), pruned(data[0]))
    pruned.save(tmp_path / "pruned.keras")
    result = ks.export(final, tmp_path / "final.tflite")
    assert result.agreement == 1
    assert list(tmp_path.glob("metrics/events*"))


# The comprehensive guide to pruning.


def test_guide_some_layers_by_cloning(data):
    base = net()

    def only_dense(layer):
        return sparsity.prune_low_magnitude(layer) if isinstance(layer, layers.Dense) else layer

    model = keras.models.clone_model(base, clone_function=only_dense)
    assert [layer.layer.name for layer in model.layers if isinstance(layer, sparsity.PruneLowMagnitude)] == [
        "hidden",
        "logits",
    ]


def test_guide_layers_of_a_model_that_is_written_down(data):
    options = {"pruning_schedule": sparsity.ConstantSparsity(0.5, 0, frequency=4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras 3 would rather have keras.Input
        first = layers.Dense(20, input_shape=(64,))
    sequential = keras.Sequential([sparsity.prune_low_magnitude(first, **options), layers.Flatten()])
    assert sequential.built
    inputs = keras.Input((64,))
    hidden = sparsity.prune_low_magnitude(layers.Dense(10), **options)(inputs)
    listed = sparsity.prune_low_magnitude([layers.Dense(10), layers.ReLU()], **options)
    for layer in listed:
        hidden = layer(hidden)
    functional = compiled(keras.Model(inputs, hidden))
    fit(functional, (data[0].reshape(-1, 64), data[1]), 1, [sparsity.UpdatePruningStep()])
    assert [zeros(layer) for layer in wrapped(functional)] == [0.5, 0.5]


def test_guide_a_custom_layer(data):
    class WithBias(layers.Dense, sparsity.PrunableLayer):
        def get_prunable_weights(self):
            return [self.kernel, self.bias]

    layer = WithBias(10, bias_initializer="random_normal")
    schedule = sparsity.ConstantSparsity(0.5, 0, frequency=4)
    model = keras.Sequential([keras.Input((64,)), sparsity.prune_low_magnitude(layer, pruning_schedule=schedule)])
    fit(compiled(model), (data[0].reshape(-1, 64), data[1]), 1, [sparsity.UpdatePruningStep()])
    assert zeros(layer) == np.mean(layer.bias.numpy() == 0) == 0.5


@pytest.mark.parametrize("in_graph", [False, True])
def test_guide_a_training_loop_of_ones_own(in_graph, data, tmp_path):
    schedule = sparsity.PolynomialDecay(0.0, 0.75, 0, 8, frequency=2)
    model = sparsity.prune_low_magnitude(net(), pruning_schedule=schedule)
    optimizer, loss = keras.optimizers.Adam(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.optimizer = optimizer
    step_callback, log_callback = sparsity.UpdatePruningStep(), sparsity.PruningSummaries(log_dir=str(tmp_path))
    step_callback.set_model(model)
    log_callback.set_model(model)

    def train_step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    train_step = tf.function(train_step) if in_graph else train_step
    step_callback.on_train_begin()
    seen = []
    for _ in range(2):
        log_callback.on_epoch_begin(epoch=-1)
        for start in range(0, 160, 32):
            train_step(data[0][start : start + 32], data[1][start : start + 32])
            seen.append(zeros(wrapped(model)[1]))
        step_callback.on_epoch_end(-1)
    expected = [0.0] + [float(schedule(min(step // 2 * 2, 8))[1]) for step in range(2, 11)]
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    assert int(model.layers[0].pruning_step) == 10
    assert zeros(sparsity.strip_pruning(model).get_layer("hidden")) == 0.75


def test_guide_saving_and_going_on(data, tmp_path):
    schedule = sparsity.PolynomialDecay(0.2, 0.8, 0, 50, frequency=5)
    whole = compiled(sparsity.prune_low_magnitude(net(), pruning_schedule=schedule))
    with pytest.warns(
        UserWarning, match=r"Training ended at step 20, before the end .* conv, hidden, logits: .* goes on"
    ):
        fit(whole, data, 1, [sparsity.UpdatePruningStep()])
    whole.save(tmp_path / "between.keras")
    with sparsity.prune_scope():
        loaded = keras.models.load_model(tmp_path / "between.keras")
    assert loaded.layers[0].pruning_schedule.get_config() == schedule.get_config()
    np.testing.assert_array_equal(loaded(data[0]), whole(data[0]))
    for model in (whole, loaded):
        fit(model, data, 2, [sparsity.UpdatePruningStep()])
        assert int(model.layers[0].pruning_step) == 60
        assert zeros(model.layers[4]) == pytest.approx(0.8, abs=1e-3)
    for one, other in zip(wrapped(whole), wrapped(loaded), strict=True):
        np.testing.assert_array_equal(kernel_of(one), kernel_of(other))


def test_checkpoints_in_mid_epoch_know_the_step(data, tmp_path):
    schedule = sparsity.PolynomialDecay(0.0, 0.5, 0, 10, frequency=10)
    model = compiled(sparsity.prune_low_magnitude(net(), pruning_schedule=schedule))
    saved = keras.callbacks.ModelCheckpoint(tmp_path / "at_{batch}.keras", save_freq=13)
    fit(model, data, 1, [saved, sparsity.UpdatePruningStep()])
    loaded = keras.models.load_model(next(tmp_path.glob("at_*.keras")))
    assert int(loaded.layers[0].pruning_step) == 13
    assert zeros(loaded.layers[4]) == 0.5


# The guide to pruning for XNNPACK.


def mobile(size=8, **last):
    def block(x, filters, stride):
        if stride == 2:
            x = layers.ZeroPadding2D(1)(x)
        x = layers.DepthwiseConv2D(3, stride, padding="valid" if stride == 2 else "same", use_bias=False)(x)
        x = layers.ReLU(6)(layers.BatchNormalization()(x))
        return layers.BatchNormalization()(layers.Conv2D(filters, 1, use_bias=False)(x))

    inputs = keras.Input((size, size, 1))
    x = layers.Concatenate()([inputs, inputs, inputs])
    x = layers.ReLU()(layers.Conv2D(8, 3, 2, padding="valid")(layers.ZeroPadding2D(1)(x)))
    x = shortcut = block(x, 16, 1)
    x = layers.Add()([shortcut, block(x, 16, 1)]) + 1.0
    x = layers.GlobalAveragePooling2D(keepdims=True)(block(x, 24, 2))
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def test_guide_xnnpack(data, tmp_path):
    policy = sparsity.PruneForLatencyOnXNNPack()
    schedule = sparsity.PolynomialDecay(0.25, 0.75, 0, 20, frequency=5)
    model = mobile()
    pruned = sparsity.prune_low_magnitude(model, pruning_schedule=schedule, pruning_policy=policy)
    names = [layer.layer.name for layer in wrapped(pruned)]
    assert names == [
        layer.name for layer in model.layers if getattr(layer, "kernel_size", 0) == (1, 1) and "depth" not in layer.name
    ]
    fit(compiled(pruned), data, 1, [sparsity.UpdatePruningStep()])
    final = sparsity.strip_pruning(pruned)
    for layer in final.layers:
        if hasattr(layer, "kernel"):
            assert zeros(layer) == (0.75 if layer.name in names else 0)
    assert ks.export(final, tmp_path / "model.tflite").agreement == 1


def test_models_that_the_policy_is_not_for():
    policy = sparsity.PruneForLatencyOnXNNPack()
    with pytest.raises(ValueError, match=r"does not begin as .*ZeroPadding2D\(1\).*Received: conv, norm"):
        sparsity.prune_low_magnitude(net(), pruning_policy=policy)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, 2)(layers.ZeroPadding2D(1)(inputs))
    with pytest.raises(ValueError, match=r"does not end as .*GlobalAveragePooling2D\(keepdims=True\)"):
        policy.ensure_model_supports_pruning(keras.Model(inputs, layers.Conv2D(4, 1)(x)))
    for unknown in (
        layers.Conv2D(4, 3, name="odd"),
        layers.Activation("tanh", name="odd"),
        layers.DepthwiseConv2D(7, padding="same", name="odd"),
        layers.DepthwiseConv2D(3, 2, name="odd"),
        layers.LayerNormalization(name="odd"),
    ):
        bad = keras.Model(inputs, layers.GlobalAveragePooling2D(keepdims=True)(unknown(x)))
        with pytest.raises(ValueError, match=r"'odd': XNNPACK's sparse inference has no such"):
            policy.ensure_model_supports_pruning(bad)


# The guide to structural pruning.


def test_guide_n_of_m(data):
    options = {"sparsity_m_by_n": (2, 4)}
    model = net()
    structured = keras.models.clone_model(
        model,
        clone_function=lambda layer: (
            sparsity.prune_low_magnitude(layer, **options) if layer.name == "hidden" else layer
        ),
    )
    fit(compiled(structured), data, 2, [sparsity.UpdatePruningStep()])
    kernel = sparsity.strip_pruning(structured).get_layer("hidden").kernel.numpy()
    groups = np.reshape(kernel, (-1, 4, kernel.shape[1]))
    assert ((groups == 0).sum(axis=1) == 2).all()


def test_n_of_m_comes_by_the_schedule_and_is_complete_at_its_end(data):
    """tfmot has the whole pattern at the first step, whatever the schedule."""
    schedule = sparsity.PolynomialDecay(0.0, 0.8, 5, 15, frequency=5, power=1)
    model = compiled(sparsity.prune_low_magnitude(net(), pruning_schedule=schedule, sparsity_m_by_n=(1, 4)))
    recorder = Recorder()
    fit(model, data, 1, [recorder])
    assert {step: round(1 - masks[1].mean(), 3) for step, _, masks in recorder.seen if step in (4, 9, 14)} == {
        4: 0.0,
        9: 0.125,
        14: 0.25,
    }


# The guide to quantization-aware training.


@pytest.fixture(scope="module")
def trained(data):
    keras.utils.set_random_seed(0)
    model = compiled(net())
    fit(model, data, 4)
    return model


def test_guide_quantization(trained, data, tmp_path):
    before = trained.get_weights()
    q = quantization.quantize_model(trained)
    fit(compiled(q), data, 1, validation_split=0.1)
    assert accuracy(q, data) > accuracy(trained, data) - 0.1
    for old, new in zip(before, trained.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert [layer.name for layer in q.layers if isinstance(layer, quantization.QuantizeWrapperV2)] == [
        "quant_conv",
        "quant_hidden",
        "logits",
    ]
    _, scale, _ = q.get_layer("quant_conv").to_integers()["kernel"]
    assert scale.size == 8
    _, scale, _ = q.get_layer("quant_hidden").to_integers()["kernel"]
    assert scale.size == 1
    result = ks.export(q, tmp_path / "q.tflite", calibration_data=data[0])
    assert result.precision == "int8"
    assert not result.float_ops
    assert result.agreement > 0.99


# The comprehensive guide to it.


def test_guide_some_layers_are_quantized(trained, data, tmp_path):
    def only_dense(layer):
        return quantization.quantize_annotate_layer(layer) if isinstance(layer, layers.Dense) else layer

    annotated = keras.models.clone_model(trained, clone_function=only_dense)
    annotated.set_weights(trained.get_weights())
    np.testing.assert_array_equal(annotated(data[0]), trained(data[0]))
    q = quantization.quantize_apply(annotated, quantized_layer_name_prefix="q8_")
    assert [layer.name for layer in q.layers if isinstance(layer, ks.QuantizeAware)] == ["q8_hidden", "logits"]
    fit(compiled(q), data, 1)
    q.save(tmp_path / "q.keras")
    with quantization.quantize_scope():
        loaded = keras.models.load_model(tmp_path / "q.keras")
    np.testing.assert_array_equal(loaded(data[0]), q(data[0]))
    annotated.save(tmp_path / "annotated.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "annotated.keras")(data[0]), annotated(data[0]))


def test_guide_layers_are_annotated_where_they_are_made(data):
    inputs = keras.Input((64,))
    x = quantization.quantize_annotate_layer(layers.Dense(20, activation="relu"))(inputs)
    model = keras.Model(inputs, layers.Flatten()(layers.Dense(10, name="last")(x)))
    q = quantization.quantize_apply(model)
    assert [type(layer).__name__ for layer in q.layers if layer.weights and "Fake" not in type(layer).__name__] == [
        "QuantizeAware",
        "Dense",
    ]


def test_guide_custom_objects_of_a_quantized_model(data, tmp_path):
    class Scaled(layers.Layer):
        def call(self, inputs):
            return 2.0 * inputs

    model = keras.Sequential([keras.Input((64,)), layers.Dense(10), Scaled()])
    with pytest.warns(UserWarning, match="left in float: scaled"):
        q = quantization.quantize_apply(quantization.quantize_annotate_model(model))
    q.save(tmp_path / "q.keras")
    with quantization.quantize_scope({"Scaled": Scaled}):
        keras.models.load_model(tmp_path / "q.keras")


def test_guide_other_grids_are_named_by_the_errors():
    with pytest.raises(NotImplementedError, match=r"quantize_aware\(model, .*quantizers\.Affine\(4\)"):
        types.new_class("DenseQuantizeConfig", (quantization.QuantizeConfig,))
    with pytest.raises(NotImplementedError, match=r'Affine\(8, range="moving_average"\)'):
        quantization.quantizers.MovingAverageQuantizer(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)
    with pytest.raises(
        NotImplementedError, match=r"`quantize_config` is not supported\. .*Received: quantize_config=3"
    ):
        quantization.quantize_annotate_layer(layers.Dense(2), 3)


def test_other_numbers_of_bits(trained):
    scheme = quantization.experimental.default_n_bit.DefaultNBitQuantizeScheme(num_bits_weight=4, disable_per_axis=True)
    q = quantization.quantize_apply(quantization.quantize_annotate_model(trained), scheme)
    integers, scale, _ = q.get_layer("quant_conv").to_integers()["kernel"]
    assert (np.abs(integers).max(), scale.size) == (7, 1)


# The guide to quantization that preserves zeros.


def test_guide_quantization_of_a_pruned_model(data, tmp_path):
    scheme = tfmot_compat.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
    pruned = sparsity.prune_low_magnitude(net(), sparsity.ConstantSparsity(0.5, begin_step=0, frequency=5))
    fit(compiled(pruned), data, 2, [sparsity.UpdatePruningStep()])
    stripped = sparsity.strip_pruning(pruned)
    annotated = quantization.quantize_annotate_model(stripped)
    q = quantization.quantize_apply(annotated, scheme)
    fit(compiled(q), data, 1)
    q.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    fit(loaded, data, 1)  # the zeros survive a file, and more training
    final = ks.finalize(loaded, activations="drop")
    for name, layer in {layer.name: layer for layer in stripped.layers if hasattr(layer, "kernel")}.items():
        was, now = layer.kernel.numpy(), final.get_layer(name).kernel.numpy()
        assert (now[was == 0] == 0).all()
        assert (now[was != 0] != 0).mean() > 0.9
    result = ks.export(loaded, tmp_path / "q.tflite", calibration_data=data[0])
    assert result.precision == "int8"
    assert not result.float_ops
    report = ks.summarize(loaded)
    assert report.total.parameters == ks.summarize(stripped).total.parameters
    with pytest.raises(ValueError, match="has no zeros to preserve"):
        quantization.quantize_apply(quantization.quantize_annotate_model(net()), scheme)


# What is better than in tfmot.


def test_the_last_update_always_happens(tfmot, data):
    """60 % of the way where `frequency` does not divide the span: tfmot stops there."""
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.8, 0, 15, frequency=10)
    model = compiled(sparsity.prune_low_magnitude(net(), pruning_schedule=schedule))
    fit(model, data, 1, [sparsity.UpdatePruningStep()])
    assert [zeros(layer) for layer in wrapped(model)] == pytest.approx([0.8] * 3, abs=0.01)


def test_of_equal_weights_exactly_as_many_stay(data):
    layer = layers.Dense(10, kernel_initializer="ones")
    schedule = sparsity.ConstantSparsity(0.5, 1, frequency=1)
    model = keras.Sequential([keras.Input((64,)), sparsity.prune_low_magnitude(layer, schedule)])
    fit(compiled(model), (data[0].reshape(-1, 64), data[1]), 1, [sparsity.UpdatePruningStep()])
    assert zeros(layer) == 0.5


def test_after_the_end_of_the_schedule(data):
    """The zeros stay, also without the callback; and what is stripped is an ordinary model, with its own weights."""
    model = compiled(sparsity.prune_low_magnitude(net(), sparsity.ConstantSparsity(0.5, 0, frequency=4)))
    fit(model, data, 1, [sparsity.UpdatePruningStep()])
    fit(model, data, 1)
    assert [zeros(layer) for layer in wrapped(model)] == [0.5] * 3
    plain = compiled(sparsity.strip_pruning(model))
    kept = [kernel_of(layer).copy() for layer in wrapped(model)]
    fit(plain, data, 1)
    assert zeros(plain.get_layer("hidden")) < 0.1
    for before, layer in zip(kept, wrapped(model), strict=True):
        np.testing.assert_array_equal(before, kernel_of(layer))


def test_wrapping_again_begins_again(data):
    model = net()
    for share in (0.8, 0.25):
        schedule = sparsity.ConstantSparsity(share, 2, frequency=4)
        pruned = compiled(sparsity.prune_low_magnitude(model, schedule))
        fit(pruned, data, 1, [sparsity.UpdatePruningStep()])
        (_, mask, _) = pruned.get_layer("prune_low_magnitude_hidden").pruning_vars[0]
        assert 1 - mask.mean() == pytest.approx(share, abs=1e-3)


def test_a_compiled_step_in_half_precision(data):
    keras.config.set_dtype_policy("mixed_float16")
    schedule = sparsity.PolynomialDecay(0.0, 0.75, 2, 10, frequency=4)
    model = compiled(sparsity.prune_low_magnitude(net(), schedule))
    model.compile("adam", model.loss, jit_compile=True, steps_per_execution=2)
    fit(model, data, 1, [sparsity.UpdatePruningStep()])
    assert zeros(model.get_layer("prune_low_magnitude_hidden")) == 0.75


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(data, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def run(*callbacks):
        keras.utils.set_random_seed(3)
        schedule = sparsity.PolynomialDecay(0.1, 0.8, 3, 33, frequency=5)
        model = compiled(sparsity.prune_low_magnitude(net(), schedule), "sgd")
        fit(model, data, 2, [*callbacks, sparsity.UpdatePruningStep()])
        return model

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(keras.callbacks.BackupAndRestore(tmp_path), Stop())
    resumed = run(keras.callbacks.BackupAndRestore(tmp_path))
    for one, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_that_tfmot_refuses(data):
    class Unknown(layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(shape=(shape[-1],))

        def call(self, inputs):
            return inputs * self.factor

    model = keras.Sequential(
        [
            keras.Input((8, 8)),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
            layers.Conv1DTranspose(4, 2),
            Unknown(name="unknown"),
            layers.TimeDistributed(layers.Dense(4)),
            layers.SeparableConv1D(4, 2, name="separable"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    with pytest.warns(UserWarning, match=r"not pruned, .*: unknown\. .*PrunableLayer"):
        pruned = sparsity.prune_low_magnitude(model, sparsity.ConstantSparsity(0.5, 0, frequency=4))
    fit(compiled(pruned), (data[0][..., 0], data[1]), 1, [sparsity.UpdatePruningStep()])
    report = ks.summarize(sparsity.strip_pruning(pruned))
    assert report.total.sparsity > 0.45
    assert not (model.get_layer("separable").depthwise_kernel.numpy() == 0).any()


def test_frozen_layers_stay_frozen():
    model = net()
    model.get_layer("conv").trainable = False
    pruned = sparsity.prune_low_magnitude(model)
    assert not pruned.layers[0].trainable_variables
    assert len(sparsity.strip_pruning(pruned).trainable_variables) == len(model.trainable_variables) == 6


def test_the_native_callback_takes_these_schedules(data):
    model = compiled(net())
    schedule = sparsity.PolynomialDecay(0.0, 0.75, 0, 10, frequency=5)
    fit(model, data, 1, [ks.MagnitudePruning(schedule, allocation="uniform")])
    assert zeros(model.get_layer("hidden")) == 0.75


def test_a_schedule_of_ones_own(data):
    class EveryThird(sparsity.PruningSchedule):
        def __init__(self, most):
            self.most = most

        def __call__(self, step):
            return step % 3 == 0 and step < 16, self.most * min(step / 15, 1)

        def get_config(self):
            return {"class_name": "EveryThird", "config": {"most": self.most}}

    model = compiled(sparsity.prune_low_magnitude(net(), EveryThird(0.5)))
    recorder = Recorder()
    fit(model, data, 1, [recorder])
    shares = {step: round(1 - masks[1].mean(), 2) for step, _, masks in recorder.seen}
    assert [shares[step] for step in (1, 2, 4, 5, 14, 19)] == [0.0, 0.1, 0.1, 0.2, 0.5, 0.5]
    assert EveryThird.from_config(EveryThird(0.5).get_config()).most == 0.5


def test_the_config_of_a_wrapper_is_complete():
    schedule = sparsity.PolynomialDecay(0.1, 0.6, 3, 30, power=2, frequency=7)
    wrapper = sparsity.PruneLowMagnitude(layers.Dense(4), schedule, (2, 1), "MAX", (1, 4))
    again = sparsity.PruneLowMagnitude.from_config(wrapper.get_config())
    assert again.get_config() == wrapper.get_config()
    assert (again.sparsity_m_by_n, again.block_size, again.block_pooling_type) == ((1, 4), (2, 1), "MAX")


# What is refused.


def test_training_without_the_callback(data):
    model = compiled(sparsity.prune_low_magnitude(net()))
    model.predict(data[0][:2], verbose=0)
    with pytest.raises(RuntimeError, match=r"'prune_low_magnitude_conv' is in training, .*UpdatePruningStep\(\)\]"):
        fit(model, data)


def test_a_fit_that_is_too_short(data):
    model = compiled(sparsity.prune_low_magnitude(net(), sparsity.ConstantSparsity(0.5, 0)))
    with pytest.warns(UserWarning, match=r"Nothing will be pruned in conv, hidden, logits .* 20 steps, .* at step 100"):
        fit(model, data, 1, [sparsity.UpdatePruningStep()])


def test_nothing_to_prune(data):
    with pytest.raises(ValueError, match=r"has no layers to prune\. Wrap it first"):
        fit(compiled(net()), data, 1, [sparsity.UpdatePruningStep()])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparsity.prune_low_magnitude(3), ValueError, r"must be a Sequential .*Received: 3 of type int"),
        (lambda: sparsity.prune_low_magnitude(net(tf_keras)), ValueError, r"from_tf_keras\(model\) makes a Keras 3"),
        (lambda: sparsity.prune_low_magnitude(net(), 0.5), TypeError, r"`pruning_schedule` must be .*Received: 0\.5"),
        (lambda: sparsity.prune_low_magnitude(net(), pruning_policy=3), TypeError, r"must be a `PruningPolicy`"),
        (lambda: sparsity.prune_low_magnitude(net(), block_size=4), ValueError, r"`block_size` must be two ints"),
        (lambda: sparsity.prune_low_magnitude(net(), block_pooling_type="MIN"), ValueError, r"\"AVG\" or \"MAX\""),
        (lambda: sparsity.prune_low_magnitude(net(), sparsity_m_by_n=(4, 2)), ValueError, r"0 < m < n\. Received"),
        (lambda: sparsity.prune_low_magnitude(keras.Model()), ValueError, r"subclassed"),
        (lambda: sparsity.PruneLowMagnitude(net()), ValueError, r"wraps one layer"),
        (lambda: sparsity.strip_pruning(layers.Dense(2)), ValueError, r"must be a Keras model"),
        (lambda: sparsity.PruningSummaries(log_dir=None), ValueError, r"`log_dir` must be"),
        (lambda: sparsity.PolynomialDecay(0.0, 80, 0, 10), ValueError, r"for 80 % pass 0\.8"),
        (lambda: sparsity.PolynomialDecay(0.0, 0.8, 10, -1), ValueError, r"not -1\. Received: begin_step=10"),
        (lambda: sparsity.ConstantSparsity(0.5, 10, 5, 0), ValueError, r"not be before `begin_step`; `frequency`"),
        (lambda: sparsity.ConstantSparsity(0.5, 1.5), TypeError, r"whole number of steps\. Received: begin_step=1\.5"),
        (lambda: quantization.quantize_model(None), ValueError, r"A Keras model is needed\. Received: None"),
        (
            lambda: quantization.quantize_model(sparsity.prune_low_magnitude(net())),
            ValueError,
            r"strip_pruning\(model\)",
        ),
        (lambda: quantization.quantize_apply(net()), ValueError, r"No layer of model .* is marked"),
        (lambda: quantization.quantize_annotate_layer(net()), ValueError, r"there is quantize_annotate_model"),
        (lambda: quantization.quantize_apply(quantization.quantize_annotate_model(net()), 8), TypeError, r"scheme=8"),
        (lambda: quantization.quantize_scope(3), TypeError, r"takes dictionaries"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
