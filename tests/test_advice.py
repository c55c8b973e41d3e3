"""Every rule speaks where it fits and is silent where it does not; its numbers are those of the model."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_squeeze as ks
from keras_squeeze.evaluation import advice
from keras_squeeze.evaluation.advice import RULES, Ratio
from keras_squeeze.evaluation.plans import zeros_of
from keras_squeeze.introspection.selection import find_layers


def convnet(width=16, head=10) -> keras.Model:
    """Three convolutions; nearly all of the MACs are theirs."""
    return with_biases(
        keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                layers.Conv2D(16, 3, padding="same", activation="relu", name="first"),
                layers.Conv2D(width, 3, padding="same", activation="relu", name="second"),
                layers.Conv2D(32, 3, padding="same", activation="relu", name="third"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(head, name="logits"),
            ]
        )
    )


def mlp(units=64) -> keras.Model:
    blocks = [layers.Dense(units, activation="relu", name=name) for name in ("hidden", "inner")]
    return with_biases(keras.Sequential([keras.Input((64,)), *blocks, layers.Dense(10, name="logits")]))


def tiny() -> keras.Model:
    return keras.Sequential([keras.Input((16,)), layers.Dense(16, name="hidden"), layers.Dense(4, name="logits")])


def with_biases(model) -> keras.Model:
    """As after training: what is zero at first would be stored as nothing."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.name == "bias":
            variable.assign(rng.normal(size=variable.shape))
    return model


class Adapter(layers.Layer):
    """A layer that is not in the layer table."""

    def build(self, shape):
        self.down = self.add_weight(shape=(shape[-1], 100), name="down")

    def call(self, x):
        return x @ self.down


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.dense = layers.Dense(24, name="dense")

    def call(self, x):
        return self.dense(x)


def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.ones((2, 16)))
    return model


def with_adapter() -> keras.Model:
    return keras.Sequential([keras.Input((50,)), Adapter(name="adapter"), layers.Dense(8, name="dense")])


def of_open_size() -> keras.Model:
    return keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(16, 3), layers.GlobalMaxPooling2D()])


def empty() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layers.ReLU()], name="empty")


def pruned() -> keras.Model:
    model = mlp()
    ks.prune_weights(model, 0.75)
    return model


def recurrent() -> keras.Model:
    rows = [layers.LSTM(33, return_sequences=True, name="lstm"), layers.Bidirectional(layers.GRU(8), name="both")]
    return with_biases(keras.Sequential([keras.Input((10, 8)), *rows, layers.Dense(4, name="logits")]))


def attentive() -> keras.Model:
    inputs = keras.Input((6, 16))
    x = layers.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    return with_biases(keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x))))


def masked() -> keras.Model:
    """Half of the neurons are zero, and none of the other weights."""
    model = convnet(32)
    ks.prune_neurons(model, 0.5)
    return model


def with_a_dead_neuron() -> keras.Model:
    model = convnet(32)
    for variable in model.get_layer("second").weights:
        values = np.array(variable.numpy())
        values[..., 0] = 0
        variable.assign(values)
    return model


# What only the sentence of this rule has.
MARKS = {
    "zeros_without_a_place": "have no place",
    "no_integer_kernel": "have no integer kernel",
    "dead_neurons": "keras_squeeze.shrink",
    "weights_only": "(dynamic range)",
    "too_small": "too small",
    "scattered_zeros": "make the model smaller",
    "few_bits": "a gain in size",
    "static_int8": "are smaller",
    "wrapped_by_hand": "by hand",
    "recurrent_in_float": "Recurrent layers stay in float",
    "fewer_neurons": "of the neurons, evenly",
    "odd_widths": "no multiple of 8 waste",
    "prospects": "Nothing is compressed yet",
    "where_the_bytes_are": "Where the bytes",
    "where_the_macs_are": "Where the MACs",
    "what_stays": "whatever is done",
}

EVERYTHING = {"sparsity": 0.5, "weights": "binary", "activations": None, "neurons": 0.5}

