"""The demo, its picture, the command line and the examples."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import keras
import matplotlib
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from networks import count_zeros, small_convnet

import keras_squeeze as ks
from keras_squeeze.analysis import plots
from keras_squeeze.cli import demo
from keras_squeeze.cli import main as cli

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "datasets")


@pytest.fixture
def short_demo(monkeypatch):
    monkeypatch.setattr(demo, "DENSE_EPOCHS", 2)
    monkeypatch.setattr(demo, "PRUNING_EPOCHS", 3)
    monkeypatch.setattr(demo, "QUANTIZED_EPOCHS", 2)
    monkeypatch.setattr(demo, "BINARY_EPOCHS", 2)
    monkeypatch.setattr(demo, "SEARCH_TRIALS", 2)
    monkeypatch.setattr(demo, "SEARCH_EPOCHS", 2)


def test_the_table_says_what_is_in_the_files(short_demo, tmp_path, capsys):
    assert cli.main(["demo", "--output", str(tmp_path), "--seed", "1"]) == 0
    printed = capsys.readouterr().out

    _, (images, labels) = demo._digits(seed=1)
    for name in ("dense", "pruned"):
        model = keras.models.load_model(tmp_path / f"{name}.keras")
        accuracy = (model.predict(images, verbose=0).argmax(-1) == labels).mean()
        assert f"{accuracy:.1%}" in printed
        packed = tmp_path / f"{name}.squeeze"
        assert f"{packed.stat().st_size:,}" in printed
        loaded = ks.load_packed(packed)
        np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
    assert count_zeros(model) == pytest.approx(
        0.9 * sum(w.numpy().size for w in model.weights if w.name == "kernel"), abs=1
    )
    assert f"{count_zeros(model):,}" in printed
    small = keras.models.load_model(tmp_path / "shrunk.keras")
    assert 0.2 < small.count_params() / model.count_params() < 0.6
    assert f"{ks.summarize(small).total.macs:,}" in printed
    for name in ("int8", "shrunk+int8", "binary"):
        path = tmp_path / f"{name}.tflite"
        assert f"{path.stat().st_size:,}" in printed
        assert path.stat().st_size < 0.5 * (tmp_path / "dense.tflite").stat().st_size
        file = Interpreter(str(path))
        file.allocate_tensors()
        right = 0
        for image, label in zip(images, labels, strict=True):
            file.set_tensor(file.get_input_details()[0]["index"], image[np.newaxis])
            file.invoke()
            right += file.get_tensor(file.get_output_details()[0]["index"])[0].argmax() == label
        assert f"{right / len(labels):.1%}" in printed
    for picture in ("widths", "pruning", "front"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    trials = list((tmp_path / "search" / "compression").glob("trial_*"))
    assert len(trials) == 2
    packed = [f"{(trial / 'model.squeeze').stat().st_size:,}" for trial in trials]
    assert any(size in printed for size in packed)


def test_train_and_test_digits_are_apart():
    (train, train_labels), (test, test_labels) = demo._digits(seed=0)
    assert len(train) + len(test) == 1797
    assert len(train_labels) == len(train)
    assert len(test_labels) == len(test) == 500
    together = np.concatenate([train, test]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    expected = (load_digits().data / 16).astype("float32")
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(expected, axis=0))


def test_every_stage_moves_its_progress_to_the_end(short_demo, tmp_path):
    done = []
    train, test = demo._digits(seed=0)
    state = demo.Demo(tmp_path, train, test, on_epoch=done.append)
    for _, stage in demo.STAGES:
        assert isinstance(stage(state), str)
        assert done == sorted(done)
        assert done.pop() == 1.0
        done.clear()


def test_the_picture_shows_the_course_of_the_training(digits, tmp_path):
    x, y = digits
    history = small_convnet().fit(x, y, epochs=2, verbose=0, callbacks=[ks.MagnitudePruning(0.5)]).history
    for suffix, start in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        path = plots.plot_pruning(history, tmp_path / f"course.{suffix}", metric="accuracy", baseline=0.5)
        assert path.read_bytes().startswith(start)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        svg = plots.plot_pruning(history, tmp_path / "text.svg", metric="accuracy", baseline=0.5).read_text()
    assert all(f">{label}<" in svg for label in ("sparsity", "accuracy", "epoch", "before pruning"))
    with pytest.raises(ValueError, match=r"lacks val_accuracy\. Received: accuracy, loss, sparsity"):
        plots.plot_pruning(history, tmp_path / "course.png")


def test_the_picture_of_the_widths(tmp_path):
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = plots.plot_widths({"first": (16, 8), "second": (32, 32)}, tmp_path / "widths.svg").read_text()
    assert all(f">{label}<" in svg for label in ("first", "second", "before", "after"))
    assert "16 → 8" in svg
    assert "32 → 32" not in svg
    with pytest.raises(ValueError, match="no widths to draw"):
        plots.plot_widths({}, tmp_path / "widths.svg")


def test_an_unknown_command_says_which_there_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prunee"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, tmp_path):
    fewer = ["--trials", "2"] if "trials" in example.read_text() else []
    command = [sys.executable, str(example), "--epochs", "2", *fewer]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sparsity" in done.stdout  # in the logs, or in the report
    assert re.search(r"^\s+total ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (28, 28)), ("fashion_mnist", (28, 28)), ("cifar10", (32, 32, 3))]
)
def test_the_data_of_the_examples(name, shape, monkeypatch):
    """The others come as Keras downloads them, here in a stand-in; all end in one form."""
    specification = importlib.util.spec_from_file_location("datasets_of_the_examples", FOLDER / "datasets.py")
    datasets = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(datasets)
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (30, *shape), dtype="uint8"), random.integers(0, 10, 30, dtype="uint8")
    given = (images, labels.reshape(-1, 1) if len(shape) == 3 else labels)
    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", lambda: (given, given))
    for found in (*datasets.load(name), *datasets.load("digits")):
        assert found[0].dtype == "float32"
        assert found[0].ndim == 4
        assert (found[0].min(), found[0].max()) == (0, 1)
        assert found[1].dtype == "int32"
        assert found[1].shape == found[0].shape[:1]
    np.testing.assert_array_equal(datasets.load(name)[1][0].reshape(images.shape), (images / 255).astype("float32"))
