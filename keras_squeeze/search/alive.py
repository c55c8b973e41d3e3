"""What a worker does beside its trials, in a search on several machines: it waits for the chief, and says it lives."""

import contextlib
import os
import socket
import threading
import time

import keras_tuner
from keras_tuner.engine.trial import TrialStatus

from keras_squeeze.search.oracle import PROGRESS

_PATIENCE = 600.0  # seconds that a worker waits for a chief to begin
_JOIN_SECONDS = 2.0


def wait_for_chief() -> None:
    """Waits until the chief listens: gRPC tries more and more rarely.

    Raises:
        ConnectionError: there is none after ten minutes.
    """
    address = os.environ["KERASTUNER_ORACLE_IP"], int(os.environ["KERASTUNER_ORACLE_PORT"])
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            with socket.create_connection(address, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"No chief listens at {address[0]}:{address[1]}. Start it, with KERASTUNER_TUNER_ID=chief, or look "
                    f"whether the search is over. Received: {error}"
                ) from None
            time.sleep(0.5)


class Heartbeat:
    """Tells the chief every few seconds that the trial is being worked on, whatever else this process is busy with.

    A context manager around the trial. Nothing happens where the oracle is in this process, and a sign that does not
    get through is no error.

    Args:
        oracle: The tuner's.
        trial_id: What runs.
        every: Seconds between the signs, such as `heartbeat_seconds(dead_after)`.

    Attributes:
        superseded: Whether the chief has a result for this trial already, from another worker.

    Example:

    ```python
    with Heartbeat(self.oracle, trial.trial_id, every=15.0):
        results = self.run_trial(trial)
    ```
    """

    def __init__(self, oracle, trial_id: str, every: float = 15.0):
        self.superseded = False
        self._oracle = oracle
        self._trial_id = trial_id
        self._every = every
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        if not isinstance(self._oracle, keras_tuner.Oracle):
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    def _beat(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(Exception):
                trial = self._oracle.update_trial(self._trial_id, {f"{PROGRESS}alive": 1.0})
                self.superseded = trial.status in (TrialStatus.COMPLETED, TrialStatus.FAILED)
            self._over.wait(self._every)


def heartbeat_seconds(dead_after: float) -> float:
    """How often a worker shows that it is alive: six times before it counts as dead, at least every 15 seconds."""
    return min(15.0, dead_after / 6)