# A model, a recipe, and the rules that fit, besides those that say where the bytes and the MACs are.
SPOKEN = [
    (mlp, None, ["prospects"]),
    (convnet, {}, ["prospects"]),
    (mlp, {"sparsity": 0.5}, ["scattered_zeros"]),
    (mlp, {"sparsity": 0.5, "pattern": "2:4"}, ["scattered_zeros"]),
    (mlp, {"sparsity": 0.8, "pattern": (1, 4), "weights": "int8"}, ["scattered_zeros", "static_int8"]),
    (mlp, {"sparsity": 0.5, "weights": "ternary"}, ["scattered_zeros", "few_bits"]),
    (mlp, {"sparsity": 0.5, "weights": "binary"}, ["zeros_without_a_place", "few_bits"]),
    (mlp, {"weights": "int16"}, ["no_integer_kernel"]),
    (mlp, {"weights": "int12", "activations": None}, ["no_integer_kernel"]),
    (mlp, {"weights": "int8", "activations": "int4"}, ["no_integer_kernel"]),
    (convnet, {"weights": "int8", "activations": None}, ["weights_only"]),
    (mlp, {"weights": "int4", "activations": None}, ["weights_only", "few_bits"]),
    (mlp, {"weights": "int4"}, ["few_bits"]),
    (mlp, {"weights": "xnor"}, ["few_bits"]),
    (mlp, {"weights": "int8"}, ["static_int8"]),
    (mlp, {"weights": "fixed8"}, ["static_int8"]),
    (tiny, {"weights": "int8"}, ["too_small", "static_int8"]),
    (tiny, {"sparsity": 0.5}, ["scattered_zeros"]),
    (mlp, {"neurons": 0.5}, ["fewer_neurons"]),
    (convnet, {"neurons": 0.25, "weights": "int8"}, ["static_int8", "fewer_neurons"]),
    (lambda: convnet(17), None, ["odd_widths", "prospects"]),
    (lambda: convnet(4), None, ["prospects"]),
    (lambda: convnet(16, head=37), None, ["prospects"]),
    (
        lambda: mlp(65),
        EVERYTHING,
        ["zeros_without_a_place", "weights_only", "few_bits", "fewer_neurons", "odd_widths"],
    ),
    (with_adapter, None, ["prospects", "what_stays"]),
    (recurrent, None, ["prospects"]),
    (recurrent, {"weights": "int8", "sparsity": 0.5}, ["scattered_zeros", "static_int8", "recurrent_in_float"]),
    (recurrent, {"weights": "binary", "activations": None}, ["few_bits", "recurrent_in_float"]),
    (attentive, {"weights": "int8"}, ["static_int8"]),
    (subclassed, {"weights": "int8"}, ["static_int8", "wrapped_by_hand"]),
    (lambda: ks.quantize_aware(convnet(), "binary"), None, ["few_bits"]),
    (pruned, None, ["scattered_zeros"]),
    (masked, None, ["dead_neurons"]),
    (with_a_dead_neuron, None, ["dead_neurons", "prospects"]),
    (masked, {"weights": "int8"}, ["dead_neurons", "static_int8"]),
    (lambda: ks.quantize_aware(masked()), None, ["dead_neurons", "static_int8"]),
    (lambda: ks.quantize_aware(pruned(), "int4"), None, ["scattered_zeros", "few_bits"]),
    (lambda: ks.finalize(ks.quantize_aware(pruned(), "int4")), None, ["scattered_zeros", "few_bits"]),
    (lambda: ks.quantize_aware(convnet()), None, ["static_int8"]),
    (lambda: ks.quantize_aware(convnet(), activations=None), None, ["weights_only"]),
    (lambda: ks.quantize_aware(tiny()), None, ["too_small", "static_int8"]),
    (lambda: ks.quantize_aware(mlp(), "ternary"), None, ["few_bits"]),
    (lambda: ks.quantize_aware(mlp(), "int4"), None, ["few_bits"]),
    (lambda: ks.finalize(ks.quantize_aware(mlp(), "int4")), None, ["few_bits"]),
    (lambda: ks.finalize(ks.quantize_aware(mlp())), None, ["static_int8"]),
    (lambda: ks.finalize(ks.quantize_aware(mlp()), activations="drop"), None, ["weights_only"]),
]


