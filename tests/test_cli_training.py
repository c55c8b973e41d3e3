"""The subcommands that train: each does what the same arguments do in Python, and says what is missing in one line."""

import json

import keras
import numpy as np
import pytest

import keras_squeeze as ks
from keras_squeeze.cli import main as cli
from keras_squeeze.deployment.loading import load_model
from keras_squeeze.quantization.conversion import calibrate
from keras_squeeze.recipes.steps import PruneNeurons, PruneWeights, Quantize

LOGITS = ("--loss", "sparse_categorical_crossentropy", "--from-logits", "--metrics", "accuracy")


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """A trained model in a file, one that is not compiled, and data; nothing here is changed by a test."""
    path = tmp_path_factory.mktemp("cli")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(48, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.save(path / "new.keras")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = digits
    np.savez(path / "train.npz", x=x[300:], y=y[300:])
    np.savez(path / "test.npz", x=x[:300], y=y[:300])
    np.save(path / "inputs.npy", x[300:])
    model.fit(x[300:], y[300:], epochs=4, verbose=0)
    model.save(path / "model.keras")
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def run_json(capsys, *arguments) -> dict:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def error(capsys, *arguments) -> str:
    """The one line that says what is wrong."""
    code, _, err = run(capsys, *arguments)
    assert code == 1
    *_, line = err.splitlines()
    assert line.startswith("keras-squeeze: error: ")
    return line


def load(path) -> keras.Model:
    """Compiled; Keras would warn that an optimizer was saved before its first step."""
    return load_model(path, compiled=True)


def arrays(path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as content:
        return content["x"], content["y"]


def assert_same(model, other, **how):
    for one, two in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(one, two, **how)


def test_prune_in_one_shot(folder, capsys, tmp_path):
    output = tmp_path / "pruned.keras"
    options = ("--neurons", 0.5, "--sparsity", 0.8, "--allocation", "global", "--criterion", "l1", "--round-to", 4)
    code, out, _ = run(capsys, "prune", folder / "model.keras", output, *options)
    assert code == 0
    before = load(folder / "model.keras")
    expected = load(folder / "model.keras")
    ks.prune_neurons(expected, 0.5, allocation="global", criterion="l1", round_to=4)
    expected = ks.shrink(expected)
    total = ks.prune_weights(expected, 0.8, allocation="global").total
    assert_same(load(output), expected)
    assert load(output).compiled
    assert f"parameters {before.count_params():,} -> {expected.count_params():,}" in out
    assert f"{total.sparsity:.1%} zeros" in out


def test_prune_to_a_block_pattern_in_some_layers(folder, capsys, tmp_path):
    output = tmp_path / "pruned.squeeze"
    options = ("--sparsity", 0.5, "--pattern", "1x4", "--layers", "dense$", "--criterion", "lamp")
    facts = run_json(capsys, "prune", folder / "new.keras", output, *options)
    expected = load(folder / "new.keras")
    ks.prune_weights(expected, 0.5, pattern=(1, 4), layers="dense$", criterion="lamp")
    assert_same(ks.load_packed(output), expected)
    assert facts["num_bytes"] == output.stat().st_size
    assert facts["zeros"][1] == ks.summarize(expected).total.zeros


def test_prune_by_what_the_data_says(folder, capsys, tmp_path):
    """The criterion is given to the step that knows it."""
    options = ("--macs", 0.5, "--sparsity", 0.5, "--criterion", "taylor", "--criterion", "magnitude")
    data = ("--data", folder / "train.npz")
    run_json(capsys, "prune", folder / "model.keras", tmp_path / "small.keras", *options, *data)
    expected = load(folder / "model.keras")
    ks.prune_neurons(expected, target_macs=0.5, criterion="taylor", data=arrays(folder / "train.npz"))
    expected = ks.shrink(expected)
    ks.prune_weights(expected, 0.5)
    assert_same(load(tmp_path / "small.keras"), expected)
    assert "needs `data`" in error(capsys, "prune", folder / "model.keras", tmp_path / "none.keras", *options)


def test_prune_while_it_trains(folder, capsys, tmp_path):
    data = ("--data", folder / "train.npz", "--validation-data", folder / "test.npz", "--seed", 3)
    options = ("--neurons", 0.3, "--sparsity", 0.5, "--epochs", 2, "--batch-size", 64)
    facts = run_json(capsys, "prune", folder / "model.keras", tmp_path / "pruned.keras", *options, *data)

    keras.utils.set_random_seed(3)
    recipe = ks.Recipe([PruneNeurons(0.3), PruneWeights(0.5)])
    x, y = arrays(folder / "train.npz")
    expected = recipe.fit(load(folder / "model.keras"), x, y, epochs=2, batch_size=64, verbose=0)
    pruned = load(tmp_path / "pruned.keras")
    assert_same(pruned, expected, atol=1e-4)
    test = arrays(folder / "test.npz")
    found = [load(folder / "model.keras").evaluate(*test, verbose=0)[1], pruned.evaluate(*test, verbose=0)[1]]
    np.testing.assert_allclose(facts["val_accuracy"], found, atol=1e-6)


def test_quantize_weights_without_data(folder, capsys, tmp_path):
    options = ("--weights", "int4", "--activations", "none")
    facts = run_json(capsys, "quantize", folder / "new.keras", tmp_path / "q.keras", *options)
    assert facts["bits"] == [32, 4]
    assert_same(load(tmp_path / "q.keras"), ks.quantize_aware(load(folder / "new.keras"), "int4", None))
    assert "--activations none" in error(capsys, "quantize", folder / "new.keras", tmp_path / "none.keras")
    assert not (tmp_path / "none.keras").exists()


def test_quantize_after_training(folder, capsys, tmp_path):
    """The `.keras` file has its quantizers, and makes the same file for LiteRT as is made at once."""
    data = ("--data", folder / "inputs.npy")
    run_json(capsys, "quantize", folder / "model.keras", tmp_path / "q.keras", *data)
    model = load(tmp_path / "q.keras")
    x, _ = arrays(folder / "test.npz")
    expected = ks.quantize_aware(load(folder / "model.keras"))
    calibrate(expected, np.load(folder / "inputs.npy"))
    np.testing.assert_allclose(model(x), expected(x), atol=1e-5)
    assert model.compiled
    code, out, _ = run(capsys, "quantize", folder / "model.keras", tmp_path / "q.tflite", *data)
    assert code == 0
    assert "8 bits a weight" in out
    assert run(capsys, "export", tmp_path / "q.keras", tmp_path / "again.tflite")[0] == 0
    assert (tmp_path / "again.tflite").read_bytes() == (tmp_path / "q.tflite").read_bytes()


def test_quantize_while_a_model_trains_that_was_not_compiled(folder, capsys, tmp_path):
    data = ("--data", folder / "train.npz", "--validation-split", 0.2, "--epochs", 2, "--seed", 1)
    arguments = ("quantize", folder / "new.keras", tmp_path / "q.keras", "--weights", "ternary", *data)
    assert "Pass --loss" in error(capsys, *arguments)
    facts = run_json(capsys, *arguments, *LOGITS, "--optimizer", "sgd", "--learning-rate", 0.05)
    model = load(tmp_path / "q.keras")
    assert model.loss.get_config()["from_logits"]
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)
    keras.utils.set_random_seed(1)
    start = load(folder / "new.keras")
    start.compile(keras.optimizers.SGD(0.05), model.loss, metrics=["accuracy"])
    x, y = arrays(folder / "train.npz")
    cut = int(len(x) * 0.8)
    expected = ks.Recipe([Quantize("ternary")]).fit(start, x[:cut], y[:cut], epochs=2, verbose=0)
    assert_same(model, expected, atol=1e-4)
    score = ks.finalize(model).evaluate(x[cut:], y[cut:], verbose=0)[1]
    assert facts["val_accuracy"][1] == pytest.approx(score, abs=1e-6)


def own_loss(y_true, y_pred):
    return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


def test_a_loss_that_keras_does_not_know(folder, capsys, tmp_path):
    """Such a file is as good as one that was not compiled."""
    model = load(folder / "new.keras")
    model.compile("adam", own_loss, metrics=["accuracy"])
    model.save(tmp_path / "own.keras")
    arguments = ("prune", tmp_path / "own.keras", tmp_path / "out.keras", "--sparsity", 0.5)
    data = ("--epochs", 1, "--data", folder / "train.npz")
    assert "a loss or metric that is not Keras's own. Pass --loss" in error(capsys, *arguments, *data)
    assert run(capsys, *arguments, *data, *LOGITS)[0] == 0
    assert load(tmp_path / "out.keras").compiled


def test_a_packed_model_goes_in(folder, capsys, tmp_path):
    ks.save_packed(load(folder / "new.keras"), tmp_path / "model.squeeze")
    run_json(capsys, "prune", tmp_path / "model.squeeze", tmp_path / "out.squeeze", "--sparsity", 0.5)
    expected = load(folder / "new.keras")
    ks.prune_weights(expected, 0.5)
    assert_same(ks.load_packed(tmp_path / "out.squeeze"), expected)


@pytest.fixture
def recipe(tmp_path):
    text = "steps:\n- {step: prune_weights, schedule: 0.5}\n- {step: export, path: half.tflite, precision: float16}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_run(folder, capsys, tmp_path, recipe):
    out = tmp_path / "out"
    data = ("--data", folder / "train.npz", "--validation-data", folder / "test.npz", "--epochs", 1, "--seed", 2)
    arguments = ("run", recipe, folder / "model.keras", *data, "--directory", out)
    code, printed, err = run(capsys, *arguments)
    assert code == 0, err
    names = "exports metrics.json model.keras model.squeeze model.tflite recipe.json report.json"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    assert (out / "exports" / "half.tflite").stat().st_size < (out / "model.tflite").stat().st_size
    assert ks.Recipe.load(out / "recipe.json") == ks.Recipe.load(recipe)

    model = load(out / "model.keras")
    assert ks.summarize(model).total.sparsity == pytest.approx(0.5, abs=0.01)
    metrics = json.loads((out / "metrics.json").read_text())
    score = model.evaluate(*arrays(folder / "test.npz"), verbose=0)[1]
    assert metrics["val_accuracy"] == pytest.approx(score, abs=1e-6)
    assert metrics["packed_bytes"] == (out / "model.squeeze").stat().st_size
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    before = load(folder / "model.keras").evaluate(*arrays(folder / "test.npz"), verbose=0)[1]
    assert rows["val_accuracy"] == [f"{before:.4f}", f"{score:.4f}"]
    assert rows["packed_bytes"][1] == f"{metrics['packed_bytes']:,.0f}"

    assert "Pass --force" in error(capsys, *arguments)
    recipe.write_text('steps: [{"step": "prune_weights", "schedule": 0.5, "share": 0}]')
    facts = run_json(capsys, *arguments[:-6], "--epochs", 1, "--directory", out, "--force")
    assert facts["after"].keys() == {"size_bytes", "tflite_bytes", "packed_bytes", "macs", "energy_pj", "val_accuracy"}
    assert facts["exports"] == []
    assert not (out / "exports").exists()


def test_search(folder, capsys, tmp_path):
    """A search, the same one gone on with, and budgets that it keeps or not."""
    out, space = tmp_path / "out", tmp_path / "space.yaml"
    space.write_text("neurons: 0.0\nsparsity: [0.3, 0.8]\nbits: 8\n")
    data = ("--data", folder / "train.npz", "--epochs", 1, "--seed", 0, "--recipe-space", space)
    arguments = ("search", folder / "model.keras", *data, "--directory", out, "--artifact", "packed")
    code, printed, err = run(capsys, *arguments, "--max-trials", 2, "--budget", "max_size_bytes=100_000")
    assert code == 0, err
    assert "trial 2 of 2" in printed
    assert "The best with size_bytes <= 100,000 is in" in printed
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")

    facts = run_json(capsys, *arguments, "--max-trials", 3)
    assert json.loads((out / "front.json").read_text()) == facts["front"]
    tuner = ks.CompressionTuner(
        ks.CompressionHyperModel(load(folder / "model.keras"), ks.CompressionSpace.load(space), artifact="packed"),
        ks.ParetoOracle(["val_accuracy", "size_bytes"], max_trials=3),
        directory=out,
    )
    assert len(tuner.results()) == 3
    assert [x["metrics"] for x in facts["front"]] == [x.metrics for x in tuner.pareto_front()]
    x, y = arrays(folder / "train.npz")
    cut = int(len(x) * 0.8)
    best = facts["front"][0]
    model = tuner.pareto_front()[0].load_model()
    accuracy = np.mean(model.predict(x[cut:], verbose=0).argmax(-1) == y[cut:])
    assert best["metrics"]["val_accuracy"] == pytest.approx(accuracy, abs=1e-6)

    code, printed, err = run(capsys, *arguments, "--max-trials", 3, "--budget", "max_size_bytes=10")
    assert code == 1
    assert "trial_" in printed  # what there is, is told
    assert "The smallest size_bytes found is" in err


def test_what_is_missing_or_wrong(folder, capsys, tmp_path):
    model, output, train = folder / "model.keras", tmp_path / "out.keras", ("--data", folder / "train.npz")
    assert "--sparsity, --neurons or --macs" in error(capsys, "prune", model, output)
    assert "`criterion` must be one of 'magnitude'" in error(
        capsys, "prune", model, output, "--sparsity", 0.5, "--criterion", "best"
    )
    assert "[0, 1)" in error(capsys, "prune", model, output, "--sparsity", 80)
    assert "must end in .keras, .tflite" in error(capsys, "prune", model, tmp_path / "out.h5", "--sparsity", 0.5)
    prune = ("prune", model, output, "--sparsity", 0.5)
    assert "pass --data FILE" in error(capsys, *prune, "--epochs", 1)
    assert "has no targets" in error(capsys, *prune, "--epochs", 1, "--data", folder / "inputs.npy")
    assert "--epochs must be at least 1" in error(capsys, *prune, "--epochs", 0, *train)
    assert "--batch-size must be at least 1" in error(capsys, *prune, "--epochs", 1, "--batch-size", 0, *train)
    assert "no --data" in error(capsys, *prune, "--validation-split", 0.1)
    assert "examples on both sides" in error(capsys, *prune, *train, "--validation-split", 1.5)
    assert "--loss must be a name" in error(capsys, *prune, "--loss", "nothing", *train)
    assert "--metrics must be a name" in error(capsys, *prune, "--metrics", "nothing", *train)
    assert "--optimizer must be a name" in error(capsys, *prune, "--optimizer", "nothing", *train)
    assert "--learning-rate must be above 0" in error(capsys, *prune, "--learning-rate", 0, *train)
    assert "no --loss" in error(capsys, *prune, "--from-logits", *train)
    assert "--loss mse" in error(capsys, *prune, "--loss", "mse", "--from-logits", *train)
    assert "must be a name" not in error(capsys, "quantize", model, output, "--weights", "int99", *train)
    assert not output.exists()
    output.write_text("mine")
    assert "Pass --force" in error(capsys, *prune)
    assert output.read_text() == "mine"


def test_data_that_does_not_fit(folder, capsys, tmp_path):
    prune = ("prune", folder / "model.keras", tmp_path / "out.keras", "--sparsity", 0.5, "--epochs", 1)
    x, y = arrays(folder / "train.npz")
    np.savez(tmp_path / "small.npz", x=x[:, :4], y=y)
    assert "small.npz does not fit the model" in error(capsys, *prune, "--data", tmp_path / "small.npz")
    np.savez(tmp_path / "short.npz", x=x, y=y[:-1])
    assert "different lengths" in error(capsys, *prune, "--data", tmp_path / "short.npz")
    np.savez(tmp_path / "classes.npz", x=x, y=np.where(np.arange(len(y)) > 10, y + 10, y))
    assert "cannot be trained on this data" in error(capsys, *prune, "--data", tmp_path / "classes.npz")


def test_a_search_that_cannot_be(folder, capsys, tmp_path):
    search = ("search", folder / "model.keras", "--data", folder / "train.npz", "--directory", tmp_path / "out")
    assert "It has: accuracy, loss" in error(capsys, *search, "--metric", "auc")
    assert "max_size_bytes=50000" in error(capsys, *search, "--budget", "max_size_bytes=small")
    limits = ("--budget", "max_macs=1", "--budget", "min_macs=2")
    assert "No macs is at least" in error(capsys, *search, *limits)
    assert "There is no file" in error(capsys, *search, "--recipe-space", tmp_path / "none.yaml")
    (tmp_path / "fixed.json").write_text('{"neurons": 0.0, "sparsity": 0.5, "bits": 8}')
    assert "Nothing varies" in error(capsys, *search, "--recipe-space", tmp_path / "fixed.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "recipe.json", "model.keras"],
        ["search", "model.keras", "--directory", "out"],
        ["prune", "model.keras", "out.keras", "--neurons", "0.5", "--macs", "0.5"],
        ["search", "model.keras", "--directory", "out", "--data", "a.npz", "--sampler", "luck"],
        ["run", "r.json", "m.keras", "--data", "a", "--validation-data", "b", "--validation-split", "0.1"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("command", ["prune", "quantize", "run", "search"])
def test_help_tells_what_there_is(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "exit codes: 0 fine; 1 an error" in out
    assert all(name in out for name in ("--data", "--epochs", "--loss", "--json", "--unsafe"))
