"""`ParetoOracle`: what it tries, what it keeps, and that nothing stops it."""

import itertools
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import keras_tuner as kt
import numpy as np
import pytest
import searches
from searches import ask_and_tell, in_directory, oracle, results

from keras_squeeze.search.configurations import allowed_values, configurations, filled, identity, nearest
from keras_squeeze.search.objectives import Budgets, hypervolume
from keras_squeeze.search.oracle import ParetoOracle
from keras_squeeze.search.results import measured

SAMPLERS = ["tpe", "nsga2", "random"]


def is_legal(hp: kt.HyperParameters, values: dict) -> bool:
    """Whether exactly the active hyperparameters are there, each in its range."""
    hp = hp.copy()
    hp.values = values
    active = {}
    for entry in hp.space:
        if hp.is_active(entry):
            active.setdefault(entry.name, entry)
    inside = []
    for name, value in values.items():
        entry = active[name]
        numeric = type(entry).__name__ in ("Int", "Float")
        inside.append(entry.min_value <= value <= entry.max_value if numeric else value in entry.values)
        inside.append(type(value) is type(entry.default))
    return set(active) == set(values) and all(inside)


def small_space() -> kt.HyperParameters:
    """Four plus two times three configurations."""
    hp = kt.HyperParameters()
    hp.Choice("kind", ["a", "b", "c"])
    with hp.conditional_scope("kind", ["a"]):
        hp.Choice("bits", [8, 4, 2, 1])
    with hp.conditional_scope("kind", ["b", "c"]):
        hp.Int("steps", 1, 3)
    return hp


def small_results(values):
    return {"val_accuracy": 1 / (1 + values.get("bits", 3)), "size_bytes": 10 + values.get("steps", 2)}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_tries_legal_configurations_once_and_the_same_for_a_seed(tmp_path, sampler):
    runs = [
        ask_and_tell(in_directory(oracle(18, sampler=sampler, seed=seed), tmp_path / name))
        for name, seed in (("a", 5), ("b", 5), ("c", 0), ("d", 0))
    ]
    for tried in runs:
        assert len(tried) == len({identity(x) for x in tried}) == 18
        assert all(is_legal(searches.space(), x) for x in tried)
    assert runs[0] == runs[1] != runs[2]
    assert runs[2] == runs[3], "0 is a seed, too"
    seen = {key: {x[key] for run in runs for x in run if key in x} for key in runs[0][0]}
    assert seen["bits"] == {8, 4, 2, 1}
    assert seen["allocation"] == {"uniform", "global", "erk"}
    updates = {(x["allocation"], x["update"] > 9) for run in runs for x in run if "update" in x}
    assert updates == {("global", False), ("erk", True)}, "one name in two scopes"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_space_is_searched_to_its_end(tmp_path, sampler):
    made = in_directory(oracle(50, hyperparameters=small_space(), sampler=sampler, seed=1), tmp_path)
    tried = ask_and_tell(made, small_results)
    assert sorted(map(identity, tried)) == sorted(map(identity, configurations(small_space().space)))
    assert made.create_trial("tuner0").status == "STOPPED"


def test_configurations_are_all_there_are():
    found = list(configurations(small_space().space))
    assert len(found) == 4 + 2 * 3
    assert len({identity(x) for x in found}) == 10
    hp = kt.HyperParameters()
    hp.Boolean("x")
    hp.Int("n", 2, 9, step=3)
    hp.Float("f", 0, 1, step=0.1)
    assert len(list(configurations(hp.space))) == 2 * 3 * 11
    hp.Float("g", 0, 1)
    assert list(configurations(hp.space)) == [], "continuous"
    assert list(configurations([])) == [{}]