@pytest.fixture
def figures(monkeypatch):
    """Ratios that are all different, of machines on which every rule has something to say."""
    table = {key: Ratio(1.2 + place / 100, 0.3 + place / 100) for place, key in enumerate(advice.MEASURED)}
    for kind in ("convolutional", "dense"):
        table[kind, "dynamic-range int8"] = Ratio(2.5, 0.29)
        table[kind, "static int8"] = Ratio(0.48 if kind == "dense" else 0.47, 0.26)
    table["tiny", "static int8"] = Ratio(0.97, 1.1)
    monkeypatch.setattr(advice, "MEASURED", table)
    return table


def sentence(findings, mark) -> str:
    (found,) = [finding for finding in findings if mark in finding]
    return found


def said(rule, make, recipe=None, **options) -> str:
    return sentence(ks.advise(make(), recipe, **options), MARKS[rule])


def kilobytes(number) -> str:
    return f"{number / 1000:.1f} kB"


def test_every_rule_is_among_the_cases():
    assert list(MARKS) == [rule.__name__ for rule in RULES]
    for rule in MARKS:
        speaking = [rule in rules for _, _, rules in SPOKEN]
        assert any(speaking) or rule.startswith("where_")
        assert not all(speaking)


@pytest.mark.parametrize(("make", "recipe", "rules"), SPOKEN)
def test_which_rules_fit_the_most_important_first(figures, make, recipe, rules):
    findings = ks.advise(make(), recipe)
    spoken = [[rule for rule, mark in MARKS.items() if mark in finding] for finding in findings]
    expected = {*rules, "where_the_bytes_are", "where_the_macs_are"}
    assert spoken == [[rule] for rule in MARKS if rule in expected]
    assert all(finding.endswith(".") and any(map(str.isdigit, finding)) for finding in findings)


def packed_kilobytes(sparsity=0.0, weights=None) -> str:
    """What the weights of `mlp` take in a packed file, once they are compressed."""
    model = mlp()
    if sparsity:
        ks.prune_weights(model, sparsity)
    if weights:
        model = ks.quantize_aware(model, weights)
    return kilobytes(ks.summarize(model).total.compressed_bytes)


def test_expected_bytes_in_sentences(figures):
    before = kilobytes(4 * mlp().count_params())
    text = said("static_int8", mlp, {"weights": "int8"})
    assert f"take about {packed_kilobytes(weights='int8')} instead of {before}" in text
    text = said("static_int8", mlp, {"weights": "int8", "sparsity": 0.8})
    assert f"take about {packed_kilobytes(weights='int8')} instead of {before}" in text  # the zeros: another sentence
    text = said("scattered_zeros", mlp, {"sparsity": 0.8})
    assert f"take about {packed_kilobytes(0.8)} instead of" in text
    text = said("few_bits", mlp, {"weights": "binary"})
    assert f"packed, the weights take about {packed_kilobytes(weights='binary')} instead of {before}" in text


def in_time() -> keras.Model:
    inner = layers.TimeDistributed(layers.Dense(24, activation="relu"), name="each")
    return with_biases(keras.Sequential([keras.Input((5, 16)), inner, layers.Dense(32), layers.Dense(8)]))


def nested() -> keras.Model:
    inner = keras.Sequential([keras.Input((32,)), layers.Dense(48), layers.Dense(32)], name="inner")
    return with_biases(keras.Sequential([keras.Input((16,)), layers.Dense(32), inner, layers.Dense(8)]))


EXPECTED = [
    *((mlp, {"weights": name}) for name in ("int8", "fixed8", "int4", "ternary", "binary", "binary_connect", "int16")),
    (mlp, {"weights": ks.quantizers.Affine(6, per_channel=False)}),
    (mlp, {"weights": ks.quantizers.LearnedStep(8)}),
    *((mlp, {"sparsity": sparsity}) for sparsity in (0.02, 0.3, 0.8, 0.95)),
    (mlp, {"sparsity": 0.8, "weights": "int8"}),
    *((convnet, recipe) for recipe in ({"weights": "int8"}, {"weights": "binary"}, {"sparsity": 0.8})),
    *((in_time, {"weights": name}) for name in ("int8", "ternary")),
    *((nested, {"weights": name}) for name in ("int8", "binary")),
]


