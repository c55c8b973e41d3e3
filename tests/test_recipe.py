"""Recipes: what they do, beside the same done by hand; JSON and YAML; epochs; callbacks; bad input."""

import json
import re

import keras
import numpy as np
import pytest
from networks import small_convnet, sparsity

import keras_squeeze as ks
from keras_squeeze import schedules
from keras_squeeze.recipes import steps
from keras_squeeze.recipes.recipe import share_out
from keras_squeeze.recipes.steps import FineTune, PruneNeurons, PruneWeights, Quantize

EVERY_STEP = [
    PruneNeurons(0.4, layers="conv|hidden", round_to=1, share=2, learning_rate=0.002),
    PruneNeurons(target_macs=0.5, criterion="l1"),
    PruneWeights(schedules.Cosine(0.6, end=0.5), allocation="global", layers=["hidden", "conv"]),
    PruneWeights({"conv": 0.3, "hidden": schedules.PolynomialDecay(0.7)}),
    PruneWeights(0.5, pattern="2:4", criterion=ks.criteria.Random(seed=3)),
    Quantize("int4", "int8", delay=0.1, freeze=0.8, ramp=0.1),
    Quantize({"hidden": "ternary", "conv": ks.quantizers.LearnedStep(4)}, None, num_bits=[8, 4]),
    FineTune(distillation=0.5, temperature=2.0, share=0.5),
    steps.Export("small.tflite", precision="int4", allow_float=True),
]


@pytest.fixture(scope="module")
def trained(digits):
    """A network, its training data, and 500 digits that it has not seen."""
    x, y = digits
    model = small_convnet()
    model.fit(x[:1200], y[:1200], epochs=6, verbose=0)
    return model, (x[:1200], y[:1200]), (x[1200:1700], y[1200:1700])


def accuracy(model, data) -> float:
    return model.evaluate(*data, verbose=0, return_dict=True)["accuracy"]


