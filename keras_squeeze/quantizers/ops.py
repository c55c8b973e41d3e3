"""Pure functions of tensors: grids of n bits, signs, and the gradients that go straight through them.

Every function here is made of `keras.ops`, works on tensors and arrays alike and computes in the type that it is given;
callers give float32. A forward value that has no useful derivative is written `value + (f - stop_gradient(f))`: exactly
`value`, with the gradient of `f`; or, where f is the tensor itself, `straight_through(value, x)`, which costs nothing.
"""

from keras import ops

GRADIENTS = ("straight_through", "approx_sign", "swish_sign")

_SWISH_SLOPE = 5.0
_TERNARY_THRESHOLD = 0.7
_LARGEST_EXPONENT = 126
_POWERS_OF_TWO = [2.0**exponent for exponent in range(-_LARGEST_EXPONENT, _LARGEST_EXPONENT + 1)]
_SEARCHED_SHARES = [step / 40 for step in range(40, 7, -1)]  # of the range, for the least squared error

# The value that a scale was made from must not fall off the end of the grid by float rounding, and lose its gradient.
_SLACK = 1 + 2.5e-7
_SMALLEST_SCALE = 1e-37
_ROWS = 16


def straight_through(value, x):
    """`value`, with a gradient of 1 for `x` (Bengio et al. 2013) and none for `value`."""
    return ops.custom_gradient(lambda x, value: (value, lambda upstream: (upstream, None)))(x, value)


def round_through(x):
    """Rounds to the nearest integer, ties to even; the gradient is 1."""
    return straight_through(ops.round(x), x)


def in_steps(x, scale):
    """How many steps of a grid `x` is away from zero, not rounded.

    The product with the reciprocal is faster than a quotient; all that rounds to a grid must use the same.
    """
    return x * (1 / scale)


def integer_range(num_bits: int, *, signed: bool = True, narrow_range: bool = False) -> tuple[int, int]:
    """The smallest and the largest integer of a grid; a narrow range leaves the smallest out: [-127, 127]."""
    low, high = (-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1) if signed else (0, 2**num_bits - 1)
    return low + int(narrow_range), high


def fake_quantize(x, scale, zero_point, low: int, high: int):
    """Rounds to the grid `scale * (q - zero_point)`, `q` an integer in [low, high], and stays in float.

    The gradient for `x` is 1 where `x` is within the grid's ends and 0 beyond. For the scale it is that of a learned
    step: `q - x / scale` (`q` without the zero point) within, the end of the grid beyond (Esser et al. 2020, equation
    3); stop it where the scale follows from the data.

    Args:
        x: Tensor.
        scale: Positive tensor that broadcasts with `x`.
        zero_point: Integer-valued tensor or number that broadcasts with `x`; zero is then exactly on the grid.
        low, high: The ends of the grid.
    """
    levels = ops.clip(in_steps(x, scale), (low - zero_point) * _SLACK, (high - zero_point) * _SLACK)
    return round_through(levels) * scale


def fake_quantize_whole_range(x, high: int, channels: tuple[int, ...] = ()):
    """Rounds to the symmetric grid on which the largest magnitude of every channel is `high`.

    The same as `fake_quantize` with the scale of `min_max`, in fewer passes over the tensor: no value is beyond the
    ends, so nothing is clipped and the gradient is 1 everywhere.
    """
    still = ops.stop_gradient(x)
    scale = _nonzero(largest_magnitude(still, channels) / high)
    return straight_through(ops.round(in_steps(still, scale)) * scale, x)


