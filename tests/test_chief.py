"""The chief and its workers: over the real protocol, in one process where that is enough, else in several."""

import collections
import contextlib
import errno
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import searches
from searches import ask_and_tell, in_directory, oracle, results

from keras_squeeze.search.alive import Heartbeat, heartbeat_seconds
from keras_squeeze.search.chief import serve
from keras_squeeze.search.configurations import identity


@pytest.fixture
def address(monkeypatch):
    """A free port of this machine, where the variables say that the chief is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_ORACLE_PORT", port)
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker")
    return "127.0.0.1", int(port)


class Chief:
    """`serve` in a thread, with what it raised or warned."""

    def __init__(self, made, **kwargs):
        self.oracle, self.error, self.changes = made, None, 0
        self.thread = threading.Thread(target=self._run, kwargs=kwargs)
        self.thread.start()

    def _run(self, **kwargs):
        try:
            serve(self.oracle, on_change=self._count, **kwargs)
        except (Exception, Warning) as error:  # warnings are errors in tests
            self.error = error

    def _count(self):
        self.changes += 1

    def join(self, seconds=20):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the chief does not end"


def client(made):
    """A worker's end of the line, with a connection of its own."""
    import grpc
    from keras_tuner.src.distribute.oracle_client import OracleClient

    worker = OracleClient(made)
    target = f"{os.environ['KERASTUNER_ORACLE_IP']}:{os.environ['KERASTUNER_ORACLE_PORT']}"
    own = grpc.insecure_channel(target, options=(("grpc.use_local_subchannel_pool", 1),))  # else a process has but one
    worker.stub = type(worker.stub)(own)
    return worker


def finish(worker, trial, status="COMPLETED"):
    if status == "COMPLETED":
        worker.update_trial(trial.trial_id, results(trial.hyperparameters.values))
    trial.status = status
    worker.end_trial(trial)


def next_trial(worker, tuner_id):
    """Waits as a tuner does."""
    for _ in range(400):
        trial = worker.create_trial(tuner_id)
        if trial.status != "IDLE":
            return trial
    raise AssertionError("idle for ever")


def work(worker, tuner_id):
    """What a tuner does; returns how many trials it ran."""
    for count in range(1000):
        trial = next_trial(worker, tuner_id)
        if trial.status == "STOPPED":
            return count
        finish(worker, trial)
    raise AssertionError("work for ever")


