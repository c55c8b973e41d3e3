"""Integers with a real scale."""

from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.quantizers import ops
from keras_squeeze.quantizers.uniform_quantizer import MOMENTUM, Grid, UniformQuantizer, check_per_tensor

RANGES = ("min_max", "moving_average", "percentile", "mse")


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
        for name in ("symmetric", "per_channel", "narrow_range"):
            checks.boolean(name, getattr(self, name), optional=True)
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
        check_per_tensor(self)
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
        return new if self.range == "min_max" else MOMENTUM * state + (1 - MOMENTUM) * new

    def _chosen(self, **choices):
        choices["narrow_range"] = choices["symmetric"] if self.symmetric is None else self.symmetric
        return replace(self, **{name: value for name, value in choices.items() if getattr(self, name) is None})
