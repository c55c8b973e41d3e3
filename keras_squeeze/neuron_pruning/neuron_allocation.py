"""How many neurons every layer loses: from scores and a target to the neurons that go.

A search over one number, the share of neurons that would go if widths could be anything, finds the smallest
one that reaches the target once every layer's limits and the rounding of widths are applied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from keras_squeeze import checks
from keras_squeeze.neuron_pruning.neurons import NeuronGroup

_HALVINGS = 24


@dataclass(frozen=True)
class Limits:
    """What a layer keeps whatever the target.

    Attributes:
        round_to: Widths end at multiples of it, or stay as they are; 1 = any.
        min_neurons: Neurons that every layer keeps.
        max_layer_fraction: The largest fraction of a layer's neurons that goes.
    """

    round_to: int = 8
    min_neurons: int = 1
    max_layer_fraction: float = 0.9

    def __post_init__(self):
        for name in ("round_to", "min_neurons"):
            object.__setattr__(self, name, checks.positive_int(name, getattr(self, name)))
        if isinstance(self.max_layer_fraction, bool) or not 0.0 < self.max_layer_fraction <= 1.0:
            raise ValueError(
                f"`max_layer_fraction` must be in (0, 1]. Received: max_layer_fraction={self.max_layer_fraction!r}"
            )

    def __str__(self) -> str:
        return (
            f"round_to={self.round_to}, min_neurons={self.min_neurons} and max_layer_fraction={self.max_layer_fraction}"
        )

    def allowed(self, group: NeuronGroup) -> np.ndarray:
        """The numbers of neurons that a group may keep, ascending; all of them is always one."""
        size = len(group.neurons)
        least = max(self.min_neurons, size - int(size * self.max_layer_fraction + 1e-9), 1)
        counts = np.arange(min(least, size), size + 1)
        multiple = self.round_to if group.rounded else 1
        fits = (counts * group.channels + group.others) % multiple == 0
        return counts[fits | (counts == size)]


class Allocation:
    """Chooses the neurons that go.

    Args:
        groups: The neurons that may go.
        limits: What every layer keeps.
        kind: `"uniform"`, every layer loses the same share; `"global"`, all neurons compete by score.
        count: How many neurons the model has.
    """

    def __init__(self, groups: Sequence[NeuronGroup], limits: Limits, kind: str, count: int):
        self._groups = groups
        self._allowed = [limits.allowed(group) for group in groups]
        self._kind = kind
        self._count = count

    def prune(self, scores: np.ndarray, reached: Callable[[np.ndarray], bool], nearest=None) -> np.ndarray:
        """The fewest neurons, by score, with which a target is reached.

        Args:
            scores: One per neuron, higher means keep; -inf for what is pruned already.
            reached: Whether a target is reached without the neurons that are marked. Must stay true when more go.
            nearest: Optional distance from the target: the last choice that does not reach it is taken if it is
                nearer.

        Returns:
            Boolean per neuron. Where the target is out of reach: all that may go.
        """
        scores = self._comparable(scores)
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if reached(self._pruned(scores, middle)) else (middle, high)
        enough, short = self._pruned(scores, high), self._pruned(scores, low)
        if nearest is not None and nearest(short) <= nearest(enough):
            return short
        return enough

    @property
    def stuck(self) -> list[NeuronGroup]:
        """Groups whose limits leave them no choice: they keep all their neurons."""
        return [group for group, allowed in zip(self._groups, self._allowed, strict=True) if len(allowed) == 1]

    def most(self, scores: np.ndarray) -> np.ndarray:
        """All neurons that may go."""
        return self._pruned(scores, 1.0)

    def _comparable(self, scores: np.ndarray) -> np.ndarray:
        """Scores over the mean of their layer, so that layers of different size and scale compare."""
        result = np.array(scores, "float64")
        for group in self._groups:
            own = result[group.neurons]
            mean = np.mean(own[np.isfinite(own)]) if np.isfinite(own).any() else 0.0
            result[group.neurons] = own / mean if mean > 0 else own
        return result

    def _pruned(self, scores: np.ndarray, share: float) -> np.ndarray:
        pruned = np.zeros(self._count, bool)
        for group, wanted, allowed in zip(self._groups, self._wanted(scores, share), self._allowed, strict=True):
            distances = np.abs(allowed - wanted)
            kept = int(allowed[np.argmin(distances)])
            order = np.argsort(scores[group.neurons], kind="stable")
            pruned[group.neurons[order[: len(group.neurons) - kept]]] = True
        return pruned

    def _wanted(self, scores: np.ndarray, share: float) -> list[float]:
        """Neurons that every group would keep if its width could be anything."""
        if self._kind == "uniform" or not self._groups:
            return [len(group.neurons) * (1.0 - share) for group in self._groups]
        everything = np.concatenate([scores[group.neurons] for group in self._groups])
        gone = np.zeros(len(everything), bool)
        gone[np.argsort(everything, kind="stable")[: round(share * len(everything))]] = True
        bounds = np.cumsum([len(group.neurons) for group in self._groups])[:-1]
        return [float(np.count_nonzero(~part)) for part in np.split(gone, bounds)]
