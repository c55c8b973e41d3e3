"""Weight pruning: gradually while a model trains, or in one shot."""

import math
import warnings
from dataclasses import replace

import keras
import numpy as np

from keras_squeeze import checks, schedules
from keras_squeeze.analysis.report import CompressionReport, summarize
from keras_squeeze.introspection.selection import CompressibleWeight, LayerSelector, Selection, select_layers
from keras_squeeze.introspection.variables import read
from keras_squeeze.training.fit_run import CompressionCallback, sum_fractions
from keras_squeeze.training.gradients import GradientWindow, MeanGradients
from keras_squeeze.training.mask_constraint import assign_masked, attach_masks, detach_masks
from keras_squeeze.training.moving_statistics import Change
from keras_squeeze.training.update_cost import TOO_SHORT
from keras_squeeze.weight_pruning.patterns import check_reachable
from keras_squeeze.weight_pruning.weight_groups import (
    PruningMethod,
    WeightGroup,
    divide_by_schedule,
    schedules_by_pattern,
)


class MagnitudePruning(CompressionCallback):
    """Prunes weights gradually while the model trains: the unimportant ones become exactly zero and stay so.

    The model remains the plain Keras model that it was: save it at any time, nothing has to be stripped. `logs`
    gets `sparsity`, the fraction of zeros over all the weights that the callback manages.

    Args:
        schedule: How sparse, and when. A float in [0, 1) is the final sparsity, reached by cubic decay of the
            density at three quarters of the run; or a schedule from `keras_squeeze.schedules` or of
            tensorflow-model-optimization; or `{regular expression: float or schedule}`, where a layer takes the
            first expression that is found in its path, and layers that none matches are left alone.
        layers: Which layers: None for all that can be, a regular expression on the layer's path or a list of
            them, a layer class or tuple of them, a list of layers, or a predicate `layer -> bool`. Frozen layers
            are left alone.
        allocation: How the target is spread. `"auto"`: by shape (`"erk"`), and depthwise kernels stay dense unless
            `layers` or the schedule names layers; the target is the sparsity of what takes part. `"erk"`: denser
            where a weight has few values per input and output (Evci et al. 2020). `"global"`: all weights compete.
            `"uniform"`: every weight has the target. All but `"uniform"` keep in every weight a fifth of the overall
            density, and one value of every output that has more than one, so that no layer dies.
        pattern: Which zeros are allowed: `"unstructured"`, `"n:m"` such as `"2:4"` (at most n of every m
            consecutive inputs stay), or a block shape such as `(1, 4)`.
        criterion: Which weights go first: `"magnitude"`, `"lamp"`, `"random"`, `"movement"`, `"snip"`, or a criterion
            from `keras_squeeze.criteria`. Those that use gradients take them from the training, from the eight batches
            before each update, unless there is `data`.
        data: For gradient criteria: `(x, y)` arrays or a `tf.data.Dataset` of batches to take gradients on instead.

    While masks move, the moving statistics of batch normalization follow with a momentum of at most 0.8; the layers'
    own comes back after the last update (see `keras_squeeze.training.moving_statistics`).

    Raises:
        ValueError, TypeError: an argument outside its range, at once; a model, data or schedule that does not
            fit, before the first batch. The message says what was received and how to mend it.

    Example:

    ```python
    model.fit(x, y, epochs=10, callbacks=[ks.MagnitudePruning(0.9)])
    ```

    Reference: Zhu & Gupta 2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878
    """

    def __init__(
        self,
        schedule,
        *,
        layers: LayerSelector = None,
        allocation: str = "auto",
        pattern="unstructured",
        criterion="magnitude",
        data=None,
    ):
        super().__init__()
        self.schedule = schedules_by_pattern(schedule)
        self.layers = layers
        self.method = PruningMethod.make(allocation, pattern, criterion, data, observes=True)
        for part in self.schedule.values():
            check_reachable(max(part.initial, part.final), self.method.pattern)
        self._groups: list[WeightGroup] = []
        self._left_dense: list[CompressibleWeight] = []
        self._model: keras.Model | None = None
        self._total_steps: int | None = None
        self._diverged = self._costs_too_much = False

    tells_validation = True

    def attach(self, model, optimizer, total_steps=None):
        groups = self.find_groups(model)
        for group in groups:
            group.check(total_steps, self.method)
        self.method.check(model, [weight for group in groups for weight in group.weights])
        self.detach()
        self._model, self._total_steps, self._groups, self._diverged = model, total_steps, groups, False
        for group in groups:
            group.constraints = attach_masks(group.variables, model, optimizer, self._run)
            group.begin(self._observe(model, optimizer, group) if self.method.observes else None, total_steps)
        self.adapt(model, optimizer)

    def find_groups(self, model) -> list[WeightGroup]:
        """The weights of a model that are pruned, in groups with a schedule each."""
        selection, self._left_dense = select_weights(model, self.layers, self.schedule, self.method, True)
        return [WeightGroup(part, chosen) for part, chosen in divide_by_schedule(selection, self.schedule)]

    def adapt(self, model, optimizer) -> None:
        """Fits the number of updates to the run, and lets batch normalization follow them."""
        trainable = [tuple(variable.shape) for variable in model.trainable_variables]
        spread = [group.spread(self._total_steps, trainable, self.method.observes) for group in self._groups]
        self._costs_too_much = not all(spread)
        pruned = [group for group in self._groups if group.prunes]
        changes = [
            Change(*group.schedule.span(self._total_steps), group.schedule.interval(self._total_steps))
            for group in pruned
        ]
        self.follow_statistics(model, optimizer, changes)

    def update(self, step):
        if self._model is None:
            return
        changes = []
        for group in self._groups:
            due = group.due(step, self._total_steps)
            if due is None:
                continue
            try:
                masks = self._choose(group, step, due)
            except FloatingPointError as error:
                if not self._diverged:
                    warnings.warn(f"Not pruned at step {step}: {error} The zeros stay as they were.", stacklevel=2)
                self._diverged = True
                group.skip(due)
            else:
                if masks is not None:
                    changes.append((group, masks, due))
        for group, masks, due in changes:
            group.apply(masks, due)
            if group.schedule(due, self._total_steps):
                self.note_change(due)

    def begin_epoch(self):
        for window in self._windows():
            window.begin_epoch()

    def end_epoch(self):
        for window in self._windows():
            window.end_epoch()

    def detach(self):
        for group in self._groups:
            detach_masks(group.constraints)
            group.constraints = []
        for window in self._windows():
            window.observer.detach()
        self.release_statistics()
        self._model = None

    @property
    def next_update(self):
        steps = [group.next_update(self._total_steps) for group in self._groups]
        return min((step for step in steps if step is not None), default=None)

    @property
    def reached(self):
        return self.next_update is None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all the weights that the callback manages, or has managed last."""
        return sum_fractions(self.progress()["sparsity"])

    def progress(self):
        taking_part = {key: pair for group in self._groups for key, pair in group.zeros.items()}
        if not self._left_dense:
            return {"sparsity": taking_part}
        dense = {id(weight.variable): (0, math.prod(weight.variable.shape)) for weight in self._left_dense}
        return {"sparsity": taking_part, "overall_sparsity": {**taking_part, **dense}}

    def finish(self, step, verbose):
        weights = [weight for group in self._groups for weight in group.weights]
        zeros = sum(math.prod(w.variable.shape) - int(np.count_nonzero(read(w.variable))) for w in weights)
        size = sum(group.size for group in self._groups)
        target = sum(group.target(self._total_steps) * group.size for group in self._groups) / size
        masked = sum(part for part, _ in self.progress()["sparsity"].values())
        if zeros < masked:
            warnings.warn(
                f"Sparsity is {zeros / size:.4f} and not {masked / size:.4f}: another callback put less pruned weights "
                "into the model after the last step. Wrap it: keras_squeeze.AfterTarget(...).",
                stacklevel=2,
            )
        elif not self.reached and not self._diverged:
            warnings.warn(
                f"Training ended at step {step}, before the end of the pruning schedule: sparsity is "
                f"{zeros / size:.4f}, the target {target:.4f}. Train longer, or let the schedule end earlier.",
                stacklevel=2,
            )
        self.warn_of_late_end(step)
        if verbose:
            print(
                f"keras_squeeze: {zeros:,} of {size:,} weights are zero ({zeros / size:.1%}). The saved file shrinks "
                "once it is compressed (gzip, zip, ...); keras_squeeze.summarize(model) shows what is where."
            )
            for note in self._notes(zeros, size):
                print(f"keras_squeeze: {note}")

    def _notes(self, zeros: int, size: int) -> list[str]:
        notes = left_dense_notes(self._left_dense, zeros, size)
        if self.reached and not self._diverged:
            target = sum(group.target(self._total_steps) * group.size for group in self._groups) / size
            masked = sum(part for part, _ in self.progress()["sparsity"].values())
            notes += missed_notes(masked, size, target)
        for group in self._groups:
            notes += floor_notes(group.at_floor(self.method, group.target(self._total_steps)))
        if self._costs_too_much:
            notes.append(TOO_SHORT)
        return notes

    def _choose(self, group: WeightGroup, step: int, due: int) -> list[np.ndarray] | None:
        """The masks of an update; None where it waits for gradients."""
        target = group.schedule(due, self._total_steps)
        if group.window is None:
            return self.method.masks(self._model, group.weights, target)
        if not target:
            return [np.ones(variable.shape, bool) for variable in group.variables]
        kept = group.zeros_kept(target) if step and not group.is_begun else None
        if kept is not None:
            return kept
        if not group.window.is_ready(step):
            group.hold_zeros()
            return None
        if group.window.is_blind:
            raise FloatingPointError(
                f"no gradient reached the optimizer's `apply`, and criterion {self.method.criterion!r} needs some. "
                "Pass data=(x, y); or in a training loop of your own, call `attach` before the training step is traced."
            )
        return self.method.masks(self._model, group.weights, target, group.window.observer.means(group.variables))

    def _observe(self, model, optimizer, group: WeightGroup) -> GradientWindow[MeanGradients]:
        observer = MeanGradients(model, optimizer, group.variables)
        return GradientWindow(observer, self.origin(optimizer), self._run.steps_per_epoch if self._run else None)

    def _windows(self) -> list[GradientWindow[MeanGradients]]:
        return [group.window for group in self._groups if group.window is not None]


def prune_weights(
    model: keras.Model,
    sparsity,
    *,
    layers: LayerSelector = None,
    allocation: str = "auto",
    pattern="unstructured",
    criterion="magnitude",
    data=None,
) -> CompressionReport:
    """Prunes weights in one shot, in place and without training.

    Train on with `KeepSparsity` to win accuracy back, or prune gradually with `MagnitudePruning`, which
    loses less.

    Args:
        model: A built Keras model.
        sparsity: Fraction of zeros, in [0, 1); or `{regular expression: fraction}`.
        layers, allocation, pattern, criterion, data: As in `MagnitudePruning`; frozen layers are pruned, too, and
            criteria that use gradients need `data`.

    Returns:
        The report of the pruned model; `.notes` say what was left dense, and where a floor bound.

    Raises:
        ValueError, TypeError: as in `MagnitudePruning`; the model is then as it was.

    Example:

    ```python
    print(ks.prune_weights(model, 0.5, allocation="global"))
    ```
    """
    by_pattern = isinstance(sparsity, dict)
    parts = schedules_by_pattern(
        {path: _constant(part) for path, part in sparsity.items()} if by_pattern else _constant(sparsity)
    )
    method = PruningMethod.make(allocation, pattern, criterion, data)
    for part in parts.values():
        check_reachable(part.final, method.pattern)
    selection, left_dense = select_weights(model, layers, parts, method, False)
    groups = [WeightGroup(part, chosen) for part, chosen in divide_by_schedule(selection, parts)]
    for group in groups:
        group.check(None, method)
    try:
        masks = [method.masks(model, group.weights, group.schedule.final) for group in groups]
    except FloatingPointError as error:
        raise ValueError(f"Nothing was pruned: {error} Check the values of `data` and the loss.") from None
    for group, group_masks in zip(groups, masks, strict=True):
        for weight, mask in zip(group.weights, group_masks, strict=True):
            assign_masked(weight.variable, mask)
    report = summarize(model)
    zeros = sum(int(np.count_nonzero(~mask)) for group_masks in masks for mask in group_masks)
    size = sum(group.size for group in groups)
    report.notes += left_dense_notes(left_dense, zeros, size)
    report.notes += missed_notes(zeros, size, sum(group.schedule.final * group.size for group in groups) / size)
    report.notes += floor_notes([path for group in groups for path in group.at_floor(method, group.schedule.final)])
    return report


def select_weights(
    model: keras.Model, layers: LayerSelector, parts: dict, method: PruningMethod, trainable_only: bool
) -> tuple[Selection, list[CompressibleWeight]]:
    """The weights to prune, and those that `allocation="auto"` leaves dense: depthwise kernels that nobody named.

    Raises:
        ValueError: nothing is left.
    """
    selection = select_layers(model, layers, trainable_only=trainable_only)
    if selection.unknown:
        warnings.warn(
            f"Model '{model.name}': not pruned, because their classes are not in the layer table: "
            f"{', '.join(selection.unknown)}. keras_squeeze.register_layer adds a class.",
            stacklevel=4,
        )
    if method.allocation != "auto" or layers is not None or None not in parts:
        return selection, []
    left_dense = [weight for weight in selection.weights if weight.depthwise]
    chosen = [
        replace(layer, weights=tuple(weight for weight in layer.weights if not weight.depthwise))
        for layer in selection.layers
    ]
    chosen = [layer for layer in chosen if layer.weights]
    if not chosen:
        raise ValueError(
            f"Model '{model.name}': allocation='auto' leaves depthwise kernels dense, and there is nothing else to "
            f"prune ({', '.join(weight.path for weight in left_dense[:10])}). Name the layers, such as "
            "layers=keras.layers.DepthwiseConv2D, or pass allocation='erk'."
        )
    return replace(selection, layers=tuple(chosen)), left_dense


def left_dense_notes(left_dense: list[CompressibleWeight], zeros: int, size: int) -> list[str]:
    """What to say of weights that `allocation="auto"` left dense."""
    if not left_dense:
        return []
    whole = size + sum(math.prod(weight.variable.shape) for weight in left_dense)
    return [
        f"left dense by allocation='auto': {len(left_dense)} depthwise kernels, so that {zeros / whole:.1%} of all "
        "prunable weights are zero; `layers=` or allocation='erk' takes them in"
    ]


def missed_notes(zeros: int, size: int, target: float) -> list[str]:
    """What to say where a pattern does not let weights have the target."""
    if abs(zeros / size - target) <= 0.01:
        return []
    return [f"the target was {target:.1%}: the pattern and the shapes of the weights allow nothing nearer"]


def floor_notes(paths: list[str]) -> list[str]:
    """What to say of weights that their floor kept from losing more."""
    if not paths:
        return []
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return [f"at the floor of their density, which keeps a layer alive: {', '.join(paths[:5])}{more}"]


def _constant(sparsity) -> schedules.Constant:
    return schedules.Constant(checks.fraction("sparsity", sparsity))
