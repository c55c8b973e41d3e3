"""The hypermodel under Keras Tuner's own tuners, and what it reports, measured again by other means."""

import json
import pathlib
import re

import keras
import keras_tuner
import numpy as np
import pytest
import search_tasks

import keras_squeeze as ks
from keras_squeeze.deployment.inspecting import predict_file
from keras_squeeze.search.artifacts import Result


@pytest.fixture(scope="module")
def model():
    return search_tasks.network()


@pytest.fixture(scope="module")
def data():
    return search_tasks.data()


def one_trial(hyper, data, folder, **values) -> Result:
    hp = keras_tuner.HyperParameters()
    hp.values = values
    (x, y), validation = data
    _, result = hyper.run(hyper.space.recipe(hp), folder, x=x, y=y, validation_data=validation, epochs=2, verbose=0)
    return result


@pytest.mark.parametrize("artifact", ["tflite", "packed"])
def test_what_is_reported_is_what_is_there(model, data, tmp_path, artifact):
    hyper = ks.CompressionHyperModel(model, search_tasks.space(), artifact=artifact, latency=True)
    result = one_trial(hyper, data, tmp_path / "trial", bits=4, neurons=0.3, sparsity=0.5)
    files = {name: (result.directory / name).stat().st_size for name in ("model.tflite", "model.squeeze")}
    assert result.metrics["tflite_bytes"] == files["model.tflite"]
    assert result.metrics["packed_bytes"] == files["model.squeeze"]
    assert result.metrics["size_bytes"] == files["model.tflite" if artifact == "tflite" else "model.squeeze"]
    assert set(result.metrics) == {*hyper.metrics}
    assert result.metrics["latency_ms"] > 0
    (_, _), (x, y) = data
    loaded = result.load_model()
    assert np.mean(loaded.predict(x, verbose=0).argmax(-1) == y) == pytest.approx(result.metrics["val_accuracy"])
    packed = ks.load_packed(result.directory / "model.squeeze")
    np.testing.assert_array_equal(packed.predict(x, verbose=0), loaded.predict(x, verbose=0))
    (outputs,) = predict_file(result.directory / "model.tflite", [x])
    assert np.mean(outputs.argmax(-1) == y) == pytest.approx(result.metrics["val_accuracy"], abs=0.02)
    total = ks.summarize(loaded).total
    assert (result.metrics["macs"], result.metrics["energy_pj"]) == (
        total.macs,
        pytest.approx(total.energy_pj, rel=0.1),
    )
    again = Result.read(result.directory)
    assert (again.metrics, again.recipe) == (result.metrics, result.recipe)
    assert json.loads((result.directory / "report.json").read_text())["report"]["total"]["bits"] == 4


def test_the_recipe_makes_the_model_again(model, data, tmp_path):
    hyper = ks.CompressionHyperModel(model, search_tasks.space(), artifact="packed")
    (x, y), (x_val, _) = data
    keras.utils.set_random_seed(11)
    result = one_trial(hyper, data, tmp_path, bits=8, neurons=0.3, sparsity=0.5)
    keras.utils.set_random_seed(11)
    again = result.recipe.fit(model, x, y, epochs=2, verbose=0, validation_data=data[1])
    np.testing.assert_array_equal(
        ks.finalize(again).predict(x_val, verbose=0), result.load_model().predict(x_val, verbose=0)
    )


def test_the_estimate_without_training_is_near(model, data, tmp_path):
    hyper = ks.CompressionHyperModel(model, search_tasks.space(), artifact="packed")
    result = one_trial(hyper, data, tmp_path, bits=8, neurons=0.4, sparsity=0.6)
    expected = hyper.estimate(result.recipe, x=data[0][0], y=data[0][1])
    assert expected["macs"] == result.metrics["macs"]
    assert expected["size_bytes"] == pytest.approx(result.metrics["size_bytes"], rel=0.15)


@pytest.mark.parametrize("kind", ["RandomSearch", "BayesianOptimization", "GridSearch"])
def test_tuners_of_keras_tuner(model, data, tmp_path, kind):
    space = ks.CompressionSpace(neurons={"values": [0, 0.5]}, sparsity=0, bits=(8, 1))
    hyper = ks.CompressionHyperModel(model, space, artifact="packed")
    objective = hyper.objective(max_size_bytes=4_000)
    options = {"max_trials": 3, "directory": tmp_path, "project_name": kind}
    options |= {} if kind == "GridSearch" else {"seed": 1}
    tuner = getattr(keras_tuner, kind)(hyper, objective=objective, **options)
    tuner.search(*data[0], validation_data=data[1], epochs=2, verbose=0)
    (best,) = tuner.oracle.get_best_trials(1)
    trials = list(tuner.oracle.trials.values())
    assert [trial.status for trial in trials] == ["COMPLETED"] * 3
    for trial in trials:
        folder = pathlib.Path(tuner.get_trial_dir(trial.trial_id))
        metrics = {name: trial.metrics.get_last_value(name) for name in trial.metrics.metrics}
        assert metrics["size_bytes"] == (folder / "model.squeeze").stat().st_size
        fits = metrics["size_bytes"] <= 4_000
        assert (trial.score == metrics["val_accuracy"]) if fits else (trial.score < -1)
    (x, y) = data[1]
    model_again = tuner.get_best_models()[0]
    assert np.mean(model_again.predict(x, verbose=0).argmax(-1) == y) == pytest.approx(
        best.metrics.get_last_value("val_accuracy")
    )