def test_two_workers_share_a_search(tmp_path, address):
    made = in_directory(oracle(12, seed=0), tmp_path)
    chief = Chief(made, dead_after=20)
    counts = {}

    def run(name):
        counts[name] = work(client(made), name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("worker0", "worker1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    chief.join()
    assert chief.error is None
    assert chief.changes > 0
    assert sum(counts.values()) == 12
    assert [x.status for x in made.trials.values()] == ["COMPLETED"] * 12
    assert len({identity(x.hyperparameters.values) for x in made.trials.values()}) == 12
    again = in_directory(oracle(12), tmp_path)
    again.reload()
    assert len(again.completed_trials()) == 12


def test_one_worker_alone_tries_what_a_single_process_does(tmp_path, address):
    made = in_directory(oracle(8, seed=5), tmp_path / "chief")
    chief = Chief(made, dead_after=20)
    worker = client(made)
    stranger = searches.oracle(50, seed=7)._started()
    stranger.trial_id, stranger.status = "0042", "COMPLETED"
    worker.end_trial(stranger)  # of a search that was here before
    assert work(worker, "worker0") == 8
    chief.join()
    alone = ask_and_tell(in_directory(oracle(8, seed=5), tmp_path / "alone"))
    assert [x.hyperparameters.values for x in made.trials.values()] == alone


def test_the_trial_of_a_silent_worker_goes_to_another_one(tmp_path, address):
    made = in_directory(oracle(3, seed=0), tmp_path)
    chief = Chief(made, dead_after=1.5)
    dead, alive = client(made), client(made)
    lost = dead.create_trial("dead")
    assert work(alive, "alive") == 3, "the last one only after a while"
    chief.join()
    assert chief.error is None
    assert made.trials[lost.trial_id].status == "COMPLETED"
    assert len(made.end_order) == 3


def test_a_slow_worker_may_still_deliver_and_the_first_result_counts(tmp_path, address):
    made = in_directory(oracle(3, seed=0), tmp_path)
    chief = Chief(made, dead_after=2.0)
    slow, quick = client(made), client(made)
    trial = slow.create_trial("slow")
    time.sleep(2.7)  # given up
    taken = next_trial(quick, "quick")
    assert taken.trial_id == trial.trial_id
    finish(slow, trial, "INVALID")  # of no use: somebody else is at it
    assert made.trials[trial.trial_id].status == "RUNNING"
    slow.update_trial(trial.trial_id, {"val_accuracy": 0.75, "size_bytes": 7})
    trial.status = "COMPLETED"
    slow.end_trial(trial)
    with Heartbeat(quick, taken.trial_id, 0.05) as heartbeat:
        time.sleep(0.5)
    assert heartbeat.superseded
    finish(quick, taken)
    assert made.trials[trial.trial_id].score == 0.75
    assert made.end_order.count(trial.trial_id) == 1
    done = [threading.Thread(target=work, args=pair) for pair in ((slow, "slow"), (quick, "quick"))]
    for thread in done:
        thread.start()
    for thread in done:
        thread.join(20)
    chief.join()
    assert chief.error is None
    assert len(made.end_order) == len(set(made.end_order)) == 3


def test_signs_of_life_keep_a_trial(tmp_path, address):
    made = in_directory(oracle(1, seed=0), tmp_path)
    chief = Chief(made, dead_after=1.0)
    worker = client(made)
    trial = worker.create_trial("worker0")
    with Heartbeat(worker, trial.trial_id, heartbeat_seconds(1.0)) as heartbeat:
        time.sleep(3)
        assert made.ongoing_trials["worker0"].trial_id == trial.trial_id
    assert not heartbeat.superseded
    finish(worker, trial)
    assert work(worker, "worker0") == 0
    chief.join()
    assert chief.error is None


def test_a_trial_that_kills_every_worker_is_failed(tmp_path, address):
    made = in_directory(oracle(2, seed=0), tmp_path)
    chief = Chief(made, dead_after=1.0)
    watcher = client(made)
    first = watcher.create_trial("watcher")
    with Heartbeat(watcher, first.trial_id, 0.2):
        for index in range(3):
            victim = next_trial(client(made), f"victim{index}")
            assert victim.trial_id == "0001"
            time.sleep(1.6)
    finish(watcher, first)
    assert work(watcher, "watcher") == 0
    chief.join()
    assert made.trials["0001"].status == "FAILED"
    assert "Nothing was heard of victim2 for 1 seconds" in made.trials["0001"].message


def test_a_chief_without_workers_says_what_is_left(tmp_path, address):
    made = in_directory(oracle(4, seed=0), tmp_path)
    chief = Chief(made, dead_after=0.8)
    worker = client(made)
    finish(worker, worker.create_trial("worker0"))
    worker.create_trial("worker0")
    chief.join()
    assert isinstance(chief.error, UserWarning)
    assert "3 of 4 trials" in str(chief.error)
    again = in_directory(oracle(4, seed=0), tmp_path)
    again.reload()
    assert len(ask_and_tell(again)) == 3


def test_workers_that_share_a_connection_fail_for_themselves(tmp_path, address):
    from keras_tuner.src.distribute.oracle_client import OracleClient

    made = in_directory(oracle(4, seed=0), tmp_path)
    chief = Chief(made, dead_after=20)
    one, other = OracleClient(made), OracleClient(made)
    trials = [one.create_trial("worker0"), other.create_trial("worker1")]
    finish(one, trials[0], "FAILED")
    finish(other, trials[1], "FAILED")
    done = [threading.Thread(target=work, args=pair) for pair in ((one, "worker0"), (other, "worker1"))]
    for thread in done:
        thread.start()
    for thread in done:
        thread.join(20)
    chief.join()
    assert [x.status for x in made.trials.values()] == ["FAILED"] * 2 + ["COMPLETED"] * 2


def test_failures_are_told_to_the_chief(tmp_path, address):
    made = in_directory(oracle(20, seed=0), tmp_path)
    chief = Chief(made, dead_after=20)
    worker = client(made)
    for _ in range(10):
        finish(worker, worker.create_trial("worker0"), "FAILED")
    assert worker.create_trial("worker0").status == "STOPPED"
    chief.join()
    assert isinstance(chief.error, RuntimeError)
    assert "All 10 trials failed" in str(chief.error)


def test_a_port_that_is_in_use_is_refused(tmp_path, address):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(address)
        other.listen()
        with pytest.raises(OSError, match=f"{address[1]}.*another one") as caught:
            serve(in_directory(oracle(), tmp_path))
        assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("PORT", None, "_PORT"), ("IP", None, "_IP"), ("PORT", "http", "'http'"), ("PORT", "70000", "70000")],
)
def test_a_missing_or_wrong_address_is_named(tmp_path, address, monkeypatch, name, value, message):
    if value is None:
        monkeypatch.delenv(f"KERASTUNER_ORACLE_{name}")
    else:
        monkeypatch.setenv(f"KERASTUNER_ORACLE_{name}", value)
    with pytest.raises(ValueError, match=message):
        serve(in_directory(oracle(), tmp_path))


