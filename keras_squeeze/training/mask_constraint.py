"""`MaskConstraint`: keeps pruned weights exactly zero, as the constraint of a weight variable.

Every Keras optimizer applies a variable's constraint inside the compiled training step, right after the update.
So the model stays the plain model that the user built, its forward pass costs nothing extra, and a checkpoint
written at any moment holds the zeros.
"""

from collections.abc import Iterable

import keras
import numpy as np

from keras_squeeze.introspection.variables import read


class MaskConstraint(keras.constraints.Constraint):
    """Sets a variable to zero where its mask is False, after the constraint that was there before.

    Where the optimizer averages weights (`use_ema=True`), Keras puts the average into the model for evaluation
    and at the end of `fit`, so the average is masked with it.
    """

    def __init__(self, variable: keras.Variable, average=None, owner: object = None):
        self.variable = variable
        self.inner = variable.constraint
        self.average = average
        self.owner = owner
        self.mask = keras.Variable(np.ones(variable.shape, bool), dtype="bool", trainable=False, name="mask")

    def __call__(self, value):
        if self.average is not None:
            self.average.assign(self._masked(self.average))
        return self._masked(value if self.inner is None else self.inner(value))

    def apply(self, mask: np.ndarray) -> None:
        """Sets the mask and applies it to the variable."""
        self.mask.value.assign(mask)
        for variable in (self.variable, self.average):
            if variable is not None:
                assign_masked(variable, mask)

    def _masked(self, value):
        # Not a product: that would leave -0.0 behind, and NaN where an infinity is pruned.
        return keras.ops.where(self.mask, value, keras.ops.zeros((), value.dtype))


def assign_masked(variable: keras.Variable, mask: np.ndarray) -> None:
    """Sets a variable to zero where a mask is False, without the checks of a Keras assignment, which take longer."""
    values = read(variable)
    bits = values.view(f"u{values.dtype.itemsize}")  # neither NaN nor -0.0 are left behind
    variable.value.assign((bits * mask).view(values.dtype))


def attach_masks(variables: Iterable[keras.Variable], model, optimizer, owner: object) -> list[MaskConstraint]:
    """Attaches a mask, all True, to every variable.

    Args:
        variables: Weights of `model`.
        model: The model, for its distribution strategy.
        optimizer: Its optimizer, for the moving averages; None where nothing trains.
        owner: The run of `fit` that the masks belong to; None in a custom loop. Masks of another run were left
            behind when it was interrupted, and go.
    """
    with model.distribute_strategy.scope():
        averages = _moving_averages(model, optimizer)
        constraints = []
        for variable in variables:
            _drop(variable, lambda constraint: constraint.owner not in (None, owner))
            constraint = MaskConstraint(variable, averages.get(id(variable)), owner)
            variable.constraint = constraint
            constraints.append(constraint)
    return constraints


def detach_masks(constraints: Iterable[MaskConstraint]) -> None:
    """Removes masks and restores the previous constraints."""
    for constraint in constraints:
        _drop(constraint.variable, lambda other, mine=constraint: other is mine)


def _drop(variable: keras.Variable, unwanted) -> None:
    """Removes mask constraints from the chain of a variable's constraints."""
    kept = []
    constraint = variable.constraint
    while isinstance(constraint, MaskConstraint):
        if not unwanted(constraint):
            kept.append(constraint)
        constraint = constraint.inner
    for mask in reversed(kept):
        mask.inner = constraint
        constraint = mask
    variable.constraint = constraint


def _moving_averages(model, optimizer) -> dict[int, keras.Variable]:
    """Returns the optimizer's moving average of each trainable variable, by the variable's id."""
    if optimizer is None:
        return {}
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    several = hasattr(inner, "optimizers")
    if not inner.built and (several or inner.use_ema):
        optimizer.build(model.trainable_variables)
    averages: dict[int, keras.Variable] = {}
    for part in inner.optimizers if several else [inner]:
        if not getattr(part, "use_ema", False) or not part.built:
            continue
        pairs = zip(part._trainable_variables, part._model_variables_moving_average, strict=True)
        averages.update((id(variable), average) for variable, average in pairs if average is not None)
    return averages
