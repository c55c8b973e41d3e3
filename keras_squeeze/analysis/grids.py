"""Grids of weights: how many bits values take that are multiples of a scale, known or found out."""

import math
from dataclasses import dataclass

import numpy as np

_MOST_BITS = 8
_TOLERANCE = 1e-4  # of a step; float rounding of `scale * integer` is far below, values off a grid are far above
_SAMPLE = 4096  # values that tell most weights in float at once
_MOST_VALUES = 2**_MOST_BITS

# For exact integers.
_CHANNEL_AXES = ((), (-1,), (-2,), (-2, -1))
_FEWEST_TO_A_SCALE = 2
_MOST_INTEGER_BITS = 16
_FEW, _NEAR = 64, 0.02  # so many values that are so near to integers: enough to look at the rest
_NEIGHBORS = 2


@dataclass(frozen=True, eq=False)
class Grid:
    """What a weight is quantized to.

    Attributes:
        bits: Bits of one integer; 1 for a sign.
        values: The quantized values, in the shape of the weight.
        scales: How many scales there are.
        input_bits: Bits of what the weight is multiplied with, where the layer quantizes its inputs itself.
    """

    bits: int
    values: np.ndarray
    scales: int
    input_bits: int | None = None

    @property
    def levels(self) -> int:
        """The largest number of distinct values that share a scale."""
        if self.scales == 1 or self.values.shape[-1] == 0:
            return len(np.unique(self.values))
        channels = self.values.reshape(-1, self.values.shape[-1]).T
        return max(len(np.unique(channel)) for channel in channels)


def find_grid(values: np.ndarray) -> Grid | None:
    """The grid of 1 to 16 bits that float values are on, one for all or one for each entry of an axis; else None.

    That is how a model whose wrappers are off still shows its bits. Values count as on a grid where every one of them
    is a whole number of steps, to a ten-thousandth of a step.
    """
    if values.ndim < 2 or not np.isfinite(values).all() or not values.any():
        return None
    for axis in (None, -1, -2):
        if axis is None:
            channels = values.reshape(1, -1)
        else:
            channels = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        if channels.shape[1] < 2 or len(np.unique(channels[0, :_SAMPLE])) > _MOST_VALUES:
            continue
        bits = 1
        for channel in channels:
            channel_bits = _bits(channel)
            if channel_bits is None:
                break
            bits = max(bits, channel_bits)
        else:
            return Grid(bits, values, len(channels))
    return _fine_grid(values)


def _fine_grid(values: np.ndarray) -> Grid | None:
    """The grid of 9 to 16 bits that float32 values are on."""
    exact = find_integers(values) if values.dtype == np.float32 else None
    if exact is None:
        return None
    integers, scales, _ = exact
    return Grid(int(np.abs(integers).max()).bit_length() + 1, values, scales.size)


def _bits(channel: np.ndarray) -> int | None:
    """Bits of the coarsest grid that the values of one scale are on."""
    magnitudes = np.unique(np.abs(channel.astype("float64")))
    largest = magnitudes[-1]
    if largest == 0:
        return 1
    if len(magnitudes) == 1:
        return 1
    if len(magnitudes) > _MOST_VALUES:
        return None
    gaps = np.diff(magnitudes) if magnitudes[0] == 0 else np.diff(magnitudes, prepend=0)
    steps = [float(gaps.min())] + [largest / (2 ** (bits - 1) - 1) for bits in range(2, _MOST_BITS + 1)]
    candidates = []
    for step in steps:
        integers = magnitudes / step
        if np.abs(integers - np.round(integers)).max() <= _TOLERANCE:
            high = round(largest / step)
            candidates.append(max(2, high.bit_length() + 1))
    return min((bits for bits in candidates if bits <= _MOST_BITS), default=None)


def find_integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]] | None:
    """`(integers, scales, axes)` with `float32(integers) * scales` exactly the float32 values; None where none do that.

    The integers take at most 16 bits. The scales broadcast with the values: one for all, or one for every entry of
    `axes` (negative numbers).
    """
    if not values.size or not np.isfinite(values).all():
        return None
    for axes in _CHANNEL_AXES:
        if len(axes) > values.ndim - 1 or (axes and min(axes) < -values.ndim):
            continue
        kept = [axis + values.ndim for axis in axes]
        order = kept + [axis for axis in range(values.ndim) if axis not in kept]
        channels = values.transpose(order).reshape(math.prod(values.shape[axis] for axis in kept), -1)
        if channels.shape[1] < _FEWEST_TO_A_SCALE:
            continue
        scales = _exact_scales(channels)
        if scales is not None:
            scales = scales.reshape([values.shape[axis] if axis in kept else 1 for axis in range(values.ndim)])
            return np.rint(values / scales.astype("float64")).astype("int32"), scales, axes
    return None


def _exact_scales(channels: np.ndarray) -> np.ndarray | None:
    scales = np.ones(len(channels), "float32")
    last = None
    for index, channel in enumerate(channels):
        magnitudes = np.abs(channel[channel != 0])
        if not magnitudes.size:
            continue
        exact = _exact_scale(magnitudes, last)
        if exact is None:
            return None
        scales[index], last = exact
    return scales


def _exact_scale(magnitudes: np.ndarray, first: int | None) -> tuple[np.float32, int] | None:
    """A scale of which all magnitudes are exact multiples, and the multiple that the largest is.

    `first`: the multiple to try first.
    """
    largest = magnitudes.max()
    sample = magnitudes[:_SAMPLE].astype("float64")
    smallest = [round(float(largest) / float(magnitudes.min()))]
    likely = [
        *([first] if first else []),
        *smallest,
        *(2 ** (bits - 1) - 1 for bits in range(2, _MOST_INTEGER_BITS + 1)),
    ]
    distinct = np.unique(sample)
    if 1 < len(distinct) <= _MOST_VALUES:
        likely.append(round(float(largest) / float(np.diff(distinct).min())))
    for high in likely:
        if not 0 < high < 2 ** (_MOST_INTEGER_BITS - 1):
            continue
        near = sample[:_FEW] * (high / float(largest))
        if np.abs(near - np.rint(near)).max() > _NEAR:
            continue
        for scale in _neighbors(np.float32(largest / np.float32(high))):
            integers = np.rint(magnitudes / np.float64(scale)).astype("float32")
            with np.errstate(over="ignore"):
                if np.array_equal(integers * scale, magnitudes):
                    return scale, high
    return None


def _neighbors(scale: np.float32) -> list[np.float32]:
    """A float and those next to it, for the quotient was rounded."""
    scales = [scale]
    for end in (np.float32(np.inf), np.float32(0)):
        other = scale
        for _ in range(_NEIGHBORS):
            other = np.nextafter(other, end)
            scales.append(other)
    return [value for value in scales if value > 0]
