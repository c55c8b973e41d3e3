"""Which neurons of a model go, for a fraction of them or for a budget that is to be met."""

from dataclasses import dataclass, replace

import numpy as np

from keras_squeeze import checks
from keras_squeeze.neuron_pruning.neuron_allocation import Allocation, Limits
from keras_squeeze.neuron_pruning.neuron_criteria import automatic_allocation
from keras_squeeze.neuron_pruning.neurons import NeuronGroup, Neurons, Savings

_ROUNDING = 0.02  # of the neurons: where all compete, how many widths allow depends a little on their scores


@dataclass(frozen=True)
class Target:
    """How small the model becomes: a fraction of its neurons, or a budget that it must fit.

    Attributes:
        kind: `"neurons"`, the fraction of the neurons to remove; `"macs"` or `"params"`, the fraction of the
            multiply-accumulates or parameters to keep.
        value: That fraction.
    """

    kind: str
    value: float

    @classmethod
    def make(cls, fraction, target_macs, target_params) -> "Target":
        targets = {"neurons": fraction, "macs": target_macs, "params": target_params}
        targets = {kind: value for kind, value in targets.items() if value is not None}
        if len(targets) != 1:
            raise ValueError(
                "Give one target: a fraction of the neurons to remove, `target_macs` or `target_params`. Received: "
                f"fraction={fraction!r}, target_macs={target_macs!r}, target_params={target_params!r}"
            )
        ((kind, value),) = targets.items()
        if kind == "neurons":
            return cls(kind, checks.fraction("fraction", value))
        if not checks.is_number(value):
            raise TypeError(f"`target_{kind}` must be a number in (0, 1]. Received: {value!r}")
        if not 0.0 < value <= 1.0:
            raise ValueError(f"`target_{kind}` is the fraction to keep, in (0, 1]. Received: target_{kind}={value}")
        return cls(kind, float(value))

    def at(self, progress: float) -> "Target":
        """The target on the way there: 0 is the whole model, 1 the target itself."""
        if self.kind == "neurons":
            return replace(self, value=self.value * progress)
        return replace(self, value=1.0 - (1.0 - self.value) * progress)


class NeuronSelector:
    """Which neurons of one model go for a target."""

    def __init__(self, neurons: Neurons, target: Target, limits: Limits, allocation: str, criterion, data):
        self.neurons = neurons
        self._target, self._criterion, self._data = target, criterion, data
        if allocation == "auto":
            allocation = automatic_allocation(criterion)
        self._allocation = Allocation(neurons.groups, limits, allocation, neurons.count)
        self._savings = Savings(neurons)
        self._whole = self._left(np.zeros(neurons.count, bool))
        self.stuck = [(group.name, _stuck_reason(group, limits)) for group in self._allocation.stuck]
        self._check_reachable()

    @property
    def target_neurons(self) -> float | None:
        """The fraction of the neurons that the target asks to remove; None where it is a budget."""
        return self._target.value if self._target.kind == "neurons" else None

    def select(self, progress: float, scores: np.ndarray | None = None) -> np.ndarray:
        """Boolean per neuron: those that go at this fraction of the way; what is zero already goes first.

        Args:
            progress: 0 is the whole model, 1 the target.
            scores: Those of the criterion, where they are known; one per neuron.

        Raises:
            FloatingPointError: scores are not finite.
        """
        if scores is None:
            scores = self._criterion.scores(self.neurons, self._data)
        bad = [group.name for group in self.neurons.groups if not np.isfinite(scores[group.neurons]).all()]
        if bad:
            raise FloatingPointError(f"NaN or infinite scores of the neurons of {', '.join(bad)}.")
        scores = np.where(self.neurons.dead(), -np.inf, scores)
        target = self._target.at(progress)
        if target.kind == "neurons":
            wanted = target.value * self.neurons.prunable
            return self._allocation.prune(
                scores,
                lambda pruned: bool(np.count_nonzero(pruned) >= wanted),
                nearest=lambda pruned: abs(np.count_nonzero(pruned) - wanted),
            )
        return self._allocation.prune(scores, lambda pruned: self._left(pruned) <= target.value * self._whole)

    def is_met(self, pruned: np.ndarray, progress: float) -> bool:
        """Whether the neurons that are marked are as many as the target asks for at this fraction of the way."""
        as_many = np.count_nonzero(self.select(progress, np.where(pruned, 0.0, 1.0)))
        return bool(np.count_nonzero(pruned) >= as_many - _ROUNDING * self.neurons.prunable)

    def check(self) -> None:
        """Raises what a criterion with data would raise at its first update."""
        if self._criterion.needs_data and self._data is not None:
            self._criterion.scores(self.neurons, self._data)

    def _left(self, pruned: np.ndarray) -> float:
        parameters, macs = self._savings.left(pruned)
        return macs if self._target.kind == "macs" else parameters

    def _check_reachable(self) -> None:
        if len(self.stuck) == len(self.neurons.groups):
            path, reason = self.stuck[0]
            raise ValueError(f"Model '{self.neurons.model.name}': no neuron can be pruned. {path}: {reason}.")
        if self._target.kind == "neurons":
            return
        name = f"target_{self._target.kind}"
        if self._target.kind == "macs" and self._savings.problem:
            raise ValueError(f"`target_macs` needs the MACs, which could not be counted: {self._savings.problem}")
        smallest = self._left(self._allocation.most(np.zeros(self.neurons.count))) / max(self._whole, 1)
        if smallest > self._target.value:
            raise ValueError(
                f"`{name}` cannot be met: the smallest that is reachable is {smallest:.3f}. Received: {name}="
                f"{self._target.value}. Raise it or `max_layer_fraction`, lower `min_neurons` or `round_to`, or select "
                "more layers."
            )


def _stuck_reason(group: NeuronGroup, limits: Limits) -> str:
    if len(group.neurons) == 1:
        return "it has only one that could go, and one stays"
    return f"too narrow for {limits}; a smaller `round_to` prunes it"