def test_the_whole_way(trained, tmp_path):
    model, train, test = trained
    before = model.get_weights()
    recipe = ks.Recipe(
        [
            PruneNeurons(0.3, round_to=4),
            PruneWeights(0.5),
            Quantize("int8"),
            FineTune(distillation=1.0),
            steps.Export("small.tflite", allow_float=True),
            steps.Export("small.squeeze"),
        ]
    )
    small = recipe.fit(model, *train, epochs=8, verbose=0, directory=tmp_path / "out", validation_data=test)
    report = ks.summarize(small)
    assert accuracy(small, test) > accuracy(model, test) - 0.05
    assert report.total.parameters < 0.8 * model.count_params()
    assert report.total.bits == 8
    assert report.total.sparsity == pytest.approx(0.5, abs=0.05)
    assert (tmp_path / "out" / "small.tflite").stat().st_size < 16_000
    np.testing.assert_array_equal(
        ks.load_packed(tmp_path / "out" / "small.squeeze").predict(test[0], verbose=0),
        ks.finalize(small).predict(test[0], verbose=0),
    )
    assert small.history.epoch == list(range(8))
    assert len(small.history.history["val_accuracy"]) == 8
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_one_step_is_what_the_callback_does(trained):
    model, train, _ = trained
    by_hand = keras.models.clone_model(model)
    by_hand.set_weights(model.get_weights())
    by_hand.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    keras.utils.set_random_seed(3)
    by_hand.fit(*train, epochs=2, verbose=0, callbacks=[ks.MagnitudePruning(0.8, allocation="global")])
    keras.utils.set_random_seed(3)
    by_recipe = ks.Recipe([PruneWeights(0.8, allocation="global")]).fit(model, *train, epochs=2, verbose=0)
    for one, other in zip(by_hand.get_weights(), by_recipe.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_epochs_it_is_the_one_shot_functions(trained):
    model, train, test = trained
    recipe = ks.Recipe([PruneNeurons(0.3, round_to=1), PruneWeights(0.6)])
    small = recipe.fit(model, *train, epochs=0, verbose=0)
    by_hand = keras.models.clone_model(model)
    by_hand.set_weights(model.get_weights())
    by_hand.compile("adam", model.loss)
    ks.prune_neurons(by_hand, 0.3, round_to=1, data=tuple(array[:512] for array in train))
    by_hand = ks.shrink(by_hand)
    ks.prune_weights(by_hand, 0.6)
    np.testing.assert_array_equal(small.predict(test[0], verbose=0), by_hand.predict(test[0], verbose=0))


def test_quantization_without_training_measures_ranges(trained):
    model, train, test = trained
    q = ks.Recipe([Quantize("int8", share=0)]).fit(model, *train, epochs=5, verbose=0)
    assert accuracy(q, test) == pytest.approx(accuracy(model, test), abs=0.02)
    assert q.history.epoch == []


def test_zeros_stay_in_later_steps(trained):
    model, train, _ = trained
    recipe = ks.Recipe([PruneWeights(0.7, share=0), FineTune(), Quantize("int8"), FineTune()])
    small = ks.finalize(recipe.fit(model, *train, epochs=3, verbose=0), activations="drop")
    assert sparsity(small) >= 0.699


def test_binary_weights(trained):
    model, train, test = trained
    small = ks.Recipe([PruneNeurons(0.2), Quantize("binary"), FineTune()]).fit(model, *train, epochs=6, verbose=0)
    assert accuracy(small, test) > 0.8
    assert ks.summarize(small).total.bits < 8


def test_a_teacher_draws_the_student_to_its_answers(trained):
    """The loss is the divergence of Hinton et al., here from its definition."""
    model, train, test = trained
    pruned = ks.Recipe([PruneWeights(0.5, share=0)]).fit(model, *train, epochs=0, verbose=0)

    def distance(student):
        wanted, given = (m.predict(test[0], verbose=0) / 4 for m in (model, student))
        p = np.exp(wanted) / np.exp(wanted).sum(-1, keepdims=True)
        q = np.exp(given) / np.exp(given).sum(-1, keepdims=True)
        return (p * np.log(p / q)).sum(-1).mean()

    taught, alone = (
        ks.Recipe([FineTune(distillation=weight)]).fit(pruned, *train, epochs=8, verbose=0) for weight in (1.0, 0.0)
    )
    assert distance(taught) < 0.25 * distance(alone)
    assert [layer.name for layer in taught.layers] == [layer.name for layer in model.layers]
    assert all(layer.trainable for layer in model.layers)


@pytest.mark.parametrize("kind", ["logits", "probabilities", "values"])
def test_distillation_loss_by_hand(kind):
    from keras_squeeze.recipes.distillation import Distillation

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 4)).astype("float32")
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)  # noqa: E731
    if kind == "values":
        expected = 0.3 * np.mean((a - b) ** 2)
        given = a, b
    else:
        p, q = softmax(b / 2), softmax(a / 2)
        expected = 0.3 * 4 * (p * np.log(p / q)).sum(-1).mean()
        given = (softmax(a), softmax(b)) if kind == "probabilities" else (a, b)
    layer = Distillation(0.3, 2.0, kind)
    np.testing.assert_array_equal(layer(*given, training=True), given[0])
    assert float(layer.losses[0]) == pytest.approx(expected, rel=1e-4)
    layer(*given, training=False)
    assert type(layer).from_config(layer.get_config()).kind == kind


@pytest.mark.parametrize("step", EVERY_STEP, ids=lambda step: step.kind)
def test_json_and_yaml_round_trip(step, tmp_path):
    recipe = ks.Recipe([step])
    again = ks.Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    for name in ("recipe.json", "recipe.yaml"):
        assert ks.Recipe.load(recipe.save(tmp_path / name)).to_dict() == recipe.to_dict()
    assert str(recipe)
    assert repr(recipe)


def test_a_recipe_that_was_read_does_the_same(trained):
    model, train, test = trained
    recipe = ks.Recipe(
        [PruneWeights({"conv": 0.3, "hidden": schedules.Cosine(0.8)}), Quantize(ks.quantizers.Affine(6))]
    )
    outputs = []
    for each in (recipe, ks.Recipe.from_json(recipe.to_json())):
        keras.utils.set_random_seed(5)
        outputs.append(each.fit(model, *train, epochs=2, verbose=0).predict(test[0], verbose=0))
    np.testing.assert_array_equal(*outputs)


def test_defaults_are_left_out_of_json():
    assert ks.Recipe([PruneWeights(0.8), Quantize()]).to_dict() == {
        "steps": [{"step": "prune_weights", "schedule": 0.8}, {"step": "quantize"}]
    }