def test_a_space_whose_children_come_first_is_filled_all_the_same():
    hp = small_space()
    values = filled(hp.space[::-1], lambda entry: allowed_values(entry)[0])
    assert values == {"kind": "a", "bits": 1}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda hp: hp.Float("x", 0, 1, step=0.1), [index / 10 for index in range(11)]),
        (lambda hp: hp.Float("x", 0.001, 1, step=10, sampling="log"), [0.001, 0.01, 0.1, 1]),
        (lambda hp: hp.Float("x", 1, 10, step=3, sampling="reverse_log"), [2, 8, 10]),
        (lambda hp: hp.Int("x", 2, 32, step=2, sampling="log"), [2, 4, 8, 16, 32]),
        (lambda hp: hp.Int("x", 6, 13, step=3), [6, 9, 12]),
        (lambda hp: hp.Int("x", 1, 3, sampling="log"), [1, 2, 3]),
        (lambda hp: hp.Choice("x", [8, 1, 4, 4]), [1, 4, 8]),
        (lambda hp: hp.Choice("x", [8, 1, 4], ordered=False), [8, 1, 4]),
        (lambda hp: hp.Choice("x", ["b", "a"]), ["b", "a"]),
        (lambda hp: hp.Boolean("x"), [False, True]),
        (lambda hp: hp.Fixed("x", "y"), ["y"]),
    ],
)
def test_the_values_of_every_kind(make, expected, tmp_path):
    hp = kt.HyperParameters()
    make(hp)
    (entry,) = hp.space
    found = list(allowed_values(entry))
    assert found == pytest.approx(expected) if isinstance(expected[0], float) else found == expected
    for value in found:
        assert nearest(entry, value) == value
    made = in_directory(oracle(50, hyperparameters=hp, seed=0), tmp_path)
    tried = ask_and_tell(made, lambda values: {"val_accuracy": 0.5, "size_bytes": 1})
    assert sorted(x["x"] for x in tried) == sorted(found)


def test_values_are_moved_to_the_nearest_that_is_allowed():
    hp = searches.space()
    entries = {entry.name: entry for entry in hp.space}
    assert nearest(entries["sparsity"], 7) == 0.95
    assert nearest(entries["bits"], 3.4) == 4
    assert nearest(entries["temperature"], 2.3) == 2.5
    assert nearest(entries["epochs"], -math.inf) == 1
    hp.Int("wide", 0, 10**12, step=10)
    assert nearest(hp.space[-1], 123456.7) == 123460
    for name, value in (("allocation", "local"), ("distil", 3), ("sparsity", "high"), ("bits", math.nan)):
        with pytest.raises(ValueError, match=name):
            nearest(entries[name], value)


def test_recipes_in_line_come_first(tmp_path):
    made = in_directory(oracle(6, seed=3), tmp_path)
    first = {"sparsity": 2.0, "bits": 3.9, "distil": False, "temperature": 3}
    assert made.enqueue([first, {"allocation": "erk"}, {"bits": 4, "sparsity": 0.95}]) == 2, "the third is the first"
    with pytest.raises(ValueError, match=r"'sparsty'.*learning_rate"):
        made.enqueue([{"sparsty": 0.5}])
    with pytest.raises(ValueError, match="allocation"):
        made.enqueue([{"allocation": "local"}])
    tried = ask_and_tell(made)
    assert len(tried) == 6
    assert {**tried[0], **{"sparsity": 0.95, "bits": 4}} == tried[0]
    assert "temperature" not in tried[0], "inactive"
    assert tried[1]["allocation"] == "erk"
    assert tried[1]["update"] == 10, "the default of its scope"
    assert made.enqueue([first]) == 0, "tried before"


