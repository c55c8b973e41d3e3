"""How much faster a shrunk model is in LiteRT: one thread, float32, a batch of one.

Parent and shrunk model run in turn in one process; every ratio is of two runs next to each other.
"""

import functools
import time
from dataclasses import dataclass

import tables
from measuring import Bar, Estimate, advance, bars_table, own_process, progress_bar, warn_if_busy
from rich.console import Console

_WARM_UP = 20


@dataclass(frozen=True)
class Case:
    """A network, the fraction of its neurons that goes, and what was promised of the ratio."""

    network: str
    fraction: float
    limit: float
    neurons: str = "neurons"

    @property
    def name(self) -> str:
        return f"{self.network}, {self.fraction:.0%} of the {self.neurons} gone"


CASES = (
    Case("MobileNetV2, 224x224", 0.5, 0.55),
    Case("four convolutions, 64x64", 0.5, 0.35),
    Case("MobileNetV2, 224x224", 0.05, 1.0),
    Case("four convolutions, 64x64", 0.05, 1.0),
    Case("LSTM, 256 units, 64 steps", 0.5, 1.0, "units"),
    Case("transformer encoder, 4 blocks of 8 heads, 64 steps", 0.5, 1.0, "heads"),
)


def build_parent(network: str):
    import keras

    keras.utils.set_random_seed(0)
    if network.startswith("MobileNetV2"):
        return keras.applications.MobileNetV2(weights=None)
    layers = keras.layers
    if network.startswith("LSTM"):
        return keras.Sequential([keras.Input((64, 128)), layers.LSTM(256, name="units"), layers.Dense(10)])
    if network.startswith("transformer"):
        return _encoder(keras)
    blocks = [layers.Conv2D(filters, 3, padding="same", activation="relu") for filters in (64, 64, 128, 128)]
    head = [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    return keras.Sequential([keras.Input((64, 64, 3)), *blocks, *head])


def _encoder(keras):
    layers = keras.layers
    x = inputs = keras.Input((64, 128))
    for _ in range(4):
        x = layers.LayerNormalization()(layers.Add()([x, layers.MultiHeadAttention(8, 16)(x, x)]))
        hidden = layers.Dense(128)(layers.Dense(256, activation="relu")(x))
        x = layers.LayerNormalization()(layers.Add()([x, hidden]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def _prune(case: Case, model) -> None:
    """Heads alone, where they are what goes: `prune_neurons` would choose among widths of keys and values as well."""
    import keras
    import numpy as np

    import keras_squeeze as ks

    if case.neurons != "heads":
        layers = "units" if case.neurons == "units" else None
        ks.prune_neurons(model, case.fraction, layers=layers, allocation="uniform", round_to=8)
        return
    for layer in model.layers:
        if isinstance(layer, keras.layers.MultiHeadAttention):
            gone = range(round(layer.num_heads * case.fraction))
            for dense in (layer.query_dense, layer.key_dense, layer.value_dense):
                kernel, bias = (np.array(weight) for weight in dense.get_weights())
                kernel[:, gone], bias[gone] = 0, 0
                dense.set_weights([kernel, bias])


def time_in_turn(case: Case, runs: int) -> tuple[list[float], list[float], float]:
    """Seconds of single inferences of parent and shrunk model, and the fraction of the MACs that is left."""
    import keras_squeeze as ks
    from keras_squeeze.evaluation.latency import prepare

    parent = build_parent(case.network)
    whole = ks.summarize(parent).total.macs
    parent_run = prepare(parent)
    _prune(case, parent)
    small = ks.shrink(parent)
    both = parent_run, prepare(small)
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(-_WARM_UP, runs):
        for index in (0, 1) if repetition % 2 else (1, 0):
            start = time.perf_counter()
            both[index]()
            if repetition >= 0:
                times[index].append(time.perf_counter() - start)
    return *times, ks.summarize(small).total.macs / whole


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=300, help="inferences of each model (300)")
    args = tables.parse(parser)
    runs = 5 if args.quick else args.runs
    console = Console()
    warn_if_busy(console)
    rows, bars = [], []
    with progress_bar(console) as progress:
        task = progress.add_task("models", total=len(CASES))
        on_case = functools.partial(advance, progress, task)
        for case in CASES:
            with own_process() as process:
                before, after, macs = process.submit(time_in_turn, case, runs).result()
            ratio = Estimate.of([b / a for a, b in zip(before, after, strict=True)])
            milliseconds = (f"{1e3 * Estimate.of(times).median:.2f}" for times in (before, after))
            rows.append((case.name, *milliseconds, ratio.text(), f"{macs:.2f}"))
            bars.append(Bar(case.name, case.limit, ratio))
            on_case()
    table = tables.markdown(("network", "parent, ms", "shrunk, ms", "ratio [95 %]", "MACs left"), rows)
    note = f"{runs} inferences of each, in turn; one thread. {tables.machine('ai-edge-litert')}"
    text = f"{table}\n\n{bars_table(bars)}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("shrunk_latency", text)
        tables.write("shrunk", f"{table}\n\n{note}", tables.FRONT_PAGE)


if __name__ == "__main__":
    main()