def test_dicts_are_steps_too():
    assert ks.Recipe([{"step": "prune_neurons", "schedule": 0.5}]) == ks.Recipe([PruneNeurons(0.5)])
    assert ks.Recipe([PruneNeurons()]).steps[0].schedule == 0.5


@pytest.mark.parametrize("epochs", range(13))
@pytest.mark.parametrize("shares", [[1, 1, 1], [1, 0, 2], [0, 0], [5, 1, 1, 1], [0.1], [3, 0.001]])
def test_epochs_are_shared_out(epochs, shares):
    counts = share_out(epochs, shares)
    takers = [share for share in shares if share > 0]
    assert sum(counts) == (epochs if takers else 0)
    assert all(count == 0 for count, share in zip(counts, shares, strict=True) if share == 0)
    if epochs >= len(takers):
        assert all(count >= 1 for count, share in zip(counts, shares, strict=True) if share > 0)
        exact = [epochs * share / max(sum(shares), 1e-9) for share in shares]
        assert all(abs(count - want) < max(1, len(takers)) for count, want in zip(counts, exact, strict=True))
    elif epochs:
        assert [count for count, share in zip(counts, shares, strict=True) if share > 0][-epochs:] == [1] * epochs


def test_callbacks_see_epochs_that_count_on(trained):
    model, train, test = trained

    class Seen(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.epochs, self.batches, self.names = [], 0, set()

        def on_epoch_begin(self, epoch, logs=None):
            self.epochs.append(epoch)

        def on_train_batch_end(self, batch, logs=None):
            self.batches += 1

        def on_epoch_end(self, epoch, logs=None):
            self.names |= set(logs)

    seen = Seen()
    recipe = ks.Recipe([PruneNeurons(0.3), PruneWeights(0.5), Quantize()])
    recipe.fit(model, *train, epochs=4, batch_size=100, verbose=0, callbacks=[seen], validation_data=test)
    assert seen.epochs == [0, 1, 2, 3]
    assert seen.batches == 4 * 12
    assert {"pruned_neurons", "sparsity", "quantized", "val_accuracy"} <= seen.names


def test_early_stopping_waits_for_the_target(trained):
    model, train, test = trained
    stop = keras.callbacks.EarlyStopping("val_loss", patience=0, restore_best_weights=True)
    recipe = ks.Recipe([PruneWeights(0.9)])
    small = recipe.fit(model, *train, epochs=6, verbose=0, callbacks=[stop], validation_data=test)
    assert sparsity(small) == pytest.approx(0.9, abs=0.01)


def test_learning_rate_of_a_step(trained):
    model, train, _ = trained
    rates = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: rates.append(watch.model.optimizer))
    ks.Recipe([PruneWeights(0.3, learning_rate=0.01), FineTune(learning_rate=0.0001), FineTune()]).fit(
        model, *train, epochs=3, verbose=0, callbacks=[watch]
    )
    found = [float(optimizer.learning_rate) for optimizer in rates]
    assert found == pytest.approx([0.01, 0.0001, float(model.optimizer.learning_rate)])


def test_datasets(trained):
    import tensorflow as tf

    model, (x, y), test = trained
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(2000, seed=0).batch(50)
    recipe = ks.Recipe([PruneNeurons(0.3, criterion="taylor"), PruneWeights(0.4), Quantize()])
    small = recipe.fit(model, data, epochs=3, shuffle=False, verbose=0)
    assert accuracy(small, test) > 0.7


def test_nothing_to_do_copies_the_model(trained):
    model, train, test = trained
    same = ks.Recipe().fit(model, *train, epochs=5, verbose=0)
    assert same is not model
    np.testing.assert_array_equal(same.predict(test[0], verbose=0), model.predict(test[0], verbose=0))


def test_advise_takes_a_recipe(trained):
    model, _, _ = trained
    recipe = ks.Recipe([PruneNeurons(0.5), PruneWeights(0.8), Quantize("int8")])
    by_dict = {"neurons": 0.5, "sparsity": 0.8, "weights": "int8"}
    assert ks.advise(model, recipe) == ks.advise(model, by_dict)


