"""Neuron pruning: whole neurons become zero, gradually while a model trains or in one shot; `shrink` removes them."""

import math
import warnings

import keras
import numpy as np

from keras_squeeze import checks, schedules
from keras_squeeze.analysis.report import CompressionReport, summarize
from keras_squeeze.data import batches, check_reusable, inputs_only
from keras_squeeze.introspection.functional import require_graph
from keras_squeeze.introspection.selection import LayerSelector, check_finite, select_layers
from keras_squeeze.neuron_pruning import neuron_criteria
from keras_squeeze.neuron_pruning.neuron_allocation import Limits
from keras_squeeze.neuron_pruning.neuron_selection import NeuronSelector, Target
from keras_squeeze.neuron_pruning.neurons import Neurons, Savings, widths
from keras_squeeze.neuron_pruning.shrinking import shrink
from keras_squeeze.reconstruction.compensation import remembering
from keras_squeeze.training.fit_run import CompressionCallback, sum_fractions
from keras_squeeze.training.gradients import BATCHES, GradientWindow, GroupProducts
from keras_squeeze.training.mask_constraint import MaskConstraint, assign_masked, attach_masks, detach_masks
from keras_squeeze.training.moving_statistics import Change
from keras_squeeze.training.update_cost import FEWEST, NEURONS, OBSERVED, TOO_SHORT, affordable_updates

ALLOCATIONS = ("auto", "global", "uniform")
_EXAMPLES = 32  # on which it is measured what an inexact removal changes


