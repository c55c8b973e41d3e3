"""What a search may vary: the hyperparameters it declares, the recipes they make, and bad input."""

import itertools
import re

import keras_tuner
import pytest
from networks import small_convnet

import keras_squeeze as ks
from keras_squeeze.recipes.steps import FineTune, PruneNeurons, PruneWeights, Quantize
from keras_squeeze.schedules import PolynomialDecay


def declared(space) -> keras_tuner.HyperParameters:
    """Everything the space declares, whatever depends on what."""
    hp = keras_tuner.HyperParameters()
    space.recipe(hp)
    for parameter in list(hp.space):
        if isinstance(parameter, keras_tuner.engine.hyperparameters.Choice):
            for value in parameter.values:
                hp.values[parameter.name] = value
                hp.ensure_active_values()
                space.recipe(hp)
    return hp


def recipe(space, **values) -> ks.Recipe:
    hp = keras_tuner.HyperParameters()
    hp.values = {name.replace("__", "/"): value for name, value in values.items()}
    return space.recipe(hp)


def test_names_and_ranges():
    space = ks.CompressionSpace(neurons=(0.0, 0.7), sparsity=(0.0, 0.95), bits=(8, 4, 2, 1), learning_rate=(1e-4, 1e-2))
    found = {parameter.name: parameter for parameter in declared(space).space}
    assert set(found) == {"neurons", "sparsity", "bits", "learning_rate"}
    assert (found["neurons"].min_value, found["neurons"].max_value) == (0.0, 0.7)
    assert (found["sparsity"].min_value, found["sparsity"].max_value) == (0.0, 0.95)
    assert list(found["bits"].values) == [8, 4, 2, 1]
    assert found["learning_rate"].sampling == "log"


def test_a_recipe_by_hand():
    space = ks.CompressionSpace(fine_tuning=(0.0, 2.0), distillation=(0.0, 1.0), learning_rate=(1e-4, 1e-2))
    found = recipe(space, neurons=0.3, sparsity=0.8, bits=4, fine_tuning=1.5, distillation=0.5, learning_rate=0.001)
    rate = {"learning_rate": 0.001}
    assert found == ks.Recipe(
        [
            PruneNeurons(0.3, **rate),
            PruneWeights(0.8, **rate),
            Quantize(ks.quantizers.LearnedStep(4), "int8", **rate),
            FineTune(0.5, share=1.5, **rate),
        ]
    )


@pytest.mark.parametrize(
    ("bits", "weights"), [(16, "int16"), (8, "int8"), (5, ks.quantizers.LearnedStep(5)), (2, "ternary"), (1, "binary")]
)
def test_bits(bits, weights):
    space = ks.CompressionSpace(neurons=(0, 0.5), sparsity=0, bits=bits)
    assert recipe(space, neurons=0.0) == ks.Recipe([Quantize(weights, "int8")])


@pytest.mark.parametrize("bits", [None, 32])
def test_float(bits):
    space = ks.CompressionSpace(sparsity=0, bits=bits)
    assert recipe(space, neurons=0.5) == ks.Recipe([PruneNeurons(0.5)])
    assert recipe(ks.CompressionSpace(activation_bits=None), neurons=0.0, sparsity=0.0, bits=8) == ks.Recipe(
        [Quantize("int8", None)]
    )


def test_one_bit_has_no_sparsity():
    space = ks.CompressionSpace(bits=(8, 1))
    hp = keras_tuner.HyperParameters()
    hp.values = {"bits": 1, "neurons": 0.2}
    assert [step.kind for step in space.recipe(hp).steps] == ["prune_neurons", "quantize"]
    (sparsity,) = [parameter for parameter in declared(space).space if parameter.name == "sparsity"]
    (condition,) = sparsity.conditions
    assert (condition.name, list(condition.values)) == ("bits", [8])
    only = ks.CompressionSpace(bits=1)
    assert [step.kind for step in recipe(only, neurons=0.2, sparsity=0.5).steps] == ["prune_neurons", "quantize"]


def test_what_depends_on_zero_is_conditional():
    space = ks.CompressionSpace(
        neurons={"values": [0, 0.5]},
        criterion=["l1", "l2"],
        sparsity=[0, 0.5, 0.9],
        allocation=["uniform", "global"],
        bits=(32, 8),
        activation_bits=(8, 16),
        fine_tuning={"values": [0, 1]},
        distillation={"values": [0, 1]},
    )
    conditions = {p.name: [(c.name, list(c.values)) for c in p.conditions] for p in declared(space).space}
    assert conditions["criterion"] == [("neurons", [0.5])]
    assert conditions["allocation"] == [("sparsity", [0.5, 0.9])]
    assert conditions["activation_bits"] == [("bits", [8])]
    assert conditions["distillation"] == [("fine_tuning", [1.0])]
    assert recipe(space, neurons=0.0, sparsity=0.0, bits=32, fine_tuning=0.0) == ks.Recipe()


