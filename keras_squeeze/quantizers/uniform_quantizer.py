"""The base class of quantizers with evenly spaced values."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import keras

from keras_squeeze import checks
from keras_squeeze.quantizers import ops
from keras_squeeze.quantizers.quantizer import Quantizer

MOMENTUM = 0.99
"""Momentum of ranges that are averaged over batches."""

_FEWEST_BITS, _MOST_BITS = 2, 16


class Grid(NamedTuple):
    """The values `scale * (q - zero_point)` for the integers q in [low, high]."""

    scale: Any
    zero_point: Any
    low: int
    high: int


@dataclass(frozen=True)
class UniformQuantizer(Quantizer):
    """A quantizer with a grid of evenly spaced values; `num_bits` is 2 to 16."""

    num_bits: int = 8

    def __post_init__(self):
        if not checks.is_int(self.num_bits):
            raise TypeError(f"`num_bits` must be an int. Received: num_bits={self.num_bits!r}")
        object.__setattr__(self, "num_bits", int(self.num_bits))
        if not _FEWEST_BITS <= self.num_bits <= _MOST_BITS:
            raise ValueError(
                f"`num_bits` must be in [{_FEWEST_BITS}, {_MOST_BITS}]. Received: num_bits={self.num_bits}. For one "
                'bit use "binary", for three values "ternary".'
            )

    @property
    def bits(self):
        return self.num_bits

    @abstractmethod
    def grid(self, state) -> Grid:
        """The grid that a state stands for."""

    def __call__(self, x, state=None, channels=(-1,)):
        return ops.fake_quantize(x, *self.grid(self._state(x, state, channels)))

    def integers(self, x, state=None, channels=(-1,)):
        scale, zero_point, low, high = self.grid(self._state(x, state, channels))
        return (
            keras.ops.clip(keras.ops.round(ops.in_steps(x, scale)), low - zero_point, high - zero_point) + zero_point,
            scale,
            zero_point,
        )

    def with_bits(self, num_bits: int) -> "UniformQuantizer":
        """The same quantizer with another number of bits."""
        return replace(self, num_bits=num_bits)

    def rescaled(self, state, num_bits: int):
        """The state for the same quantizer with another number of bits."""
        return state

    def _state(self, x, state, channels):
        return keras.ops.stop_gradient(self.measure(x, channels)) if state is None else state


def check_per_tensor(quantizer) -> None:
    """Raises a `ValueError` for a quantizer with a scale for each channel, which activations cannot have."""
    if quantizer.per_channel:
        raise ValueError(
            f"Activations have one scale for all channels, since integer kernels sum over them. Received: {quantizer}"
        )