def test_hyperband_trains_the_parents_model_on(model, data, tmp_path):
    hyper = ks.CompressionHyperModel(model, ks.CompressionSpace(neurons=(0.2, 0.5), sparsity=0, bits=(8, 4)))
    tuner = keras_tuner.Hyperband(
        hyper, objective=hyper.objective(), max_epochs=3, factor=3, directory=tmp_path, project_name="h", seed=1
    )
    epochs = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    tuner._deepcopy_callbacks = list  # the list of epochs is to be the same
    tuner.search(*data[0], validation_data=data[1], verbose=0, callbacks=[watch])
    trials = tuner.oracle.trials.values()
    assert {trial.status for trial in trials} == {"COMPLETED"}
    children = [trial for trial in trials if "tuner/trial_id" in trial.hyperparameters.values]
    assert children
    for child in children:
        parent = tuner.oracle.trials[child.hyperparameters.values["tuner/trial_id"]]
        assert child.metrics.get_last_value("macs") == parent.metrics.get_last_value("macs")  # pruned once, not twice
    planned = [trial.hyperparameters.values for trial in trials]
    assert len(epochs) == sum(values["tuner/epochs"] - values["tuner/initial_epoch"] for values in planned)


def test_validation_split_is_that_of_keras(model, data, tmp_path):
    """The last part is held out, as `model.fit(validation_split=...)` does."""
    hyper = ks.CompressionHyperModel(model, search_tasks.space(), artifact="packed")
    (x, y), _ = data
    recipe = ks.Recipe([ks.steps.Quantize()])
    _, result = hyper.run(recipe, tmp_path, x=x, y=y, validation_split=0.2, epochs=1, verbose=0)
    guess = result.load_model().predict(x[400:], verbose=0).argmax(-1)
    assert np.mean(guess == y[400:]) == pytest.approx(result.metrics["val_accuracy"])


def test_losses_are_minimized(model, data, tmp_path):
    hyper = ks.CompressionHyperModel(model, search_tasks.space(), metric="val_loss", artifact="packed")
    objective = hyper.objective(max_size_bytes=10)
    result = one_trial(hyper, data, tmp_path, bits=8, neurons=0.0, sparsity=0.0)
    assert {"val_loss", objective.name} <= set(result.metrics)
    assert (hyper.metric, hyper.direction, objective.direction) == ("loss", "min", "max")
    assert result.metrics[objective.name] < -1


def test_forgiving(model, data, tmp_path):
    """AutoQKeras's formula, by hand; a budget that is broken is not forgiven."""
    hyper = ks.CompressionHyperModel(model, search_tasks.space(), artifact="packed")
    forgiving, bounded = hyper.objective(forgiving=8), hyper.objective(forgiving=8, max_size_bytes=10)
    result = one_trial(hyper, data, tmp_path / "trial", bits=8, neurons=0.3, sparsity=0.0)
    before = ks.save_packed(model, tmp_path / "before")
    halvings = np.log2(before / result.metrics["size_bytes"])
    expected = result.metrics["val_accuracy"] * (1 + 0.08 * halvings)
    assert result.metrics[forgiving.name] == pytest.approx(expected)
    assert result.metrics[bounded.name] < -1


def test_a_function_that_makes_the_model():
    hyper = ks.CompressionHyperModel(lambda: search_tasks.network(epochs=1))
    assert hyper.metric == "accuracy"
    assert hyper.build(keras_tuner.HyperParameters()).compiled


def plain(**options):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    if options:
        model.compile(**options)
    return model


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ks.CompressionHyperModel("m.keras"), TypeError, "`model` must be a `keras.Model`"),
        (lambda: ks.CompressionHyperModel(plain()), ValueError, "not compiled"),
        (
            lambda: ks.CompressionHyperModel(plain(optimizer="sgd", loss="mse", metrics=["mae"]), metric="accuracy"),
            ValueError,
            "It has: mae, loss",
        ),
        (lambda: ks.CompressionHyperModel(search_tasks.network(1), {"bits": 8}), TypeError, "`space` must be"),
        (lambda: ks.CompressionHyperModel(search_tasks.network(1), artifact="zip"), ValueError, "`artifact` must be"),
        (
            lambda: ks.CompressionHyperModel(search_tasks.network(1)).objective(max_size_bytes=1, min_size_bytes=2),
            ValueError,
            "at least its minimum and at most its maximum",
        ),
        (
            lambda: ks.CompressionHyperModel(search_tasks.network(1)).objective(size=1),
            ValueError,
            "size",
        ),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make()


def test_validation_data_is_needed(model, data, tmp_path):
    hyper = ks.CompressionHyperModel(model, search_tasks.space())
    tuner = keras_tuner.RandomSearch(hyper, objective=hyper.objective(), max_trials=1, directory=tmp_path)
    with pytest.raises(ValueError, match="pass validation_data="):
        tuner.search(*data[0], epochs=1, verbose=0)
