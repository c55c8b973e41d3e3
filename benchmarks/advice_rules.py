"""What `advise` quotes, measured: what each change makes of the latency and the file of a network in LiteRT.

One thread, a batch of one. Both files are made in one process of their own and run in turn there; every ratio is of two
measurements next to each other. The last lines printed are the constants for `keras_squeeze/evaluation/advice.py`.
"""

import functools
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tables
from measuring import Estimate, advance, in_turn, own_process, progress_bar, warn_if_busy
from rich.console import Console

NAMES = {
    "convolutional": "MobileNetV2, 224x224",
    "dense": "four dense layers, 784 inputs, 1024 units",
    "tiny": "three dense layers, 24 inputs, 24 units",
}
WIDE_NAMES = {"convolutional": "four convolutions, 64x64", "dense": "four dense layers, 784 inputs"}
QUICK = (("dense", "80% zeros, sparse-encoded"), ("convolutional", "65 wide over 64"), ("tiny", "static int8"))

_WARM_UP = 20
_SECONDS = 1e-3  # that one measurement takes at least
_STALE = 0.1  # how far what is quoted may be from what is measured
_EXAMPLES = 32


@dataclass(frozen=True)
class Result:
    """Of one change to one network: seconds of single inferences in turn, before and after, and bytes of the files."""

    before: list[float]
    after: list[float]
    bytes_before: int
    bytes_after: int

    @property
    def latency(self) -> Estimate:
        return Estimate.of([after / before for before, after in zip(self.before, self.after, strict=True)])

    @property
    def num_bytes(self) -> float:
        return self.bytes_after / self.bytes_before


def _build(network: str):
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    if network == "convolutional":
        return keras.applications.MobileNetV2(weights=None)
    inputs, units, hidden = (784, 1024, 3) if network == "dense" else (24, 24, 2)
    blocks = [layers.Dense(units, activation="relu") for _ in range(hidden)]
    return keras.Sequential([keras.Input((inputs,)), *blocks, layers.Dense(10)])


