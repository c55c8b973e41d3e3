"""What prunes the layer of one wrapper: this package's own pruning, by tfmot's steps."""

import contextlib

import keras
import numpy as np

from keras_squeeze.introspection.selection import CompressibleLayer
from keras_squeeze.tfmot_compat.pruning_schedules import course_of
from keras_squeeze.training.fit_run import CompressionCallback
from keras_squeeze.training.mask_constraint import MaskConstraint
from keras_squeeze.weight_pruning.magnitude_pruning import MagnitudePruning
from keras_squeeze.weight_pruning.patterns import NOfM
from keras_squeeze.weight_pruning.weight_groups import WeightGroup

_PRUNING = "_pruned_by_keras_squeeze"


class LayerPruning(MagnitudePruning):
    """Prunes the layer of one wrapper, by the steps that the wrapper counts.

    Args:
        wrapper: The `PruneLowMagnitude`, built.
    """

    def __init__(self, wrapper):
        complete = wrapper.pattern.max_sparsity if isinstance(wrapper.pattern, NOfM) else None
        self.course = course_of(wrapper.pruning_schedule, complete)
        super().__init__(self.course, allocation="uniform", pattern=wrapper.pattern)
        self.wrapper = wrapper
        self.driver: CompressionCallback | None = None  # during `fit`
        self.by_hand = False  # in a training loop of the user's own
        self._shift: int | None = None  # from the steps of a `fit` to those of the wrapper

    @property
    def driven(self) -> bool:
        """Whether somebody says when a step is over."""
        return self.by_hand or self.driver is not None

    def find_groups(self, model):
        weights = tuple(self.wrapper.weights_to_prune())
        return [WeightGroup(self.course, [CompressibleLayer(self.wrapper.name, self.wrapper.layer, weights, ())])]

    def adapt(self, model, optimizer):
        """Leaves updates and batch normalization as they are in tfmot."""

    def attach(self, model, optimizer, total_steps=None):
        attributes = vars(self.wrapper.layer)
        before = attributes.get(_PRUNING)
        if before is not None and before is not self:
            before.detach()  # the layer was wrapped before, whose masks are no longer wanted
        attributes[_PRUNING] = self
        super().attach(model, optimizer)  # all times are steps
        self._shift = None

    def advance(self, step: int) -> None:
        """Does what is due after so many steps of this `fit`."""
        if self._shift is None:
            self._shift = self.steps_done - step
        self.update(step + self._shift)
        self.count(step)

    def count(self, step: int) -> None:
        """Notes that so many steps of this `fit` are done."""
        self.wrapper.pruning_step.assign(step + (self._shift or 0))

    @property
    def steps_done(self) -> int:
        """Steps that the wrapper has been pruned for."""
        return max(int(keras.ops.convert_to_numpy(self.wrapper.pruning_step)), 0)

    def next_in_fit(self) -> int | None:
        """The step of this `fit` at which `advance` has something to do."""
        return None if self.next_update is None else self.next_update - (self._shift or 0)

    @property
    def reached(self):
        return super().reached or (self.started and getattr(self.wrapper.pruning_schedule, "end_step", -1) < 0)

    @property
    def started(self) -> bool:
        """Whether something has been pruned."""
        return any(zeros for zeros, _ in self.progress()["sparsity"].values())

    def mask_of(self, variable) -> np.ndarray:
        """The mask of one of the weights."""
        masks = [c.mask for c in self._constraints() if c.variable is variable]
        return keras.ops.convert_to_numpy(masks[0]) if masks else np.ones(variable.shape, bool)

    def mask_again(self) -> None:
        """Zeroes what is pruned; for loops whose optimizer does not know constraints."""
        for constraint in self._constraints():
            constraint.apply(keras.ops.convert_to_numpy(constraint.mask))

    def note_step(self) -> None:
        """Brings the wrapper's count up to date."""
        run = self.driver._run if self.driver is not None else None
        if run is not None:
            run.catch_up()

    def before_step(self):
        """A context for the forward pass of a training step: in a loop of the user's own, masks change before it."""
        import tensorflow as tf

        if not self.by_hand:
            return contextlib.nullcontext()
        if tf.executing_eagerly():
            self._step_by_hand()
            return contextlib.nullcontext()
        constraints = self._constraints()
        masks = tf.py_function(self._step_by_hand, [], [tf.bool] * len(constraints))
        for constraint, mask in zip(constraints, masks, strict=True):
            constraint.mask.assign(tf.reshape(mask, constraint.mask.shape))  # so that it is read after the change
        return tf.control_dependencies(masks)

    def _step_by_hand(self) -> list:
        self.update(self.steps_done)
        self.wrapper.pruning_step.assign(self.steps_done + 1)
        return [keras.ops.convert_to_tensor(constraint.mask) for constraint in self._constraints()]

    def _constraints(self) -> list[MaskConstraint]:
        return [constraint for group in self._groups for constraint in group.constraints]
