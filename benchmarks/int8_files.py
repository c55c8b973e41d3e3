"""How small and how fast int8 files are in LiteRT: trained with their quantizers, one thread, a batch of one.

The file of the parent in float32 and that of the compressed network run in turn in one process; every ratio is of two
inferences next to each other. A small network is compared with what tfmot makes of it in tf_keras.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tables
from characters import SIZE
from measuring import Bar, Estimate, advance, bars_table, own_process, progress_bar, warn_if_busy
from quantization_overhead import library_model, small_model
from rich.console import Console
from shrunk_latency import build_parent

SMALL = "two convolutions, 28x28"
_WARM_UP = 20
_EDGES = {"QUANTIZE", "DEQUANTIZE"}


@dataclass(frozen=True)
class Case:
    """A network, the fraction of its neurons that goes, and what was promised of bytes and latency."""

    network: str
    fraction: float
    bytes_limit: float
    latency_limit: float

    @property
    def name(self) -> str:
        return f"{self.network}, {f'{self.fraction:.0%} of the neurons gone, ' if self.fraction else ''}int8"


CASES = (
    Case("MobileNetV2, 224x224", 0.0, 0.30, 0.55),
    Case("four convolutions, 64x64", 0.5, 0.10, 0.12),
)


def write_files(case: Case, folder: str) -> list[str]:
    """Writes `float.tflite` and `int8.tflite`; returns the operations that stayed in float."""
    import keras

    import keras_squeeze as ks

    parent = build_parent(case.network)
    ks.export(parent, Path(folder, "float.tflite"))
    if case.fraction:
        ks.prune_neurons(parent, case.fraction, allocation="uniform", round_to=8)
        parent = ks.shrink(parent)
    q = ks.quantize_aware(parent)
    q.compile("adam", keras.losses.SparseCategoricalCrossentropy())
    rng = np.random.default_rng(0)
    images = rng.random((16, *parent.inputs[0].shape[1:]), dtype="float32")
    q.fit(images, rng.integers(10, size=16), batch_size=8, epochs=2, verbose=0)
    return ks.export(q, Path(folder, "int8.tflite"), calibration_data=images).float_ops


def write_small(library: str, folder: str) -> None:
    """The small network of `quantization_overhead.py`, quantized by one library and trained for a few steps."""
    keras, quantize = library_model(library)
    keras.utils.set_random_seed(0)
    plain = small_model(keras)
    q = quantize(plain)
    q.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    images = rng.random((64, SIZE, SIZE, 1), dtype="float32")
    q.fit(images, rng.integers(36, size=64), batch_size=32, epochs=2, verbose=0)
    if library == "ours":
        import keras_squeeze as ks

        ks.export(plain, Path(folder, "float.tflite"))
        ks.export(q, Path(folder, "ours.tflite"), calibration_data=images)
        return
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(q)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    Path(folder, "tfmot.tflite").write_bytes(converter.convert())


def time_in_turn(paths: list[str], runs: int) -> list[list[float]]:
    """Seconds of single inferences of each file."""
    from keras_squeeze.evaluation.latency import prepare

    inferences = [prepare(path) for path in paths]
    times: list[list[float]] = [[] for _ in paths]
    places = range(len(paths))
    for repetition in range(-_WARM_UP, runs):
        for place in places if repetition % 2 else reversed(places):
            start = time.perf_counter()
            inferences[place]()
            if repetition >= 0:
                times[place].append(time.perf_counter() - start)
    return times


def measure(case: Case, runs: int) -> tuple[tuple[str, ...], list[Bar]]:
    """A row of the table, and its bars."""
    with tempfile.TemporaryDirectory() as folder:
        with own_process() as process:
            left = process.submit(write_files, case, folder).result()
        paths = [str(Path(folder, name)) for name in ("float.tflite", "int8.tflite")]
        sizes = [os.path.getsize(path) for path in paths]
        with own_process() as process:
            before, after = process.submit(time_in_turn, paths, runs).result()
    ratio = Estimate.of([b / a for a, b in zip(before, after, strict=True)])
    milliseconds = (f"{1e3 * Estimate.of(times).median:.3f}" for times in (before, after))
    share = sizes[1] / sizes[0]
    row = (case.name, *(f"{size:,}" for size in sizes), f"{share:.3f}", *milliseconds, ratio.text(), _named(left))
    bars = [
        Bar(f"{case.name}: bytes", case.bytes_limit, Estimate.of([share])),
        Bar(f"{case.name}: latency", case.latency_limit, ratio),
        Bar(f"{case.name}: operations in float", 0, Estimate.of([len(left)]), digits=0),
    ]
    return row, bars


def measure_small(runs: int) -> list[tuple[str, ...]]:
    """Rows of the small network, here and in tfmot, over the same float file."""
    with tempfile.TemporaryDirectory() as folder:
        for library in ("ours", "tfmot"):
            with own_process() as process:
                process.submit(write_small, library, folder).result()
        paths = [str(Path(folder, f"{name}.tflite")) for name in ("float", "ours", "tfmot")]
        sizes = [os.path.getsize(path) for path in paths]
        with own_process() as process:
            whole, *others = process.submit(time_in_turn, paths, 10 * runs).result()
    rows = []
    for name, size, times in zip(("keras_squeeze", "tfmot"), sizes[1:], others, strict=True):
        ratio = Estimate.of([b / a for a, b in zip(whole, times, strict=True)])
        milliseconds = f"{1e3 * Estimate.of(times).median:.4f}"
        rows.append((name, f"{size:,}", f"{size / sizes[0]:.3f}", milliseconds, ratio.text()))
    return rows


def _named(float_ops: list[str]) -> str:
    return ", ".join(float_ops) or "none"


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=300, help="inferences of each file (300)")
    args = tables.parse(parser)
    runs = 5 if args.quick else args.runs
    console = Console()
    warn_if_busy(console)
    rows, bars = [], []
    with progress_bar(console) as progress:
        task = progress.add_task("networks", total=len(CASES) + 1)
        for case in CASES:
            row, promised = measure(case, runs)
            rows.append(row)
            bars += promised
            advance(progress, task)
        small = measure_small(runs)
        advance(progress, task)
    sides = ("parent", "int8")
    bytes_of, ms_of = ([f"{side}, {unit}" for side in sides] for unit in ("bytes", "ms"))
    header = ("network", *bytes_of, "bytes ratio", *ms_of, "latency ratio [95 %]", "operations in float")
    small_header = (f"{SMALL}, int8", "bytes", "over float", "ms", "latency over float [95 %]")
    note = (
        f"Trained for a few steps on random pictures; {runs} inferences of each, in turn ({10 * runs} of the small "
        f"network); one thread. {tables.machine('ai-edge-litert', 'tensorflow-model-optimization')}"
    )
    parts = (tables.markdown(header, rows), tables.markdown(small_header, small), bars_table(bars), note)
    text = "\n\n".join(parts)
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("int8_files", text)
        tables.write("int8", "\n\n".join((*parts[:2], note)), tables.FRONT_PAGE)


if __name__ == "__main__":
    main()