@pytest.mark.parametrize(("make", "recipe"), EXPECTED)
def test_expected_bytes_are_those_of_the_compressed_model(make, recipe):
    model = make()
    plan = advice.read_recipe(recipe)
    report, found = ks.summarize(model), find_layers(model)
    case = advice.Case(model, plan, True, "x86", report, found, zeros_of(model, report, found))
    expected = case.expected_bytes(plan.sparsity, plan.weights)
    if "sparsity" in recipe:
        ks.prune_weights(model, recipe["sparsity"], allocation="uniform")
    if "weights" in recipe:
        model = ks.quantize_aware(model, recipe["weights"])
    assert expected == pytest.approx(ks.summarize(model).total.compressed_bytes, abs=8)


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_what_removed_neurons_leave(figures, make, fraction):
    model = make()
    before = ks.summarize(model).total
    text = said("fewer_neurons", make, {"neurons": fraction})
    ks.prune_neurons(model, fraction, allocation="uniform")
    after = ks.summarize(ks.shrink(model)).total
    assert after.macs < before.macs
    assert f"{after.macs:,} of {before.macs:,} MACs ({after.macs / before.macs:.0%})" in text
    assert f"{after.parameters:,} of {before.parameters:,} parameters" in text
    assert f"{fraction:.0%} of the neurons" in text


def test_half_of_the_neurons_of_a_deep_model_leave_a_quarter():
    blocks = [layers.Dense(64, activation="relu") for _ in range(20)]
    model = keras.Sequential([keras.Input((64,)), *blocks])
    macs = 64 * 32 + 18 * 32 * 32 + 32 * 64  # the ends lose one side only
    text = sentence(ks.advise(model, {"neurons": 0.5}), "evenly")
    assert f"{macs:,} of {20 * 64 * 64:,} MACs ({macs / (20 * 64 * 64):.0%})" in text


def test_neurons_that_are_masked(figures):
    before, after = ks.summarize(masked()).total, ks.summarize(ks.shrink(masked())).total
    text = said("dead_neurons", masked)
    assert f"leaves {after.macs:,} of {before.macs:,} MACs" in text
    assert f"{after.parameters:,} of {before.parameters:,} parameters" in text
    both = masked()
    ks.prune_weights(both, 0.75, allocation="uniform")  # the zeros of the neurons among them
    small = ks.summarize(ks.shrink(both)).total
    findings = ks.advise(both)
    assert f"{small.parameters:,} of" in sentence(findings, MARKS["dead_neurons"])
    kernels, neurons = 9 * (3 * 16 + 16 * 32 + 32 * 32) + 32 * 10, 9 * (3 * 16 + 16 * 32 + 32 * 32) / 2
    scattered = (0.75 * kernels - neurons) / (kernels - neurons)
    assert sentence(findings, MARKS["scattered_zeros"]).startswith(f"{scattered:.0%} unstructured zeros")


def test_neurons_that_cannot_go(figures):
    assert "No neuron can be removed: the model is subclassed" in " ".join(ks.advise(subclassed(), {"neurons": 0.5}))
    one = keras.Sequential([keras.Input((16,)), layers.Dense(32, name="only")])
    assert "No neuron can be removed: only: " in " ".join(ks.advise(one, {"neurons": 0.5}))
    narrow = keras.Sequential([keras.Input((16,)), layers.Dense(8, name="thin"), layers.Dense(4)])
    assert "thin: no smaller width is a multiple of 8" in " ".join(ks.advise(narrow, {"neurons": 0.5}))
    assert "No neuron can be removed: only: " in said("prospects", lambda: one)


