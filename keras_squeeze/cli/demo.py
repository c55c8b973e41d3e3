"""`keras-squeeze demo`: the main job on real data, offline, as a list of stages.

A stage is a function that gets the `Demo` so far, adds a model to it or draws something, and returns a sentence
about what it did. A new feature shows itself by one more entry in `STAGES`.
"""

import functools
import gzip
import itertools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_squeeze import quantizers
from keras_squeeze.analysis import plots
from keras_squeeze.analysis.report import summarize
from keras_squeeze.deployment.inspecting import predict_file
from keras_squeeze.deployment.litert import export
from keras_squeeze.deployment.packing import save_packed
from keras_squeeze.evaluation.latency import measure_latency
from keras_squeeze.neuron_pruning.neuron_pruning import NeuronPruning
from keras_squeeze.neuron_pruning.shrinking import shrink
from keras_squeeze.quantization.conversion import finalize, quantize_aware
from keras_squeeze.quantization.quantization_schedule import QuantizationSchedule
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.search.artifacts import Result
from keras_squeeze.search.space import CompressionSpace
from keras_squeeze.weight_pruning.magnitude_pruning import MagnitudePruning

TARGET_SPARSITY = 0.9
TARGET_NEURONS = 0.5
DENSE_EPOCHS = 15
PRUNING_EPOCHS = 25
QUANTIZED_EPOCHS = 10
BINARY_EPOCHS = 25
SEARCH_TRIALS = 12
SEARCH_EPOCHS = 6

_HELD_OUT = 300  # training images that the search judges its trials on

_HEADINGS = {
    "parameters": "parameters",
    "zeros": "zeros",
    "dense_bytes": "bytes, weights in float32",
    "packed_bytes": "bytes, packed file",
    "gzip_bytes": "bytes, .keras file gzipped",
    "tflite_bytes": "bytes, .tflite file",
    "macs": "MACs",
    "effective_macs": "MACs, zeros left out",
    "energy_nj": "nJ for one image, an estimate",
}


@dataclass
class Demo:
    """What the stages share.

    Attributes:
        directory: Where models and pictures are written.
        train, test: `(images, labels)`; images (n, 8, 8, 1) in [0, 1].
        models: The models so far, by the name of their row in the table.
        front: The best trade-offs of the search.
        on_epoch: Called after each training epoch with the fraction of the stage that is done.
    """

    directory: pathlib.Path
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    on_epoch: Callable[[float], None]
    models: dict[str, keras.Model] = field(default_factory=dict)
    front: list[Result] = field(default_factory=list)

    def fit(self, model: keras.Model, epochs: int, *callbacks: keras.callbacks.Callback) -> dict:
        """Trains on the digits, validates on the test images, and moves the progress bar."""
        progress = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: self.on_epoch((epoch + 1) / epochs),
        )
        options = {"epochs": epochs, "batch_size": 64, "verbose": 0, "validation_data": self.test}
        return model.fit(*self.train, callbacks=[*callbacks, progress], **options).history

    def accuracy(self, model: keras.Model) -> float:
        """Fraction of the test images that a model gets right."""
        images, labels = self.test
        return float(np.mean(model.predict(images, verbose=0).argmax(-1) == labels))

    def accuracy_of_file(self, path: pathlib.Path) -> float:
        """The same for a `.tflite` file."""
        images, labels = self.test
        return float(np.mean(predict_file(path, [images])[0].argmax(-1) == labels))


