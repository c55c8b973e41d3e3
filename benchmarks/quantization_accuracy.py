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
from neuron_criteria import Mean, Plan, _compile, _data, _network, _one_thread
from rich.console import Console

CALIBRATION = 1024  # images
BATCH = 128
FLOAT = "float"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        network: `"convolutions"` or `"MLP"`.
        bits: Of weights and of activations, in words.
        weights, activations: As in `quantize_aware`; a dict is for what needs the package to be made.
        trained: Whether it is trained with its quantizers, or only calibrated.
        rate: The learning rate that training on begins with.
    """

    network: str
    name: str
    bits: str
    weights: Any
    activations: Any = None
    trained: bool = True


RATES = {"convolutions": 1e-3, "MLP": 1e-3}
VARIANTS = (
    Variant("convolutions", "int8, QAT", "8 / 8", "int8", "int8"),
    Variant("convolutions", "int8, after training", "8 / 8", "int8", "int8", trained=False),
    Variant("convolutions", "learned step, QAT", "4 / 4", "learned4", "learned4"),
    Variant("convolutions", "int4, QAT", "4 / 4", "int4", "int4"),
    Variant("convolutions", "int4, after training", "4 / 4", "int4", "int4", trained=False),
    Variant("convolutions", "ternary, QAT", "2 / 8", "ternary", "int8"),
    Variant("convolutions", "binary, QAT", "1 / 8", "binary", "int8"),
    Variant("convolutions", "xnor, QAT", "1 / 1", "xnor"),
    Variant("MLP", "binary_connect, QAT", "1 / float", "binary_connect"),
    Variant("MLP", "binary_connect on every layer, QAT", "1 / float", {"": "binary_connect"}),
)


def _mlp(keras):
    layers = keras.layers
    hidden = []
    for _ in range(2):
        hidden += [layers.Dense(512, use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([keras.Input((SIZE, SIZE, 1)), layers.Flatten(), *hidden, layers.Dense(len(CLASSES))])


NETWORKS = {"convolutions": _network, "MLP": _mlp}


def train_first(plan: Plan, seed: int, network: str) -> list[np.ndarray]:
    """The weights that all copies begin with."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = _compile(keras, NETWORKS[network](keras), 2e-3)
    model.fit(*_data(plan)[0], batch_size=BATCH, epochs=plan.dense_epochs, verbose=0)
    return model.get_weights()


def train_on(plan: Plan, seed: int, network: str, weights: list[np.ndarray], variant) -> dict[str, float]:
    """Accuracy in percent after the rest of the training; of the copy in float also after quantizing it."""
    import keras

    import keras_squeeze as ks

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    train, test = _data(plan)
    model = NETWORKS[network](keras)
    model.set_weights(weights)
    if variant:
        model = _quantize(model, variant)
    steps = plan.tuning_epochs * -(-plan.train // BATCH)
    _compile(keras, model, keras.optimizers.schedules.PolynomialDecay(RATES[network], steps, 0.0))
    callbacks = [ks.QuantizationSchedule()] if variant else []
    model.fit(*train, batch_size=BATCH, epochs=plan.tuning_epochs, verbose=0, callbacks=callbacks)
    if variant:
        return {variant.name: _accuracy(keras, model, test)}
    calibrated = [other for other in VARIANTS if other.network == network and not other.trained]
    found = {other.name: _accuracy(keras, _calibrate(model, other, train), test) for other in calibrated}
    return {FLOAT: _accuracy(keras, model, test), **found}