class NeuronPruning(CompressionCallback):
    """Prunes whole neurons gradually while the model trains: units, filters, all that belongs to one output.

    A masked neuron is zero in everything that computes it, so `keras_squeeze.shrink` can take it out afterwards: the
    model is then smaller and faster on any hardware. `logs` gets `pruned_neurons`, the fraction of the neurons (that
    can be pruned) which are masked.

    Args:
        schedule: The final fraction of the neurons to remove, in [0, 1), or a schedule from `keras_squeeze.schedules`.
        target_macs: Instead: the fraction of the multiply-accumulates to keep, in (0, 1].
        target_params: Instead: the fraction of the parameters to keep, in (0, 1].
        layers: Which layers, as in `MagnitudePruning`. Neurons that a sum joins go only together, so all the layers
            that compute them must be selected.
        allocation: `"uniform"`: every layer loses the same share; `"global"`: all neurons compete, by scores over the
            mean of their layer; `"auto"`: `"global"` with a criterion that uses gradients, else `"uniform"`.
        criterion: Which neurons go first: `"taylor"`, `"l2"`, `"l1"`, `"batch_norm_scale"`, `"geometric_median"`,
            `"random"`, or with `data` `"apoz"`, `"mean_activation"`. `"auto"` is `"taylor"`: from the gradients
            that the optimizer gets, in the eight batches before each update, unless there is `data`.
        data: For criteria that look at data: `(x, y)` arrays or a `tf.data.Dataset` of batches.
        round_to: Widths end at multiples of it, which runtimes compute faster, or stay as they are; 1 = any width.
        min_neurons: Neurons that every layer keeps.
        max_layer_fraction: The largest fraction of a layer's neurons that goes, in (0, 1].
        allow_inexact: Prune neurons in front of a `LayerNormalization`, too. Its statistics change when
            `shrink(model, allow_inexact=True)` removes them, so that the shrunk model predicts something else than the
            masked one: fine-tune it.

    Raises:
        ValueError, TypeError: an argument outside its range, at once; a model, data or budget that does not fit,
            before the first batch. The message says what was received and how to mend it.

    Example:

    ```python
    model.fit(x, y, epochs=10, callbacks=[ks.NeuronPruning(0.5)])
    small = ks.shrink(model)
    ```
    """

    def __init__(
        self,
        schedule=None,
        *,
        target_macs: float | None = None,
        target_params: float | None = None,
        layers: LayerSelector = None,
        allocation: str = "auto",
        criterion="auto",
        data=None,
        round_to: int = 8,
        min_neurons: int = 1,
        max_layer_fraction: float = 0.9,
        allow_inexact: bool = False,
    ):
        super().__init__()
        self.schedule = schedules.get(0.5 if schedule is None else schedule)
        self.target = Target.make(None if schedule is None else self.schedule.final, target_macs, target_params)
        self.layers = layers
        self.limits = Limits(round_to, min_neurons, max_layer_fraction)
        self.allocation = checks.one_of("allocation", allocation, ALLOCATIONS)
        self.criterion = neuron_criteria.get(criterion)
        self.data = data
        _check_data(self.criterion, data, observes=True)
        self.allow_inexact = allow_inexact
        self._selector: NeuronSelector | None = None
        self._constraints: dict[int, MaskConstraint] = {}
        self._window: GradientWindow[GroupProducts] | None = None
        self._pruned = np.zeros(0, bool)
        self._course = self.schedule  # with the updates of this run
        self._total_steps: int | None = None
        self._done = -1
        self._attached = self._diverged = self._costs_too_much = False

    tells_validation = True

    def attach(self, model, optimizer, total_steps=None):
        neurons = _neurons(model, self.layers, self.allow_inexact, trainable_only=True)
        selector = NeuronSelector(neurons, self.target, self.limits, self.allocation, self.criterion, self.data)
        schedules.check_fires(self.schedule, total_steps)
        _warn_of_frozen(model, neurons)
        selector.check()
        self.detach()
        self._selector, self._total_steps = selector, total_steps
        self._done, self._diverged, self._attached = -1, False, True
        self._pruned = np.zeros(neurons.count, bool)
        masked = {id(v): v for v, _ in neurons.masks(self._pruned) if v.trainable}
        attached = attach_masks(masked.values(), model, optimizer, self._run)
        self._constraints = dict(zip(masked, attached, strict=True))
        self._adapt(model, neurons)
        if isinstance(self.criterion, neuron_criteria.GradientNeuronCriterion) and self.data is None:
            steps_per_epoch = self._run.steps_per_epoch if self._run else None
            observer = self.criterion.observe(neurons, optimizer)
            self._window = GradientWindow(observer, self.origin(optimizer), steps_per_epoch)
            self._window.open_before(self.next_update, None)
        prunes = max(self.schedule.initial, self.schedule.final) > 0
        change = Change(*self._course.span(total_steps), self._course.interval(total_steps))
        self.follow_statistics(model, optimizer, [change] if prunes else [])

    def update(self, step):
        if self._selector is None or not self._attached:
            return
        due = self._course.last_update(step, self._total_steps)
        if due is None or due <= self._done:
            return
        try:
            pruned = self._choose(step, due)
        except FloatingPointError as error:
            if not self._diverged:
                warnings.warn(f"Not pruned at step {step}: {error} The zeros stay as they were.", stacklevel=2)
            self._diverged, pruned = True, self._pruned
        if pruned is None:  # it waits for gradients
            return
        self._done = due
        self._mask(pruned)
        if pruned.any():
            self.note_change(due)
        if self._window is not None:
            self._window.open_before(self.next_update, due)

    def begin_epoch(self):
        if self._window is not None:
            self._window.begin_epoch()

    def end_epoch(self):
        if self._window is not None:
            self._window.end_epoch()

    def detach(self):
        detach_masks(self._constraints.values())
        if self._window is not None:
            self._window.observer.detach()
            self._window = None
        self.release_statistics()
        self._constraints, self._attached = {}, False

    @property
    def next_update(self):
        return self._course.next_update(self._done, self._total_steps) if self._selector else None

    @property
    def reached(self):
        return self.next_update is None

    @property
    def pruned_neurons(self) -> float:
        """Fraction of the neurons that are masked, of those that the callback manages or has managed last."""
        return sum_fractions(self.progress()["pruned_neurons"])

    def progress(self):
        groups = self._selector.neurons.groups if self._selector else []
        parts = {group.paths: (int(self._pruned[group.neurons].sum()), len(group.neurons)) for group in groups}
        return {"pruned_neurons": parts}

    def finish(self, step, verbose):
        assert self._selector is not None  # `fit` has begun
        pruned, whole = int(np.count_nonzero(self._pruned)), self._selector.neurons.prunable
        if self._diverged:
            pass  # said already
        elif np.count_nonzero(self._selector.neurons.dead() & self._pruned) < pruned:
            warnings.warn(
                "Neurons that were pruned are not zero: another callback put less pruned weights into the model after "
                "the last step. Wrap it: keras_squeeze.AfterTarget(...).",
                stacklevel=2,
            )
        elif not self.reached:
            warnings.warn(
                f"Training ended at step {step}, before the end of the pruning schedule: {pruned:,} of {whole:,} "
                "neurons are pruned. Train longer, or let the schedule end earlier.",
                stacklevel=2,
            )
        self.warn_of_late_end(step)
        if verbose:
            print(
                f"keras_squeeze: {pruned:,} of {whole:,} neurons are zero ({pruned / whole:.1%}), by criterion "
                f"{neuron_criteria.name_of(self.criterion)!r}. keras_squeeze.shrink(model) takes them out."
            )
            wanted = self._selector.target_neurons
            if self.reached and wanted is not None and abs(pruned / whole - wanted) > 0.01:
                print(f"keras_squeeze: the target was {wanted:.1%}: {self.limits} allow nothing nearer")
            if self._costs_too_much:
                print(f"keras_squeeze: {TOO_SHORT}")

    def _adapt(self, model, neurons: Neurons) -> None:
        """Gives the schedule as many updates as the run can pay for."""
        self._course, self._costs_too_much = self.schedule, False
        if self.schedule.frequency is not None:
            return
        begin, end = self.schedule.span(self._total_steps)
        trainable = [tuple(variable.shape) for variable in model.trainable_variables]
        sizes = [math.prod(slices.variable.shape) for slices in neurons.entries()]
        cost = NEURONS.of(sizes) + (BATCHES * OBSERVED.of(sizes) if self.data is None else 0.0)
        affordable = affordable_updates(self._total_steps or end, trainable, cost)
        self._course = self.schedule.with_updates(max(affordable, FEWEST))
        self._costs_too_much = affordable < min(FEWEST, end - begin)

    def _choose(self, step: int, due: int) -> np.ndarray | None:
        """The neurons that go at an update; None where it waits for gradients."""
        selector = self._selector
        assert selector is not None
        final = self._course.final
        progress = self._course(due, self._total_steps) / final if final else 1.0
        if self._window is None:
            return selector.select(progress)
        if not progress:
            return np.zeros(selector.neurons.count, bool)
        if self._done < 0:  # the run may be one that is resumed
            dead = selector.neurons.dead_prunable()
            if step and selector.is_met(dead, progress):
                return dead
            if dead.any():
                _apply(selector.neurons, dead, self._constraints)
        if not self._window.is_ready(step):
            return None
        if self._window.is_blind:
            raise FloatingPointError(
                "no gradient reached the optimizer's `apply`. Pass data=(x, y) or a criterion that needs none, such as "
                f"criterion={neuron_criteria.name_of(neuron_criteria.BEST_WITHOUT_DATA())!r}; or in a training loop of "
                "your own, call `attach` before the training step is traced."
            )
        return selector.select(progress, self._window.observer.values())

    def _mask(self, pruned: np.ndarray) -> None:
        assert self._selector is not None
        self._pruned = pruned
        _apply(self._selector.neurons, pruned, self._constraints)


