"""How small packed files are, over the bytes of the float32 weights, and what a pruned and quantized network loses.

The last row is the experiment of Han et al. 2016 (Deep Compression), a 300-100 network for digits pruned and quantized,
here on rendered digits: from the same weights one copy is trained on as it is, and one while it is pruned and then
quantized as well, in one `fit`, for as many epochs with the same learning rates.
"""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tables
from characters import SIZE, characters
from measuring import Bar, advance, bars_table, own_process, progress_bar, warn_if_busy
from networks import compile_network, use_one_thread
from neuron_criteria import Mean, Plan
from rich.console import Console

SPARSITY = 0.92
BITS = 4
DELAY = 0.5  # of the run: it is pruned before, quantized after
DIGITS = 10
BATCH = 128
RATE = 2e-3  # of training on; it falls to zero in a straight line
LENET = "300-100 network, pruned and quantized"
LOST = 0.3  # points


@dataclass(frozen=True)
class Case:
    """A network of wide layers, how it is compressed, and what was promised of its file over its float32 weights."""

    name: str
    weights: str
    limit: float
    sparsity: float = 0.0


CASES = (
    Case("99 % binary, the rest int8", "binary", 1 / 28),
    Case("int8", "int8", 0.26),
    Case("90 % zeros, int8", "int8", 0.055, 0.9),
)


def pack_wide(case: Case, width: int) -> tuple[int, int, float]:
    """Bytes of the float32 weights and of the file, and the fraction of the weights that the quantizer has."""
    import keras

    import keras_squeeze as ks

    keras.utils.set_random_seed(0)
    layers = keras.layers
    hidden = [layers.Dense(width, activation="relu") for _ in range(8)]
    model = keras.Sequential([keras.Input((64,)), layers.Dense(width, activation="relu"), *hidden, layers.Dense(10)])
    if case.sparsity:
        ks.prune_weights(model, case.sparsity)
    q = ks.quantize_aware(model, case.weights)
    q.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    callbacks = [ks.KeepSparsity()] if case.sparsity else []
    q.fit(rng.normal(size=(256, 64)), rng.integers(10, size=256), verbose=0, callbacks=callbacks)
    share = sum(layer.count_params() for layer in model.layers[1:-1]) / model.count_params()
    return 4 * model.count_params(), _packed_bytes(q), share


def _packed_bytes(model) -> int:
    """Of the file; the model that is loaded from it must predict what the saved one does."""
    import keras_squeeze as ks

    x = np.random.default_rng(1).random((16, *model.inputs[0].shape[1:]), dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        size = ks.save_packed(model, Path(folder, "model.squeeze"))
        loaded = ks.load_packed(Path(folder, "model.squeeze"))
    if not np.array_equal(loaded(x, training=False), model(x, training=False)):
        raise RuntimeError("The loaded model predicts something else.")
    return size


@functools.lru_cache(maxsize=1)
def _digits(plan: Plan):
    return characters(plan.train, 1, DIGITS), characters(plan.test, 2, DIGITS)


def pack_lenet(plan: Plan, seed: int) -> tuple[float, float, int, int]:
    """Accuracy in percent in float and compressed; bytes of the float32 weights and of the file."""
    import keras

    import keras_squeeze as ks

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    hidden = [layers.Dense(units, activation="relu") for units in (300, 100)]
    first = keras.Sequential([keras.Input((SIZE, SIZE, 1)), layers.Flatten(), *hidden, layers.Dense(DIGITS)])
    train, test = _digits(plan)
    compile_network(keras, first, RATE).fit(*train, batch_size=BATCH, epochs=plan.dense_epochs, verbose=0)

    def train_on(model, *callbacks):
        steps = plan.tuning_epochs * -(-plan.train // BATCH)
        compile_network(keras, model, keras.optimizers.schedules.PolynomialDecay(RATE, steps, 0.0))
        model.fit(*train, batch_size=BATCH, epochs=plan.tuning_epochs, verbose=0, callbacks=list(callbacks))
        return model

    dense = keras.models.clone_model(first)
    dense.set_weights(first.get_weights())
    train_on(dense)
    pruning = ks.MagnitudePruning(ks.schedules.PolynomialDecay(SPARSITY, end=DELAY), allocation="global")
    compressed = ks.quantize_aware(first, ks.quantizers.LearnedStep(BITS))
    train_on(compressed, pruning, ks.QuantizationSchedule(delay=DELAY))
    scores = (100 * model.evaluate(*test, batch_size=512, verbose=0)[1] for model in (dense, compressed))
    return *scores, 4 * dense.count_params(), _packed_bytes(compressed)


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="300-100 networks to train (5)")
    args = tables.parse(parser)
    args.width, args.plan = 1024, Plan(pruning_epochs=0, tuning_epochs=35)
    if args.quick:
        args.seeds, args.width, args.plan = 1, 256, Plan(1000, 500, 1, 0, 2)
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    rows, bars = [], []
    with progress_bar(console) as progress, own_process() as process, own_process() as trainer:
        task = progress.add_task("networks", total=len(CASES) + args.seeds)
        for case in CASES:
            whole, size, share = process.submit(pack_wide, case, args.width).result()
            rows.append(
                (f"{case.name} ({share:.1%} in the hidden layers)", f"{whole:,}", f"{size:,}", _times(whole, size), "")
            )
            bars.append(Bar(f"{case.name}: bytes over float32's", case.limit, Mean.of([size / whole]), digits=4))
            advance(progress, task)
        trainer.submit(use_one_thread).result()
        found = []
        for seed in range(args.seeds):
            found.append(trainer.submit(pack_lenet, args.plan, seed).result())
            advance(progress, task)
    dense, compressed, wholes, sizes = (np.array(column) for column in zip(*found, strict=True))
    lost = Mean.of(dense - compressed)
    size = int(np.mean(sizes))
    rows.append((LENET, f"{wholes[0]:,}", f"{size:,}", _times(wholes[0], size), lost.text()))
    bars.append(Bar(f"{LENET}: bytes over float32's", 1 / 40, Mean.of(sizes / wholes), digits=4))
    bars.append(Bar(f"{LENET}: points lost", LOST, lost, digits=2))
    plan = args.plan
    note = (
        f"Every file was loaded again and predicts bit for bit the same. {LENET}: {SPARSITY:.0%} zeros, steps of "
        f"{BITS} bits learned; {args.seeds} seeds, {plan.train:,} digits to train and {plan.test:,} to test, "
        f"{plan.dense_epochs} epochs, then {plan.tuning_epochs} of each copy; {dense.mean():.2f} % in float, "
        f"{compressed.mean():.2f} % compressed. "
        f"{tables.machine()}"
    )
    header = ("network", "float32, bytes", "file, bytes", "smaller", "points lost [95 %]")
    text = f"{tables.markdown(header, rows)}\n\n{bars_table(bars)}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("packed_sizes", text)


def _times(whole: int, size: int) -> str:
    return f"{whole / size:.1f}x"


if __name__ == "__main__":
    main()