def test_recipes_in_line_survive(tmp_path):
    made = in_directory(oracle(6, seed=3), tmp_path)
    made.enqueue([{"bits": 1}, {"bits": 2}, {"bits": 8}])
    ask_and_tell(made, count=1)
    again = in_directory(oracle(6, seed=3), tmp_path)
    again.reload()
    assert again.enqueue([{"bits": 1}, {"bits": 2}, {"bits": 8}]) == 0
    assert [x["bits"] for x in ask_and_tell(again, count=2)] == [2, 8]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_in_pieces_is_the_search_in_one(tmp_path, sampler):
    whole = ask_and_tell(in_directory(oracle(16, sampler=sampler, seed=9), tmp_path / "whole"))
    pieces = []
    for count in (1, 5, 7):
        made = in_directory(oracle(16, sampler=sampler, seed=9), tmp_path / "pieces")
        if pieces:
            made.reload()
        pieces += ask_and_tell(made, count=count)
        made.create_trial("tuner0")  # is running when the process ends
    made = in_directory(oracle(16, sampler=sampler, seed=9), tmp_path / "pieces")
    made.reload()
    pieces += ask_and_tell(made)
    assert pieces == whole
    assert len(made.trials) == len(made.end_order) == 16


def test_a_reloaded_search_knows_what_was_measured(tmp_path):
    made = in_directory(oracle(12, seed=2), tmp_path)
    ask_and_tell(made)
    again = in_directory(oracle(12), tmp_path)
    again.reload()
    assert [measured(x) for x in again.front_trials()] == [measured(x) for x in made.front_trials()]
    assert [x.trial_id for x in again.get_best_trials(12)] == [x.trial_id for x in made.get_best_trials(12)]
    assert again.create_trial("tuner0").status == "STOPPED"
    longer = in_directory(oracle(15), tmp_path)
    longer.reload()
    assert len(ask_and_tell(longer)) == 3
    assert longer.seed == 2


def test_front_and_best_are_those_of_the_definition(tmp_path):
    made = in_directory(oracle(20, seed=4), tmp_path)
    ask_and_tell(made)
    points = [measured(x) for x in made.trials.values()]
    front = [measured(x) for x in made.front_trials()]
    for point in points:
        beaten = any(
            other["val_accuracy"] >= point["val_accuracy"] and other["size_bytes"] <= point["size_bytes"]
            for other in points
            if other != point
        )
        assert (point in front) != beaten
    assert made.get_best_trials()[0].score == max(x["val_accuracy"] for x in points)
    budgets = Budgets.of(max_size_bytes=statistics.median(x["size_bytes"] for x in points))
    assert {x.trial_id for x in made.completed_trials(budgets)} == {
        x.trial_id for x in made.trials.values() if budgets.met_by(measured(x))
    }
    assert all(budgets.met_by(measured(x)) for x in made.front_trials(budgets))


def test_the_score_is_what_the_finished_model_measured(tmp_path):
    made = in_directory(oracle(2, seed=0), tmp_path)
    trial = made.create_trial("tuner0")
    for step, accuracy in enumerate((0.99, 0.5)):
        made.update_trial(trial.trial_id, {"val_accuracy": accuracy, "size_bytes": 5}, step=step)
    made.update_trial(trial.trial_id, {"val_accuracy": 0.6, "size_bytes": 5}, step=1)  # reported again
    trial.status = "COMPLETED"
    made.end_trial(trial)
    assert made.trials[trial.trial_id].score == 0.6
    assert made.trials[trial.trial_id].best_step == 0


def test_tpe_beats_chance(tmp_path):
    def volume(sampler, seed):
        made = in_directory(oracle(40, sampler=sampler, seed=seed), tmp_path / f"{sampler}{seed}")
        made.save = made._save_trial = lambda *args: None
        points = [results(values) for values in ask_and_tell(made)]
        rows = [(x["val_accuracy"], math.log(x["size_bytes"])) for x in points]
        return hypervolume(rows, ["max", "min"], (0.89, math.log(1e6)))

    volumes = {sampler: [volume(sampler, seed) for seed in range(10)] for sampler in ("tpe", "random")}
    assert statistics.median(volumes["tpe"]) > statistics.median(volumes["random"])


