"""How long one inference takes, measured in LiteRT on this machine."""

import os
import pathlib
import tempfile
import time
from dataclasses import dataclass

import keras
import numpy as np

from keras_squeeze.deployment.converting import convert

_WARM_UP_RUNS = 5


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one inference with a batch of one.

    Attributes:
        median_ms: The median over the runs.
        p10_ms, p90_ms: A tenth of the runs were faster, a tenth slower.
        runs: How many were timed.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms (10 % below {self.p10_ms:.3g}, 10 % above {self.p90_ms:.3g}; {self.runs} runs)"


def measure_latency(path_or_model, *, num_threads: int = 1, runs: int = 50) -> Latency:
    """Measures a `.tflite` file, or what a model becomes when it is converted to float32.

    Args:
        path_or_model: Path of a `.tflite` file, or a built Keras model whose inputs have a known shape.
        num_threads: Threads that LiteRT may use.
        runs: Inferences to time, after a few that are not.

    Returns:
        A `Latency`. Compare two models in one run on one idle machine: the same file differs between machines, and
        between busy and idle ones.

    Raises:
        TypeError: neither a path nor a model.
        ValueError: the file does not exist or is no LiteRT model, a size of the inputs is not known, or a number is
            below 1.

    Example:

    ```python
    ks.measure_latency(model).median_ms / ks.measure_latency(ks.shrink(model)).median_ms
    ```
    """
    for name, value in {"num_threads": num_threads, "runs": runs}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an int, at least 1. Received: {name}={value!r}")
    run = prepare(path_or_model, num_threads=num_threads)
    for _ in range(_WARM_UP_RUNS):
        run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    low, median, high = np.quantile(times, [0.1, 0.5, 0.9])
    return Latency(float(median), float(low), float(high), runs)


def prepare(path_or_model, *, num_threads: int = 1):
    """A function that runs one inference on random inputs, for those who time it themselves."""
    if isinstance(path_or_model, keras.Model):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.tflite")
            path.write_bytes(convert(path_or_model))
            return _invoker(path, num_threads)
    if not isinstance(path_or_model, (str, os.PathLike)):
        raise TypeError(f"Expected the path of a .tflite file or a `keras.Model`. Received: {path_or_model!r}")
    path = pathlib.Path(path_or_model)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Pass the path of a .tflite file or a `keras.Model`.")
    return _invoker(path, num_threads)


def _invoker(path: pathlib.Path, num_threads: int):
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(str(path), num_threads=num_threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no model that LiteRT can run: {error}") from None
    rng = np.random.default_rng(0)
    for detail in interpreter.get_input_details():
        shape, dtype = detail["shape"], detail["dtype"]
        is_float = np.issubdtype(dtype, np.floating)
        values = rng.random(shape) if is_float else np.zeros(shape)  # zero is in every vocabulary
        interpreter.set_tensor(detail["index"], values.astype(dtype))
    return interpreter.invoke
