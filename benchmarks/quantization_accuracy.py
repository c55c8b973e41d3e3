"""What quantization costs in accuracy, trained with it or calibrated after training, on rendered characters.

For every seed one network of each kind is trained; then, from the same weights and for as many epochs with the same
learning rates, one copy is trained on in float and one for every quantizer is trained on with it. What is quantized
after training is the copy in float, with ranges from 1,024 of the training images. The points lost are those against
the copy in float, on the same test characters.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tables
from characters import CLASSES, SIZE
from measuring import Bar, advance, bars_table, progress_bar, warn_if_busy
from networks import build_characters, compile_network, use_one_thread
from neuron_criteria import Mean, Plan, load_data
from rich.console import Console

CALIBRATION = 1024  # images
BATCH = 128
FLOAT = "float"
LEARNED = "LearnedStep(4)"  # the package is imported only where something is trained


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        network: `"convolutions"` or `"MLP"`.
        bits: Of weights and of activations, in words.
        weights, activations: As in `quantize_aware`, or `LEARNED`.
        trained: Whether it is trained with its quantizers, or only calibrated.
        last: Whether the last layer is quantized as well; otherwise it stays in float.
    """

    network: str
    name: str
    bits: str
    weights: Any
    activations: Any = None
    trained: bool = True
    last: bool = True


RATES = {"convolutions": 1e-3, "MLP": 3e-3}  # of training on; they fall to zero in a straight line
VARIANTS = (
    Variant("convolutions", "int8, QAT", "8 / 8", "int8", "int8"),
    Variant("convolutions", "int8, after training", "8 / 8", "int8", "int8", trained=False),
    Variant("convolutions", "learned step, QAT", "4 / 4", LEARNED, LEARNED),
    Variant("convolutions", "learned step, last layer in float, QAT", "4 / 4", LEARNED, LEARNED, last=False),
    Variant("convolutions", "int4, QAT", "4 / 4", "int4", "int4"),
    Variant("convolutions", "int4, after training", "4 / 4", "int4", "int4", trained=False),
    Variant("convolutions", "ternary, QAT", "2 / 8", "ternary", "int8"),
    Variant("convolutions", "binary, QAT", "1 / 8", "binary", "int8"),
    Variant("convolutions", "xnor, QAT", "1 / 1", "xnor"),
    Variant("MLP", "binary_connect, QAT", "1 / float", "binary_connect"),
    Variant("MLP", "binary_connect on every layer, QAT", "1 / float", {"": "binary_connect"}),
)
LIMITS = {  # points lost against the copy in float
    "int8, QAT": 0.3,
    "learned step, QAT": 1.0,
    "learned step, last layer in float, QAT": 1.0,
    "binary_connect, QAT": 3.0,
    "binary_connect on every layer, QAT": 3.0,
}