def train_dense(demo: Demo) -> str:
    """An ordinary small convolutional network."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    _compile(model)
    demo.fit(model, DENSE_EPOCHS)
    demo.models["dense"] = model
    return f"trained {model.count_params():,} parameters on {len(demo.train[0]):,} handwritten digits"


def prune(demo: Demo) -> str:
    """The same network, trained on while nine of ten weights go."""
    dense = demo.models["dense"]
    model = _copy(dense)
    history = demo.fit(model, PRUNING_EPOCHS, MagnitudePruning(TARGET_SPARSITY))
    demo.models["pruned"] = model
    picture = plots.plot_pruning(history, demo.directory / "pruning.png", baseline=demo.accuracy(dense))
    return f"pruned to {history['sparsity'][-1]:.0%} zeros; sparsity and accuracy over training: {picture}"


def remove_neurons(demo: Demo) -> str:
    """The same network once more, trained on while half of its neurons go, and rebuilt without them."""
    model = _copy(demo.models["dense"])
    history = demo.fit(model, PRUNING_EPOCHS, NeuronPruning(TARGET_NEURONS))
    small = shrink(model)
    demo.models["shrunk"] = small
    widths = {
        layer.name: (_width(layer), _width(small.get_layer(layer.name))) for layer in model.layers if _width(layer)
    }
    picture = plots.plot_widths(widths, demo.directory / "widths.png")
    return f"removed {history['pruned_neurons'][-1]:.0%} of the neurons; the layers before and after: {picture}"


def quantize(demo: Demo) -> str:
    """The same network, trained on as if it computed with integers of 8 bits."""
    demo.models["int8"] = _trained_in_int8(demo, demo.models["dense"])
    return "trained with weights and activations of 8 bits: a quarter of the bytes, integer arithmetic"


def quantize_small(demo: Demo) -> str:
    """The network that has lost its neurons, with integers of 8 bits."""
    demo.models["shrunk+int8"] = _trained_in_int8(demo, demo.models["shrunk"])
    return "trained the network without those neurons with 8 bits"


def _trained_in_int8(demo: Demo, plain: keras.Model) -> keras.Model:
    model = quantize_aware(plain)
    _compile(model)
    demo.fit(model, QUANTIZED_EPOCHS, QuantizationSchedule())
    return model


def binarize(demo: Demo) -> str:
    """The same network with weights of one bit, but in the first and the last layer."""
    model = quantize_aware(demo.models["dense"], "binary")
    _compile(model)
    demo.fit(model, BINARY_EPOCHS, QuantizationSchedule())
    demo.models["binary"] = model
    bits = summarize(model).total.bits
    return f"trained with weights of one bit, the first and the last layer with eight: {bits:g} bits on average"


def search(demo: Demo) -> str:
    """Neurons, weights and bits together: which balance is best, for how many bytes?"""
    from keras_squeeze.search.hypermodel import CompressionHyperModel
    from keras_squeeze.search.oracle import ParetoOracle
    from keras_squeeze.search.tuner import CompressionTuner

    judges, train = ([part[half] for part in demo.train] for half in (slice(_HELD_OUT), slice(_HELD_OUT, None)))
    model = keras.models.clone_model(demo.models["dense"])  # a new one, which has not seen the images it is judged on
    _compile(model)
    model.fit(*train, epochs=DENSE_EPOCHS, batch_size=64, verbose=0)
    space = CompressionSpace(neurons=(0.0, 0.7), sparsity=(0.0, 0.9), bits=(8, 4, 2))
    hyper = CompressionHyperModel(model, space, metric="accuracy", artifact="packed")
    oracle = ParetoOracle(["val_accuracy", "size_bytes"], SEARCH_TRIALS, seed=0)
    tuner = CompressionTuner(hyper, oracle, directory=demo.directory / "search", overwrite=True, stop_early=False)
    epochs = itertools.count(1)
    progress = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: demo.on_epoch(next(epochs) / (SEARCH_TRIALS * SEARCH_EPOCHS))
    )
    kwargs = {"validation_data": tuple(judges), "epochs": SEARCH_EPOCHS, "verbose": 0}
    tuner.search(*train, **kwargs, callbacks=[progress])
    demo.on_epoch(1.0)
    demo.front = tuner.pareto_front()
    picture = tuner.plot_pareto(demo.directory / "front.png")
    return f"tried {SEARCH_TRIALS} ways to combine them; the {len(demo.front)} best trade-offs: {picture}"


def _width(layer) -> int:
    return getattr(layer, "filters", 0) or getattr(layer, "units", 0)


def _copy(dense: keras.Model) -> keras.Model:
    """A network with the same weights, compiled."""
    model = keras.models.clone_model(dense)
    model.set_weights(dense.get_weights())
    _compile(model)
    return model


def _compile(model: keras.Model) -> None:
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])


STAGES: list[tuple[str, Callable[[Demo], str]]] = [
    ("Train a convolutional network", train_dense),
    ("Prune it gradually while it trains on", prune),
    ("Remove half of its neurons instead", remove_neurons),
    ("Quantize it to 8 bits instead", quantize),
    ("Quantize what was shrunk", quantize_small),
    ("Quantize it to one bit instead", binarize),
    ("Search for the best combination", search),
]


def run_demo(directory: str | pathlib.Path = "squeeze-demo", *, seed: int = 0) -> list[dict]:
    """Runs every stage, prints the table before and after, and saves the models.

    Args:
        directory: Where the models and the picture go; made if it is missing.
        seed: For reproducible results.

    Returns:
        One dictionary per row of the table.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    keras.utils.set_random_seed(seed)
    console = Console()
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(title, total=1.0, start=False) for title, _ in STAGES]
        train, test = _digits(seed)
        demo = Demo(directory, train, test, on_epoch=lambda done: None)
        for task, (_, stage) in zip(tasks, STAGES, strict=True):
            progress.start_task(task)
            demo.on_epoch = functools.partial(_move, progress, task)
            progress.console.print(f"  {stage(demo)}", soft_wrap=True)
            progress.update(task, completed=1.0)
    rows = [_row(demo, name, model) for name, model in demo.models.items()]
    console.print(_table(rows))
    if demo.front:
        console.print(_front_table(demo))
    console.print(f"Models and pictures are in {directory}/. Look inside one with keras_squeeze.summarize(model).")
    return rows


