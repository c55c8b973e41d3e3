"""A search on several machines: the chief, which hands out trials to workers.

The protocol is Keras Tuner's own, and so are the variables: `KERASTUNER_TUNER_ID` (the chief's contains `chief`),
`KERASTUNER_ORACLE_IP` and `KERASTUNER_ORACLE_PORT`. What Keras Tuner's chief lacks is here: it survives the death of a
worker, it ends, and it does not share its port with another one.
"""

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures

import keras_tuner
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.src import protos
from keras_tuner.src.distribute.oracle_chief import OracleServicer

from keras_squeeze.search.oracle import ParetoOracle

_IDLE_SECONDS = 0.5  # how long a worker without work waits for its next answer
_MOST_WORKERS = 64  # that are answered at once
_LAST_ANSWERS = 5.0  # seconds for answers that are on their way when the search ends


def serve(oracle: ParetoOracle, *, dead_after: float = 120.0, on_change: Callable[[], None] | None = None) -> None:
    """Hands out trials to workers until all are ended.

    A worker of which nothing is heard for `dead_after` seconds is given up and its trial handed to another one, at
    most twice. A worker that was only slow may still deliver: the first result counts. A worker that has nothing to
    do waits for the end, since it may be needed. Where nothing is heard of any worker for twice `dead_after`, the
    search ends unfinished, with a warning.

    Args:
        oracle: With its directory set and, where the search is to go on, reloaded.
        dead_after: Seconds without a sign of life after which a worker counts as dead.
        on_change: Called, in this thread, whenever a trial was begun or ended.

    Raises:
        TypeError: the oracle is another one.
        ValueError: `dead_after` is not above 0, or a variable is missing or no address.
        OSError: the port is in use.
        RuntimeError: all trials fail.
    """
    if not isinstance(oracle, ParetoOracle):
        raise TypeError(f"Several machines need a `ParetoOracle`. Received: {oracle!r}")
    if not dead_after > 0:
        raise ValueError(f"`dead_after` must be seconds, above 0. Received: {dead_after!r}")
    host, port = _address()
    servicer = _Servicer(oracle, dead_after)
    with oracle.lock:
        oracle.dead_after = dead_after
        oracle.save()
    before = None
    with _server(servicer, host, port):
        while not servicer.is_over():
            time.sleep(min(0.25, dead_after / 10))
            servicer.bury()
            if on_change is not None and servicer.census() != before:
                before = servicer.census()
                on_change()
    if servicer.error is not None:
        raise servicer.error
    left = servicer.left()
    if left:
        warnings.warn(
            f"No worker is left, and {left} of {oracle.max_trials} trials are still to be done. Start the chief and "
            "the workers again as before, and the search goes on.",
            stacklevel=2,
        )


