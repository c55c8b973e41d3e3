"""The report against slow counts of the same things, and that reading a model leaves it as it was."""

import io
import json
import sys

import keras
import numpy as np
import pytest
import rich
from keras import layers
from networks import small_convnet

import keras_squeeze as ks
from keras_squeeze.analysis.encodings import encode
from keras_squeeze.analysis.energy import dram_pj, mac_pj


def prune_by_hand(model, every: int) -> int:
    """Sets every n-th value of every kernel to zero; how many that are."""
    zeros = 0
    for variable in model.weights:
        if variable.name.endswith("kernel"):
            values = variable.numpy()
            values.reshape(-1)[::every] = 0
            variable.assign(values)
            zeros += int((values == 0).sum())
    return zeros


def nested() -> keras.Model:
    """A shared nested model, attention, recurrence and a custom layer."""
    inner = keras.Sequential([keras.Input((6, 8)), layers.Dense(8, name="dense"), layers.PReLU()], name="inner")
    a, b = keras.Input((6, 8), name="a"), keras.Input((6, 8), name="b")
    x = layers.MultiHeadAttention(2, 4, name="attention")(inner(a), inner(b))
    x = layers.Bidirectional(layers.LSTM(3), name="both")(x)
    return keras.Model([a, b], layers.Dense(2, name="head")(layers.BatchNormalization(name="norm")(x)))


class WithToken(keras.Model):
    """A subclassed model with a weight of its own."""

    def __init__(self):
        super().__init__(name="with_token")
        self.token = self.add_weight(shape=(4,), name="token", initializer="ones")
        self.dense = layers.Dense(3, name="dense")

    def call(self, x):
        return self.dense(x + self.token)


def with_token() -> keras.Model:
    model = WithToken()
    model(np.ones((2, 4)))
    return model


def text() -> keras.Model:
    return keras.Sequential([keras.Input((7,), dtype="int32"), layers.Embedding(9, 4), layers.GRU(3)])


MODELS = {"convnet": small_convnet, "nested": nested, "with token": with_token, "text": text}


def inputs_of(model):
    shapes = [(4,)] if isinstance(model, WithToken) else [tensor.shape[1:] for tensor in model.inputs]
    arrays = [np.random.default_rng(0).integers(0, 9, (3, *shape)).astype("float32") for shape in shapes]
    return arrays if len(arrays) > 1 else arrays[0]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_parameters_and_zeros(make):
    model = make()
    zeros = prune_by_hand(model, every=3)
    report = ks.summarize(model)
    assert report.total.parameters == model.count_params() == sum(layer.parameters for layer in report.layers)
    assert report.total.dense_bytes == sum(v.numpy().nbytes for v in model.weights)
    assert report.total.zeros == zeros == sum(layer.zeros for layer in report.layers)
    assert report.total.sparsity == zeros / report.total.compressible
    assert report.total.bits == 32
    paths = [layer.path for layer in report.layers]
    assert len(set(paths)) == len(paths)


def test_the_rows_are_the_layers_with_weights_in_their_order():
    rows = [(layer.path, layer.kind) for layer in ks.summarize(nested()).layers]
    assert rows == [
        ("inner/dense", "Dense"),
        ("inner/p_re_lu", "PReLU"),
        ("attention", "MultiHeadAttention"),
        ("both/forward_lstm", "LSTM"),
        ("both/backward_lstm", "LSTM"),
        ("norm", "BatchNormalization"),
        ("head", "Dense"),
    ]


def test_the_weights_of_the_model_itself():
    first, second = ks.summarize(with_token()).layers
    assert (first.path, first.kind, first.parameters, first.macs) == ("with_token", "WithToken", 4, 0)
    assert (second.path, second.parameters, second.macs) == ("dense", 4 * 3 + 3, 4 * 3)


def test_a_new_model_has_no_sparsity_though_its_biases_are_zero():
    report = ks.summarize(small_convnet())
    assert report.total.zeros == 0
    assert report.total.sparsity == 0.0
    norm = next(layer for layer in report.layers if layer.path == "norm")
    assert (norm.parameters, norm.compressible, norm.sparsity) == (4 * 8, 0, 0.0)
    assert ("norm", "BatchNormalization has no weights worth compressing") in report.skipped