def test_where_bytes_and_macs_are():
    model = convnet()
    convolutions = {"first": 16 * 16 * 9 * 3 * 16, "second": 16 * 16 * 9 * 16 * 16, "third": 16 * 16 * 9 * 16 * 32}
    macs = sum(convolutions.values()) + 32 * 10
    text = said("where_the_macs_are", lambda: model)
    assert text == (
        f"Where the MACs are, {macs:,} in all: third {convolutions['third'] / macs:.0%} ({convolutions['third']:,}), "
        f"second {convolutions['second'] / macs:.0%} ({convolutions['second']:,}), first "
        f"{convolutions['first'] / macs:.0%} ({convolutions['first']:,})."
    )
    third, second, first, logits = (4 * (n + out) for n, out in ((4608, 32), (2304, 16), (432, 16), (320, 10)))
    total = third + second + first + logits
    assert said("where_the_bytes_are", lambda: model) == (
        f"Where the bytes of the weights are, {kilobytes(total)} in all: third {third / total:.0%} "
        f"({kilobytes(third)}), second {second / total:.0%} ({kilobytes(second)}), first {first / total:.0%} "
        f"({kilobytes(first)})."
    )


@pytest.mark.parametrize(
    ("make", "what"),
    [(recurrent, "recurrent layers"), (attentive, "attention layers"), (subclassed, "subclassed models")],
)
@pytest.mark.parametrize("weights", ["int8", "ternary"])
def test_what_was_not_measured_has_no_ratio(figures, make, what, weights):
    findings = ks.advise(make(), {"weights": weights, "sparsity": 0.5, "neurons": 0.5})
    assert "times as long" not in " ".join(findings)
    assert "smaller and faster" not in " ".join(findings)
    assert "no multiple of" not in " ".join(findings)
    assert f"faster was not measured for {what}" in sentence(findings, MARKS["scattered_zeros"])
    before = ks.advise(make())
    assert f"whether faster was not measured for {what}" in sentence(before, MARKS["prospects"])
    assert ("smaller and faster" in " ".join(before)) == (make is not subclassed)  # without some of its neurons


def test_subclassed_models_are_wrapped_by_hand(figures):
    text = said("wrapped_by_hand", subclassed, {"weights": "int8"})
    assert "layers, 1 of them, by hand with keras_squeeze.QuantizeAware. No file of such a model was measured" in text
    assert "by hand" not in " ".join(ks.advise(subclassed()))


def test_layers_are_looked_for_in_wrappers(figures):
    model = ks.quantize_aware(convnet(), "binary")
    text = said("few_bits", lambda: model)
    assert advice.NETWORKS["convolutional"] in text
    kernels = 9 * (3 * 16 + 16 * 16 + 16 * 32) + 32 * 10
    stored = kernels + 4 * (ks.summarize(model).total.parameters - kernels)
    assert f"In a .tflite file the weights take about {kilobytes(stored)}, a byte each" in text
    assert "whatever is done" not in " ".join(ks.advise(model))


def test_what_was_measured_is_not_what_the_model_has(figures):
    text = said("scattered_zeros", mlp, {"sparsity": 0.9})
    assert text.startswith("90% unstructured zeros make the model smaller, not faster. Measured with 80% zeros: ")
    assert "Measured in a sparse-encoded .tflite file with 80% zeros: " in text


def test_macs_that_cannot_be_counted(figures):
    findings = ks.advise(of_open_size(), {"weights": "int8", "neurons": 0.5, "activations": None})
    assert "MACs not counted: input" in " ".join(findings)
    assert "of the bytes, slower" in " ".join(findings)
    assert "too small" not in " ".join(findings)


def test_what_stays_by_hand():
    held, total = 4 * 50 * 100, 4 * (50 * 100 + 100 * 8 + 8)
    text = said("what_stays", with_adapter)
    assert f"{held / total:.0%} of the bytes" in text
    assert "adapter: Adapter is not in the layer table; keras_squeeze.register_layer" in text


def test_what_stays_by_reason():
    blocks = [layer for _ in range(5) for layer in (layers.Conv2D(4, 1), layers.BatchNormalization())]
    model = keras.Sequential([keras.Input((4, 4, 4)), *blocks, Adapter(name="adapter")])
    norms, adapter = 5 * 4 * 16, 4 * 400
    text = said("what_stays", lambda: model)
    share = (norms + adapter) / (norms + adapter + 5 * 4 * 20)
    assert f"{share:.0%} of the bytes" in text
    assert "(adapter: Adapter is not in the layer table" in text
    assert " and 2 more: BatchNormalization has no weights worth compressing)" in text