def _move(progress, task, done: float) -> None:
    progress.update(task, completed=done)


def _digits(seed: int):
    """scikit-learn's handwritten digits, 1,797 real scans of 8 by 8 pixels; 500 are kept for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = (data.images[order, ..., np.newaxis] / 16).astype("float32")
    labels = data.target[order].astype("int32")
    return (images[500:], labels[500:]), (images[:500], labels[:500])


def _row(demo: Demo, name: str, model: keras.Model) -> dict:
    if any(isinstance(layer, QuantizeAware) for layer in model.layers):
        artifact = finalize(model, activations="drop")
    else:  # the optimizer's state does not ship
        artifact = keras.models.clone_model(model)
        artifact.set_weights(model.get_weights())
    path = demo.directory / f"{name}.keras"
    artifact.save(path)
    total = summarize(model).total
    shipped = export(model, demo.directory / f"{name}.tflite", calibration_data=demo.train[0])
    return {
        "model": name,
        "accuracy": demo.accuracy_of_file(shipped.path),
        "parameters": total.parameters,
        "zeros": total.zeros,
        "dense_bytes": total.dense_bytes,
        "packed_bytes": save_packed(model, demo.directory / f"{name}.squeeze"),
        "gzip_bytes": len(gzip.compress(path.read_bytes())),
        "macs": total.macs,
        "effective_macs": total.effective_macs,
        "energy_nj": round((total.energy_pj or 0) / 1000),
        "tflite_bytes": shipped.num_bytes,
        "latency": measure_latency(shipped.path, runs=300).median_ms,
    }


def table_cells(rows: list[dict]) -> list[tuple[str, ...]]:
    """The table as text, heading first: one column per model."""
    cells = [("", *(row["model"] for row in rows))]
    cells.append(("accuracy", *(f"{row['accuracy']:.1%}" for row in rows)))
    for key, heading in _HEADINGS.items():
        cells.append((heading, *(f"{row[key]:,}" for row in rows)))
    cells.append(("ms for one image, LiteRT, one thread", *(f"{row['latency']:.3f}" for row in rows)))
    return cells


def _table(rows: list[dict]):
    from rich.table import Table

    header, *body = table_cells(rows)
    table = Table(title="The digits network, before and after")
    table.add_column()
    for name in header[1:]:
        table.add_column(name, justify="right")
    for cells in body:
        table.add_row(*cells)
    return table


def _front_table(demo: Demo):
    """Accuracies are those on the test images, which the search has not seen."""
    from rich.table import Table

    table = Table(title="What the search found")
    headings = ("accuracy", "bytes, packed file", "bytes, .tflite file", "neurons removed", "weights pruned", "bits")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in demo.front:
        plan = result.recipe.plan()
        quantizer = quantizers.get(plan.get("weights"))
        sizes = [result.metrics.get(name) for name in ("packed_bytes", "tflite_bytes")]
        table.add_row(
            f"{demo.accuracy(result.load_model()):.1%}",
            *("-" if size is None else f"{size:,.0f}" for size in sizes),
            *(f"{plan.get(name, 0.0):.0%}" for name in ("neurons", "sparsity")),
            str(quantizer.bits if quantizer else 32),
        )
    return table
