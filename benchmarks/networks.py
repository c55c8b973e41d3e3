"""Networks that benchmarks' bars name, in one place: layers, data, optimizer, batch, epochs, and their accuracy.

Each is small enough that an epoch takes seconds on one thread of a CPU. The dense weights of every network and seed are
trained once and cached; all data are generated, so nothing is downloaded.
"""

import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import characters
import numpy as np
import sequences
import spoken_words
import tables
from measuring import advance, own_process, progress_bar, warn_if_busy
from rich.console import Console

CACHE = pathlib.Path(tempfile.gettempdir(), "keras_squeeze_networks")

_TIMED_EPOCHS = 3


@dataclass(frozen=True)
class Network:
    """One network and its dense training: Adam, whose learning rate falls linearly to zero.

    Attributes:
        name: Key in `NETWORKS`.
        layers: Its kinds of layers, for tables.
        build: Returns a new uncompiled model. Takes the module `keras` or `tf_keras`.
        data: Returns `(x_train, y_train), (x_test, y_test)`.
        learning_rate: Learning rate of the dense training, constant.
        batch: Examples in a batch.
        dense_epochs: Epochs of the dense training.
    """

    name: str
    layers: str
    build: Callable[[Any], Any]
    data: Callable[[], sequences.Split]
    learning_rate: float
    batch: int
    dense_epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """Returns the number of batches in an epoch."""
        return -(-len(self.data()[0][1]) // self.batch)


def use_one_thread() -> None:
    """Limits TensorFlow to one thread; small networks train faster in parallel processes than on several threads."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def compile_network(keras, model, rate):
    """Compiles a classifier with Adam and returns it; `rate` is a learning rate or a schedule."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


def train_dense(network: Network, seed: int, folder: pathlib.Path = CACHE) -> list[np.ndarray]:
    """Trains the network with Keras 3, or reads the weights that an earlier call left in `folder`."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = network.build(keras)
    train, _ = network.data()
    versions = [importlib.metadata.version(package) for package in ("keras", "tensorflow", "numpy")]
    recipe = (model.to_json(), "constant", network.learning_rate, network.batch, network.dense_epochs, seed)

    def train_weights() -> list[np.ndarray]:
        compile_network(keras, model, network.learning_rate)
        model.fit(*train, batch_size=network.batch, epochs=network.dense_epochs, verbose=0)
        return model.get_weights()

    return _read_or_compute(folder, f"{network.name}_{seed}", _digest(*recipe, *versions, *train), train_weights)


def measure_accuracy(network: Network, model) -> float:
    """Returns the test accuracy of a compiled model in percent."""
    return 100 * model.evaluate(*network.data()[1], batch_size=500, verbose=0)[1]


def build_characters(keras, batch_norm: bool = True):
    """Builds two strided convolutions and a Dense layer, with batch normalization or with biases."""
    layers = keras.layers

    def activate(layer) -> list:
        return [layer, *([layers.BatchNormalization()] if batch_norm else []), layers.ReLU()]

    blocks = []
    for filters, size in ((32, 5), (64, 3)):
        blocks += activate(layers.Conv2D(filters, size, strides=2, padding="same", use_bias=not batch_norm))
    head = [layers.Flatten(), *activate(layers.Dense(256, use_bias=not batch_norm))]
    inputs = keras.Input((characters.SIZE, characters.SIZE, 1))
    return keras.Sequential([inputs, *blocks, *head, layers.Dense(len(characters.CLASSES))])


def build_ds_cnn(keras):
    """Builds the keyword-spotting network of MLPerf Tiny: a convolution and four depthwise separable ones.

    Reference:
        [MLPerf Tiny Benchmark](https://arxiv.org/abs/2106.07597)
    """
    layers = keras.layers

    def activate(layer) -> list:
        return [layer, layers.BatchNormalization(), layers.ReLU()]

    stem = activate(layers.Conv2D(64, (10, 4), strides=2, padding="same"))
    blocks = []
    for _ in range(4):
        blocks += activate(layers.DepthwiseConv2D(3, padding="same"))
        blocks += activate(layers.Conv2D(64, 1))
    head = [layers.Dropout(0.4), layers.GlobalAveragePooling2D(), layers.Dense(len(spoken_words.WORDS))]
    inputs = keras.Input((spoken_words.FRAMES, spoken_words.COEFFICIENTS, 1))
    return keras.Sequential([inputs, *stem, layers.Dropout(0.2), *blocks, *head])


def build_resnet8(keras, shape: tuple[int, ...] = (characters.SIZE, characters.SIZE, 1), classes: int = 36):
    """Builds three residual blocks of 16, 32 and 64 filters, with batch normalization: 78 thousand weights.

    Reference:
        [MLPerf Tiny Benchmark](https://arxiv.org/abs/2106.07597)
    """

    def convolve(tensor, filters, size=3, strides=1):
        tensor = keras.layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(tensor)
        return keras.layers.BatchNormalization()(tensor)

    inputs = keras.Input(shape)
    outputs = keras.layers.ReLU()(convolve(inputs, 16))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        shortcut = outputs if strides == 1 else convolve(outputs, filters, 1, strides)
        outputs = keras.layers.ReLU()(convolve(outputs, filters, 3, strides))
        outputs = keras.layers.Add()([convolve(outputs, filters), shortcut])
        outputs = keras.layers.ReLU()(outputs)
    outputs = keras.layers.GlobalAveragePooling2D()(outputs)
    return keras.Model(inputs, keras.layers.Dense(classes)(outputs))


def build_mlp(keras):
    """Builds 784-300-100-36 with biases."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((characters.SIZE, characters.SIZE, 1)),
            layers.Flatten(),
            layers.Dense(300, activation="relu"),
            layers.Dense(100, activation="relu"),
            layers.Dense(len(characters.CLASSES)),
        ]
    )


def build_recurrent(keras):
    """Builds an LSTM of 64 units over word embeddings."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((sequences.PASSAGE,), dtype="int32"),
            layers.Embedding(sequences.WORDS, 32),
            layers.LSTM(64),
            layers.Dropout(0.3),
            layers.Dense(len(sequences.PACKAGES)),
        ]
    )


def build_transformer(keras):
    """Builds two pre-norm encoder blocks of width 48; a convolution over the embeddings encodes the word order."""
    layers = keras.layers
    inputs = keras.Input((sequences.PASSAGE,), dtype="int32")
    x = layers.Conv1D(48, 3, padding="same")(layers.Embedding(sequences.WORDS, 32)(inputs))
    for _ in range(2):
        normed = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 12, dropout=0.1)(normed, normed)])
        hidden = layers.Dense(96, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dropout(0.1)(layers.Dense(48)(hidden))])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(len(sequences.PACKAGES))(layers.Dropout(0.3)(x)))


@functools.cache
def load_characters(train: int) -> sequences.Split:
    """Returns `train` rendered characters and 2,000 to test; cached on disk, since rendering takes seconds."""
    source = pathlib.Path(characters.__file__).read_text()
    versions = [importlib.metadata.version(package) for package in ("matplotlib", "pillow", "numpy")]

    def render() -> list[np.ndarray]:
        return [*characters.characters(train, seed=1), *characters.characters(2000, seed=2)]

    x_train, y_train, x_test, y_test = _read_or_compute(
        CACHE, f"characters_{train}", _digest(source, *versions), render
    )
    return (x_train, y_train), (x_test, y_test)


@functools.cache
def load_spoken_words() -> sequences.Split:
    """Returns 2,952 synthetic words to train, 41 batches of 72, and 2,000 to test."""
    return spoken_words.spoken_words(2952, seed=1), spoken_words.spoken_words(2000, seed=2)


@functools.cache
def load_passages() -> sequences.Split:
    """Returns about 11,000 passages of the standard library's source to train and 2,800 to test."""
    return sequences.passages(seed=0)


NETWORKS = {
    network.name: network
    for network in (
        Network(
            "characters_batch_norm",
            "Conv2D, Dense, batch norm",
            build_characters,
            functools.partial(load_characters, 12_000),
            learning_rate=2e-3,
            batch=96,
            dense_epochs=6,
        ),
        Network(
            "characters_biases",
            "Conv2D, Dense, biases",
            functools.partial(build_characters, batch_norm=False),
            functools.partial(load_characters, 12_000),
            learning_rate=1e-3,
            batch=96,
            dense_epochs=8,
        ),
        Network(
            "ds_cnn",
            "depthwise separable, batch norm",
            build_ds_cnn,
            load_spoken_words,
            learning_rate=1e-3,
            batch=72,
            dense_epochs=18,
        ),
        Network(
            "resnet8",
            "residual Conv2D, batch norm",
            build_resnet8,
            functools.partial(load_characters, 4000),
            learning_rate=1e-3,
            batch=32,
            dense_epochs=16,
        ),
        Network(
            "mlp",
            "Dense",
            build_mlp,
            functools.partial(load_characters, 12_000),
            learning_rate=1e-3,
            batch=96,
            dense_epochs=12,
        ),
        Network(
            "recurrent",
            "Embedding, LSTM",
            build_recurrent,
            load_passages,
            learning_rate=3e-3,
            batch=128,
            dense_epochs=8,
        ),
        Network(
            "transformer",
            "Embedding, attention, LayerNorm",
            build_transformer,
            load_passages,
            learning_rate=2e-3,
            batch=128,
            dense_epochs=8,
        ),
    )
}


def _digest(*parts) -> str:
    """Hashes arrays by their bytes and anything else by its `repr`, together with the version of Python."""
    digest = hashlib.sha256(platform.python_version().encode())
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]


