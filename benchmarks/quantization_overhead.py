"""How much longer a training step takes when it quantizes to int8, and what accuracy comes of it, here and in tfmot.

Both libraries get the same networks, data, optimizer and batches. A plain model and its quantization-aware copy live in
one process for each library, and short runs of the two take turns: each ratio is of two runs right after each other.
For the accuracy, all copies begin with the same trained weights.
"""

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tables
from characters import CLASSES, SIZE
from measuring import Bar, Estimate, advance, bars_table, in_turn, own_process, progress_bar, warn_if_busy
from networks import compile_network, use_one_thread
from neuron_criteria import Mean, Plan, load_data
from rich.console import Console
from training_fits import FIT_NETWORKS, FIT_SHAPES
from training_overhead import NAMES

BATCH = 128
RATE = 1e-3  # of training on for the accuracy; it falls to zero in a straight line
LIBRARIES = {"ours": "keras_squeeze, Keras 3", "tfmot": "tfmot, tf_keras"}

_WARM_UP_STEPS = 30

Pair = tuple[float, float]


@dataclass(frozen=True)
class Overhead:
    """What the pairs (plain, quantized) of one library say; seconds of one step."""

    plain: Estimate
    quantized: Estimate
    ratio: Estimate

    @classmethod
    def of(cls, pairs: list[Pair]) -> "Overhead":
        plain, quantized = (Estimate.of([pair[side] for pair in pairs]) for side in (0, 1))
        return cls(plain, quantized, Estimate.of([quantized / plain for plain, quantized in pairs]))


@dataclass
class Runner:
    """A compiled model and the endless batches that it is trained on."""

    model: Any
    batches: Iterator

    def seconds(self, steps: int) -> float:
        """Of one step, over as many."""
        start = time.perf_counter()
        for _ in range(steps):
            logs = self.model.train_function(self.batches)
        float(logs["loss"])
        return (time.perf_counter() - start) / steps


def time_pair(library: str, network: str, repetition: int, seconds: float) -> Pair:
    """The step of the plain model and that of the quantized one, measured for about as many seconds each."""
    (plain, quantized), steps = _runners(library, network), _steps(library, network, seconds)
    return in_turn(repetition, lambda: plain.seconds(steps[0]), lambda: quantized.seconds(steps[1]))