def reduced_axes(x, channels: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that a statistic runs over, so that one value is left for every channel."""
    kept = {axis % x.ndim for axis in channels} if channels else set()
    return tuple(axis for axis in range(x.ndim) if axis not in kept)


def largest_magnitude(x, channels: tuple[int, ...] = ()):
    """The largest `|x|` of every channel, as a shape that broadcasts with x; without channels a scalar.

    Of a large matrix the rows are reduced in two steps: TensorFlow's maximum of columns is faster over fewer of them.
    """
    magnitudes, axes = ops.abs(x), reduced_axes(x, channels)
    if x.ndim == 2 and axes == (0,) and x.shape[0] and x.shape[0] % _ROWS == 0:
        magnitudes = ops.max(ops.reshape(magnitudes, (_ROWS, -1, x.shape[1])), axis=0)
    return ops.max(magnitudes, axis=axes, keepdims=bool(channels))


def min_max(x, channels: tuple[int, ...] = ()):
    """The least and the largest value, stacked along a new first axis: (2,), or (2, *shape that broadcasts with x)."""
    axes, keepdims = reduced_axes(x, channels), bool(channels)
    return ops.stack([ops.min(x, axis=axes, keepdims=keepdims), ops.max(x, axis=axes, keepdims=keepdims)])


def percentiles(x, channels: tuple[int, ...] = (), percentile: float = 99.9):
    """Like `min_max`, without the most extreme values on either side."""
    axes = reduced_axes(x, channels)
    last = ops.transpose(x, [axis for axis in range(x.ndim) if axis not in axes] + list(axes))
    kept = [x.shape[axis] for axis in range(x.ndim) if axis not in axes]
    flat = ops.reshape(last, [*kept, -1])
    ends = ops.quantile(flat, [1 - percentile / 100, percentile / 100], axis=-1)
    return (
        ops.reshape(ends, (2, *(1 if axis in axes else x.shape[axis] for axis in range(x.ndim)))) if channels else ends
    )


def least_error_range(x, quantize, channels: tuple[int, ...] = ()):
    """The part of the range of `x` on whose grid the squared error is least, in 33 steps from all to a fifth of it.

    Args:
        x: Tensor.
        quantize: Function `(x, range) -> x on the grid of that range`.
        channels: As in `min_max`.
    """
    whole = min_max(x, channels)
    axes = reduced_axes(x, channels)
    errors = [
        ops.mean(ops.square(quantize(x, share * whole) - x), axis=axes, keepdims=bool(channels))
        for share in _SEARCHED_SHARES
    ]
    best = ops.argmin(ops.stack(errors), axis=0)  # the widest, where two are as good
    return ops.take(ops.convert_to_tensor(_SEARCHED_SHARES, dtype=x.dtype), best) * whole


def symmetric_scale(ends, high: int):
    """The scale of a grid whose zero point is zero: the larger end of the range falls on `high`."""
    return _nonzero(ops.max(ops.abs(ends), axis=0) / high)


def affine_grid(ends, low: int, high: int):
    """`(scale, zero_point)` of a grid that spans a range widened to contain zero (Jacob et al. 2018, section 3)."""
    least, largest = ops.minimum(ends[0], 0.0), ops.maximum(ends[1], 0.0)
    scale = _nonzero((largest - least) / (high - low))
    return scale, ops.clip(ops.round(low - least / scale), low, high)


def power_of_two_scale(ends, high: int):
    """The smallest power of two whose grid reaches the larger end of the range."""
    needed = symmetric_scale(ends, high)
    exponent = ops.clip(ops.ceil(ops.log2(needed)), 1 - _LARGEST_EXPONENT, _LARGEST_EXPONENT)
    exponent = ops.where(ops.isfinite(exponent), exponent, ops.zeros_like(exponent))
    index = ops.cast(exponent, "int32") + _LARGEST_EXPONENT
    powers = ops.convert_to_tensor(_POWERS_OF_TWO, dtype=ends.dtype)
    smaller = ops.take(powers, index - 1)  # the logarithm is not exact
    return ops.where(smaller >= needed, smaller, ops.take(powers, index))


def first_step(x, high: int, channels: tuple[int, ...] = ()):
    """Where a learned step begins: `2 * mean|x| / sqrt(high)` (Esser et al. 2020, section 2.1)."""
    magnitude = ops.mean(ops.abs(x), axis=reduced_axes(x, channels), keepdims=bool(channels))
    return _nonzero(2 * magnitude / high**0.5)


def scale_gradient(x, factor: float):
    """`x` itself; its gradient is multiplied by `factor`."""
    return ops.stop_gradient(x) + factor * (x - ops.stop_gradient(x))


def sign(x, gradient: str = "straight_through"):
    """-1 or +1, and +1 for zero.

    Args:
        x: Tensor.
        gradient: What takes the place of a derivative that is zero. `"straight_through"`: 1 for |x| <= 1, else 0
            (Courbariaux et al. 2016). `"approx_sign"`: 2 - 2|x| for |x| < 1, else 0 (Bi-Real Net, Liu et al. 2018).
            `"swish_sign"`: b * (2 - b * x * tanh(b * x / 2)) / (1 + cosh(b * x)) with b = 5 (Darabi et al. 2018).
    """
    near = ops.clip(x, -1.0, 1.0)
    if gradient == "straight_through":
        smooth = near
    elif gradient == "approx_sign":
        smooth = near * (2 - ops.abs(near))
    else:
        slope = _SWISH_SLOPE * x
        smooth = 2 * ops.sigmoid(slope) * (1 + slope * (1 - ops.sigmoid(slope))) - 1
    ones = ops.ones_like(x)
    return ops.where(x >= 0, ones, -ones) + (smooth - ops.stop_gradient(smooth))


def stochastic_sign(x, uniform):
    """+1 with probability `clip((x + 1) / 2, 0, 1)`, else -1 (Courbariaux et al. 2015, equation 2).

    The gradient is 1 for |x| <= 1, else 0. `uniform` are random numbers in [0, 1), of the shape of `x`.
    """
    near = ops.clip(x, -1.0, 1.0)
    ones = ops.ones_like(x)
    return ops.where(uniform < (near + 1) / 2, ones, -ones) + (near - ops.stop_gradient(near))


def mean_magnitude(x, channels: tuple[int, ...] = ()):
    """`mean|x|` of every channel, as a shape that broadcasts with `x`; without a gradient."""
    return ops.stop_gradient(ops.mean(ops.abs(x), axis=reduced_axes(x, channels), keepdims=True))


def scaled_sign(x, alpha, gradient: str = "straight_through"):
    """`alpha * sign(x)`, with the gradient of XNOR-Net: `1 / n + alpha * d sign(x)`, `n` values to an alpha.

    Reference: Rastegari et al. 2016, section 3.1.
    """
    count = _size(x) / _size(alpha)
    return alpha * sign(x, gradient) + (x - ops.stop_gradient(x)) / count


def ternary_parts(x, channels: tuple[int, ...] = ()):
    """`(signs, alpha)`: signs are -1, 0 or +1, zero up to 0.7 mean|x|; alpha is mean|x| over the others.

    Reference: Li & Liu 2016, equations 5 and 6. Neither has a gradient.
    """
    axes = reduced_axes(x, channels)
    magnitude = ops.abs(x)
    large = ops.cast(magnitude > _TERNARY_THRESHOLD * ops.mean(magnitude, axis=axes, keepdims=True), x.dtype)
    alpha = ops.sum(magnitude * large, axis=axes, keepdims=True) / ops.maximum(
        ops.sum(large, axis=axes, keepdims=True), 1.0
    )
    return ops.stop_gradient(ops.sign(x) * large), ops.stop_gradient(alpha)


def ternary(x, channels: tuple[int, ...] = ()):
    """-alpha, 0 or +alpha; the gradient is 1."""
    signs, alpha = ternary_parts(x, channels)
    return straight_through(signs * alpha, x)


def _nonzero(scale):
    """A range of nothing but zeros gets a scale of one, on whose grid they are exact as well.

    So does one whose steps are so small (below 1e-37) that their reciprocal is not a number.
    """
    return ops.where(scale < _SMALLEST_SCALE, ops.ones_like(scale), scale)


def _size(x) -> int:
    size = 1
    for length in x.shape:
        size *= int(length)
    return size
