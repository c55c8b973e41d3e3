"""Quantized weights in the form that the TensorFlow Lite converter turns into these very integers.

The converter reads a grid of 8 bits off a fake-quantization operation after a constant. A grid of fewer bits is a part
of one of 8 bits with the same scale. Batch normalization after a convolution goes into the scales; integers stay as
they are, up to the sign of gamma.
"""

import numpy as np

_BITS = 8
_HIGH = 127


def convertible_weight(
    integers: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, channels: tuple[int, ...] | None
):
    """A constant tensor with the values `scale * (integers - zero_point)`, marked for the converter.

    Args:
        integers, scale, zero_point: As `Quantizer.to_integers` returns them.
        channels: The axes of the outputs. Every output is marked with a scale, equal or not: only these take up a batch
            normalization. None: unmarked, for the converter to mark where it has a kernel.
    """
    import tensorflow as tf

    values = (scale * (integers - zero_point)).astype("float32")
    if channels is None or np.any(zero_point) or np.abs(integers).max(initial=0) > _HIGH:
        return tf.constant(values)  # no kernel takes these, and `export` finds other integers or none
    scale = _harmless(scale, integers)
    if not channels:
        end = float(scale.reshape(-1)[0]) * _HIGH
        return tf.quantization.fake_quant_with_min_max_vars(values, -end, end, num_bits=_BITS, narrow_range=True)
    axes = [axis % values.ndim for axis in channels]
    order = [axis for axis in range(values.ndim) if axis not in axes] + axes
    flat = values.transpose(order).reshape(*(values.shape[axis] for axis in order[: -len(axes)]), -1)
    ends = np.broadcast_to(scale, [values.shape[axis] if axis in axes else 1 for axis in range(values.ndim)])
    ends = ends.transpose(order).reshape(-1) * np.float32(_HIGH)
    marked = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        flat, -ends, ends, num_bits=_BITS, narrow_range=True
    )
    if flat.ndim < values.ndim:
        marked = tf.reshape(marked, [values.shape[axis] for axis in order])
    return tf.transpose(marked, np.argsort(order)) if order != sorted(order) else marked


def _harmless(scale: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """The scales, with another one for outputs whose weights are all zero.

    Theirs may be next to zero, and biases, which are stored in its multiples, would not fit 32 bits.
    """
    scale = np.reshape(scale, (*[1] * (integers.ndim - scale.ndim), *scale.shape))
    shared = tuple(axis for axis in range(scale.ndim) if scale.shape[axis] == 1)
    used = np.any(integers != 0, axis=shared, keepdims=True) & (scale > 0)
    return np.where(used, scale, scale[used].max() if np.any(used) else np.float32(1)).astype("float32")


def convertible_matmul(inputs, integers: np.ndarray, scale: np.ndarray, zero_point: np.ndarray):
    """`inputs @ weight` for a kernel (inputs, outputs).

    The converter refuses a marked kernel with a scale for each output. It marks an unmarked one itself, with the
    largest value of each output as 127; where that is another grid, the product is written as a convolution with a
    window of one.
    """
    import tensorflow as tf

    values = (scale * (integers - zero_point)).astype("float32")
    if not np.any(zero_point) and np.all(np.abs(integers).max(axis=0) == _HIGH):
        return tf.matmul(inputs, tf.constant(values))
    kernel = convertible_weight(integers[np.newaxis, np.newaxis], scale, zero_point, (-1,))
    lengths = tf.shape(inputs)[:-1] if None in inputs.shape[1:] else [-1, *inputs.shape[1:-1]]
    pixels = tf.reshape(inputs, (-1, 1, 1, values.shape[0]))
    return tf.reshape(tf.nn.conv2d(pixels, kernel, 1, "VALID"), [*lengths, values.shape[1]])
