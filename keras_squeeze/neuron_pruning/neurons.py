"""The neurons of a model that can be removed, where they lie, and what is saved without them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import keras
import numpy as np

from keras_squeeze.analysis.mac_counting import count_macs
from keras_squeeze.channel_graph.graph import Slices
from keras_squeeze.channel_graph.propagation import trace
from keras_squeeze.introspection.mac_formulas import WEIGHTLESS
from keras_squeeze.introspection.selection import LayerSelector, find_layers, select_layers
from keras_squeeze.introspection.variables import read


@dataclass(frozen=True, eq=False)
class NeuronGroup:
    """Neurons of layers that are as wide as each other, such as the convolutions that a residual sum joins.

    Attributes:
        paths: The layers that compute them.
        neurons: Their numbers, in the order in which they lie in the first of those layers.
        channels: Channels of that layer which one neuron takes: more than one where groups of a convolution are kept
            equal, or where channels are shuffled.
        others: Channels of that layer that belong to no neuron of this group.
        rounded: Whether runtimes like the width to be a multiple of something.
    """

    paths: tuple[str, ...]
    neurons: np.ndarray
    channels: int
    others: int
    rounded: bool = True

    @property
    def name(self) -> str:
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"

    def width(self, kept: int) -> int:
        """Channels of the layer where so many neurons are kept."""
        return kept * self.channels + self.others


class Neurons:
    """All neurons of a model.

    Attributes:
        graph: The channel graph.
        classes: For each of its ids, the number of the neuron.
        count: How many neurons there are, frozen ones included.
        reasons: `{neuron: why}` for those that cannot be removed.
        groups: Those that can.
        frozen: `(layer path, reason)` of those that cannot.
    """

    def __init__(self, model: keras.Model, layers: LayerSelector = None, *, inexact=False, trainable_only=False):
        self.model = model
        self.graph = trace(model, inexact=inexact)
        self.classes = self.graph.classes()
        self.count = int(self.classes.max(initial=-1)) + 1
        chosen = {id(w.variable) for w in select_layers(model, layers, trainable_only=trainable_only).weights}
        self.reasons = self._reasons(inexact, chosen, trainable_only)
        self.groups = self._groups(self.reasons)
        self.frozen = self._frozen(self.reasons)

    @property
    def prunable(self) -> int:
        """How many neurons can be removed."""
        return sum(len(group.neurons) for group in self.groups)

    def entries(self) -> Iterator[Slices]:
        """The slices of weights that are zero in a masked neuron."""
        return (slices for slices in self.graph.slices.values() if slices.role == "output")

    def masks(self, pruned: np.ndarray) -> Iterator[tuple[keras.Variable, np.ndarray]]:
        """Weights that masked neurons make zero, each with its mask of the same shape, True keeps.

        Args:
            pruned: Boolean per neuron.
        """
        masks: dict[int, tuple[keras.Variable, np.ndarray]] = {}
        for slices in self.entries():
            keep = ~pruned[self.classes[slices.ids]]
            shape = [-1 if axis == slices.axis else 1 for axis in range(len(slices.variable.shape))]
            mask = np.broadcast_to(keep.reshape(shape), tuple(slices.variable.shape))
            if id(slices.variable) in masks:  # with neurons along another axis, too
                mask = mask & masks[id(slices.variable)][1]
            masks[id(slices.variable)] = slices.variable, mask
        yield from masks.values()

    def dead(self) -> np.ndarray:
        """Boolean per neuron: whether everything that computes it is zero, as in one that is masked already."""
        alive = np.zeros(self.count, bool)
        for slices in self.entries():
            values = np.moveaxis(read(slices.variable), slices.axis, -1)
            nonzero = np.any(values.reshape(-1, values.shape[-1]) != 0, axis=0)
            alive[self.classes[slices.ids[nonzero]]] = True
        return ~alive

    def dead_prunable(self) -> np.ndarray:
        """Boolean per neuron: those of the `dead` that can be removed."""
        prunable = np.zeros(self.count, bool)
        for group in self.groups:
            prunable[group.neurons] = True
        return self.dead() & prunable

    def _reasons(self, inexact, chosen, trainable_only) -> dict[int, str]:
        """Why neurons stay."""
        reasons = self.graph.frozen(self.classes)
        for source in self.graph.sources.values():
            if id(source.variable) not in chosen:
                why = "frozen (trainable=False)" if trainable_only and not source.variable.trainable else "not selected"
                for neuron in self.classes[source.ids].tolist():
                    reasons.setdefault(neuron, why)
        if trainable_only:
            for slices in self.entries():
                if not slices.variable.trainable and not slices.variable.name.startswith("moving_"):
                    for neuron in self.classes[slices.ids].tolist():
                        reasons.setdefault(neuron, f"{slices.path}/{slices.variable.name} is frozen (trainable=False)")
        open_ = np.ones(self.count, bool)
        open_[list(reasons)] = False
        # The graph once more, as if all that can be masked were: some would not be removable for all that.
        masked = trace(self.model, inexact=inexact, assumed=open_[self.classes])
        for neuron, reason in masked.blocked(self.classes).items():
            reasons.setdefault(neuron, reason)
        return reasons

    def _groups(self, reasons) -> list[NeuronGroup]:
        sources = list(self.graph.sources.values())
        owners: dict[int, list[int]] = {}
        for index, source in enumerate(sources):
            for neuron in dict.fromkeys(self.classes[source.ids].tolist()):
                if neuron not in reasons:
                    owners.setdefault(neuron, []).append(index)
        by_owners: dict[tuple[int, ...], list[int]] = {}
        for neuron, indices in owners.items():
            by_owners.setdefault(tuple(indices), []).append(neuron)
        groups = []
        for key, neurons in by_owners.items():
            first = sources[key[0]]
            lies = self.classes[first.ids[: first.width]]
            width = int(np.isin(lies, neurons).sum())
            paths = tuple(dict.fromkeys(sources[index].path for index in key))
            channels = max(width // len(neurons), 1)
            others = len(lies) - channels * len(neurons)
            rounded = any(sources[index].rounded for index in key)
            groups.append(NeuronGroup(paths, np.array(neurons), channels, others, rounded))
        return groups

    def _frozen(self, reasons) -> list[tuple[str, str]]:
        reason_of_path: dict[tuple[str, str], None] = {}
        for source in self.graph.sources.values():
            for neuron in self.classes[source.ids].tolist():
                if neuron in reasons:
                    reason_of_path.setdefault((source.path, reasons[neuron]))
        return [*reason_of_path, *self.graph.opaque_layers.items()]


class Savings:
    """Parameters and multiply-accumulates that are left when neurons go."""

    def __init__(self, neurons: Neurons):
        self._classes = neurons.classes
        model, graph = neurons.model, neurons.graph
        layers = find_layers(model).layers
        macs = count_macs(model, [(entry.path, entry.layer) for entry in layers])
        self.problem = macs.problem
        by_layer = macs.by_layer or {}
        self._fixed_macs = sum(sum(by_layer.get(id(entry.layer), {}).values()) for entry in layers)
        self._weights: list[tuple[int, float, list[np.ndarray]]] = []
        macs_of = {
            id(weight.variable): by_layer.get(id(entry.layer), {}).get(weight.name, 0)
            for entry in layers
            for weight in entry.weights
        }
        for variable in {id(v): v for v in model.weights}.values():
            axes = [graph.slices.get((id(variable), axis)) for axis in range(len(variable.shape))]
            ids = [slices.ids for slices in axes if slices is not None]
            size = int(np.prod(variable.shape))
            self._weights.append((size, macs_of.get(id(variable), 0), ids))
        for entry in layers:
            whole = by_layer.get(id(entry.layer), {}).get(WEIGHTLESS, 0)
            for fraction, neurons_of in graph.work.get(id(entry.layer), []):
                self._weights.append((0, fraction * whole, list(neurons_of)))

    def left(self, pruned: np.ndarray) -> tuple[int, int]:
        """`(parameters, MACs)` without the neurons that are marked."""
        parameters, macs = 0.0, float(self._fixed_macs)
        for size, weight_macs, axes in self._weights:
            share = 1.0
            for ids in axes:
                share *= 1.0 - np.count_nonzero(pruned[self._classes[ids]]) / max(len(ids), 1)
            parameters += size * share
            macs -= weight_macs * (1.0 - share)
        return round(parameters), round(macs)


def widths(groups: Iterable[NeuronGroup], pruned: np.ndarray) -> dict[str, tuple[int, int]]:
    """`{layer path: (channels, channels that are left)}` of every group's first layer, and of those joined with it."""
    by_path: dict[str, tuple[int, int]] = {}
    for group in groups:
        gone = int(np.count_nonzero(pruned[group.neurons])) * group.channels
        before = group.width(len(group.neurons))
        for path in group.paths:
            # A layer whose neurons are joined with different others belongs to several groups.
            _, remaining = by_path.get(path, (before, before))
            by_path[path] = (before, remaining - gone)
    return by_path
