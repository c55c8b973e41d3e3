"""Holding the zeros of a pruned model while it trains on."""

import numpy as np

from keras_squeeze.introspection.selection import LayerSelector, check_finite, select_layers
from keras_squeeze.introspection.variables import read
from keras_squeeze.training.fit_run import CompressionCallback
from keras_squeeze.training.mask_constraint import MaskConstraint, attach_masks, detach_masks


class KeepSparsity(CompressionCallback):
    """Holds the zeros that are in a model while it trains on: fine-tuning, or quantizing a pruned model.

    The zeros are found when `fit` begins. A weight that is zero altogether (a zero-initialized kernel) is left
    to train.

    Args:
        layers: Which layers, as in `MagnitudePruning`.

    Raises:
        ValueError: before the first batch, where the selected weights have no zeros to keep.

    Example:

    ```python
    model.fit(x, y, epochs=2, callbacks=[ks.KeepSparsity()])
    ```
    """

    def __init__(self, layers: LayerSelector = None):
        super().__init__()
        self.layers = layers
        self._constraints: list[MaskConstraint] = []
        self._zeros: dict[int, tuple[int, int]] = {}

    def attach(self, model, optimizer, total_steps=None):
        weights = select_layers(model, self.layers, trainable_only=True).weights
        check_finite(weights)
        masks = [read(weight.variable) != 0 for weight in weights]
        sparse = [(w, mask) for w, mask in zip(weights, masks, strict=True) if mask.any() and not mask.all()]
        if not sparse:
            raise ValueError(
                f"Model '{model.name}' has no zeros to keep in the selected weights. Prune it first "
                "(keras_squeeze.MagnitudePruning), or load the pruned weights before `fit`."
            )
        self.detach()
        self._constraints = attach_masks([w.variable for w, _ in sparse], model, optimizer, self._run)
        for constraint, (_, mask) in zip(self._constraints, sparse, strict=True):
            constraint.apply(mask)
        self._zeros = {id(weight.variable): (0, mask.size) for weight, mask in zip(weights, masks, strict=True)}
        for weight, mask in sparse:
            self._zeros[id(weight.variable)] = mask.size - int(np.count_nonzero(mask)), mask.size

    def update(self, step):
        """The zeros are those that were there at `attach`."""

    def detach(self):
        detach_masks(self._constraints)
        self._constraints = []

    @property
    def next_update(self):
        return None

    @property
    def reached(self):
        return True

    def progress(self):
        return {"sparsity": self._zeros}
