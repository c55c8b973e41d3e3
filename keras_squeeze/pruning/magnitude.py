"""Weight pruning: gradually while a model trains, or in one shot."""

import math
import warnings

import keras
import numpy as np

from keras_squeeze import schedules
from keras_squeeze.pruning.constraints import attach_masks, detach_masks
from keras_squeeze.pruning.groups import PruningMethod, WeightGroup, divide_by_schedule, schedules_by_pattern
from keras_squeeze.pruning.masks import check_reachable
from keras_squeeze.report import CompressionReport, summarize
from keras_squeeze.selection import Layers, Selection, read, select_layers
from keras_squeeze.training import CompressionCallback, fraction


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
        allocation: `"uniform"` gives every weight matrix the target sparsity, `"global"` lets all compete,
            `"erk"` spreads by shape (Evci et al. 2020).
        pattern: Which zeros are allowed: `"unstructured"`, `"n:m"` such as `"2:4"` (at most n of every m
            consecutive inputs stay), or a block shape such as `(1, 4)`.
        criterion: Which weights go first: `"magnitude"`, `"lamp"`, `"random"`, or with `data` `"movement"` or
            `"snip"`; or a criterion from `keras_squeeze.criteria`.
        data: For gradient criteria: `(x, y)` arrays or a `tf.data.Dataset` of batches.

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
        layers: Layers = None,
        allocation: str = "uniform",
        pattern="unstructured",
        criterion="magnitude",
        data=None,
    ):
        super().__init__()
        self.schedule = schedules_by_pattern(schedule)
        self.layers = layers
        self.method = PruningMethod.make(allocation, pattern, criterion, data)
        for part in self.schedule.values():
            check_reachable(max(part.initial, part.final), self.method.pattern)
        self._groups: list[WeightGroup] = []
        self._model: keras.Model | None = None
        self._total_steps: int | None = None
        self._diverged = False

    def attach(self, model, optimizer, total_steps=None):
        groups = self.find_groups(model)
        for group in groups:
            group.check(total_steps, self.method.pattern)
        self.method.check(model, [weight for group in groups for weight in group.weights])
        self.detach()
        self._model, self._total_steps, self._groups, self._diverged = model, total_steps, groups, False
        for group in groups:
            variables = [weight.variable for weight in group.weights]
            group.constraints = attach_masks(variables, model, optimizer, self._run)

    def find_groups(self, model) -> list[WeightGroup]:
        """The weights of a model that are pruned, in groups with a schedule each."""
        selection = select_layers(model, self.layers, trainable_only=True)
        groups = [WeightGroup(part, chosen) for part, chosen in divide_by_schedule(selection, self.schedule)]
        _warn_of_unknown(model, selection)
        return groups

    def update(self, step):
        if self._model is None:
            return
        changes = []
        for group in self._groups:
            due = group.due(step, self._total_steps)
            if due is None:
                continue
            try:
                masks = self.method.masks(self._model, group.weights, group.schedule(due, self._total_steps))
            except FloatingPointError as error:
                if not self._diverged:
                    warnings.warn(f"Not pruned at step {step}: {error} The zeros stay as they were.", stacklevel=2)
                self._diverged = True
                group.skip(due)
            else:
                changes.append((group, masks, due))
        for group, masks, due in changes:
            group.apply(masks, due)

    def detach(self):
        for group in self._groups:
            detach_masks(group.constraints)
            group.constraints = []
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
        return fraction(self.progress()["sparsity"])

    def progress(self):
        return {"sparsity": {key: pair for group in self._groups for key, pair in group.zeros.items()}}

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
        if verbose:
            print(
                f"keras_squeeze: {zeros:,} of {size:,} weights are zero ({zeros / size:.1%}). The saved file shrinks "
                "once it is compressed (gzip, zip, ...); keras_squeeze.summarize(model) shows what is where."
            )


def prune_weights(
    model: keras.Model,
    sparsity,
    *,
    layers: Layers = None,
    allocation: str = "uniform",
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
        layers, allocation, pattern, criterion, data: As in `MagnitudePruning`; frozen layers are pruned, too.

    Returns:
        The report of the pruned model.

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
    selection = select_layers(model, layers)
    groups = [WeightGroup(part, chosen) for part, chosen in divide_by_schedule(selection, parts)]
    for group in groups:
        group.check(None, method.pattern)
    _warn_of_unknown(model, selection)
    try:
        masks = [method.masks(model, group.weights, group.schedule.final) for group in groups]
    except FloatingPointError as error:
        raise ValueError(f"Nothing was pruned: {error} Check the values of `data` and the loss.") from None
    for group, group_masks in zip(groups, masks, strict=True):
        for weight, mask in zip(group.weights, group_masks, strict=True):
            weight.variable.assign(np.where(mask, read(weight.variable), 0))
    return summarize(model)


def _constant(sparsity) -> schedules.Constant:
    return schedules.Constant(schedules.check_sparsity("sparsity", sparsity))


def _warn_of_unknown(model, selection: Selection) -> None:
    if selection.unknown:
        warnings.warn(
            f"Model '{model.name}': not pruned, because their classes are not in the layer table: "
            f"{', '.join(selection.unknown)}. keras_squeeze.register_layer adds a class.",
            stacklevel=3,
        )