def test_a_layer_by_hand():
    inputs, units = 12, 5
    model = keras.Sequential([keras.Input((inputs,)), layers.Dense(units, name="only")])
    kernel = np.zeros((inputs, units), "float32")
    kernel[::3] = np.random.default_rng(0).normal(size=(4, units))  # of 12 rows; on no grid
    model.layers[0].set_weights([kernel, np.ones(units)])
    (layer,) = ks.summarize(model).layers
    nonzeros, whole = 4 * units, inputs * units
    assert layer.zeros == whole - nonzeros
    assert layer.sparsity == (whole - nonzeros) / whole
    assert layer.macs == whole
    assert layer.effective_macs == nonzeros
    assert layer.dense_bytes == 4 * (whole + units)
    assert layer.compressed_bytes < -(-whole // 8) + 4 * nonzeros + 4 * units  # a bit mask and the others as they are


def test_effective_macs_of_layers_with_several_weights():
    rows, columns, channels, filters, size = 7, 6, 4, 3, 3
    model = keras.Sequential([keras.Input((rows, columns, channels)), layers.SeparableConv2D(filters, size)])
    layer = model.layers[0]
    layer.pointwise_kernel.assign(np.eye(channels, filters)[None, None])  # 3 of 12 stay
    depthwise = (5 * 4) * size * size * channels
    assert ks.summarize(model).total.effective_macs == depthwise + (5 * 4) * 3

    steps, width, heads, key = 5, 6, 2, 3
    inputs = keras.Input((steps, width))
    attention = layers.MultiHeadAttention(heads, key)
    model = keras.Model(inputs, attention(inputs, inputs))
    attention.query_dense.kernel.assign(np.zeros((width, heads, key)))
    projection = steps * width * heads * key
    report = ks.summarize(model)
    assert report.total.macs == 4 * projection + 2 * heads * steps**2 * key
    assert report.total.effective_macs == 3 * projection + 2 * heads * steps**2 * key

    model = keras.Sequential([keras.Input((7, 5)), layers.LSTM(3)])
    model.layers[0].cell.recurrent_kernel.assign(np.zeros((3, 12)))
    assert ks.summarize(model).total.effective_macs == 7 * 5 * 12


def test_compressed_bytes_are_those_of_the_encoding():
    model = small_convnet()
    prune_by_hand(model, every=2)
    for layer in ks.summarize(model).layers:
        weights = model.get_layer(layer.path).weights
        assert layer.compressed_bytes == sum(encode(weight.numpy()).num_bytes for weight in weights)


def test_energy_of_operations_against_the_published_table():
    assert mac_pj(None, None) == pytest.approx(0.9 + 3.7)
    assert mac_pj(None, None, 16) == pytest.approx(0.4 + 1.1)
    assert mac_pj(8, None) == mac_pj(None, 8) == mac_pj(None, None)  # one float makes both floats
    assert mac_pj(8, 8) == pytest.approx(0.1 + 0.2, rel=1e-2)  # the sum is kept in 32 bits
    assert mac_pj(32, 32) == pytest.approx(0.1 + 3.1, rel=1e-2)
    assert mac_pj(1, 8) == mac_pj(2, 8) == pytest.approx(0.1)  # nothing to multiply
    assert mac_pj(1, None) == pytest.approx(0.9)
    assert mac_pj(4, 8) == mac_pj(8, 4) < mac_pj(8, 8)
    assert dram_pj(4) == pytest.approx(640)


def test_energy_of_a_layer_by_hand():
    model = keras.Sequential([keras.Input((12,)), layers.Dense(5, use_bias=False, name="only")])
    kernel = np.random.default_rng(0).uniform(0.3, 1, (12, 5))  # none of them rounds to zero
    model.layers[0].set_weights([kernel])
    assert ks.summarize(model).total.energy_pj == pytest.approx(60 * (4.6 + 640))
    kernel[::3] = 0
    model.layers[0].set_weights([kernel])
    assert ks.summarize(model).total.energy_pj == pytest.approx(40 * 4.6 + _read(32))

    whole = ks.quantize_aware(model, activations="int8")
    assert ks.summarize(whole).total.energy_pj == pytest.approx(40 * 0.3 + _read(8), rel=1e-3)
    only_weights = ks.quantize_aware(model, activations=None)
    assert ks.summarize(only_weights).total.energy_pj == pytest.approx(40 * 4.6 + _read(8))
    for kind in ("keep", "drop"):
        plain = ks.finalize(_seen(whole), activations=kind)
        joined = 0.3 if kind == "keep" else 4.6
        assert ks.summarize(plain).total.energy_pj == pytest.approx(40 * joined + _read(8), rel=1e-3)
    assert f"energy of one inference, an estimate: {(40 * 4.6 + _read(32)) / 1000:.3g} nJ" in str(ks.summarize(model))


def _read(bits) -> float:
    """Reading 40 of 60 weights, and a bit for each that says which, from DRAM."""
    return 640 / 32 * (40 * bits + 60)


def test_a_table_that_is_looked_up_in_is_not_read_whole():
    model = keras.Sequential([keras.Input((6,)), layers.Embedding(1000, 8), layers.GlobalAveragePooling1D()])
    assert ks.summarize(model).total.energy_pj == 0


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_fine_grids_are_found_without_wrappers(bits):
    model = keras.Sequential([keras.Input((30,)), layers.Dense(20)])
    q = ks.quantize_aware(model, f"int{bits}", activations=None)
    assert ks.summarize(ks.finalize(q)).layers[0].bits == ks.summarize(q).layers[0].bits == bits


def _seen(model):
    model(np.ones((1, 12)), training=True)
    return model


def test_a_wrapper_that_computes_for_its_layer():
    model = small_convnet()
    q = ks.quantize_aware(model, {"conv": "xnor"})
    report = ks.summarize(q)
    assert report.total.macs == ks.summarize(model).total.macs
    assert report.total.effective_macs == report.total.macs


def test_energy_is_unknown_where_the_macs_are():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Lambda(lambda x: x * 2)])
    model.layers[1].function = lambda x: 1 / 0
    report = ks.summarize(model)
    assert report.total.energy_pj is None
    assert "energy" not in str(report)