class _Servicer(OracleServicer):
    """Answers workers, and knows when it heard of each."""

    def __init__(self, oracle: ParetoOracle, dead_after: float):
        super().__init__(oracle)
        self.error: Exception | None = None
        self.stop_triggered = False
        self._dead_after = dead_after
        self._heard: dict[str, float] = {}
        # From the address of a connection to the tuner at its other end; None where several in one process share it.
        self._tuners: dict[str, str | None] = {}

    def CreateTrial(self, request, context):  # noqa: N802
        with self.oracle.lock:
            tuner_id, peer = request.tuner_id, context.peer()
            self._tuners[peer] = tuner_id if self._tuners.get(peer, tuner_id) == tuner_id else None
            self._heard[tuner_id] = time.monotonic()
            trial = self._next(tuner_id)
        if trial.status == TrialStatus.IDLE:
            time.sleep(min(_IDLE_SECONDS, self._dead_after / 10))
        return protos.get_service().CreateTrialResponse(trial=trial.to_proto())

    def UpdateTrial(self, request, context):  # noqa: N802
        with self.oracle.lock:
            self._hear(context, request.trial_id)
            return super().UpdateTrial(request, context)

    def EndTrial(self, request, context):  # noqa: N802
        with self.oracle.lock:
            self._hear(context, request.trial.trial_id)
            try:
                if request.trial.trial_id in self.oracle.trials:  # else of a search that was here before
                    self.oracle.end_trial(Trial.from_proto(request.trial), tuner_id=self._tuners.get(context.peer()))
            except Exception as error:
                self.error = error
            return protos.get_service().EndTrialResponse()

    def GetTrial(self, request, context):  # noqa: N802
        with self.oracle.lock:
            self._hear(context, request.trial_id)
            return super().GetTrial(request, context)

    def is_over(self) -> bool:
        """Whether there were workers, and all were told that nothing is left to do, or are dead and do not return."""
        with self.oracle.lock:
            if not self._heard or self.oracle.tuner_ids or self.oracle.ongoing_trials:
                return False
            told = self.error is not None or not self.left()
            return told or time.monotonic() - max(self._heard.values()) > 2 * self._dead_after

    def left(self) -> int:
        """How many trials are still to be ended."""
        return self.oracle.unfinished() if self.stop_triggered else self.oracle.max_trials - len(self.oracle.end_order)

    def bury(self) -> None:
        """Gives up the workers that were not heard of for too long."""
        with self.oracle.lock:
            now = time.monotonic()
            for tuner_id in list(self.oracle.tuner_ids):
                if now - self._heard.get(tuner_id, now) > self._dead_after:
                    self.oracle.abandon(tuner_id, f"Nothing was heard of {tuner_id} for {self._dead_after:g} seconds.")

    def census(self) -> tuple[int, int]:
        """How many trials were begun and ended."""
        with self.oracle.lock:
            return len(self.oracle.trials), len(self.oracle.end_order)

    def _next(self, tuner_id: str) -> Trial:
        """A trial, or `"IDLE"` as long as a trial of somebody else may come back, or `"STOPPED"`."""
        if self.error is None:
            try:
                trial = self.oracle.create_trial(tuner_id)
            except Exception as error:  # a space that cannot be sampled, a disk that is full: the chief has to say it
                self.error = error
        if self.error is not None:
            self.oracle.tuner_ids.discard(tuner_id)
            self.oracle.ongoing_trials.pop(tuner_id, None)
            return Trial(keras_tuner.HyperParameters(), status=TrialStatus.STOPPED)
        if trial.status == TrialStatus.STOPPED and self.oracle.unfinished():
            self.oracle.tuner_ids.add(tuner_id)
            trial.status = TrialStatus.IDLE
        self.stop_triggered = self.stop_triggered or trial.status in (TrialStatus.STOPPED, TrialStatus.IDLE)
        return trial

    def _hear(self, context, trial_id: str) -> None:
        """Notes a sign of life: of who is at the other end or, where that is unknown, of who has the trial.

        A worker that was given up and is heard of again is waited for, too: else it would find nobody to report to.
        """
        tuner_id = self._tuners.get(context.peer())
        if tuner_id is None:
            held = {trial.trial_id: tuner for tuner, trial in self.oracle.ongoing_trials.items()}
            tuner_id = held.get(trial_id)
        if tuner_id is not None:
            self._heard[tuner_id] = time.monotonic()
            self.oracle.tuner_ids.add(tuner_id)


def _address() -> tuple[str, int]:
    """Where workers look for the chief."""
    missing = [name for name in ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"A chief needs the variables KERASTUNER_ORACLE_IP and _PORT. Received no {missing[0]}")
    port = os.environ["KERASTUNER_ORACLE_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"KERASTUNER_ORACLE_PORT must be a port, from 1 to 65535. Received: {port!r}")
    return os.environ["KERASTUNER_ORACLE_IP"], int(port)


@contextlib.contextmanager
def _server(servicer: _Servicer, host: str, port: int) -> Iterator[None]:
    """A server that has its port for itself: by default two of them would take turns on one."""
    import grpc

    _check_free(host, port)
    server = grpc.server(futures.ThreadPoolExecutor(_MOST_WORKERS), options=(("grpc.so_reuseport", 0),))
    protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
    server.add_insecure_port(f"{host}:{port}")
    server.start()
    try:
        yield
    finally:
        server.stop(_LAST_ANSWERS).wait()


def _check_free(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The chief cannot listen on {host}:{port} ({error.strerror}). Is another one running there? Received: "
                f"KERASTUNER_ORACLE_IP={host}, KERASTUNER_ORACLE_PORT={port}",
            ) from None
