"""Trains one row of `defaults.py`: a network, pruned while it trains with one combination of settings."""

import functools
import gc
import hashlib
import math
import pathlib
import time
import warnings
from dataclasses import asdict, dataclass, replace

import numpy as np
from networks import NETWORKS, Network, compile_network, measure_accuracy, train_dense

RATE = 1e-3
DATA = 1024  # examples for criteria that look at data, and for the recalibration of batch normalization
NEED_DATA = ("apoz", "mean_activation")
HIGHEST_TARGET = 0.98

SCHEDULES = {  # class in `keras_squeeze.schedules` and its arguments
    "polynomial": ("PolynomialDecay", {}),
    "polynomial to 0.5": ("PolynomialDecay", {"end": 0.5}),
    "polynomial to 0.9": ("PolynomialDecay", {"end": 0.9}),
    "cosine": ("Cosine", {}),
    "exponential": ("Exponential", {}),
    "one cycle": ("OneCycle", {}),
}


@dataclass(frozen=True)
class Settings:
    """One combination of settings of a pruning callback.

    Attributes:
        technique: `"weights"` for `MagnitudePruning`, `"neurons"` for `NeuronPruning`.
        allocation: Argument of the callback.
        criterion: Argument of the callback.
        schedule: Key in `SCHEDULES`.
        left_out: Roles of the layers that stay dense, joined by "+": depthwise, first, last, embeddings. Empty if all
            layers take part.
    """

    technique: str
    allocation: str
    criterion: str
    schedule: str = "polynomial"
    left_out: str = ""

    def on(self, network: str) -> "Settings":
        """Drops the roles that a network lacks, so that equal trainings have equal settings."""
        has_depthwise, has_embeddings = (kind in NETWORKS[network].layers for kind in ("depthwise", "Embedding"))
        roles = self.left_out.split("+") if self.left_out else []
        if has_embeddings:  # an embedding is the first layer
            roles = ["embeddings" if role == "first" else role for role in roles]
        lacking = {role for role, has in (("depthwise", has_depthwise), ("embeddings", has_embeddings)) if not has}
        return replace(self, left_out="+".join(dict.fromkeys(role for role in roles if role not in lacking)))


DEFAULTS = {  # of the package: the callbacks with a target and no other argument
    "weights": Settings("weights", "erk", "magnitude", left_out="depthwise"),
    "neurons": Settings("neurons", "global", "taylor"),
}


@dataclass(frozen=True)
class Cell:
    """A place to compare settings in: network, final sparsity or fraction of the neurons, and optimizer steps."""

    network: str
    strength: float
    steps: int


@dataclass(frozen=True)
class Job:
    """One training."""

    settings: Settings
    cell: Cell
    seed: int

    @property
    def fields(self) -> dict:
        """Returns everything that tells one training from another."""
        return {**asdict(self.settings.on(self.cell.network)), **asdict(self.cell), "seed": self.seed}


@functools.cache
def prepare_dense(name: str, seed: int, dense_epochs: int | None = None) -> tuple[list[np.ndarray], float]:
    """Returns the dense weights and their accuracy in percent; a worker computes them once."""
    import keras

    network = _network(name, dense_epochs)
    weights = train_dense(network, seed)
    keras.utils.clear_session()
    model = compile_network(keras, network.build(keras), 0.0)
    model.set_weights(weights)
    return weights, measure_accuracy(network, model)


def train_row(job: Job, dense_epochs: int | None = None) -> dict:
    """Trains and evaluates one network.

    Args:
        job: The training.
        dense_epochs: Epochs of the dense training before it; None for the network's own.

    Returns:
        The row: all settings and the measurements. After an error `accuracy` is None and `error` says why.
    """
    begin = time.perf_counter()
    row = {**job.fields, "code": package_digest(), "accuracy": None, "error": None}
    gc.collect()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row |= _train(job, dense_epochs)
        texts = {str(warning.message)[:200] for warning in caught if warning.category is UserWarning}
        row["warnings"] = sorted(texts)
    except Exception as error:  # the benchmark goes on: settings need not fit every network
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return {**row, "seconds": round(time.perf_counter() - begin, 2)}


def plan_epochs(network: Network, steps: int) -> tuple[int, int]:
    """Returns the epochs and the steps of each, whose product is `steps` or the nearest number above it."""
    epochs = math.ceil(steps / network.steps_per_epoch)
    return epochs, math.ceil(steps / epochs)