def test_progress_is_told(trained, capsys):
    model, train, _ = trained
    ks.Recipe([PruneWeights(0.5), Quantize(share=0)]).fit(model, *train, epochs=1, verbose=2)
    told = capsys.readouterr().out
    assert "step 1 of 2, prune_weights: 1 epoch" in told
    assert "step 2 of 2, quantize: without training" in told


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ks.Recipe("prune"), TypeError, "must be a list of steps"),
        (lambda: ks.Recipe([0.5]), TypeError, "A step is an object"),
        (lambda: ks.Recipe([{"step": "prun"}]), ValueError, "There is no step 'prun'; there are prune_neurons"),
        (lambda: ks.Recipe([{"step": "quantize", "bits": 4}]), ValueError, "has no 'bits'. It has: share"),
        (lambda: ks.Recipe([Quantize(), PruneNeurons(0.5)]), ValueError, "put `prune_neurons` before `quantize`"),
        (lambda: ks.Recipe([Quantize(), Quantize()]), ValueError, "can be quantized once"),
        (lambda: ks.Recipe.from_json("{"), ValueError, "This is no JSON"),
        (lambda: ks.Recipe.from_json("[]"), TypeError, 'a dict with a list of "steps"'),
        (lambda: ks.Recipe.from_json('{"steps": [], "more": 1}'), ValueError, "nothing else. Received: 'more'"),
        (lambda: ks.Recipe.load("nowhere.json"), ValueError, "There is no file nowhere.json"),
        (lambda: PruneWeights(1.5), ValueError, "must be in [0, 1)"),
        (lambda: PruneWeights(0.5, layers=lambda layer: True), TypeError, "a regular expression or a list"),
        (lambda: PruneWeights(0.5, layers="("), ValueError, "does not compile"),
        (lambda: PruneWeights(0.5, share=-1), ValueError, "`share` must be a number, at least 0"),
        (lambda: PruneWeights(0.5, share="much"), TypeError, "`share` must be a number"),
        (lambda: PruneWeights(0.5, learning_rate=0), ValueError, "`learning_rate` must be None or a number above 0"),
        (lambda: PruneNeurons(0.5, target_macs=0.5), ValueError, "Give one target"),
        (lambda: PruneNeurons(0.5, criterion="l3"), ValueError, "l3"),
        (lambda: Quantize("int99"), ValueError, "num_bits"),
        (lambda: FineTune(distillation=-1), ValueError, "`distillation` must be a number, at least 0"),
        (lambda: FineTune(temperature=0), ValueError, "`temperature` must be a number, above 0"),
    ],
)
def test_bad_recipes(make, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make()


def test_bad_files(tmp_path):
    (tmp_path / "bad.yaml").write_text("steps: [")
    (tmp_path / "bad.json").write_text(json.dumps({"steps": [{"step": "prune_weights", "sparsity": 0.8}]}))
    with pytest.raises(ValueError, match=r"bad\.yaml: This is no YAML"):
        ks.Recipe.load(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match=r"bad\.json: The step 'prune_weights' has no 'sparsity'"):
        ks.Recipe.load(tmp_path / "bad.json")


def test_bad_runs(trained, tmp_path):
    model, (x, y), _ = trained
    recipe = ks.Recipe([PruneWeights(0.5)])
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"not compiled.*model.compile"):
        recipe.fit(plain, x, y)
    with pytest.raises(ValueError, match="needs data"):
        recipe.fit(model)
    with pytest.raises(TypeError, match="`model` must be"):
        recipe.fit("model.keras", x, y)
    with pytest.raises(ValueError, match="`epochs` must be an int"):
        recipe.fit(model, x, y, epochs=1.5)
    with pytest.raises(TypeError, match="read at every update"):
        recipe.fit(model, iter([(x, y)]))
    with pytest.raises(ValueError, match="begins at epoch 0"):
        recipe.fit(model, x, y, epochs=3, initial_epoch=1)
    with pytest.raises(ValueError, match=r"Step 1 of the recipe, prune_weights: .*nothing"):
        ks.Recipe([PruneWeights(0.5, layers="nothing")]).fit(model, x, y, verbose=0)
    two = ks.Recipe([PruneWeights(0.5), FineTune()])
    with pytest.raises(ValueError, match="BackupAndRestore resumes one `fit`"):
        two.fit(model, x, y, epochs=2, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])


def test_pruned_weights_on_a_binary_grid_say_which_step(trained):
    model, (x, y), _ = trained
    recipe = ks.Recipe([PruneWeights(0.5), Quantize("binary")])
    with pytest.raises(ValueError, match="Step 2 of the recipe, quantize: Pruned weights would not stay zero"):
        recipe.fit(model, x, y, epochs=2, verbose=0)