def test_other_oracles_and_times_are_refused(tmp_path, address):
    import keras_tuner as kt

    with pytest.raises(TypeError, match="ParetoOracle"):
        serve(kt.oracles.RandomSearchOracle("val_loss", 3))
    with pytest.raises(ValueError, match="dead_after"):
        serve(in_directory(oracle(), tmp_path), dead_after=0)


def test_in_one_process_a_heart_does_not_beat(tmp_path):
    made = in_directory(oracle(1), tmp_path)
    trial = made.create_trial("tuner0")
    before = threading.active_count()
    with Heartbeat(made, trial.trial_id, 0.01):
        assert threading.active_count() == before
    assert made.last_seen == {}


class Processes:
    """Starts chiefs and workers in a folder, and ends those that are left."""

    def __init__(self, folder, address):
        here = pathlib.Path(__file__).parent
        paths = os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])
        self.environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "default"}
        self.folder, self.script = folder, str(here / "search_process.py")
        self.running: list[subprocess.Popen] = []

    def start(self, tuner_id, max_trials, dead_after, seconds=0.2):
        command = [sys.executable, self.script, str(max_trials), str(dead_after), str(seconds)]
        environment = {**self.environment, "KERASTUNER_TUNER_ID": tuner_id}
        output = (self.folder / f"{tuner_id}.txt").open("a")
        with output:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output, stderr=output)
        self.running.append(process)
        return process

    def runs(self):
        """`(tuner, trial)` for everything that was begun."""
        path = self.folder / "runs.txt"
        return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def output(self):
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in self.folder.glob("*.txt"))


@pytest.fixture
def processes(tmp_path, address):
    started = Processes(tmp_path, address)
    yield started
    for process in started.running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_one_worker_is_killed_and_the_others_finish(tmp_path, processes):
    chief = processes.start("chief", 10, 3)
    workers = {name: processes.start(name, 10, 3) for name in ("worker0", "worker1")}
    processes.wait_for(lambda: {"worker0", "worker1"} <= {tuner for tuner, _ in processes.runs()[:-1]})
    killed, _ = processes.runs()[-1]
    kill(workers.pop(killed))
    (left,) = workers.values()
    assert left.wait(60) == 0, processes.output()
    assert chief.wait(60) == 0, processes.output()
    assert "ended 10" in (tmp_path / "chief.txt").read_text()
    made = in_directory(oracle(10), tmp_path)
    made.reload()
    assert len(made.completed_trials()) == 10
    times = collections.Counter(trial for _, trial in processes.runs())
    assert set(times) == set(made.trials)
    assert max(times.values()) <= 2, "a trial is begun again only where it was lost"
    assert sum(times.values()) <= 11
    for trial in made.completed_trials():
        assert trial.score == results(trial.hyperparameters.values)["val_accuracy"]


def test_all_workers_are_killed_and_the_chief_ends(tmp_path, processes):
    chief = processes.start("chief", 6, 2)
    worker = processes.start("worker0", 6, 2)
    processes.wait_for(lambda: len(processes.runs()) >= 3)
    kill(worker)
    assert chief.wait(60) == 0, processes.output()
    assert "of 6 trials are still to be done" in (tmp_path / "chief.txt").read_text()
    made = in_directory(oracle(6, seed=1), tmp_path)
    made.reload()
    done = {x.trial_id: x.score for x in made.completed_trials()}
    assert len(done) >= 2
    assert len(ask_and_tell(made)) == 6 - len(done), "what was finished is kept"
    assert {x.trial_id: x.score for x in made.completed_trials()}.items() >= done.items()
    assert len(made.completed_trials()) == len(made.end_order) == 6


def test_the_chief_is_killed_and_started_again(tmp_path, processes):
    chief = processes.start("chief", 8, 4, seconds=0.5)
    worker = processes.start("worker0", 8, 4, seconds=0.5)
    processes.wait_for(lambda: len(processes.runs()) >= 3)
    kill(chief)
    done = {trial for _, trial in processes.runs()[:-1]}
    chief = processes.start("chief", 8, 4)
    assert worker.wait(60) == 0, processes.output()
    assert chief.wait(60) == 0, processes.output()
    runs = collections.Counter(trial for _, trial in processes.runs())
    assert all(runs[trial] == 1 for trial in done), "what was finished is kept"
    made = in_directory(oracle(8), tmp_path)
    made.reload()
    assert len(made.completed_trials()) == len(made.end_order) == 8
    for trial in made.completed_trials():
        assert trial.score == results(trial.hyperparameters.values)["val_accuracy"]