def test_the_zeros_that_a_model_has(figures):
    report = ks.summarize(pruned()).total
    text = said("scattered_zeros", pruned)
    assert text.startswith("75% unstructured zeros")
    assert f"take {kilobytes(report.compressed_bytes)} instead of {kilobytes(report.dense_bytes)}" in text


def test_the_quantizers_that_a_model_has(figures):
    model = ks.quantize_aware(mlp(), "ternary", activations=None)
    report = ks.summarize(model).total
    text = said("few_bits", lambda: model)
    assert text.startswith("Weights in ternary")
    assert f"take {kilobytes(report.compressed_bytes)} instead of {kilobytes(report.dense_bytes)}" in text
    assert said("weights_only", lambda: model)


@pytest.mark.parametrize(("make", "kind"), [(convnet, "convolutional"), (mlp, "dense")])
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (
            {"sparsity": 0.8, "neurons": 0.5, "weights": "int8"},
            {
                "scattered_zeros": ["80% zeros", "80% zeros, sparse-encoded"],
                "static_int8": ["static int8"],
                "fewer_neurons": ["half of the neurons"],
            },
        ),
        (
            {"weights": "binary", "activations": None},
            {
                "weights_only": ["dynamic-range int8", "static int8"],
                "few_bits": ["binary weights", "static int8"],
            },
        ),
        ({"sparsity": 0.5, "pattern": "2:4"}, {"scattered_zeros": ["2:4 zeros", "80% zeros, sparse-encoded"]}),
    ],
)
def test_ratios_are_those_of_a_network_like_the_model(figures, make, kind, recipe, changes):
    findings = ks.advise(make(), recipe)
    for rule, names in changes.items():
        text = sentence(findings, MARKS[rule])
        assert advice.NETWORKS[kind] in text
        assert text.count("times as long") == len(names)
        for name in names:
            assert f"took {figures[kind, name].latency:.2f} times as long" in text
    encoded, binary = figures[kind, "80% zeros, sparse-encoded"], figures[kind, "binary weights"]
    for rule, ratio in (("scattered_zeros", encoded), ("few_bits", binary)):
        assert rule not in changes or f"with {ratio.num_bytes:.2f} of the bytes" in sentence(findings, MARKS[rule])


def test_ratios_of_widths_and_of_the_tiny_network(figures):
    text = said("odd_widths", lambda: convnet(17))
    assert "second (17)" in text
    assert "(LiteRT on x86, one thread)" in text
    for width in (64, 72):
        assert f"{figures['convolutional', f'65 wide over {width}'].latency:.2f} times as long as {width}" in text
    text = said("odd_widths", lambda: mlp(65))
    assert "inner (65), hidden (65), with" in text
    for width in (1024, 1032):
        assert f"{figures['dense', f'1025 wide over {width}'].latency:.2f} times as long as {width}" in text
    assert f"{16 * 16 + 16 * 4} MACs" in said("too_small", tiny, {"weights": "int8"})
    assert "took 0.97 times as long" in said("too_small", tiny, {"weights": "int8"})
    assert advice.TINY_MACS == 2 * 24 * 24 + 24 * 10
    assert f"{advice.TINY_MACS:,}" in advice.NETWORKS["tiny"]


def test_widths_of_outputs_are_left_alone(figures):
    inputs = keras.Input((16,))
    x = layers.Dense(33, name="wide")(inputs)
    branches = [layers.Softmax()(layers.Dense(11, name="a")(x)), layers.Dense(13, name="b")(x)]
    text = said("odd_widths", lambda: keras.Model(inputs, branches))
    assert "wide (33)" in text
    assert "(11)" not in text
    assert "(13)" not in text


def test_rules_follow_what_was_measured(figures):
    figures["convolutional", "65 wide over 64"] = Ratio(1.0)
    figures["convolutional", "dynamic-range int8"] = Ratio(0.3)
    figures["tiny", "static int8"] = Ratio(0.5)
    assert "no multiple of 8" not in " ".join(ks.advise(convnet(17)))
    assert "dynamic range" not in " ".join(ks.advise(convnet(), {"weights": "int8", "activations": None}))
    assert "too small" not in " ".join(ks.advise(tiny(), {"weights": "int8"}))


