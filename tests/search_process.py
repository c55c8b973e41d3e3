"""A chief or a worker in a process of its own; which, the variables of Keras Tuner say. Run by test_chief.py."""

import contextlib
import os
import pathlib
import socket
import sys
import time

import keras_tuner as kt
import searches

from keras_squeeze.search.alive import Heartbeat, heartbeat_seconds
from keras_squeeze.search.chief import serve


class Worker(searches.Search):
    """Notes what it begins, and takes its time over it."""

    def __init__(self, *args, seconds: float, dead_after: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds, self.dead_after = seconds, dead_after

    def run_trial(self, trial, *args, **kwargs):
        with open("runs.txt", "a") as file:
            file.write(f"{self.tuner_id} {trial.trial_id}\n")
        with Heartbeat(self.oracle, trial.trial_id, heartbeat_seconds(self.dead_after)):
            time.sleep(self.seconds)
        return searches.results(trial.hyperparameters.values)


def wait_for_chief() -> None:
    """Until somebody listens: what connects too early waits longer and longer between its attempts."""
    address = os.environ["KERASTUNER_ORACLE_IP"], int(os.environ["KERASTUNER_ORACLE_PORT"])
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            return
        time.sleep(0.1)


def main(max_trials: str, dead_after: str, seconds: str) -> None:
    made = searches.oracle(int(max_trials), seed=1)
    if "chief" not in os.environ["KERASTUNER_TUNER_ID"]:
        wait_for_chief()
        arguments = {"seconds": float(seconds), "dead_after": float(dead_after), "directory": "."}
        worker = Worker(made, project_name="search", **arguments)
        assert not isinstance(worker.oracle, kt.Oracle)
        worker.search()
        return
    searches.in_directory(made, ".")
    if pathlib.Path("search/oracle.json").exists():
        made.reload()
    serve(made, dead_after=float(dead_after), on_change=lambda: print("changed", flush=True))
    print(f"ended {len(made.end_order)}")


main(*sys.argv[1:])
