"""Criteria for neurons: a model -> one score per neuron; the lowest scores are pruned first.

A neuron's weights may lie in several layers (those that a residual sum joins): a criterion adds up over all of them.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.channel_graph.activation_recorder import observe
from keras_squeeze.channel_graph.graph import Slices
from keras_squeeze.configurable import Configurable, resolve
from keras_squeeze.data import batches
from keras_squeeze.introspection.variables import read
from keras_squeeze.neuron_pruning.neurons import Neurons
from keras_squeeze.training.gradients import GroupProducts
from keras_squeeze.weight_pruning.criteria import batch_gradients


class NeuronCriterion(Configurable, ABC):
    """Base class: scores every neuron of a model; higher means keep.

    Attributes:
        needs_data: Whether `data` must be given.
    """

    needs_data = False

    @abstractmethod
    def scores(self, neurons: Neurons, data=None) -> np.ndarray:
        """float64 array, one score for each of `neurons.count`."""


def _summed(neurons: Neurons, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Adds `value(kernel)` up over everything but the neurons, in every kernel that computes them."""
    scores = np.zeros(neurons.count)
    for source in neurons.graph.sources.values():
        values = np.moveaxis(value(np.asarray(read(source.variable), "float64")), source.axis, -1)
        np.add.at(scores, neurons.classes[source.ids], values.reshape(-1, values.shape[-1]).sum(axis=0))
    return scores


@keras.saving.register_keras_serializable("keras_squeeze")
class L1(NeuronCriterion):
    """Sum of the absolute weights that compute the neuron.

    Reference: Li et al. 2017, "Pruning Filters for Efficient ConvNets", https://arxiv.org/abs/1608.08710
    """

    def scores(self, neurons, data=None):
        return _summed(neurons, np.abs)


@keras.saving.register_keras_serializable("keras_squeeze")
class L2(NeuronCriterion):
    """Euclidean norm of the weights that compute the neuron."""

    def scores(self, neurons, data=None):
        return np.sqrt(_summed(neurons, np.square))


@keras.saving.register_keras_serializable("keras_squeeze")
class BatchNormScale(NeuronCriterion):
    """|gamma| of the batch normalization behind the neuron.

    Reference: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming",
        https://arxiv.org/abs/1708.06519
    """

    def scores(self, neurons, data=None):
        scores, has_scale = np.zeros(neurons.count), np.zeros(neurons.count, bool)
        for slices in neurons.entries():
            if slices.variable.name == "gamma":
                own = neurons.classes[slices.ids]
                np.add.at(scores, own, np.abs(read(slices.variable)))
                has_scale[own] = True
        lacking = [group.name for group in neurons.groups if not has_scale[group.neurons].all()]
        if lacking:
            raise ValueError(
                f"Criterion 'batch_norm_scale' needs a normalization with a scale behind every neuron. None behind: "
                f"{', '.join(lacking)}. Leave these out with `layers=`, or use another criterion."
            )
        return scores


@keras.saving.register_keras_serializable("keras_squeeze")
class GeometricMedian(NeuronCriterion):
    """`sum over j of ||F_c - F_j||`: neurons near the geometric median of their layer can be replaced by the others.

    Reference: He et al. 2019, "Filter Pruning via Geometric Median", https://arxiv.org/abs/1811.00250
    """

    def scores(self, neurons, data=None):
        scores = np.zeros(neurons.count)
        for source in neurons.graph.sources.values():
            kernel = np.moveaxis(np.asarray(read(source.variable), "float64"), source.axis, 0)
            filters = kernel.reshape(len(kernel), -1)
            squares = np.sum(filters**2, axis=1)
            distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * filters @ filters.T, 0))
            np.add.at(scores, neurons.classes[source.ids], distances.sum(axis=1))
        return scores


@keras.saving.register_keras_serializable("keras_squeeze")
class RandomNeurons(NeuronCriterion):
    """Uniform noise, the baseline that every other criterion must beat; the same at every update.

    Args:
        seed: Integer.
    """

    def __init__(self, seed: int = 0):
        self.seed = checks.non_negative_int("seed", seed)

    def scores(self, neurons, data=None):
        scores = np.zeros(neurons.count)
        for group in neurons.groups:
            generator = np.random.default_rng([self.seed, zlib.crc32(group.name.encode())])
            scores[group.neurons] = generator.random(len(group.neurons))
        return scores

    def get_config(self):
        return {"seed": self.seed}


class _DataCriterion(NeuronCriterion):
    """Base class of those that look at batches of data.

    Args:
        num_batches: Batches of `data` to use, at least 1; None for all.
    """

    needs_data = True

    def __init__(self, num_batches: int | None = 8):
        self.num_batches = checks.positive_int("num_batches", num_batches, optional=True)

    def get_config(self):
        return {"num_batches": self.num_batches}


class GradientNeuronCriterion(_DataCriterion):
    """Base class of those for which the gradients of the training do as well as `data`."""

    @abstractmethod
    def observe(self, neurons: Neurons, optimizer) -> GroupProducts:
        """Begins to sum up, while the model trains, what `values` then gives as scores."""


