"""What `shrink(model, compensate=data)` saves before any fine-tuning, for every criterion, on rendered characters.

Networks are trained, then lose a part of their neurons in one shot, and are judged as they are: shrunk, shrunk with
the statistics of batch normalization measured anew, and shrunk with the means of what was removed in the next biases
as well. The data of both are training pictures without their classes.
"""

import numpy as np
import tables
from characters import CLASSES, SIZE
from measuring import Bar, advance, bars_table, own_process, progress_bar
from networks import build_characters, compile_network, use_one_thread
from neuron_criteria import CRITERIA, Mean, Plan, load_data
from rich.console import Console

FRACTIONS = (0.25, 0.5)
NETWORKS = ("with batch normalization", "with biases")
PICTURES = 1024


def _build(keras, network: str):
    if network == NETWORKS[0]:
        return build_characters(keras)
    layers = keras.layers
    blocks = [
        layers.Conv2D(filters, size, strides=2, padding="same", activation="relu")
        for filters, size in ((32, 5), (64, 3))
    ]
    head = [layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dense(len(CLASSES))]
    return keras.Sequential([keras.Input((SIZE, SIZE, 1)), *blocks, *head])


def train(plan: Plan, network: str, seed: int) -> tuple[list[np.ndarray], float]:
    """Weights, and the accuracy in percent."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = compile_network(keras, _build(keras, network), 2e-3)
    train_data, test = load_data(plan)
    model.fit(*train_data, batch_size=128, epochs=plan.dense_epochs, verbose=0)
    return model.get_weights(), 100 * model.evaluate(*test, batch_size=512, verbose=0)[1]


def shrink(plan: Plan, network: str, weights: list[np.ndarray], criterion: str, fraction: float) -> list[float]:
    """Accuracies in percent: shrunk, recalibrated, compensated."""
    import keras

    import keras_squeeze as ks
    from keras_squeeze.reconstruction.compensation import recalibrate

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    (x, y), test = load_data(plan)
    model = compile_network(keras, _build(keras, network), 1e-3)
    model.set_weights(weights)
    data = x[:PICTURES], y[:PICTURES]
    ks.prune_neurons(model, fraction, criterion=criterion, allocation="uniform", data=data)
    plain, again = ks.shrink(model), ks.shrink(model)
    recalibrate(again, x[:PICTURES])
    models = plain, again, ks.shrink(model, compensate=x[:PICTURES])
    return [100 * each.evaluate(*test, batch_size=512, verbose=0)[1] for each in models]


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind to train (3)")
    args = tables.parse(parser)
    seeds, plan = (1, Plan(1000, 500, 1)) if args.quick else (args.seeds, Plan())
    console = Console()
    rows, bars = [], []
    with own_process() as process, progress_bar(console) as progress:
        process.submit(use_one_thread).result()
        criteria = {name: [c for c in CRITERIA if name == NETWORKS[0] or c != "batch_norm_scale"] for name in NETWORKS}
        count = sum(map(len, criteria.values()))
        task = progress.add_task("networks", total=seeds * (len(NETWORKS) + count * len(FRACTIONS)))
        for network in NETWORKS:
            trained = []
            for seed in range(seeds):
                trained.append(process.submit(train, plan, network, seed).result())
                advance(progress, task)
            whole = np.mean([accuracy for _, accuracy in trained])
            for fraction in FRACTIONS:
                for criterion in criteria[network]:
                    found = []
                    for weights, _ in trained:
                        found.append(process.submit(shrink, plan, network, weights, criterion, fraction).result())
                        advance(progress, task)
                    plain, recalibrated, compensated = np.mean(found, axis=0)
                    cells = (f"{value:.1f}" for value in (whole, plain, recalibrated, compensated))
                    rows.append((f"{network}, {fraction:.0%} gone", criterion, *cells))
                    lost = Mean.of([before - after for before, _, after in found])
                    name = f"{network}, {fraction:.0%}, {criterion}: points below shrinking without data"
                    bars.append(Bar(name, 0.0, lost, 1))
    header = ("network", "criterion", "whole, %", "shrunk, %", "and recalibrated, %", "and compensated, %")
    note = f"{seeds} seeds, {PICTURES} pictures to compensate with, no fine-tuning. {tables.machine()}"
    text = f"{tables.markdown(header, rows)}\n\n{bars_table(bars)}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("compensation", text)


if __name__ == "__main__":
    main()
