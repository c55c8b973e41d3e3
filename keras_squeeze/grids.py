"""Grids of weights: how many bits values take that are multiples of a scale, known or found out."""

from dataclasses import dataclass

import numpy as np

_MOST_BITS = 8
_TOLERANCE = 1e-4  # of a step; float rounding of `scale * integer` is far below, values off a grid are far above
_SAMPLE = 4096  # values that tell most weights in float at once
_MOST_VALUES = 2**_MOST_BITS


@dataclass(frozen=True, eq=False)
class Grid:
    """What a weight is quantized to.

    Attributes:
        bits: Bits of one integer; 1 for a sign.
        values: The quantized values, in the shape of the weight.
        scales: How many scales there are.
    """

    bits: int
    values: np.ndarray
    scales: int

    @property
    def levels(self) -> int:
        """The largest number of distinct values that share a scale."""
        if self.scales == 1 or self.values.shape[-1] == 0:
            return len(np.unique(self.values))
        channels = self.values.reshape(-1, self.values.shape[-1]).T
        return max(len(np.unique(channel)) for channel in channels)

    @property
    def num_bytes(self) -> int:
        """The integers packed, and a float for each scale."""
        return -(-self.values.size * self.bits // 8) + 4 * self.scales


def find_grid(values: np.ndarray) -> Grid | None:
    """The grid of 1 to 8 bits that float values are on, one for all or one for each entry of an axis; else None.

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
            found = _bits(channel)
            if found is None:
                break
            bits = max(bits, found)
        else:
            return Grid(bits, values, len(channels))
    return None


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
    found = []
    for step in steps:
        integers = magnitudes / step
        if np.abs(integers - np.round(integers)).max() <= _TOLERANCE:
            high = round(largest / step)
            found.append(max(2, high.bit_length() + 1))
    return min((bits for bits in found if bits <= _MOST_BITS), default=None)