def prune_neurons(
    model: keras.Model,
    fraction: float | None = None,
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    layers: LayerSelector = None,
    allocation: str = "auto",
    criterion="auto",
    data=None,
    round_to: int = 8,
    min_neurons: int = 1,
    max_layer_fraction: float = 0.9,
    allow_inexact: bool = False,
) -> CompressionReport:
    """Prunes whole neurons in one shot, in place and without training; `shrink` then removes them.

    Train on to win accuracy back, or prune gradually with `NeuronPruning`, which loses less.

    Args:
        model: A built Functional or Sequential model.
        fraction: Fraction of the neurons to remove, in [0, 1).
        target_macs, target_params: Instead: the fraction of the MACs or parameters to keep, in (0, 1].
        layers, allocation, criterion, data, round_to, min_neurons, max_layer_fraction, allow_inexact: As in
            `NeuronPruning`; frozen layers are pruned, too. `criterion="auto"` is `"taylor"` for a compiled model and
            `data=(x, y)`, else the best that needs no data; the report names it.

    Returns:
        The report of the masked model: `.widths`, the channels of each layer before and after; `.frozen`, the layers
        whose neurons could not be pruned, and why; `.notes`, what `shrink` will save.

    Raises:
        ValueError, TypeError: as in `NeuronPruning`; the model is then as it was.

    Example:

    ```python
    print(ks.prune_neurons(model, target_macs=0.5))
    small = ks.shrink(model)
    ```
    """
    target = Target.make(fraction, target_macs, target_params)
    limits = Limits(round_to, min_neurons, max_layer_fraction)
    allocation = checks.one_of("allocation", allocation, ALLOCATIONS)
    criterion = neuron_criteria.automatic(model, data) if criterion == "auto" else neuron_criteria.get(criterion)
    _check_data(criterion, data)
    neurons = _neurons(model, layers, allow_inexact)
    selector = NeuronSelector(neurons, target, limits, allocation, criterion, data)
    try:
        pruned = selector.select(1.0)
    except FloatingPointError as error:
        raise ValueError(f"Nothing was pruned: {error} Check the weights, `data` and the loss.") from None
    with remembering(model, neurons.masks(pruned)):
        _apply(neurons, pruned, {})
    report = _report(neurons, pruned)
    report.notes.append(f"criterion: {neuron_criteria.name_of(criterion)}")
    if neurons.graph.inexact_layers:
        report.notes.append(f"{_inexact(neurons)}; {_measured_change(model, data)}")
    report.frozen += selector.stuck
    gone = np.count_nonzero(pruned) / neurons.prunable
    if target.kind == "neurons" and abs(gone - target.value) > 0.01:
        report.notes.append(
            f"{gone:.1%} of the neurons are pruned and not {target.value:.1%}: {limits} allow nothing nearer"
        )
    return report


