"""How long one inference takes, measured in LiteRT on this machine."""

import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.deployment.litert import export
from keras_squeeze.progress import progress_bar

_WARM_UP_RUNS = 5


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one inference with a batch of one.

    Attributes:
        median_ms: The median over the runs.
        p10_ms, p90_ms: A tenth of the runs were faster, a tenth slower.
        runs: How many were timed.
        ratio: The median over the rounds of its time divided by that of the first file in the same round; 1.0 for the
            first file, and for one that was measured alone.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    ratio: float = 1.0

    def __str__(self) -> str:
        spread = f"10 % below {self.p10_ms:.3g}, 10 % above {self.p90_ms:.3g}; {self.runs} runs"
        beside = "" if self.ratio == 1 else f"; {self.ratio:.3g} of the first"
        return f"{self.median_ms:.3g} ms ({spread}{beside})"


def measure_latency(path_or_model, *, num_threads: int = 1, runs: int = 50) -> Latency:
    """Measures a `.tflite` file, or the one that a model becomes.

    Args:
        path_or_model: Path of a `.tflite` file, or a built Keras model whose inputs have a known shape. A model is
            exported as it was trained: in int8 where it has quantizers, else in float32.
        num_threads: Threads that LiteRT may use.
        runs: Inferences to time, after a few that are not.

    Returns:
        A `Latency`. The same file differs between machines, and between busy and idle ones: compare models with
        `measure_latencies`, which lets them take turns.

    Raises:
        TypeError: neither a path nor a model.
        ValueError: the file does not exist or is no LiteRT model, a size of the inputs is not known, `export` refuses
            the model, or a number is below 1.

    Example:

    ```python
    print(ks.measure_latency(model))
    ```
    """
    return measure_latencies({"": path_or_model}, num_threads=num_threads, runs=runs)[""]


def measure_latencies(models: Mapping[str, object], *, num_threads: int = 1, runs: int = 50) -> dict[str, Latency]:
    """Measures several files or models in turn, so that what the machine does meanwhile slows all of them alike.

    In every round each one runs once, forwards and backwards in turn; what it pushed out of the processor's caches
    comes back in an inference before, which is not timed.

    Args:
        models: `{name: path of a .tflite file or Keras model}`, each as in `measure_latency`; the first one is what the
            others are compared with.
        num_threads: Threads that LiteRT may use.
        runs: Rounds, after a few that are not timed.

    Returns:
        `{name: Latency}`, each with its `ratio` to the first one.

    Raises:
        TypeError, ValueError: as `measure_latency`; or `models` is no dict, or empty.

    Example:

    ```python
    ks.measure_latencies({"before": model, "after": ks.shrink(model)})["after"].ratio
    ```
    """
    checks.positive_int("num_threads", num_threads)
    checks.positive_int("runs", runs)
    if not isinstance(models, Mapping):
        raise TypeError(f"`models` must be a dict from names to files or models. Received: {models!r}")
    if not models:
        raise ValueError("`models` is empty: pass at least one file or model. Received: {}")
    functions = [prepare(model, num_threads=num_threads) for model in models.values()]
    with progress_bar("timing", total=runs, quiet=True) as advance:
        times = _times_in_turn(functions, runs, advance)
    return {name: _latency(own, times[0]) for name, own in zip(models, times, strict=True)}


def prepare(path_or_model, *, num_threads: int = 1) -> Callable[[], None]:
    """A function that runs one inference on random inputs, for those who time it themselves."""
    if isinstance(path_or_model, keras.Model):
        with tempfile.TemporaryDirectory() as folder:
            return _invoker(export(path_or_model, pathlib.Path(folder, "model.tflite")).path, num_threads)
    if not isinstance(path_or_model, (str, os.PathLike)):
        raise TypeError(f"Expected the path of a .tflite file or a `keras.Model`. Received: {path_or_model!r}")
    path = pathlib.Path(path_or_model)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Pass the path of a .tflite file or a `keras.Model`.")
    return _invoker(path, num_threads)


def _times_in_turn(functions: Sequence[Callable], runs: int, on_round: Callable) -> np.ndarray:
    """Milliseconds, shape (functions, runs)."""
    for function in functions:
        for _ in range(_WARM_UP_RUNS):
            function()
    times = np.empty((len(functions), runs))
    order = list(range(len(functions)))
    for run in range(runs):
        for index in order if run % 2 == 0 else reversed(order):
            if len(functions) > 1:
                functions[index]()
            start = time.perf_counter()
            functions[index]()
            times[index, run] = 1e3 * (time.perf_counter() - start)
        on_round()
    return times


def _latency(times: np.ndarray, first: np.ndarray) -> Latency:
    low, median, high = np.quantile(times, [0.1, 0.5, 0.9])
    return Latency(float(median), float(low), float(high), len(times), float(np.median(times / first)))


def _invoker(path: pathlib.Path, num_threads: int) -> Callable[[], None]:
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(str(path), num_threads=num_threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no model that LiteRT can run: {error} Pass a .tflite file, or a `keras.Model`; "
            "keras_squeeze.compare reads other files as well."
        ) from None
    rng = np.random.default_rng(0)
    for detail in interpreter.get_input_details():
        shape, dtype = detail["shape"], detail["dtype"]
        is_float = np.issubdtype(dtype, np.floating)
        values = rng.random(shape) if is_float else np.zeros(shape)  # zero is in every vocabulary
        interpreter.set_tensor(detail["index"], values.astype(dtype))
    return interpreter.invoke