def _train(job: Job, dense_epochs: int | None) -> dict:
    import keras

    import keras_squeeze as ks

    network = _network(job.cell.network, dense_epochs)
    weights, dense = prepare_dense(network.name, job.seed, dense_epochs)
    keras.utils.clear_session()
    keras.utils.set_random_seed(job.seed)
    model = compile_network(keras, network.build(keras), RATE)
    model.set_weights(weights)
    (x, y), _ = network.data()
    epochs, steps = plan_epochs(network, job.cell.steps)
    chosen = np.random.default_rng(job.seed).permutation(len(y))[: steps * network.batch]
    callback = _make_callback(job, model, (x[:DATA], y[:DATA]))
    options = {"batch_size": network.batch, "epochs": epochs, "verbose": 0}
    begin = time.perf_counter()
    model.fit(x[chosen], y[chosen], callbacks=[callback], **options)
    fit_seconds = time.perf_counter() - begin
    accuracy = measure_accuracy(network, model)
    changes = ks.recalibrate_batch_norm(model, x[:DATA], max_examples=DATA)
    return {
        "dense": dense,
        "accuracy": accuracy,
        "recalibrated": measure_accuracy(network, model) if changes else accuracy,
        "sparsity": callback.sparsity if job.settings.technique == "weights" else callback.pruned_neurons,
        "overall_sparsity": _measure_sparsity(model),
        "steps_trained": epochs * steps,
        "fit_seconds": round(fit_seconds, 2),
    }


def _make_callback(job: Job, model, data):
    """Builds the callback; the defaults are those of the package and not their names here."""
    import keras_squeeze as ks

    settings, strength = job.settings.on(job.cell.network), job.cell.strength
    make = {"weights": ks.MagnitudePruning, "neurons": ks.NeuronPruning}[settings.technique]
    if settings == DEFAULTS[settings.technique].on(job.cell.network):
        return make(strength)
    name, arguments = SCHEDULES[settings.schedule]
    if settings.technique == "weights":
        strength = _equal_target(model, settings, strength)
    schedule = getattr(ks.schedules, name)(strength, **arguments)
    options = {"allocation": settings.allocation, "criterion": settings.criterion}
    if settings.left_out:
        options["layers"] = [entry.layer for entry in _entries_taking_part(model, settings.left_out)]
    if settings.criterion in NEED_DATA:
        options["data"] = data
    return make(schedule, **options)


def _equal_target(model, settings: Settings, strength: float) -> float:
    """Returns the target with which settings make as many zeros as the default does with `strength`.

    What leaves more layers dense prunes the others more: otherwise it would win by pruning less.
    """
    sizes = [
        sum(
            math.prod(weight.variable.shape) for entry in _entries_taking_part(model, roles) for weight in entry.weights
        )
        for roles in (DEFAULTS["weights"].left_out, settings.left_out)
    ]
    target = strength * sizes[0] / sizes[1]
    if target > HIGHEST_TARGET:
        raise ValueError(f"a target of {target:.3f} for the layers that take part would be needed")
    return target


def _entries_taking_part(model, left_out: str) -> list:
    """Returns the compressible layers that have none of the roles."""
    import keras

    from keras_squeeze.introspection.selection import find_layers

    entries = find_layers(model).layers
    with_role = {
        "depthwise": [entry for entry in entries if all(weight.depthwise for weight in entry.weights)],
        "embeddings": [entry for entry in entries if isinstance(entry.layer, keras.layers.Embedding)],
        "first": entries[:1],
        "last": entries[-1:],
    }
    dense = {entry.path for role in filter(None, left_out.split("+")) for entry in with_role[role]}
    return [entry for entry in entries if entry.path not in dense]


def _measure_sparsity(model) -> float:
    """Returns the fraction of zeros over all prunable weights, whether they take part or not."""
    from keras_squeeze.introspection.selection import find_layers
    from keras_squeeze.introspection.variables import read

    values = [read(weight.variable) for weight in find_layers(model).weights]
    return 1.0 - sum(int(np.count_nonzero(array)) for array in values) / sum(array.size for array in values)


def _network(name: str, dense_epochs: int | None) -> Network:
    network = NETWORKS[name]
    return network if dense_epochs is None else replace(network, dense_epochs=dense_epochs)


@functools.cache
def package_digest() -> str:
    """Hashes the sources that pruning depends on, so that rows of different versions can be told apart."""
    import keras_squeeze

    folder = pathlib.Path(keras_squeeze.__file__).parent
    digest = hashlib.sha256()
    rooms = ("training", "weight_pruning", "neuron_pruning")
    for path in sorted([folder / "schedules.py", *(path for room in rooms for path in folder.glob(f"{room}/*.py"))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]