def test_groups():
    space = ks.CompressionSpace(neurons=0, groups={"convolutions": "conv", "dense": "hidden|logits"}, bits=(8, 4, 1))
    names = {parameter.name for parameter in declared(space).space}
    assert names == {"bits/convolutions", "bits/dense", "sparsity/convolutions", "sparsity/dense"}
    values = {"bits/convolutions": 8, "bits/dense": 1, "sparsity/convolutions": 0.5}
    found = recipe(space, **{name.replace("/", "__"): value for name, value in values.items()})
    assert found == ks.Recipe(
        [
            PruneWeights({"conv": 0.5}, layers=["conv"], allocation="uniform"),
            Quantize({"conv": "int8", "hidden|logits": "binary"}, "int8"),
        ]
    )


def test_groups_are_pruned_each_to_its_own_sparsity(digits):
    x, y = digits
    model = small_convnet()
    space = ks.CompressionSpace(neurons=0, groups={"conv": "conv", "hidden": "hidden"}, bits=(8, 4))
    hp = keras_tuner.HyperParameters()
    hp.values = {"bits/conv": 8, "bits/hidden": 4, "sparsity/conv": 0.25, "sparsity/hidden": 0.75}
    small = space.recipe(hp).fit(model, x[:300], y[:300], epochs=2, verbose=0)
    rows = {row.path.split("/")[-1]: row for row in ks.summarize(small).layers}
    assert rows["conv"].sparsity == pytest.approx(0.25, abs=0.03)
    assert rows["hidden"].sparsity >= 0.75
    assert (rows["conv"].bits, rows["hidden"].bits, rows["logits"].bits) == (8, 4, 32)


def test_every_layer():
    space = ks.CompressionSpace.per_layer(small_convnet(), neurons=0)
    assert {parameter.name for parameter in declared(space).space} == {
        f"{kind}/{layer}" for kind, layer in itertools.product(("bits", "sparsity"), ("conv", "hidden", "logits"))
    }


def test_two_numbers_are_a_range_and_more_are_choices():
    parameters = {
        "range": ks.CompressionSpace(neurons=[0.1, 0.5]),
        "choices": ks.CompressionSpace(neurons=[0.1, 0.3, 0.5]),
        "two choices": ks.CompressionSpace(neurons={"values": [0.1, 0.5]}),
        "steps": ks.CompressionSpace(neurons={"min": 0.0, "max": 0.5, "step": 0.25}),
    }
    found = {kind: next(p for p in declared(space).space if p.name == "neurons") for kind, space in parameters.items()}
    assert type(found["range"]).__name__ == "Float"
    assert list(found["choices"].values) == [0.1, 0.3, 0.5]
    assert list(found["two choices"].values) == [0.1, 0.5]
    assert found["steps"].step == 0.25


def test_a_schedule_that_ends_elsewhere():
    space = ks.CompressionSpace(schedule_end=(0.3, 1.0), bits=None, sparsity=0)
    (step,) = recipe(space, neurons=0.5, schedule_end=0.4).steps
    assert step.schedule.get_config() == PolynomialDecay(0.5, end=0.4).get_config()


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files(suffix, tmp_path):
    path = tmp_path / f"space.{suffix}"
    text = {
        "yaml": "neurons: [0.0, 0.5]\nbits: [8, null]\ngroups:\n  all: .\n",
        "json": '{"neurons": [0.0, 0.5], "bits": [8, null], "groups": {"all": "."}}',
    }
    path.write_text(text[suffix])
    space = ks.CompressionSpace.load(path)
    assert space.to_dict() == ks.CompressionSpace(neurons=(0.0, 0.5), bits=(8, None), groups={"all": "."}).to_dict()
    assert repr(space).startswith("CompressionSpace(neurons=")


