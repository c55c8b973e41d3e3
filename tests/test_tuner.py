"""Searches from the first line to the last: fronts, budgets, reloading, killed processes, several processes."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import keras
import keras_tuner
import numpy as np
import pytest
import search_tasks

import keras_squeeze as ks
from keras_squeeze.search.artifacts import Result

TRIALS = 6
_SECONDS = 900  # for what a process of a test is expected to do, on a busy machine


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A search that has ended, and what it said."""
    directory = tmp_path_factory.mktemp("search")
    tuner = search_tasks.tuner(directory, TRIALS)
    said: list[str] = []
    train, validation = search_tasks.data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        tuner.search(*train, validation_data=validation, epochs=search_tasks.EPOCHS)
    return tuner, said, directory


def dominates(one: Result, other: Result) -> bool:
    accuracy, size = (one.metrics[name] - other.metrics[name] for name in ("val_accuracy", "size_bytes"))
    return accuracy >= 0 and size <= 0 and (accuracy > 0 or size < 0)


def test_the_front_is_that_of_all_pairs(finished):
    tuner, _, _ = finished
    results = tuner.results()
    assert len(results) == TRIALS
    expected = [r for r in results if not any(dominates(other, r) for other in results)]
    front = tuner.pareto_front()
    assert {r.directory for r in front} <= {r.directory for r in expected}
    assert {tuple(r.metrics.values()) for r in front} == {tuple(r.metrics.values()) for r in expected}
    accuracies = [r.metrics["val_accuracy"] for r in front]
    assert accuracies == sorted(accuracies, reverse=True)


def test_results_are_whole_directories(finished):
    tuner, _, _ = finished
    (_, _), (x, y) = search_tasks.data()
    for result in tuner.pareto_front():
        files = {path.name for path in result.directory.iterdir()}
        assert {"model.keras", "model.tflite", "model.squeeze", "recipe.json", "report.json"} <= files
        guess = result.load_model().predict(x, verbose=0).argmax(-1)
        assert np.mean(guess == y) == pytest.approx(result.metrics["val_accuracy"])
        assert isinstance(result.recipe, ks.Recipe)
        assert (result.directory / "model.squeeze").stat().st_size == result.metrics["size_bytes"]


