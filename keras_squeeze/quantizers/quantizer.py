"""The base class of quantizers.

A quantizer is a small immutable object with a config and without state. What it must remember between steps, a range
of activations or a learned step, is a tensor that `measure` makes and that a `FakeQuantize` layer keeps.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass

import keras
import numpy as np


@dataclass(frozen=True)
class Quantizer(ABC):
    """Base class. Called on a tensor, a quantizer returns it rounded to its grid, with a gradient.

    `state` is what `measure` made of a tensor earlier; without it the tensor itself is measured. `channels` are the
    axes along which every entry has a scale of its own, where the quantizer has one per channel.
    """

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits that an integer of the grid takes."""

    @abstractmethod
    def __call__(self, x, state=None, channels: tuple[int, ...] = (-1,)):
        """`x` on the grid; same shape and type."""

    @abstractmethod
    def integers(self, x, state=None, channels: tuple[int, ...] = (-1,)):
        """`(integers, scale, zero_point)` as tensors."""

    def to_integers(self, weight, state=None, channels: tuple[int, ...] = (-1,)) -> tuple:
        """The integers that a weight becomes, and what they stand for.

        Args:
            weight: Array or tensor of any shape.
            state: What a `FakeQuantize` layer keeps, for learned steps; by default the weight is measured.
            channels: The axes with a scale for each entry, where the quantizer has one per channel.

        Returns:
            `(integers, scale, zero_point)`, NumPy arrays (int32, float32, int32) that broadcast, with
            `scale * (integers - zero_point)` the quantized weight.

        Raises:
            ValueError: the weight has NaN or infinite values.
        """
        weight = np.asarray(keras.ops.convert_to_numpy(weight), "float32")
        if not np.isfinite(weight).all():
            raise ValueError("A weight must be finite to be quantized. Received NaN or infinite values.")
        integers, scale, zero_point = (
            keras.ops.convert_to_numpy(part)
            for part in self.integers(keras.ops.convert_to_tensor(weight), state, channels)
        )
        return integers.astype("int32"), np.asarray(scale, "float32"), np.asarray(zero_point, "int32")

    @property
    def has_zero(self) -> bool:
        """Whether zero is on the grid, so that pruned weights stay pruned."""
        return True

    @property
    def keeps_state(self) -> bool:
        """Whether ranges of activations have to be remembered."""
        return True

    @property
    def learned(self) -> bool:
        """Whether the state is trained."""
        return False

    @property
    def random(self) -> bool:
        """Whether training draws random numbers."""
        return False

    def measure(self, x, channels: tuple[int, ...] = ()):
        """What to remember of a tensor."""
        return None

    def updated(self, state, new):
        """The state after another batch of training."""
        return new

    def widened(self, state, new):
        """The state after another batch of calibration, which counts as much as those before it."""
        return keras.ops.stack([keras.ops.minimum(state[0], new[0]), keras.ops.maximum(state[1], new[1])])

    def for_weights(self) -> "Quantizer":
        """This quantizer, what was left open chosen for weights."""
        return self

    def for_activations(self, *, signed: bool = True) -> "Quantizer":
        """This quantizer, what was left open chosen for activations; `signed`: whether they can be negative."""
        return self

    def get_config(self) -> dict:
        config = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}

    @classmethod
    def from_config(cls, config) -> "Quantizer":
        return cls(**config)