def _mlp(keras):
    layers = keras.layers
    hidden = []
    for _ in range(2):
        hidden += [layers.Dense(512, use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([keras.Input((SIZE, SIZE, 1)), layers.Flatten(), *hidden, layers.Dense(len(CLASSES))])


NETWORKS = {"convolutions": build_characters, "MLP": _mlp}


def train_first(plan: Plan, seed: int, network: str) -> list[np.ndarray]:
    """The weights that all copies begin with."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = compile_network(keras, NETWORKS[network](keras), 2e-3)
    model.fit(*load_data(plan)[0], batch_size=BATCH, epochs=plan.dense_epochs, verbose=0)
    return model.get_weights()


def train_on(plan: Plan, seed: int, network: str, weights: list[np.ndarray], variant) -> dict[str, float]:
    """Accuracy in percent after the rest of the training; of the copy in float also after quantizing it."""
    import keras

    import keras_squeeze as ks

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    train, test = load_data(plan)
    model = NETWORKS[network](keras)
    model.set_weights(weights)
    if variant:
        model = _quantize(model, variant)
    steps = plan.tuning_epochs * -(-plan.train // BATCH)
    compile_network(keras, model, keras.optimizers.schedules.PolynomialDecay(RATES[network], steps, 0.0))
    callbacks = [ks.QuantizationSchedule()] if variant else []
    model.fit(*train, batch_size=BATCH, epochs=plan.tuning_epochs, verbose=0, callbacks=callbacks)
    if variant:
        return {variant.name: _accuracy(keras, model, test)}
    calibrated = [other for other in VARIANTS if other.network == network and not other.trained]
    found = {other.name: _accuracy(keras, _calibrate(model, other, train), test) for other in calibrated}
    return {FLOAT: _accuracy(keras, model, test), **found}


def _quantize(model, variant: Variant):
    import keras_squeeze as ks

    learned = ks.quantizers.LearnedStep(4)
    weights, activations = (learned if q == LEARNED else q for q in (variant.weights, variant.activations))
    last = model.layers[-1]
    layers = None if variant.last else lambda layer: layer is not last
    return ks.quantize_aware(model, weights, activations, layers=layers)


def _calibrate(model, variant: Variant, train):
    from keras_squeeze.quantization.conversion import calibrate

    quantized = _quantize(model, variant)
    calibrate(quantized, train[0][:CALIBRATION])
    return quantized


def _accuracy(keras, model, test) -> float:
    return 100 * compile_network(keras, model, 0.0).evaluate(*test, batch_size=512, verbose=0)[1]


def results_table(accuracy: dict[str, dict[str, list[float]]]) -> str:
    rows = []
    for network, found in accuracy.items():
        rows.append((f"{network}: {FLOAT}", "32 / 32", f"{np.mean(found[FLOAT]):.2f} %", ""))
        rows += [
            (f"{network}: {v.name}", v.bits, f"{np.mean(found[v.name]):.2f} %", _lost(found, FLOAT, v.name).text())
            for v in VARIANTS
            if v.network == network
        ]
    return tables.markdown(("variant", "bits, weights / activations", "accuracy", "points lost [95 %]"), rows)


def bars(accuracy: dict[str, dict[str, list[float]]]) -> list[Bar]:
    promised = [
        Bar(f"{v.network}: {v.name}: points lost", LIMITS[v.name], _lost(accuracy[v.network], FLOAT, v.name), digits=2)
        for v in VARIANTS
        if v.name in LIMITS
    ]
    found = accuracy["convolutions"]
    return promised + [
        Bar(f"{name}: points that QAT is worse than after training", 0, _lost(found, after, qat), digits=2)
        for name in ("int8", "int4")
        for after, qat in [(f"{name}, after training", f"{name}, QAT")]
    ]


def _lost(found: dict[str, list[float]], reference: str, name: str) -> Mean:
    """Points, seed by seed."""
    return Mean.of(np.subtract(found[reference], found[name]))


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="networks of each kind to train (5)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at the same time (2)")
    args = tables.parse(parser)
    args.plan = Plan(1000, 500, 1, 0, 1) if args.quick else Plan(pruning_epochs=0, tuning_epochs=10)
    args.seeds = 1 if args.quick else args.seeds
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    trained = {name: [None, *(v for v in VARIANTS if v.network == name and v.trained)] for name in NETWORKS}
    accuracy: dict = {name: {v.name: [] for v in VARIANTS if v.network == name} | {FLOAT: []} for name in NETWORKS}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.processes, mp_context=context, initializer=use_one_thread)
    with pool, progress_bar(console) as progress:
        task = progress.add_task(
            "trainings", total=args.seeds * sum(1 + len(variants) for variants in trained.values())
        )
        first = [
            (network, seed, pool.submit(train_first, args.plan, seed, network))
            for seed in range(args.seeds)
            for network in NETWORKS
        ]
        jobs = []
        for network, seed, future in first:
            weights = future.result()
            advance(progress, task)
            jobs += [
                (network, pool.submit(train_on, args.plan, seed, network, weights, variant))
                for variant in trained[network]
            ]
        for network, job in jobs:
            for name, percent in job.result().items():
                accuracy[network][name].append(percent)
            advance(progress, task)
    plan = args.plan
    rates = " and ".join(f"{rate} ({network})" for network, rate in RATES.items())
    note = (
        f"{args.seeds} seeds, {plan.train:,} characters to train and {plan.test:,} to test, {plan.dense_epochs} epochs "
        f"and {plan.tuning_epochs} more of every copy, with Adam from {rates} down to 0. With fewer than 4 bits, the "
        f"weights of the first and the last layer have 8, unless it says every layer. {tables.machine()}"
    )
    text = f"{results_table(accuracy)}\n\n{bars_table(bars(accuracy))}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("quantization_accuracy", text)


if __name__ == "__main__":
    main()