def test_the_sampler_keeps_inside_budgets(tmp_path):
    limits = {"max_size_bytes": 100_000}
    inside = []
    for budgets in (None, limits):
        made = in_directory(oracle(40, seed=1, budgets=budgets), tmp_path / str(bool(budgets)))
        later = [results(x)["size_bytes"] for x in ask_and_tell(made)[20:]]
        inside.append(sum(x <= 100_000 for x in later))
    assert inside[1] > inside[0]
    assert made.get_best_trials()[0].score == max(x.score for x in made.completed_trials(made.budgets))


def fail(made, status="INVALID"):
    trial = made.create_trial("tuner0")
    trial.status, trial.message = status, "It does not converge."
    made.end_trial(trial)
    return made.trials[trial.trial_id]


def test_failures_in_a_row_do_not_end_a_search(tmp_path):
    made = in_directory(oracle(10, seed=0), tmp_path)
    failed = [fail(made) for _ in range(5)]
    assert {x.status for x in failed} == {"FAILED"}
    tried = ask_and_tell(made)
    assert len(tried) == 5
    assert not {identity(x.hyperparameters.values) for x in failed} & {identity(x) for x in tried}


def test_nothing_but_failures_does(tmp_path):
    made = in_directory(oracle(50, seed=0), tmp_path)
    for _ in range(9):
        fail(made)
    with pytest.raises(RuntimeError, match=r"All 10 trials failed.*\n.*does not converge"):
        fail(made)
    ask_and_tell(made, count=1)  # and nothing is locked
    for _ in range(5):
        fail(made)


def test_a_failed_trial_is_run_again_as_often_as_asked(tmp_path):
    made = in_directory(oracle(4, seed=0, max_retries_per_trial=1), tmp_path)
    first = fail(made)
    assert first.status == "INVALID"
    assert fail(made) is first
    assert first.status == "FAILED"
    assert made.create_trial("tuner0").trial_id != first.trial_id


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_objective_that_is_no_number_fails_the_trial(tmp_path, value):
    made = in_directory(oracle(8, seed=0, max_retries_per_trial=3), tmp_path)
    bad = iter([value] * 4)
    tried = ask_and_tell(made, lambda values: {**results(values), "val_accuracy": next(bad, 0.5)})
    assert len(tried) == 8
    statuses = [x.status for x in made.trials.values()]
    assert statuses == ["FAILED"] * 4 + ["COMPLETED"] * 4
    assert "val_accuracy is" in made.trials["0000"].message
    again = in_directory(oracle(8), tmp_path)
    again.reload()
    assert [x.status for x in again.trials.values()] == statuses


def test_a_missing_metric_is_named(tmp_path):
    made = in_directory(oracle(4, budgets={"max_latency_ms": 3}), tmp_path)
    trial = made.create_trial("tuner0")
    with pytest.raises(ValueError, match=r"missing: size_bytes.*val_accuracy"):
        made.update_trial(trial.trial_id, {"val_accuracy": 1.0})
    with pytest.raises(ValueError, match="latency_ms"):
        made.update_trial(trial.trial_id, {"val_accuracy": 1.0, "size_bytes": 1})
    trial.status = "COMPLETED"
    made.end_trial(trial)
    assert made.trials[trial.trial_id].status == "FAILED"
    assert "not measured: val_accuracy" in made.trials[trial.trial_id].message


def report(made, trial, done, accuracy, size):
    progress = {"progress/done": done, "progress/val_accuracy": accuracy, "progress/size_bytes": size}
    return made.update_trial(trial.trial_id, progress).status


