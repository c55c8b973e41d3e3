"""Weights of three values."""

from dataclasses import dataclass

import keras

from keras_squeeze import checks
from keras_squeeze.quantizers import ops
from keras_squeeze.quantizers.quantizer import Quantizer


@keras.saving.register_keras_serializable(package="keras_squeeze")
@dataclass(frozen=True)
class Ternary(Quantizer):
    """-alpha, 0 or +alpha: zero up to `0.7 mean|w|`, alpha the mean magnitude of the others; for weights.

    The gradient is 1.

    Args:
        per_channel: One threshold and one alpha for each output channel instead of one for all.

    Reference: Li & Liu 2016, "Ternary weight networks", https://arxiv.org/abs/1605.04711
    """

    per_channel: bool = True

    def __post_init__(self):
        checks.boolean("per_channel", self.per_channel)

    @property
    def bits(self):
        return 2

    @property
    def keeps_state(self):
        return False

    def __call__(self, x, state=None, channels=(-1,)):
        return ops.ternary(x, channels if self.per_channel else ())

    def integers(self, x, state=None, channels=(-1,)):
        signs, alpha = ops.ternary_parts(x, channels if self.per_channel else ())
        return signs, alpha, keras.ops.zeros(())

    def for_activations(self, *, signed=True):
        raise ValueError('"ternary" is a grid for weights. For activations use an integer grid such as "int2".')
