"""Quantizers: which grid a tensor is rounded to, and how the grid follows from its values.

A quantizer is a small immutable object with a config and without state. What it must remember between steps, a range
of activations or a learned step, is a tensor that `measure` makes and that a `FakeQuantize` layer keeps.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.quantization import ops

RANGES = ("min_max", "moving_average", "percentile", "mse")

_FEWEST_BITS, _MOST_BITS = 2, 16
_MOMENTUM = 0.99  # of ranges that are averaged over batches


class Grid(NamedTuple):
    """The values `scale * (q - zero_point)` for the integers q in [low, high]."""

    scale: Any
    zero_point: Any
    low: int
    high: int


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


@dataclass(frozen=True)
class UniformQuantizer(Quantizer):
    """A quantizer with a grid of evenly spaced values; `num_bits` is 2 to 16."""

    num_bits: int = 8

    def __post_init__(self):
        if isinstance(self.num_bits, np.integer):
            object.__setattr__(self, "num_bits", int(self.num_bits))
        if not isinstance(self.num_bits, int) or isinstance(self.num_bits, bool):
            raise TypeError(f"`num_bits` must be an int. Received: num_bits={self.num_bits!r}")
        if not _FEWEST_BITS <= self.num_bits <= _MOST_BITS:
            raise ValueError(
                f"`num_bits` must be in [{_FEWEST_BITS}, {_MOST_BITS}]. Received: num_bits={self.num_bits}. For one "
                "bit use "
                '"binary", for three values "ternary".'
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


@keras.saving.register_keras_serializable(package="keras_squeeze")
@dataclass(frozen=True)
class Affine(UniformQuantizer):
    """Integers with a real scale: `scale * (q - zero_point)`, the scheme of integer kernels.

    What is left at None is chosen by what is quantized: weights get a symmetric, narrow grid with one scale for each
    output channel, from their least and largest value at every step; activations get one affine grid, from the moving
    average of the least and largest value, which the first batch begins.

    Args:
        num_bits: 2 to 16.
        symmetric: Whether the zero point is zero. Otherwise the grid spans the range, widened to contain zero.
        per_channel: One scale for each output channel instead of one for all.
        narrow_range: Leave the smallest integer out: [-127, 127] for 8 bits.
        range: `"min_max"`: of the weight as it is, or of the last batch; `"moving_average"`: of the least and largest
            value over batches; `"percentile"`: from the 0.1st to the 99.9th; `"mse"`: the part of the range with the
            least squared error (both averaged over batches); or `(low, high)`, fixed.

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877
    """

    symmetric: bool | None = None
    per_channel: bool | None = None
    narrow_range: bool | None = None
    range: Any = None

    def __post_init__(self):
        super().__post_init__()
        _check_bools(self, "symmetric", "per_channel", "narrow_range", optional=True)
        if isinstance(self.range, (list, tuple)):
            object.__setattr__(self, "range", tuple(self.range))
            ends = np.asarray(self.range, "float64") if len(self.range) == 2 else np.array([np.nan])
            if not (np.isfinite(ends).all() and ends[0] <= 0 <= ends[-1] and ends[0] < ends[-1]):
                raise ValueError(
                    "A fixed `range` must be two finite numbers (low, high) that have zero between them. Received: "
                    f"range={self.range!r}"
                )
        elif self.range is not None and self.range not in RANGES:
            raise ValueError(
                f"`range` must be one of {', '.join(map(repr, RANGES))}, or (low, high). Received: range={self.range!r}"
            )

    @property
    def keeps_state(self):
        return not isinstance(self.range, tuple)

    def for_weights(self):
        return self._chosen(symmetric=True, per_channel=True, range="min_max")

    def for_activations(self, *, signed=True):
        _check_per_tensor(self)
        return self._chosen(symmetric=False, per_channel=False, range="moving_average")

    def __call__(self, x, state=None, channels=(-1,)):
        if state is None and self.symmetric is not False and self.range in (None, "min_max"):
            _, high = ops.integer_range(self.num_bits)
            return ops.fake_quantize_whole_range(x, high, channels if self.per_channel is not False else ())
        return super().__call__(x, state, channels)

    def grid(self, state):
        symmetric = self.symmetric is not False  # left open: as for weights
        narrow = symmetric if self.narrow_range is None else self.narrow_range
        low, high = ops.integer_range(self.num_bits, narrow_range=narrow)
        if symmetric:
            return Grid(ops.symmetric_scale(state, high), 0.0, low, high)
        scale, zero_point = ops.affine_grid(state, low, high)
        return Grid(scale, zero_point, low, high)

    def measure(self, x, channels=()):
        channels = channels if self.per_channel is not False else ()
        if isinstance(self.range, tuple):
            return keras.ops.convert_to_tensor(self.range, dtype=x.dtype)
        if self.range == "percentile":
            return ops.percentiles(x, channels)
        if self.range == "mse":
            return ops.least_error_range(x, lambda values, ends: ops.fake_quantize(values, *self.grid(ends)), channels)
        return ops.min_max(x, channels)

    def updated(self, state, new):
        return new if self.range == "min_max" else _MOMENTUM * state + (1 - _MOMENTUM) * new

    def _chosen(self, **choices):
        choices["narrow_range"] = choices["symmetric"] if self.symmetric is None else self.symmetric
        return replace(self, **{name: value for name, value in choices.items() if getattr(self, name) is None})


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
        if self.integer_bits is not None and (
            isinstance(self.integer_bits, bool) or not isinstance(self.integer_bits, int)
        ):
            raise TypeError(f"`integer_bits` must be an int or None. Received: integer_bits={self.integer_bits!r}")
        if self.integer_bits is not None and abs(self.integer_bits) > 64:
            raise ValueError(f"`integer_bits` must be in [-64, 64]. Received: integer_bits={self.integer_bits}")

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
        return _MOMENTUM * state + (1 - _MOMENTUM) * new


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
        _check_bools(self, "signed", optional=True)
        _check_bools(self, "per_channel")

    @property
    def learned(self):
        return True

    def for_weights(self):
        return replace(self, signed=True) if self.signed is None else self

    def for_activations(self, *, signed=True):
        _check_per_tensor(self)
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
        _check_bools(self, "per_channel")

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


@keras.saving.register_keras_serializable(package="keras_squeeze")
@dataclass(frozen=True)
class Binary(Quantizer):
    """One bit: the sign, +1 for zero, with or without a scale.

    | published form | here | as a string |
    |---|---|---|
    | XNOR-Net weights (Binary-Weight-Networks) | `Binary()` | `"binary"` |
    | XNOR-Net, weights and inputs | `Binary(inputs="straight_through")` | `"xnor"` |
    | BinaryConnect, deterministic | `Binary(scaled=False, clip=True)` | `"binary_connect"` |
    | BinaryConnect, stochastic | `Binary(scaled=False, clip=True, stochastic=True)` | |

    Args:
        scaled: Weights: multiply by `mean|W|` of each output channel. Inputs: multiply the outputs by K, the mean of
            `|x|` over the channels and over the window of the kernel.
        stochastic: While training, +1 with probability `clip((w + 1) / 2, 0, 1)`; otherwise the sign. Weights only.
        gradient: `"straight_through"`, `"approx_sign"` or `"swish_sign"`; see `keras_squeeze.quantization.ops.sign`.
        clip: Clip the real weights to [-1, 1] after every update, so that they do not drift to where the gradient is
            zero.
        inputs: The gradient by which the inputs of the layer are binarized as well, or None: they stay as they are.
            Dense layers and convolutions; other layers have only binary weights.

    A network of binary inputs puts them after a batch normalization: batch norm, sign, convolution, pooling. The sign
    of what follows a ReLU would be a constant.

    Reference: Courbariaux et al. 2015, https://arxiv.org/abs/1511.00363; Rastegari et al. 2016,
        https://arxiv.org/abs/1603.05279
    """

    scaled: bool = True
    stochastic: bool = False
    gradient: str = "straight_through"
    clip: bool = False
    inputs: str | None = None

    def __post_init__(self):
        _check_bools(self, "scaled", "stochastic", "clip")
        for name in ("gradient", "inputs"):
            value = getattr(self, name)
            if name != "inputs" or value is not None:
                checks.one_of(name, value, ops.GRADIENTS)
        if self.stochastic and self.gradient != "straight_through":
            raise ValueError(
                f'A stochastic sign has the gradient "straight_through". Received: gradient={self.gradient!r}'
            )

    @property
    def bits(self):
        return 1

    @property
    def has_zero(self):
        return False

    @property
    def keeps_state(self):
        return False

    @property
    def random(self):
        return self.stochastic

    def __call__(self, x, state=None, channels=(-1,), *, uniform=None):
        """`uniform`: random numbers in [0, 1) of the shape of `x`, for a stochastic sign; without them, the sign."""
        if uniform is not None:
            signs = ops.stochastic_sign(x, uniform)
            return ops.mean_magnitude(x, channels) * signs if self.scaled else signs
        if self.scaled:
            return ops.scaled_sign(x, ops.mean_magnitude(x, channels), self.gradient)
        return ops.sign(x, self.gradient)

    def integers(self, x, state=None, channels=(-1,)):
        scale = ops.mean_magnitude(x, channels) if self.scaled else keras.ops.ones(())
        return ops.sign(x), scale, keras.ops.zeros(())

    def for_activations(self, *, signed=True):
        if self.stochastic or self.clip or self.inputs:
            raise ValueError(
                "`stochastic`, `clip` and `inputs` are for weights. Received for activations: "
                f"{self}. Pass Binary(scaled=False) for the sign of the activations."
            )
        return replace(self, scaled=False)


def _check_bools(quantizer, *names: str, optional: bool = False) -> None:
    for name in names:
        value = getattr(quantizer, name)
        if not isinstance(value, bool) and not (optional and value is None):
            raise TypeError(f"`{name}` must be a bool{' or None' if optional else ''}. Received: {name}={value!r}")


def _check_per_tensor(quantizer) -> None:
    if quantizer.per_channel:
        raise ValueError(
            f"Activations have one scale for all channels, since integer kernels sum over them. Received: {quantizer}"
        )


NAMES: Mapping[str, Quantizer] = {
    "int8": Affine(8),
    "int4": Affine(4),
    "int2": Affine(2),
    "fixed8": FixedPoint(8),
    "ternary": Ternary(),
    "binary": Binary(),
    "binary_connect": Binary(scaled=False, clip=True),
    "xnor": Binary(inputs="straight_through"),
}
_NUMBERED = {"int": Affine, "fixed": FixedPoint}


def get(identifier) -> Quantizer | None:
    """A quantizer by its name, itself, or None.

    Args:
        identifier: A quantizer, None, or a string: `"int8"`, `"int4"`, `"int2"`, `"fixed8"` (any number of bits from 2
            to 16 in place of these), `"ternary"`, `"binary"`, `"binary_connect"`, `"xnor"`.

    Raises:
        ValueError: the name is not known.
        TypeError: it is neither.
    """
    if identifier is None or isinstance(identifier, Quantizer):
        return identifier
    if not isinstance(identifier, str):
        raise TypeError(
            "A quantizer must be a name, or an object of `keras_squeeze.quantizers` such as Affine(4), or None. "
            f"Received: {identifier!r}"
        )
    numbered = re.fullmatch(r"(int|fixed)(\d+)", identifier)
    if numbered:
        return _NUMBERED[numbered[1]](int(numbered[2]))
    if identifier not in NAMES:
        raise ValueError(
            f"Unknown quantizer. Received: {identifier!r}. Known: {', '.join(map(repr, NAMES))}; int and fixed take "
            "any "
            "number of bits from 2 to 16."
        )
    return NAMES[identifier]
