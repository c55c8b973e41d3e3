"""A grid whose step is trained."""

import math
from dataclasses import dataclass, replace

import keras

from keras_squeeze import checks
from keras_squeeze.quantizers import ops
from keras_squeeze.quantizers.uniform_quantizer import Grid, UniformQuantizer, check_per_tensor


@keras.saving.register_keras_serializable(package="keras_squeeze")
@dataclass(frozen=True)
class LearnedStep(UniformQuantizer):
    """A grid whose step is trained with the weights.

    The step begins at `2 * mean|v| / sqrt(high)` of the first tensor; its gradient is that of equation 3, times
    `1 / sqrt(n * high)` for n values. What is kept, and trained, is the logarithm of the step: it stays positive, and
    an optimizer that evens out gradients, such as Adam, moves it in proportion.

    Args:
        num_bits: 2 to 16.
        signed: Whether the grid has negative values. None: weights yes, activations where they can be negative.
        per_channel: One step for each output channel instead of one for all.

    Reference: Esser et al. 2020, https://arxiv.org/abs/1902.08153
    """

    num_bits: int = 4
    signed: bool | None = None
    per_channel: bool = False

    def __post_init__(self):
        super().__post_init__()
        checks.boolean("signed", self.signed, optional=True)
        checks.boolean("per_channel", self.per_channel)

    @property
    def learned(self):
        return True

    def for_weights(self):
        return replace(self, signed=True) if self.signed is None else self

    def for_activations(self, *, signed=True):
        check_per_tensor(self)
        return replace(self, signed=signed) if self.signed is None else self

    def grid(self, state):
        low, high = self._ends
        return Grid(keras.ops.exp(state), 0.0, low, high)

    def __call__(self, x, state=None, channels=(-1,)):
        logarithm = self._state(x, state, channels)
        per_step = keras.ops.cast(keras.ops.size(x), x.dtype) / keras.ops.cast(keras.ops.size(logarithm), x.dtype)
        factor = keras.ops.rsqrt(per_step * self._ends[1])
        return super().__call__(x, ops.scale_gradient(logarithm, factor), channels)

    def measure(self, x, channels=()):
        return keras.ops.log(ops.first_step(x, self._ends[1], channels if self.per_channel else ()))

    def rescaled(self, state, num_bits):
        _, high = ops.integer_range(num_bits, signed=self.signed is not False)
        return state + math.log(self._ends[1] / high)

    @property
    def _ends(self) -> tuple[int, int]:
        return ops.integer_range(self.num_bits, signed=self.signed is not False)