def test_a_trial_that_the_front_beats_is_told_to_stop(tmp_path):
    made = in_directory(oracle(12, seed=0), tmp_path)
    trial = made.create_trial("tuner0")
    assert report(made, trial, 0.9, 0.1, 1e9) == "RUNNING", "nothing is finished"
    made.update_trial(trial.trial_id, {"val_accuracy": 0.1, "size_bytes": 1})
    trial.status = "COMPLETED"
    made.end_trial(trial)
    ask_and_tell(made, lambda values: {"val_accuracy": 0.9, "size_bytes": 1000}, count=4)
    trial = made.create_trial("tuner0")
    assert report(made, trial, 0.4, 0.2, 2000) == "RUNNING", "too early"
    assert report(made, trial, 0.5, 0.79, 1000) == "RUNNING", "0.11 is within 0.2 * 0.5 + 0.02"
    assert report(made, trial, 0.5, 0.77, 1000) == "STOPPED"
    assert report(made, trial, 1.0, 0.875, 1000) == "STOPPED"
    assert report(made, trial, 1.0, 0.885, 1000) == "RUNNING"
    assert report(made, trial, 0.9, 0.2, 999) == "RUNNING", "smaller than what would beat it"
    assert report(made, trial, 0.9, math.nan, 2000) == "RUNNING", "nothing is known"
    assert made.update_trial(trial.trial_id, {"progress/alive": 1.0}).status == "RUNNING"
    assert made.trials[trial.trial_id].status == "RUNNING"
    assert not made.trials[trial.trial_id].metrics.metrics


def test_a_trial_that_was_stopped_is_never_on_the_front(tmp_path):
    made = in_directory(oracle(8, seed=0), tmp_path)
    ask_and_tell(made, lambda values: {"val_accuracy": 1.0, "size_bytes": 1, "stopped_early": 1.0}, count=1)
    assert made.front_trials() == made.completed_trials() == []
    ask_and_tell(made)
    assert "0000" not in {x.trial_id for x in made.front_trials()}
    assert made.get_best_trials()[0].trial_id != "0000"
    assert [x.trial_id for x in made.get_best_trials(8)][-1] == "0000"