@keras.saving.register_keras_serializable("keras_squeeze")
class Taylor(GradientNeuronCriterion):
    """`|sum of dL/dw * w|` over the weights of a neuron, averaged over batches: what the loss would change by.

    Reference: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning",
        https://arxiv.org/abs/1906.10771
    """

    def observe(self, neurons, optimizer):
        slices = [(each.variable, each.axis, neurons.classes[each.ids]) for each in _weights_of(neurons)]
        return GroupProducts(neurons.model, optimizer, slices, neurons.count)

    def scores(self, neurons, data=None):
        entries = _weights_of(neurons)
        weights = [slices.variable for slices in entries]
        scores, seen = np.zeros(neurons.count), 0
        for gradients in batch_gradients(neurons.model, weights, data, num_batches=self.num_batches):
            sums = np.zeros(neurons.count)
            for slices, gradient in zip(entries, gradients, strict=True):
                products = np.moveaxis(gradient * read(slices.variable), slices.axis, -1)
                np.add.at(sums, neurons.classes[slices.ids], products.reshape(-1, products.shape[-1]).sum(axis=0))
            scores += np.abs(sums)
            seen += 1
        return scores / seen


def _weights_of(neurons: Neurons) -> list[Slices]:
    """The slices of neurons that are trained."""
    return [slices for slices in neurons.entries() if not slices.variable.name.startswith("moving_")]


class _ActivationCriterion(_DataCriterion):
    """Base class of those that look at what a neuron's readers see of it.

    Neurons that no layer reads by itself, such as the width of attention keys, get their Euclidean norm.
    """

    @abstractmethod
    def of(self, activations: np.ndarray) -> np.ndarray:
        """Scores of channels from activations of shape (values, channels)."""

    def scores(self, neurons, data=None):
        sums, seen = np.zeros(neurons.count), np.zeros(neurons.count)

        def see(layer, channels, values):
            own = neurons.classes[channels.ids]
            np.add.at(sums, own, self.of(values))
            np.add.at(seen, own, 1)

        observe(neurons.model, neurons.graph, data, self.num_batches, see)
        return np.where(seen > 0, sums / np.maximum(seen, 1), L2().scores(neurons))


@keras.saving.register_keras_serializable("keras_squeeze")
class APoZ(_ActivationCriterion):
    """One minus the average percentage of zeros: neurons that are rarely active go first.

    Reference: Hu et al. 2016, "Network Trimming", equation 1, https://arxiv.org/abs/1607.03250
    """

    def of(self, activations):
        return np.mean(activations != 0, axis=0)


@keras.saving.register_keras_serializable("keras_squeeze")
class MeanActivation(_ActivationCriterion):
    """Mean absolute activation (Molchanov et al. 2017, https://arxiv.org/abs/1611.06440)."""

    def of(self, activations):
        return np.mean(np.abs(activations), axis=0, dtype="float64")


_CRITERIA: dict[str, Callable[[], NeuronCriterion]] = {
    "l1": L1,
    "l2": L2,
    "batch_norm_scale": BatchNormScale,
    "apoz": APoZ,
    "mean_activation": MeanActivation,
    "taylor": Taylor,
    "geometric_median": GeometricMedian,
    "random": RandomNeurons,
    "auto": Taylor,  # unless there is nothing to take gradients on: see `automatic`
}


BEST_WITHOUT_DATA = L1
"""What `"auto"` is where there is nothing to take gradients on: of the criteria that fit every model and need no data,
one of the two that lose least in `benchmarks/neuron_criteria.py`. The other, the geometric median, is within its noise,
and may keep a neuron whose weights are nearly zero."""


def automatic(model: keras.Model, data) -> NeuronCriterion:
    """What `"auto"` is in one shot: `Taylor` for a compiled model and data with targets, else `BEST_WITHOUT_DATA`."""
    if data is not None and getattr(model, "compiled", False):
        _, targets, _ = next(batches(data, 1))
        if targets is not None:
            return Taylor()
    return BEST_WITHOUT_DATA()


def automatic_allocation(criterion: NeuronCriterion) -> str:
    """Returns what `allocation="auto"` is: neurons of different layers compete where gradients make them comparable.

    By the size of weights alone, a layer with small ones would lose nearly all of its neurons.
    """
    return "global" if isinstance(criterion, GradientNeuronCriterion) else "uniform"


def name_of(criterion: NeuronCriterion) -> str:
    """The name under which users know a criterion."""
    return next((name for name, cls in _CRITERIA.items() if type(criterion) is cls), repr(criterion))


def get(identifier) -> NeuronCriterion:
    """Turns a name, a config or a `NeuronCriterion` into a `NeuronCriterion`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: something else.
    """
    allowed = "a name or a criterion for neurons"
    return resolve("criterion", identifier, NeuronCriterion, _CRITERIA, allowed)  # type: ignore[type-abstract]