def test_best_within_budgets(finished):
    tuner, _, _ = finished
    results = tuner.results()
    sizes = sorted(r.metrics["size_bytes"] for r in results)
    limit = sizes[len(sizes) // 2]
    best = tuner.best(max_size_bytes=limit)
    inside = [r for r in results if r.metrics["size_bytes"] <= limit]
    assert best.metrics["size_bytes"] <= limit
    assert best.metrics["val_accuracy"] == max(r.metrics["val_accuracy"] for r in inside)
    assert tuner.best().metrics["val_accuracy"] == max(r.metrics["val_accuracy"] for r in results)
    with pytest.raises(ValueError, match=rf"smallest size_bytes found is {sizes[0]:,.0f}"):
        tuner.best(max_size_bytes=10)
    with pytest.raises(ValueError, match="at least its minimum and at most its maximum"):
        tuner.best(max_size_bytes=10, min_size_bytes=20)


def test_knee(finished):
    """Farthest below the line between the ends of the front, bytes on a log scale."""
    tuner, _, _ = finished
    points = np.array([[r.metrics["val_accuracy"], -np.log(r.metrics["size_bytes"])] for r in tuner.pareto_front()])
    spread = np.ptp(points, axis=0)
    scaled = (points - points.min(axis=0)) / np.where(spread > 0, spread, 1)
    assert tuner.knee().metrics == tuner.pareto_front()[int(scaled.sum(axis=1).argmax())].metrics


def test_what_is_said(finished):
    _, said, _ = finished
    text = "\n".join(said)
    assert "come from a sensitivity profile" in text
    for number in range(1, TRIALS + 1):
        assert f"trial {number} of {TRIALS}, " in text
    assert re.search(r"\d on the front; about .+ left", text)
    assert "Search: Running Trial" not in text


def test_first_trials_are_those_of_the_profile(finished):
    from keras_squeeze.evaluation.sensitivity_profile import Sensitivity
    from keras_squeeze.search.seeding import first_configurations

    tuner, _, _ = finished
    content = json.loads(pathlib.Path(tuner.project_dir, "sensitivity.json").read_text())
    expected = first_configurations(Sensitivity.from_dict(content), tuner.hypermodel.space)
    first = tuner.oracle.trials[tuner.oracle.start_order[0]].hyperparameters.values
    assert {name: first[name] for name in expected[0]} == pytest.approx(expected[0])


def test_pictures_and_tables(finished, tmp_path, capsys):
    tuner, _, _ = finished
    assert tuner.plot_pareto(tmp_path / "front.png").stat().st_size > 10_000
    assert tuner.plot_pareto(tmp_path / "macs.svg", x="macs", y="packed_bytes").exists()
    with pytest.raises(ValueError, match=r"no metric 'flops'; there are val_accuracy, size_bytes"):
        tuner.plot_pareto(tmp_path / "front.png", x="flops")
    tuner.results_summary()
    table = capsys.readouterr().out
    assert "val_accuracy" in table
    assert "before" in table
    assert str(tuner.project_dir) in table.replace("\n", "")


def test_reloaded(finished):
    tuner, _, directory = finished
    again = search_tasks.tuner(directory, TRIALS)
    assert [r.metrics for r in again.pareto_front()] == [r.metrics for r in tuner.pareto_front()]
    train, validation = search_tasks.data()
    again.search(*train, validation_data=validation, epochs=search_tasks.EPOCHS, verbose=0)
    assert len(again.results()) == TRIALS  # there was nothing left to do
    (x, y) = validation
    best = again.get_best_models()[0]
    assert np.mean(best.predict(x, verbose=0).argmax(-1) == y) == pytest.approx(again.best().metrics["val_accuracy"])


def test_another_search_is_in_the_directory(finished):
    _, _, directory = finished
    hyper = ks.CompressionHyperModel(search_tasks.network(1), search_tasks.space(), artifact="packed")
    with pytest.raises(ValueError, match="overwrite=True"):
        ks.CompressionTuner(hyper, ks.ParetoOracle(["val_accuracy", "macs"], TRIALS), directory=directory)


def test_another_model_is_in_the_directory(finished):
    _, _, directory = finished
    other = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    other.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    hyper = ks.CompressionHyperModel(other, search_tasks.space(), artifact="packed")
    tuner = ks.CompressionTuner(hyper, ks.ParetoOracle(["val_accuracy", "size_bytes"], TRIALS), directory=directory)
    train, validation = search_tasks.data()
    with pytest.raises(ValueError, match="began with a model of another shape"):
        tuner.search(*train, validation_data=validation)


def test_a_failing_recipe_is_not_the_end(tmp_path):
    """Three trials in a row that cannot be done: Keras Tuner's own oracles stop the search."""
    hyper = ks.CompressionHyperModel(search_tasks.network(1), search_tasks.space(), artifact="packed")
    calls = []
    run = hyper.run

    def fails_at_first(*args, **kwargs):
        calls.append(1)
        if len(calls) <= 3:
            raise ValueError("no such kernel")
        return run(*args, **kwargs)

    hyper.run = fails_at_first
    oracle = ks.ParetoOracle(["val_accuracy", "size_bytes"], max_trials=5, seed=1)
    tuner = ks.CompressionTuner(hyper, oracle, directory=tmp_path, sensitivity=False)
    train, validation = search_tasks.data()
    tuner.search(*train, validation_data=validation, epochs=1, verbose=0)
    assert [trial.status for trial in oracle.trials.values()] == ["FAILED"] * 3 + ["COMPLETED"] * 2
    assert len(tuner.results()) == 2
    assert "no such kernel" in oracle.trials["0000"].message


def test_a_search_without_any_result_says_so(tmp_path):
    """Labels of which there are fewer than inputs: no recipe is to blame, and no trial can be finished."""
    tuner = search_tasks.tuner(tmp_path, 2, sensitivity=False)
    (x, y), validation = search_tasks.data()
    with pytest.raises(
        RuntimeError, match=r"All 2 trials failed, the last one so:(.|\n)*(cardinality|different lengths)"
    ):
        tuner.search(x, y[:-1], validation_data=validation, epochs=1, verbose=0)


def test_a_search_with_nothing_within_its_budgets_says_so(tmp_path, capsys):
    hyper = ks.CompressionHyperModel(search_tasks.network(1), search_tasks.space(), artifact="packed")
    oracle = ks.ParetoOracle(["val_accuracy", "size_bytes"], 1, seed=3, budgets={"max_size_bytes": 10})
    tuner = ks.CompressionTuner(hyper, oracle, directory=tmp_path, sensitivity=False)
    train, validation = search_tasks.data()
    tuner.search(*train, validation_data=validation, epochs=1)
    (size,) = (result.metrics["size_bytes"] for result in tuner.results())
    assert f"no trial keeps size_bytes <= 10. The smallest size_bytes found is {size:,.0f}." in capsys.readouterr().out


def test_hopeless_trials_end_early(tmp_path):
    """Against a front of five excellent trials, one that learns nothing is ended; it is not on the front."""
    hyper = ks.CompressionHyperModel(search_tasks.network(), search_tasks.space(), artifact="packed")
    oracle = ks.ParetoOracle(["val_accuracy", "size_bytes"], max_trials=7, seed=1)
    tuner = ks.CompressionTuner(hyper, oracle, directory=tmp_path, sensitivity=False)
    for _ in range(5):
        trial = oracle.create_trial("before")
        oracle.update_trial(trial.trial_id, {"val_accuracy": 0.99, "size_bytes": 10.0})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
    seen = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
    tuner._deepcopy_callbacks = list
    train, validation = search_tasks.data()
    wrong = (validation[0], (validation[1] + 5) % 10)
    tuner.search(*train, validation_data=wrong, epochs=6, verbose=0, callbacks=[watch])
    ended = [oracle.trials[trial_id] for trial_id in oracle.end_order[5:]]
    assert [trial.metrics.get_last_value("stopped_early") for trial in ended] == [1.0, 1.0]
    assert max(seen) < 5
    assert tuner.results() == []


def test_tensorboard_shows_hyperparameters_and_results(tmp_path):
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tuner = search_tasks.tuner(tmp_path / "search", 1, sensitivity=False)
    train, validation = search_tasks.data()
    board = keras.callbacks.TensorBoard(tmp_path / "logs")
    tuner.search(*train, validation_data=validation, epochs=2, verbose=0, callbacks=[board])
    (result,) = tuner.results()
    scalars, tags = {}, set()
    for folder in {path.parent for path in (tmp_path / "logs").rglob("events.out.*")}:
        events = EventAccumulator(str(folder)).Reload()
        tags |= set(events.summary_metadata)
        for tag in events.Tags()["tensors"]:
            scalars[tag] = tf.make_ndarray(events.Tensors(tag)[-1].tensor_proto)
    assert any("hparams" in tag for tag in tags)
    assert {name: float(scalars[name]) for name in result.metrics} == pytest.approx(result.metrics)


def test_under_a_distribution_strategy(tmp_path):
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    tuner = search_tasks.tuner(tmp_path, 2, sensitivity=False, distribution_strategy=strategy)
    train, validation = search_tasks.data()
    tuner.search(*train, validation_data=validation, epochs=3, batch_size=50, verbose=0)
    results = tuner.results()
    assert len(results) == 2
    (x, y) = validation
    for result in results:
        guess = result.load_model().predict(x, verbose=0).argmax(-1)
        assert np.mean(guess == y) == pytest.approx(result.metrics["val_accuracy"])


# Processes.


@pytest.fixture
def start():
    """Begins a search in a process of its own; `seconds`: how long each training waits. All are ended with the test."""
    script = pathlib.Path(__file__).with_name("search_tasks.py")
    begun: list[subprocess.Popen] = []

    def begin(directory, max_trials: int, seconds: float, **environment) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(script), str(directory), str(max_trials), str(seconds)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        with process:
            pass


def wait_until(condition, *processes) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-3000:]
        time.sleep(0.1)


