"""How many neurons of each layer could go, and what keeps the others."""

import collections
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import keras

from keras_squeeze.introspection.selection import LayerSelector
from keras_squeeze.neuron_pruning.neurons import Neurons


@dataclass(frozen=True)
class LayerNeurons:
    """The neurons of one layer, or one kind of them: attention has heads, and widths of keys and values.

    Attributes:
        path: The layer, and of attention the kind.
        neurons: How many there are.
        free: How many of them can be removed.
        kept: `{reason: neurons}` for the others; a reason names the layer that keeps them.
    """

    path: str
    neurons: int
    free: int
    kept: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class NeuronOverview:
    """What `prunable_neurons` found; prints as a table.

    Attributes:
        name: The model's name.
        layers: A `LayerNeurons` for each layer that computes neurons, in the model's order.
        opaque: `{path: reason}` of layers with weights in which no neurons are known; `register_channel_rule` teaches
            them.
    """

    name: str
    layers: list[LayerNeurons]
    opaque: dict[str, str] = field(default_factory=dict)

    @property
    def neurons(self) -> int:
        """Of all layers."""
        return sum(layer.neurons for layer in self.layers)

    @property
    def free(self) -> int:
        """Of all layers."""
        return sum(layer.free for layer in self.layers)

    def to_dict(self) -> dict:
        """The overview as dicts, lists, strings and numbers."""
        layers = [asdict(layer) for layer in self.layers]
        totals = {"neurons": self.neurons, "free": self.free}
        return {"name": self.name, **totals, "layers": layers, "opaque": dict(self.opaque)}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.name}: {self.free:,} of {self.neurons:,} neurons can be removed"
        width = max((len(layer.path) for layer in self.layers), default=0)
        for layer in self.layers:
            why = "; ".join(f"{count:,}: {reason}" for reason, count in layer.kept.items())
            yield f"  {layer.path:<{width}}  {layer.free:>6,} of {layer.neurons:>6,}  {why}".rstrip()
        for path, reason in self.opaque.items():
            yield f"  {path}: not known: {reason}"


def prunable_neurons(
    model: keras.Model, layers: LayerSelector = None, *, allow_inexact: bool = False
) -> NeuronOverview:
    """Says for each layer how many neurons `prune_neurons` and `shrink` can remove, and which layer keeps the rest.

    Where all of them are free, one stays nevertheless.

    Args:
        model: A built Functional or Sequential model; it is only read.
        layers: Which layers, as in `prune_neurons`.
        allow_inexact: Whether neurons in front of a `LayerNormalization` count as free; see `prune_neurons`.

    Raises:
        TypeError, ValueError: no such model, or it is not built, or subclassed.

    Example:

    ```python
    print(ks.prunable_neurons(model))
    ```
    """
    neurons = Neurons(model, layers, inexact=allow_inexact)
    by_path: dict[str, LayerNeurons] = {}
    for source in neurons.graph.sources.values():
        own = neurons.classes[source.ids[: source.width]].tolist()
        kept = collections.Counter(neurons.reasons[neuron] for neuron in own if neuron in neurons.reasons)
        free = len(own) - sum(kept.values())
        by_path.setdefault(source.path, LayerNeurons(source.path, len(own), free, dict(kept.most_common())))
    return NeuronOverview(model.name, list(by_path.values()), dict(neurons.graph.opaque_layers))