@functools.lru_cache(maxsize=1)
def _runners(library: str, network: str) -> tuple[Runner, Runner]:
    """Both models, after a first `fit`, which traces them."""
    import tensorflow as tf

    keras, quantize = library_model(library)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = rng.random((_WARM_UP_STEPS * BATCH, *FIT_SHAPES[network]), dtype="float32")
    labels = rng.integers(10, size=len(images))
    runners = []
    for quantized in (False, True):
        model = FIT_NETWORKS[network](keras)
        model = quantize(model) if quantized else model
        model.compile(keras.optimizers.Adam(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(images, labels, batch_size=BATCH, epochs=1, verbose=0)
        data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(BATCH).cache().repeat().prefetch(2)
        runners.append(Runner(model, iter(data)))
    _check(*(runner.model for runner in runners))
    return tuple(runners)


@functools.lru_cache(maxsize=1)
def _steps(library: str, network: str, seconds: float) -> tuple[int, ...]:
    """How many steps of each of the two models take about as many seconds."""
    runners = _runners(library, network)
    for runner in runners:
        runner.seconds(_WARM_UP_STEPS)
    return tuple(max(1, round(seconds / runner.seconds(_WARM_UP_STEPS))) for runner in runners)


def _check(plain, quantized) -> None:
    """A benchmark of quantization must have quantized: it takes variables for the ranges."""
    if len(quantized.variables) <= len(plain.variables):
        raise RuntimeError("The model that should be quantized has no more variables than the plain one.")


def library_model(name: str):
    """Its Keras, and the function that makes a model quantization-aware."""
    if name == "ours":
        import keras

        import keras_squeeze as ks

        return keras, ks.quantize_aware
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tensorflow_model_optimization as tfmot
    import tf_keras

    return tf_keras, tfmot.quantization.keras.quantize_model


def small_model(keras):
    layers = keras.layers
    inputs = outputs = keras.Input((SIZE, SIZE, 1))
    for filters in (16, 32):
        outputs = layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)(outputs)
        outputs = layers.ReLU()(layers.BatchNormalization()(outputs))
    return keras.Model(inputs, layers.Dense(len(CLASSES))(layers.Flatten()(outputs)))


def train_first(plan: Plan, seed: int) -> list[np.ndarray]:
    """The weights that all copies begin with."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = compile_network(keras, small_model(keras), 2e-3)
    model.fit(*load_data(plan)[0], batch_size=BATCH, epochs=plan.dense_epochs, verbose=0)
    return model.get_weights()


def train_on(library: str, plan: Plan, seed: int, weights: list[np.ndarray], quantized: bool) -> float:
    """Accuracy in percent after the rest of the training."""
    keras, quantize = library_model(library)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    train, test = load_data(plan)
    model = small_model(keras)
    model.set_weights(weights)
    model = quantize(model) if quantized else model
    steps = plan.tuning_epochs * -(-plan.train // BATCH)
    compile_network(keras, model, keras.optimizers.schedules.PolynomialDecay(RATE, steps, 0.0))
    model.fit(*train, batch_size=BATCH, epochs=plan.tuning_epochs, verbose=0)
    return 100 * model.evaluate(*test, batch_size=512, verbose=0)[1]


def measure_overheads(networks: list[str], pairs: int, seconds: float, progress) -> dict[str, dict[str, Overhead]]:
    """Of each network, of each library; the libraries take turns as well. A first pair of each is thrown away."""
    results = {}
    for network in networks:
        samples: dict[str, list[Pair]] = {library: [] for library in LIBRARIES}
        task = progress.add_task(f"{NAMES[network]}: pairs", total=len(LIBRARIES) * (pairs + 1))
        with own_process() as ours, own_process() as tfmot:
            for repetition in range(-1, pairs):
                for library, worker in (("ours", ours), ("tfmot", tfmot)):
                    pair = worker.submit(time_pair, library, network, repetition, seconds).result()
                    if repetition >= 0:
                        samples[library].append(pair)
                    advance(progress, task)
        results[network] = {library: Overhead.of(found) for library, found in samples.items()}
    return results


def measure_accuracies(plan: Plan, seeds: int, progress) -> dict[tuple[str, bool], list[float]]:
    """Of every seed, of each library in float and quantized; the libraries train at the same time."""
    accuracy: dict = {(library, quantized): [] for library in LIBRARIES for quantized in (False, True)}
    task = progress.add_task("trainings", total=seeds * (1 + len(accuracy)))
    with own_process() as ours, own_process() as tfmot:
        workers = {"ours": ours, "tfmot": tfmot}
        for worker in workers.values():
            worker.submit(use_one_thread).result()
        for seed in range(seeds):
            weights = ours.submit(train_first, plan, seed).result()
            advance(progress, task)
            jobs = {
                (library, quantized): workers[library].submit(train_on, library, plan, seed, weights, quantized)
                for library, quantized in accuracy
            }
            for key, job in jobs.items():
                accuracy[key].append(job.result())
                advance(progress, task)
    return accuracy


def overhead_table(results: dict[str, dict[str, Overhead]]) -> str:
    rows = []
    for network, overheads in results.items():
        for library, overhead in overheads.items():
            steps = (f"{1e3 * side.median:.2f}" for side in (overhead.plain, overhead.quantized))
            rows.append((f"{NAMES[network]}, batch {BATCH}", LIBRARIES[library], *steps, overhead.ratio.text()))
    return tables.markdown(("network, batch", "library", "plain step, ms", "int8 step, ms", "ratio [95 %]"), rows)


def accuracy_table(accuracy: dict[tuple[str, bool], list[float]]) -> str:
    rows = []
    for library, title in LIBRARIES.items():
        plain, quantized = accuracy[library, False], accuracy[library, True]
        lost = Mean.of(np.subtract(plain, quantized))
        rows.append((title, Mean.of(plain).text(), Mean.of(quantized).text(), lost.text()))
    return tables.markdown(("library", "float, % [95 %]", "int8, % [95 %]", "points lost [95 %]"), rows)


def bars(results: dict[str, dict[str, Overhead]], accuracy: dict[tuple[str, bool], list[float]]) -> list[Bar]:
    """Not slower than tfmot, over its own plain step, and not less accurate."""
    promised = [
        Bar(f"{NAMES[network]}: not above tfmot's ratio", found["tfmot"].ratio.median, found["ours"].ratio)
        for network, found in results.items()
    ]
    less = Mean.of(np.subtract(accuracy["tfmot", True], accuracy["ours", True]))
    return [*promised, Bar("int8: points below tfmot's accuracy", 0, less, digits=2)]


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of runs for each network and library (40)")
    parser.add_argument("--seconds", type=float, default=0.75, help="how long each run of a pair is (0.75)")
    parser.add_argument("--seeds", type=int, default=5, help="networks to train for the accuracy (5)")
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES), help="all")
    args = tables.parse(parser)
    args.plan = Plan(pruning_epochs=0, tuning_epochs=6)
    if args.quick:
        args.pairs, args.seconds, args.seeds, args.plan = 2, 0.1, 1, Plan(1000, 500, 1, 0, 1)
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    with progress_bar(console) as progress:
        results = measure_overheads(args.networks, args.pairs, args.seconds, progress)
        console.print(overhead_table(results), soft_wrap=True, markup=False)
        accuracy = measure_accuracies(args.plan, args.seeds, progress)
    plan = args.plan
    note = (
        f"{args.pairs} pairs of runs of {args.seconds} s of each network and library, compiled as each library does by "
        "default (on a CPU neither uses XLA). Accuracy: two convolutions with batch normalization and a Dense layer, "
        f"{args.seeds} seeds, {plan.train:,} characters to train and {plan.test:,} to test, {plan.dense_epochs} epochs "
        f"in float, then {plan.tuning_epochs} more of every copy, with Adam from {RATE} down to 0. "
        f"{tables.machine('tensorflow-model-optimization', 'tf_keras')}"
    )
    text = f"{overhead_table(results)}\n\n{accuracy_table(accuracy)}\n\n{bars_table(bars(results, accuracy))}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("quantization_overhead", text)


if __name__ == "__main__":
    main()