def finished_trials(directory) -> list[pathlib.Path]:
    return sorted(directory.glob("compression/trial_*/metrics.json"))


def test_killed_in_mid_trial_and_begun_again(tmp_path, start):
    first = start(tmp_path, 4, 1.0)
    wait_until(lambda: len(finished_trials(tmp_path)) >= 2, first)
    (tmp_path / "alone.running").unlink()
    wait_until((tmp_path / "alone.running").exists, first)  # in the third trial
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = {path: path.read_text() for path in finished_trials(tmp_path)}
    assert 2 <= len(kept) < 4
    second = start(tmp_path, 4, 0.0)
    output, _ = second.communicate(timeout=_SECONDS)
    assert second.returncode == 0, output[-3000:]
    assert len(finished_trials(tmp_path)) == 4
    assert {path: path.read_text() for path in kept} == kept
    state = json.loads((tmp_path / "compression" / "oracle.json").read_text())
    assert len(state["end_order"]) == len(set(state["end_order"])) == 4
    assert len(search_tasks.tuner(tmp_path, 4).results()) == 4


def test_chief_and_workers_of_which_one_is_killed(tmp_path, start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": str(port)}
    processes = {
        name: start(tmp_path, 4, 1.0 if "worker" in name else 0.0, KERASTUNER_TUNER_ID=name, **address)
        for name in ("chief", "worker1", "worker2")
    }
    wait_until((tmp_path / "worker2.running").exists, processes["chief"])
    processes["worker2"].send_signal(signal.SIGKILL)
    for name in ("chief", "worker1"):
        output, _ = processes[name].communicate(timeout=_SECONDS)
        assert processes[name].returncode == 0, f"{name}: {output[-3000:]}"
    alone = search_tasks.tuner(tmp_path, 4)  # read by a single process
    assert len(alone.results()) == 4
    assert len(alone.pareto_front()) >= 1
    assert len(set(alone.oracle.end_order)) == 4


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda hyper: ks.CompressionTuner(search_tasks.network), TypeError, "`hypermodel` must be"),
        (
            lambda hyper: ks.CompressionTuner(hyper, keras_tuner.oracles.RandomSearchOracle(hyper.objective(), 3)),
            TypeError,
            "`oracle` must be a `ParetoOracle`",
        ),
        (
            lambda hyper: ks.CompressionTuner(hyper, ks.ParetoOracle(["val_accuracy", "latency_ms"], 3)),
            ValueError,
            "The search measures val_accuracy, size_bytes",
        ),
        (
            lambda hyper: ks.CompressionTuner(hyper, ks.ParetoOracle(["val_accuracy"], 3, budgets={"max_loss": 1})),
            ValueError,
            "for 'loss'",
        ),
    ],
)
def test_bad_input(make, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hyper = ks.CompressionHyperModel(search_tasks.network(1), search_tasks.space())
    with pytest.raises(error, match=re.escape(words)):
        make(hyper)


def test_nothing_was_found(tmp_path):
    tuner = search_tasks.tuner(tmp_path, 2)
    with pytest.raises(ValueError, match="No trial is finished"):
        tuner.best()
    with pytest.raises(ValueError, match="no finished trial to draw"):
        tuner.plot_pareto(tmp_path / "front.png")
    assert tuner.pareto_front() == []
    train, _ = search_tasks.data()
    with pytest.raises(ValueError, match="pass validation_data="):
        tuner.search(*train, epochs=1)