def test_a_directory_of_another_search_is_refused(tmp_path):
    ask_and_tell(in_directory(oracle(4, seed=0), tmp_path), count=2)
    other = searches.space()
    other.Boolean("more")
    changed = kt.HyperParameters()
    changed.Float("sparsity", 0, 0.5)
    for made, message in (
        (oracle(objectives=["val_accuracy", "macs"]), r"overwrite=True.*min size_bytes.*Received.*min macs"),
        (oracle(objectives=["val_accuracy"]), "objectives"),
        (oracle(hyperparameters=other), "more is new"),
        (oracle(hyperparameters=changed), "sparsity was .*0.95.*not .*0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            in_directory(made, tmp_path).reload()
    made = in_directory(ParetoOracle([kt.Objective("size_bytes", "min"), "val_accuracy"], 4), tmp_path)
    made.reload()
    assert made.get_best_trials()[0].score == min(measured(x)["size_bytes"] for x in made.completed_trials())
    made.check_space(searches.space())
    with pytest.raises(ValueError, match="learning_rate is missing"):
        made.check_space(changed)


def test_a_directory_of_another_oracle_is_refused(tmp_path):
    stock = kt.oracles.RandomSearchOracle("val_accuracy", 3, hyperparameters=searches.space())
    in_directory(stock, tmp_path)
    pathlib.Path(stock._project_dir)
    stock.save()
    with pytest.raises(ValueError, match="another oracle"):
        in_directory(oracle(), tmp_path).reload()


def test_damage_is_repaired_or_named(tmp_path):
    made = in_directory(oracle(10, seed=0), tmp_path)
    ask_and_tell(made, count=3)
    folder = tmp_path / "search"
    (folder / "trial_0003").mkdir()  # killed before its file was written
    state = json.loads((folder / "oracle.json").read_text())
    state["start_order"], state["end_order"] = state["start_order"][:-1], state["end_order"][:-1]  # killed before this
    (folder / "oracle.json").write_text(json.dumps(state))
    again = in_directory(oracle(10, seed=0), tmp_path)
    again.reload()
    assert again.end_order == ["0000", "0001", "0002"]
    assert len(ask_and_tell(again)) == 7
    (folder / "trial_0004" / "trial.json").write_text("{")
    with pytest.raises(ValueError, match=r"trial_0004.*damaged.*overwrite=True"):
        in_directory(oracle(10), tmp_path).reload()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"objectives": []}, ValueError, "at least one"),
        ({"objectives": "val_accuracy"}, TypeError, "list"),
        ({"objectives": ["val_loss", "val_loss"]}, ValueError, "each once"),
        ({"objectives": ["val_psnr"]}, ValueError, "val_psnr"),
        ({"objectives": [3]}, TypeError, "Received: 3"),
        ({"objectives": [kt.Objective("val_psnr", "up")]}, ValueError, "direction"),
        ({"max_trials": 0}, ValueError, "max_trials"),
        ({"max_trials": None}, ValueError, "max_trials"),
        ({"sampler": "grid"}, ValueError, "'tpe', 'nsga2', 'random'"),
        ({"budgets": {"size_bytes": 3}}, ValueError, "max_<metric>"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        ParetoOracle(**{"objectives": ["val_accuracy"], "max_trials": 3, **kwargs})


def test_a_tuner_of_keras_tuner_takes_it(tmp_path, capsys):
    tuner = searches.Search(
        ParetoOracle(["val_accuracy", "size_bytes"], 5, hyperparameters=searches.space()),
        directory=tmp_path,
        project_name="search",
    )
    tuner.search(verbose=1)
    assert "Best val_accuracy So Far" in capsys.readouterr().out
    assert len(tuner.oracle.completed_trials()) == 5
    again = searches.Search(oracle(5), directory=tmp_path, project_name="search")
    assert len(again.oracle.completed_trials()) == 5
    tuner.results_summary()


KILLED = """
import os, pathlib, sys, time
import searches

class Slow(searches.Search):
    def run_trial(self, trial, *args, **kwargs):
        with open("runs.txt", "a") as file:
            file.write(trial.trial_id + "\\n")
        if trial.trial_id == "0003" and not os.path.exists("waited"):
            pathlib.Path("waited").touch()
            time.sleep(600)
        return super().run_trial(trial)

made = searches.oracle(7, seed=8)
made._set_project_dir(".", "search")
if os.path.exists("search/oracle.json"):
    made.reload()
searches.ask_and_tell(made, lambda values: Slow.run_trial(None, made.ongoing_trials["tuner0"]))
"""


def test_a_killed_process_loses_only_the_trial_that_ran(tmp_path):
    script = KILLED.replace("return super().run_trial(trial)", "return searches.results(trial.hyperparameters.values)")
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "waited").exists() and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    runs = (tmp_path / "runs.txt").read_text().split()
    assert runs == ["0000", "0001", "0002", "0003", "0003", "0004", "0005", "0006"]
    made = in_directory(oracle(7), tmp_path)
    made.reload()
    whole = ask_and_tell(in_directory(oracle(7, seed=8), tmp_path / "whole"))
    assert [x.hyperparameters.values for x in made.completed_trials()] == whole
    assert all(len(x.metrics.get_history("val_accuracy")[0].value) == 1 for x in made.completed_trials())


def test_a_trial_that_kills_its_process_every_time_is_failed(tmp_path):
    for _ in itertools.repeat(None, 3):
        made = in_directory(oracle(4, seed=8), tmp_path)
        if (tmp_path / "search" / "oracle.json").exists():
            made.reload()
        assert made.create_trial("tuner0").trial_id == "0000"
    made = in_directory(oracle(4, seed=8), tmp_path)
    made.reload()
    assert made.create_trial("tuner0").trial_id == "0001"
    assert made.trials["0000"].status == "FAILED"
    assert "3 times" in made.trials["0000"].message


def test_parallel_trials_differ(tmp_path):
    made = in_directory(oracle(30, seed=1), tmp_path)
    ask_and_tell(made, count=12)
    together = [made.create_trial(f"worker{index}").hyperparameters.values for index in range(6)]
    assert len({identity(x) for x in together}) == 6
    sparsities = sorted(x["sparsity"] for x in together)
    assert np.ptp(sparsities) > 0.01