def test_json_dict_and_dataframe():
    report = ks.summarize(small_convnet())
    report.frozen.append(("logits", "model output"))
    as_dict = report.to_dict()
    assert json.loads(report.to_json(indent=2)) == as_dict
    assert as_dict["total"]["sparsity"] == report.total.sparsity
    assert as_dict["frozen"] == [["logits", "model output"]]
    frame = report.to_dataframe()
    assert list(frame["path"]) == [layer.path for layer in report.layers]
    assert frame["macs"].sum() == report.total.macs
    assert {"kind", "zeros", "sparsity", "bits", "dense_bytes", "compressed_bytes"} <= set(frame.columns)


def test_a_dataframe_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        ks.summarize(small_convnet()).to_dataframe()


def test_the_table_as_text():
    model = small_convnet()
    prune_by_hand(model, every=2)
    report = ks.summarize(model)
    report.frozen += [(f"layer_{i}", "model output") for i in range(7)]
    text = str(report)
    assert all(layer.path in text and layer.kind in text for layer in report.layers)
    assert f"{model.count_params():,}" in text
    assert f"{report.total.macs:,}" in text
    assert "50.0%" in text
    assert "skipped: norm: BatchNormalization has no weights worth compressing" in text
    assert "frozen: layer_0, layer_1, layer_2, layer_3, layer_4 and 2 more: model output" in text
    assert max(map(len, text.splitlines())) <= 120
    assert text.isascii()


def test_many_reasons_are_shortened():
    report = ks.summarize(small_convnet())
    report.skipped[:] = [(f"layer_{i}", f"reason {i}") for i in range(9)]
    assert "reason 4" in str(report)
    assert "reason 5" not in str(report)
    assert "skipped: and 4 more" in str(report)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_in_color(width):
    model = small_convnet()
    prune_by_hand(model, every=2)
    console = rich.console.Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    console.print(ks.summarize(model))
    text = console.file.getvalue()
    assert "\x1b[32m" in text  # green, as layers with zeros are
    assert all(name in text for name in ("conv", "hidden", "logits", "total"))
    assert ("Conv2D" in text) == (width == 200)


def test_names_are_not_markup():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="a<b>&[red]c")], name="<i>[bold]m")
    report = ks.summarize(model)
    assert "a<b>&[red]c" in str(report)
    assert "<i>[bold]m" in str(report)
    page = report._repr_html_()
    assert "a&lt;b&gt;&amp;[red]c" in page
    assert "&lt;i&gt;" in page
    assert "<b>" not in page
    assert page.count("<tr>") == 1 + len(report.layers) + 1


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_model_is_left_as_it_was(make):
    model = make()
    members = model._flatten_layers()
    x = inputs_of(model)
    predicted = model.predict(x, verbose=0)
    functions = model.predict_function, model.train_function
    weights = model.get_weights()
    attributes = [(id(member), dict(vars(member))) for member in members]
    reports = [ks.summarize(model).to_dict() for _ in range(2)]
    assert reports[0] == reports[1]
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert (model.predict_function, model.train_function) == functions
    for member, (identity, before) in zip(members, attributes, strict=True):
        assert id(member) == identity
        assert "call" not in vars(member)
        assert vars(member).keys() == before.keys()
        assert all(vars(member)[name] is before[name] for name in before)
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)


