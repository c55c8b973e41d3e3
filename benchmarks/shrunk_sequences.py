"""Recurrent layers and attention with half of their neurons: trained, pruned while they train, shrunk, and trained on.

Texts are the source of Python's standard library and dates, pictures are rendered digits. The parent trains on for
as many epochs as the small model; accuracy is of single words, characters or pictures.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import sequences
import tables
from characters import characters
from measuring import Bar, Estimate, advance, bars_table, own_process, progress_bar
from rich.console import Console

LIMIT = 0.5  # points below the parent
DIGITS = 10


@dataclass(frozen=True)
class Epochs:
    dense: int = 20
    pruning: int = 8
    tuning: int = 12


@dataclass(frozen=True)
class Outcome:
    """Accuracies in percent: of the parent, of the parent trained as long, of the small model."""

    accuracies: tuple[float, float, float]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    num_bytes: tuple[int, int]
    difference: float


def _classifier():
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input((sequences.PASSAGE,), dtype="int32"),
            layers.Embedding(sequences.WORDS, 32),
            layers.LSTM(64),
            layers.Dropout(0.3),
            layers.Dense(len(sequences.PACKAGES)),
        ]
    )


def _tagger():
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input((sequences.WINDOW,), dtype="int32"),
            layers.Embedding(sequences.CHARACTERS, 32),
            layers.Bidirectional(layers.GRU(48, return_sequences=True)),
            layers.Dense(len(sequences.TAGS)),
        ]
    )


def _translator():
    from keras import Input, Model, layers

    source, target = Input((sequences.SOURCE,), dtype="int32"), Input((sequences.TARGET,), dtype="int32")
    embedding = layers.Embedding(sequences.CHARACTERS, 32)
    encoded, h, c = layers.LSTM(64, return_sequences=True, return_state=True)(embedding(source))
    decoded = layers.LSTM(64, return_sequences=True)(embedding(target), initial_state=[h, c])
    x = layers.Concatenate()([decoded, layers.Attention()([decoded, encoded])])
    x = layers.Dense(64, activation="relu")(x)
    return Model([source, target], layers.Dense(sequences.CHARACTERS)(x))


def _patches(width: int):
    from keras import Input, layers

    inputs = Input((28, 28, 1))
    x = layers.Conv2D(width, 4, strides=4)(inputs)
    return inputs, layers.Reshape((49, width))(x)


def _transformer():
    from keras import Model, layers

    inputs, x = _patches(48)
    for _ in range(2):
        normed = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 16)(normed, normed)])
        hidden = layers.Dense(96, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(48)(hidden)])
    x = layers.Dense(16, activation="gelu")(layers.LayerNormalization()(x))
    return Model(inputs, layers.Dense(DIGITS)(layers.Dropout(0.2)(layers.Flatten()(x))))


def _mixer():
    from keras import Model, layers

    inputs, x = _patches(48)
    for _ in range(3):
        mixed = layers.Permute((2, 1))(layers.LayerNormalization()(x))
        mixed = layers.Dense(49)(layers.Dense(96, activation="gelu")(mixed))
        x = layers.Add()([x, layers.Permute((2, 1))(mixed)])
        hidden = layers.Dense(192, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(48)(hidden)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return Model(inputs, layers.Dense(DIGITS)(layers.Dropout(0.2)(x)))


def _pictures(seed: int, train: int = 8000, test: int = 4000) -> sequences.Split:
    return characters(train, seed, DIGITS), characters(test, 1000 + seed, DIGITS)


TASKS: dict[str, tuple[Callable, Callable, float, str]] = {  # network, data, learning rate, criterion
    "LSTM, which package a passage is from": (_classifier, sequences.passages, 3e-3, "l2"),
    "bidirectional GRU, tags of source code": (_tagger, sequences.tagged_source, 3e-3, "l2"),
    "encoder and decoder with attention, dates": (_translator, sequences.dates, 3e-3, "l2"),
    "vision transformer, rendered digits": (_transformer, _pictures, 1e-3, "l2"),
    "mixer, rendered digits": (_mixer, _pictures, 2e-3, "taylor"),
}


def run(task: str, seed: int, epochs: Epochs) -> Outcome:
    import keras

    import keras_squeeze as ks

    build, load, rate, criterion = TASKS[task]
    (x, y), (x_test, y_test) = load(seed)
    keras.utils.set_random_seed(seed)
    model = build()

    def trained(network, count: int, rate: float, *callbacks, decay: bool = True) -> float:
        steps = count * -(-len(y) // 128)
        schedule = keras.optimizers.schedules.CosineDecay(rate, steps) if decay else rate
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        network.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"])
        network.fit(x, y, batch_size=128, epochs=count, callbacks=list(callbacks), verbose=0)
        return 100 * network.evaluate(x_test, y_test, batch_size=512, verbose=0)[1]

    parent = trained(model, epochs.dense, rate)
    weights = model.get_weights()
    trained(model, epochs.pruning, 1e-3, decay=False)
    as_long = trained(model, epochs.tuning, 1e-3)
    control = model.get_weights()
    model.set_weights(weights)
    some = keras.tree.map_structure(lambda array: array[:512], (x, y))
    pruning = ks.NeuronPruning(0.5, round_to=4, allocation="uniform", criterion=criterion, data=some)
    trained(model, epochs.pruning, 1e-3, pruning, decay=False)
    small = ks.shrink(model)
    expected, actual = (each.predict(some[0], verbose=0) for each in (model, small))
    accuracy = trained(small, epochs.tuning, 1e-3)
    model.set_weights(control)
    before, after = ks.summarize(model).total, ks.summarize(small).total
    with tempfile.TemporaryDirectory() as folder:
        files = [
            ks.export(each, pathlib.Path(folder, f"{each.name}{i}.tflite")) for i, each in enumerate((model, small))
        ]
    return Outcome(
        (parent, as_long, accuracy),
        (before.parameters, after.parameters),
        (before.macs, after.macs),
        (files[0].num_bytes, files[1].num_bytes),
        float(np.abs(expected - actual).max() / np.abs(expected).max()),
    )


def _known(path: pathlib.Path | None) -> dict[tuple[str, int], Outcome]:
    lines = path.read_text().splitlines() if path is not None and path.is_file() else []
    return {(task, seed): Outcome(**values) for task, seed, values in map(json.loads, lines)}


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each task (2)")
    parser.add_argument("--progress", type=pathlib.Path, metavar="FILE", help="of finished runs, to go on from")
    args = tables.parse(parser)
    seeds, epochs = (1, Epochs(1, 1, 1)) if args.quick else (args.seeds, Epochs())
    console = Console()
    known = _known(args.progress)
    rows, bars = [], []
    with progress_bar(console) as progress:
        bar = progress.add_task("runs", total=len(TASKS) * seeds)
        for task in TASKS:
            outcomes = []
            for seed in range(seeds):
                outcome = known.get((task, seed))
                if outcome is None:
                    with own_process() as process:
                        outcome = process.submit(run, task, seed, epochs).result()
                    if args.progress is not None:
                        with args.progress.open("a") as file:
                            file.write(f"{json.dumps([task, seed, asdict(outcome)])}\n")
                outcomes.append(outcome)
                console.print(task, outcomes[-1], markup=False)
                advance(progress, bar)
            parent, as_long, small = (np.mean([o.accuracies[i] for o in outcomes]) for i in range(3))
            below = Estimate.of([o.accuracies[1] - o.accuracies[2] for o in outcomes])
            bars.append(Bar(f"{task}: points below the parent, trained as long", LIMIT, below, 2))
            first = outcomes[0]
            sizes = [f"{1e-3 * a:,.0f} -> {1e-3 * b:,.0f}" for a, b in (first.parameters, first.macs, first.num_bytes)]
            worst = max(outcome.difference for outcome in outcomes)
            rows.append(
                (task, TASKS[task][3], f"{parent:.2f}", f"{as_long:.2f}", f"{small:.2f}", *sizes, f"{worst:.0e}")
            )
    header = (
        "network and task",
        "criterion",
        "parent, %",
        "trained as long, %",
        "half the neurons, %",
        "parameters, thousands",
        "MACs, thousands",
        ".tflite, kB",
        "shrunk against masked",
    )
    note = (
        f"{seeds} seeds; {epochs.dense} epochs dense, {epochs.pruning} with pruning, {epochs.tuning} after shrinking. "
        f"{tables.machine('ai-edge-litert')}"
    )
    text = f"{tables.markdown(header, rows)}\n\n{bars_table(bars)}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("shrunk_sequences", text)


if __name__ == "__main__":
    main()