@pytest.mark.parametrize("target", ["x86", "arm", "microcontroller"])
def test_what_was_measured_elsewhere_says_so(figures, target):
    recipe = {"sparsity": 0.8, "neurons": 0.5, "weights": "int8"}
    quoting = [finding for finding in ks.advise(convnet(17), recipe, target=target) if "times as long" in finding]
    assert len(quoting) == 4
    for finding in quoting:
        assert "LiteRT on x86, one thread" in finding
        assert ("not measured on" in finding) == (target != "x86")


@pytest.mark.parametrize(
    ("make", "quoted"), [(mlp, 7), (convnet, 7), (subclassed, 0), (of_open_size, 6), (with_adapter, 6), (empty, 0)]
)
def test_without_any_measurement(monkeypatch, make, quoted):
    monkeypatch.setattr(advice, "MEASURED", {key: Ratio(None) for key in advice.MEASURED})
    model = make()
    weights = model.get_weights()
    recipe = {"weights": "ternary", "activations": None, "sparsity": 0.5, "neurons": 0.5}
    findings = " ".join(ks.advise(model, recipe))
    assert "times as long" not in findings
    assert findings.count("was not timed yet") == quoted  # those of neurons only where some can go
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


@pytest.mark.parametrize("recipe", [None, {"weights": "int8", "sparsity": 0.5, "neurons": 0.5}])
def test_a_model_with_nothing_to_say(figures, recipe):
    honest = "Model 'empty' has no weights: there is nothing in it to make smaller or faster."
    assert ks.advise(empty(), recipe) == [honest]
    only_adapter = keras.Sequential([keras.Input((5,)), Adapter(name="adapter")])
    bytes_held, stays = ks.advise(only_adapter, recipe)
    assert bytes_held == "Where the bytes of the weights are, 2.0 kB in all: adapter 100% (2.0 kB)."
    assert stays.startswith("Not compressed whatever is done: 100% of the bytes")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "Received: 3"),
        ((mlp, None), {"target": "gpu"}, ValueError, "'x86', 'arm', 'microcontroller'. Received: target='gpu'"),
        ((mlp, None), {"target": ["x86"]}, ValueError, r"Received: target=\['x86'\]"),
        ((mlp, "int8"), {}, TypeError, "'sparsity', 'pattern', 'neurons', 'weights', 'activations'. Received: 'int8'"),
        ((mlp, {"sparsty": 0.8}), {}, ValueError, "takes the keys 'sparsity', .*Received: 'sparsty'"),
        ((mlp, {"sparsity": 80}), {}, ValueError, r"Received: sparsity=80.*pass 0\.8"),
        ((mlp, {"neurons": 1.0}), {}, ValueError, r"`neurons` must be in \[0, 1\)"),
        ((mlp, {"sparsity": 0.8, "pattern": "2:4"}), {}, ValueError, r"at most 0\.5.*Received: sparsity=0\.8"),
        ((mlp, {"pattern": "2:4"}), {}, ValueError, "no zeros to lie in it.*Received: {'pattern': '2:4'}"),
        ((mlp, {"pattern": (1, 4), "sparsity": 0.0}), {}, ValueError, "no zeros to lie in it"),
        ((mlp, {"sparsity": 0.5, "pattern": "blocks"}), {}, ValueError, "Received: 'blocks'"),
        ((mlp, {"weights": "int1"}), {}, ValueError, "num_bits=1"),
        ((mlp, {"weights": "tiny"}), {}, ValueError, "Received: 'tiny'"),
        ((mlp, {"activations": "int8"}), {}, ValueError, "no weights.*Received: {'activations': 'int8'}"),
        ((mlp, {"weights": "int8", "activations": "ternary"}), {}, ValueError, "is a grid for weights"),
        ((lambda: keras.Sequential([layers.Dense(3)]),), {}, ValueError, "is not built"),
    ],
)
def test_bad_input(arguments, options, error, message):
    model, *rest = arguments
    with pytest.raises(error, match=message):
        ks.advise(model() if callable(model) else model, *rest, **options)