def _wide(network: str, width: int):
    """Layers of a width that is, or is not, a multiple of 8."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    if network == "dense":
        blocks = [layers.Dense(width, activation="relu") for _ in range(3)]
        return keras.Sequential([keras.Input((784,)), *blocks, layers.Dense(10)])
    blocks = [layers.Conv2D(width, 3, padding="same", activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((64, 64, 3)), *blocks, layers.GlobalAveragePooling2D(), layers.Dense(10)])


def _converted(model, *optimizations) -> bytes:
    """What the TensorFlow Lite converter makes of a model by itself."""
    import tensorflow as tf

    logging.getLogger("absl").setLevel(logging.ERROR)
    spec = tf.TensorSpec((1, *model.input_shape[1:]), model.inputs[0].dtype)
    function = tf.function(lambda x: model(x, training=False)).get_concrete_function(spec)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    converter.optimizations = list(optimizations)
    return converter.convert()


def _pruned(model, sparsity: float, pattern: str = "unstructured", encoded: bool = False) -> bytes:
    import tensorflow as tf

    import keras_squeeze as ks

    ks.prune_weights(model, sparsity, pattern=pattern)
    return _converted(model, *([tf.lite.Optimize.EXPERIMENTAL_SPARSITY] if encoded else []))


def _dynamic_range(model) -> bytes:
    import tensorflow as tf

    return _converted(model, tf.lite.Optimize.DEFAULT)


def _quantized(model, weights: str) -> bytes:
    import keras_squeeze as ks

    q = ks.quantize_aware(model, weights)
    examples = np.random.default_rng(0).random((_EXAMPLES, *model.input_shape[1:]), "float32")
    with tempfile.TemporaryDirectory() as folder:
        return ks.export(q, Path(folder, "model.tflite"), calibration_data=examples).path.read_bytes()


def _shrunk(model) -> bytes:
    import keras_squeeze as ks

    ks.prune_neurons(model, 0.5, allocation="uniform", round_to=8)
    return _converted(ks.shrink(model))


CHANGES: dict[str, Callable] = {
    "80% zeros": functools.partial(_pruned, sparsity=0.8),
    "80% zeros, sparse-encoded": functools.partial(_pruned, sparsity=0.8, encoded=True),
    "95% zeros": functools.partial(_pruned, sparsity=0.95),
    "95% zeros, sparse-encoded": functools.partial(_pruned, sparsity=0.95, encoded=True),
    "2:4 zeros": functools.partial(_pruned, sparsity=0.5, pattern="2:4"),
    "dynamic-range int8": _dynamic_range,
    "static int8": functools.partial(_quantized, weights="int8"),
    "binary weights": functools.partial(_quantized, weights="binary"),
    "half of the neurons": _shrunk,
}
CASES = (
    *(("convolutional", change) for change in CHANGES),
    *(("convolutional", f"65 wide over {width}") for width in (64, 72)),
    *(("dense", change) for change in CHANGES),
    *(("dense", f"1025 wide over {width}") for width in (1024, 1032)),
    ("tiny", "static int8"),
)


def _files(network: str, change: str) -> tuple[bytes, bytes]:
    """The file before a change and after it."""
    if change in CHANGES:
        return _converted(_build(network)), CHANGES[change](_build(network))
    wide, other = (int(part) for part in change.replace(" wide over", "").split())
    return _converted(_wide(network, other)), _converted(_wide(network, wide))


def measure(network: str, change: str, runs: int) -> Result:
    """Runs both files in turn."""
    from keras_squeeze.evaluation.latency import prepare

    files = _files(network, change)
    with tempfile.TemporaryDirectory() as folder:
        invocations = []
        for name, content in zip(("before", "after"), files, strict=True):
            path = Path(folder, f"{name}.tflite")
            path.write_bytes(content)
            invocations.append(prepare(path))

        def seconds(invoke: Callable, calls: int) -> float:
            invoke()  # brings back what the other file pushed out of the caches
            start = time.perf_counter()
            for _ in range(calls):
                invoke()
            return (time.perf_counter() - start) / calls

        calls = max(1, round(_SECONDS / seconds(invocations[0], _WARM_UP)))
        timed = [functools.partial(seconds, invoke, calls) for invoke in invocations]
        pairs = [in_turn(repetition, *timed) for repetition in range(runs)]
    before, after = zip(*pairs, strict=True)
    return Result(list(before), list(after), *map(len, files))


def quoted() -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """What `advise` quotes for every network and change.

    Raises:
        RuntimeError: these are not the ones that are measured here.
    """
    import keras_squeeze as ks
    from keras_squeeze.evaluation.advice import MEASURED, TINY_MACS

    other = set(MEASURED) ^ set(CASES)
    if other:
        raise RuntimeError(f"`advise` and its benchmark do not agree about: {sorted(other)}")
    macs = ks.summarize(_build("tiny")).total.macs
    if macs != TINY_MACS:
        raise RuntimeError(f"The tiny network computes {macs:,} MACs, and `advise` says {TINY_MACS:,}.")
    return {case: tuple(ratio) for case, ratio in MEASURED.items()}


def _shown(quoted: float | None, measured: float) -> str:
    """What `advise` quotes, in bold where that is no longer so."""
    if quoted is None:
        return "**nothing**"
    return f"{quoted:.2f}" if abs(quoted / measured - 1) <= _STALE else f"**{quoted:.2f}**"


def _row(case: tuple[str, str], result: Result, quoted: tuple[float | None, float | None]) -> tuple[str, ...]:
    network, change = case
    name = NAMES[network] if change in CHANGES else WIDE_NAMES[network]
    before, after = (f"{1e3 * Estimate.of(times).median:.3g}" for times in (result.before, result.after))
    latency = (result.latency.text(), _shown(quoted[0], result.latency.median))
    return f"{name}: {change}", before, after, *latency, f"{result.num_bytes:.2f}", _shown(quoted[1], result.num_bytes)


def _constant(case: tuple[str, str], result: Result) -> str:
    """A line of `MEASURED`."""
    network, change = case
    return f'    ("{network}", "{change}"): Ratio({result.latency.median:.2f}, {result.num_bytes:.2f}),'


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=300, help="measurements of each file (300)")
    args = tables.parse(parser)
    runs, cases = (5, QUICK) if args.quick else (args.runs, CASES)
    console = Console()
    warn_if_busy(console)
    with own_process() as process:
        constants = process.submit(quoted).result()
    results: dict[tuple[str, str], Result] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("changes", total=len(cases))
        for case in cases:
            with own_process() as process:
                results[case] = process.submit(measure, *case, runs).result()
            advance(progress, task)
    header = ("network: change", "before, ms", "after, ms", "time, ratio [95 %]", "quoted", "bytes, ratio", "quoted")
    table = tables.markdown(header, [_row(case, result, constants[case]) for case, result in results.items()])
    note = (
        f"{runs} measurements of each file, in turn; one thread. *quoted*: by `advise`, in bold where that is missing "
        f"or more than {_STALE:.0%} off. {tables.machine('ai-edge-litert')}"
    )
    text = f"{table}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    lines = [_constant(case, result) for case, result in results.items()]
    console.print("", *lines, sep="\n", soft_wrap=True, markup=False, highlight=False)
    if args.write:
        tables.write("advice_rules", text)


if __name__ == "__main__":
    main()