def _neurons(model, layers, allow_inexact, trainable_only=False) -> Neurons:
    neurons = Neurons(model, layers, inexact=allow_inexact, trainable_only=trainable_only)
    check_finite(select_layers(model, layers, trainable_only=trainable_only).weights)
    if not neurons.groups:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in neurons.frozen[:10])
        raise ValueError(f"Model '{model.name}' has no neuron that can be pruned. {reasons}.")
    return neurons


def _apply(neurons: Neurons, pruned: np.ndarray, constraints: dict[int, MaskConstraint]) -> None:
    """Makes everything zero that computes these neurons."""
    for variable, mask in neurons.masks(pruned):
        constraint = constraints.get(id(variable))
        if constraint is None:
            assign_masked(variable, mask)
        else:
            constraint.apply(mask)


def _report(neurons: Neurons, pruned: np.ndarray) -> CompressionReport:
    report = summarize(neurons.model)
    savings = Savings(neurons)
    (parameters, macs), (parameters_left, macs_left) = savings.left(np.zeros_like(pruned)), savings.left(pruned)
    call = "shrink(model, allow_inexact=True)" if neurons.graph.inexact_layers else "shrink(model)"
    note = f"{call} will leave {parameters_left:,} of {parameters:,} parameters"
    report.notes.append(f"{note} and {macs_left:,} of {macs:,} MACs" if macs else note)
    report.frozen = list(neurons.frozen)
    report.widths = widths(neurons.groups, pruned)
    return report


def _inexact(neurons: Neurons) -> str:
    return f"inexact when shrunk: {', '.join(dict.fromkeys(neurons.graph.inexact_layers))}"


def _measured_change(model: keras.Model, data) -> str:
    """What leaving statistics to fewer channels does to the predictions."""
    small = shrink(model, allow_inexact=True)
    try:
        if data is None:
            source, x = "random inputs", _random_inputs(model)
        else:
            source, (x, _, _) = "data", next(batches(inputs_only(model, data), 1, _EXAMPLES))
        before, after = (map(np.asarray, keras.tree.flatten(each(x, training=False))) for each in (model, small))
    except Exception as problem:  # random inputs need not be what the model takes
        reason = str(problem).strip().splitlines()[0]
        return f"by how much predictions then change could not be measured ({reason}): pass data=(x, y)"
    change = max(np.abs(one - other).max() / np.abs(one).max() for one, other in zip(before, after, strict=True))
    return f"predictions then change by up to {change:.2g} of the largest, on {source}"


def _random_inputs(model: keras.Model):
    rng = np.random.default_rng(0)
    shapes = [(_EXAMPLES, *(size or _EXAMPLES for size in tensor.shape[1:])) for tensor in model.inputs]
    arrays = [rng.normal(size=shape).astype(x.dtype) for shape, x in zip(shapes, model.inputs, strict=True)]
    return keras.tree.pack_sequence_as(require_graph(model, "")._inputs_struct, arrays)


def _warn_of_frozen(model, neurons: Neurons) -> None:
    without = [(path, reason) for path, reason in neurons.frozen if "has no channel rule" in reason]
    if without:
        warnings.warn(
            f"Model '{model.name}': neurons that stay: {'; '.join(f'{path}: {why}' for path, why in without[:5])}. "
            "keras_squeeze.register_channel_rule teaches a layer.",
            stacklevel=3,
        )


def _check_data(criterion, data, *, observes: bool = False) -> None:
    """Raises where a criterion lacks its data; with `observes`, gradients may come from the training."""
    is_observable = isinstance(criterion, neuron_criteria.GradientNeuronCriterion)
    if criterion.needs_data and data is None and not (observes and is_observable):
        raise ValueError(
            f"Criterion {criterion!r} needs `data`: pass data=(x, y) or a dataset of batches. Received: data=None"
        )
    check_reusable(data)