def _read_or_compute(folder: pathlib.Path, name: str, digest: str, compute: Callable) -> list[np.ndarray]:
    """Caches a list of arrays; processes that compute the same at the same time do not disturb each other."""
    path = folder / f"{name}_{digest}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            np.savez(file, *compute())
        pathlib.Path(file.name).replace(path)
    with np.load(path) as arrays:
        return [arrays[f"arr_{index}"] for index in range(len(arrays.files))]


def train_and_measure(network: Network, seed: int) -> tuple[float, int]:
    """Returns the dense accuracy in percent and the number of parameters."""
    import keras

    weights = train_dense(network, seed)
    model = compile_network(keras, network.build(keras), 0.0)
    model.set_weights(weights)
    return measure_accuracy(network, model), model.count_params()


def time_step(network: Network) -> float:
    """Returns the seconds of one training step, the fastest of a few epochs after the one that traces."""
    import keras

    model = compile_network(keras, network.build(keras), network.learning_rate)
    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    train, _ = network.data()
    model.fit(*train, batch_size=network.batch, epochs=1 + _TIMED_EPOCHS, verbose=0, callbacks=[clock])
    return float(np.diff(ends).min()) / network.steps_per_epoch


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="dense trainings of each network (3)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="all")
    args = tables.parse(parser)
    args.seeds = 1 if args.quick else args.seeds
    args.networks = [NETWORKS[name] for name in args.networks]
    if args.quick:
        args.networks = [replace(network, dense_epochs=1) for network in args.networks]
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    rows = []
    with progress_bar(console) as progress, own_process() as process:
        process.submit(use_one_thread).result()
        task = progress.add_task("trainings", total=len(args.networks) * args.seeds)
        for network in args.networks:
            accuracies = []
            for seed in range(args.seeds):
                accuracy, parameters = process.submit(train_and_measure, network, seed).result()
                accuracies.append(accuracy)
                advance(progress, task)
            seconds = process.submit(time_step, network).result()
            epochs = f"{network.dense_epochs} of {network.steps_per_epoch} steps of {network.batch}"
            percents = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
            row = (network.name, network.layers, f"{parameters:,}", epochs, percents, f"{np.mean(accuracies):.1f}")
            rows.append((*row, f"{1e3 * seconds:.1f}"))
    header = ("network", "layers", "parameters", "dense epochs", "accuracy by seed, %", "mean, %", "step, ms")
    text = f"{tables.markdown(header, rows)}\n\nOne thread; dense accuracy on test data. {tables.machine()}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("networks", text)


if __name__ == "__main__":
    main()