def test_own_hypermodel(digits):
    """`space.recipe(hp)` in a user's own `HyperModel`."""
    x, y = digits
    space = ks.CompressionSpace(sparsity=0, bits=(8, 4))

    class Mine(keras_tuner.HyperModel):
        def build(self, hp):
            space.recipe(hp)
            return small_convnet()

        def fit(self, hp, model, *args, **kwargs):
            kwargs.pop("callbacks")
            small = space.recipe(hp).fit(model, *args, **kwargs)
            return {"bits": float(ks.summarize(small).total.bits)}

    hp = keras_tuner.HyperParameters()
    mine = Mine()
    model = mine.build(hp)
    hp.values = {"neurons": 0.0, "bits": 4}
    assert mine.fit(hp, model, x[:100], y[:100], callbacks=[], verbose=0) == {"bits": 4.0}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"neurons": 0, "sparsity": 0, "bits": None}, ValueError, "Nothing varies in this space"),
        ({"neurons": 0.5, "sparsity": 0.5, "bits": 8}, ValueError, "Nothing varies"),
        ({"neurons": (0, 1.0)}, ValueError, "`neurons` must be in [0, 1)"),
        ({"sparsity": (0.9, 0.1)}, ValueError, "ends before it begins"),
        ({"sparsity": "much"}, TypeError, "`sparsity` must be a number"),
        ({"sparsity": {"min": 0.1}}, ValueError, "`sparsity` as a dict is"),
        ({"sparsity": []}, ValueError, "has no values"),
        ({"bits": ()}, ValueError, "`bits` has no values"),
        ({"bits": (8, 20)}, ValueError, "`bits` must be in [1, 16]"),
        ({"bits": 0.5}, TypeError, "whole numbers of bits"),
        ({"activation_bits": 1}, ValueError, "`activation_bits` must be in [2, 16]"),
        ({"criterion": 3}, TypeError, "`criterion` must be a name"),
        ({"criterion": "l7"}, ValueError, "l7"),
        ({"allocation": ["everywhere"]}, ValueError, "everywhere"),
        ({"groups": {}}, TypeError, "`groups` must be"),
        ({"groups": {"a": "("}}, ValueError, "does not compile"),
        ({"learning_rate": (0, 0.1)}, ValueError, "`learning_rate` must be above 0"),
        ({"schedule_end": 1.5}, ValueError, "`schedule_end` must be in [0, 1]"),
    ],
)
def test_bad_spaces(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ks.CompressionSpace(**options)


def test_bad_files(tmp_path):
    (tmp_path / "space.yaml").write_text("neuron: 0.5")
    with pytest.raises(ValueError, match=r"a space has neurons, sparsity.*Received: 'neuron'"):
        ks.CompressionSpace.load(tmp_path / "space.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(TypeError, match="must hold names and values"):
        ks.CompressionSpace.load(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="There is no file"):
        ks.CompressionSpace.load(tmp_path / "none.yaml")
    (tmp_path / "wrong.yaml").write_text("neurons: 2")
    with pytest.raises(ValueError, match=r"wrong\.yaml: `neurons` must be in"):
        ks.CompressionSpace.load(tmp_path / "wrong.yaml")


def test_first_configurations_come_from_the_profile():
    from keras_squeeze.evaluation.sensitivity_profile import Curve, Sensitivity
    from keras_squeeze.search.seeding import first_configurations

    curves = [
        Curve("all", "sparsity", (0.5, 0.9), (0.9, 0.1)),
        Curve("all", "neurons", (0.25, 0.75), (0.8, 0.2)),
        Curve("all", "bits", (8, 4, 2), (0.9, 0.85, 0.2)),
    ]
    profile = Sensitivity("accuracy", "max", 0.9, 100, curves)
    space = ks.CompressionSpace(bits=(8, 4, 2))
    found = first_configurations(profile, space)
    # By hand, with straight lines between what was measured: 30 % of 0.9 gone at a sparsity of 0.5 + 0.4 * 0.27 / 0.8,
    # 60 % at 0.77, of what is then left the half as well; neurons 30 % at 0.25 + 0.5 * 0.17 / 0.6; 85 %: the most.
    few, many, mild, strong = 0.635, 0.885, 0.25 + 0.5 * 0.17 / 0.6, 0.7
    removed = [(mild, many), (strong, few), (0.0, many)]
    expected = [{"bits": bits, "neurons": n, "sparsity": s} for bits in (8, 4, 2) for n, s in removed]
    assert len(found) == len(expected)
    for values, wanted in zip(found, expected, strict=True):
        assert values == pytest.approx(wanted)


def test_first_configurations_of_groups_and_of_what_is_fixed():
    from keras_squeeze.evaluation.sensitivity_profile import Curve, Sensitivity
    from keras_squeeze.search.seeding import first_configurations

    curves = [Curve(name, "sparsity", (0.5, 0.9), (0.9, 0.1)) for name in ("all", "conv", "dense")]
    profile = Sensitivity("accuracy", "max", 0.9, 100, curves)
    space = ks.CompressionSpace(neurons=0, bits=8, groups={"conv": "conv", "dense": "dense"})
    names = {"sparsity/conv", "sparsity/dense"}
    assert [set(values) for values in first_configurations(profile, space)] == [names, names]
