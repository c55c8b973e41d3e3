"""Fixed point numbers."""

from dataclasses import dataclass

import keras

from keras_squeeze import checks
from keras_squeeze.quantizers import ops
from keras_squeeze.quantizers.uniform_quantizer import MOMENTUM, Grid, UniformQuantizer


@keras.saving.register_keras_serializable(package="keras_squeeze")
@dataclass(frozen=True)
class FixedPoint(UniformQuantizer):
    """Fixed point Qm.n: a sign, m integer bits and n fraction bits; the scale is the power of two `2 ** -n`.

    One scale for the whole tensor, so that rescaling is a shift.

    Args:
        num_bits: 2 to 16, the sign included: `num_bits = 1 + m + n`.
        integer_bits: m; it may be negative, or larger than `num_bits`. None: as few as the values need (dynamic fixed
            point).
    """

    integer_bits: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.integer_bits is None:
            return
        if not checks.is_int(self.integer_bits):
            raise TypeError(f"`integer_bits` must be an int or None. Received: integer_bits={self.integer_bits!r}")
        if abs(self.integer_bits) > 64:
            raise ValueError(f"`integer_bits` must be in [-64, 64]. Received: integer_bits={self.integer_bits}")
        object.__setattr__(self, "integer_bits", int(self.integer_bits))

    @property
    def keeps_state(self):
        return self.integer_bits is None

    def grid(self, state):
        low, high = ops.integer_range(self.num_bits)
        if self.integer_bits is not None:
            return Grid(2.0 ** (self.integer_bits - self.num_bits + 1), 0.0, low, high)
        return Grid(ops.power_of_two_scale(state, high), 0.0, low, high)

    def measure(self, x, channels=()):
        return ops.min_max(x)

    def updated(self, state, new):
        return MOMENTUM * state + (1 - MOMENTUM) * new