def test_the_model_is_left_as_it_was_when_counting_fails():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Lambda(lambda x: x * 2)])
    failing = model.layers[1]
    failing.function = lambda x: 1 / 0
    assert ks.summarize(model).total.macs is None
    assert all("call" not in vars(layer) for layer in model._flatten_layers())
    failing.function = lambda x: x * 2
    assert ks.summarize(model).total.macs == 4 * 3


def test_a_model_in_training_goes_on(digits, tmp_path):
    x, y = digits
    model = small_convnet()
    model.fit(x[:64], y[:64], verbose=0, shuffle=False)
    iterations, step = int(model.optimizer.iterations.numpy()), model.train_function
    ks.summarize(model)
    assert int(model.optimizer.iterations.numpy()) == iterations
    assert model.train_function is step
    model.fit(x[:64], y[:64], verbose=0, shuffle=False)

    plain = small_convnet()
    for _ in range(2):
        plain.fit(x[:64], y[:64], verbose=0, shuffle=False)
    assert all(np.array_equal(a, b) for a, b in zip(plain.get_weights(), model.get_weights(), strict=True))

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert ks.summarize(loaded).to_dict() == ks.summarize(model).to_dict()
    np.testing.assert_array_equal(loaded.predict(x[:9], verbose=0), model.predict(x[:9], verbose=0))


def test_inside_a_callback(digits):
    x, y = digits
    model, seen = small_convnet(), []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(ks.summarize(model).total.macs))
    model.fit(x[:64], y[:64], verbose=0, epochs=2, callbacks=[callback])
    assert seen == 2 * [(6 * 6) * (3 * 3) * 1 * 8 + (6 * 6 * 8) * 32 + 32 * 10]


def test_losses_and_random_state_are_left_alone():
    inputs = keras.Input((4,))
    x = layers.Dense(3, activity_regularizer="l2")(layers.Dropout(0.5)(inputs))
    model = keras.Model(inputs, x)
    model(np.ones((2, 4)))
    losses = [float(loss) for loss in model.losses]
    states = [variable.numpy() for variable in model.non_trainable_variables]
    ks.summarize(model)
    assert [float(loss) for loss in model.losses] == losses
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(states, model.non_trainable_variables, strict=True))


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_float16"])
def test_other_float_types(policy):
    keras.config.set_dtype_policy(policy)
    model = small_convnet()
    zeros = prune_by_hand(model, every=2)
    report = ks.summarize(model)
    assert report.total.zeros == zeros
    assert report.total.bits == (32 if policy == "mixed_float16" else 16)
    assert report.total.dense_bytes == model.count_params() * report.total.bits // 8
    assert report.total.macs == (6 * 6) * (3 * 3) * 1 * 8 + (6 * 6 * 8) * 32 + 32 * 10


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_model_that_keras_has_quantized(mode):
    def make():
        inputs = keras.Input((6, 8))
        x = layers.MultiHeadAttention(2, 4)(inputs, inputs)
        return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))

    macs = ks.summarize(make()).total.macs
    model = make()
    model.quantize(mode)
    report = ks.summarize(model)
    assert report.total.macs == macs
    assert report.total.bits == 8
    assert report.total.parameters == model.count_params()
    assert "holds integers" in str(report)


def test_bits_of_a_model_of_two_types():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, dtype="float16", name="half"), layers.Dense(4, name="whole")]
    )
    report = ks.summarize(model)
    assert [layer.bits for layer in report.layers] == [16, 32]
    assert report.total.bits == (16 * 24 + 32 * 24) / 48


def test_a_model_without_weights():
    report = ks.summarize(keras.Sequential([keras.Input((4,)), layers.ReLU()]))
    assert report.layers == []
    assert (report.total.parameters, report.total.sparsity, report.total.macs) == (0, 0.0, 0)
    assert "total" in str(report)
    assert len(report.to_dataframe()) == 0


def test_bytes_for_people():
    from keras_squeeze.analysis.tables import format_bytes

    shown = [format_bytes(n) for n in (0, 999, 1000, 999_949, 999_950, 13_600_000, 2_500_000_000_000)]
    assert shown == ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "13.6 MB", "2,500.0 GB"]
