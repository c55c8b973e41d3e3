"""Reads data in every form that `fit` takes."""

from collections.abc import Iterable, Iterator

import keras
import numpy as np


def check_reusable(data) -> None:
    """Raises a `TypeError` for data that can be read only once."""
    if isinstance(data, Iterator):
        raise TypeError(
            "`data` is read at every update, and an iterator or generator is empty after the first. Pass arrays "
            f"(x, y), a tf.data.Dataset or a keras.utils.PyDataset. Received: {data!r}"
        )


def batches(data, num_batches: int | None, batch_size: int = 32) -> Iterator[tuple]:
    """Yields the first batches of data as `(x, y, sample_weight)`, where `y` and `sample_weight` may be None.

    Args:
        data: An array or tensor; a tuple or list of them, `(x,)`, `(x, y)` or `(x, y, sample_weight)`, each of which
            may be a nested structure; a batched `tf.data.Dataset`; a `keras.utils.PyDataset`; or any iterable of
            batches.
        num_batches: Batches to yield; None for all.
        batch_size: Examples in a batch where `data` is arrays.

    Raises:
        TypeError: `data` is neither arrays nor batches.
        ValueError: `data` is empty, missing, or arrays of different lengths.
    """
    import tensorflow as tf

    if data is None:
        raise ValueError("`data` is missing: pass data=(x, y) or data=dataset. Received: data=None")
    if hasattr(data, "shape") and hasattr(data, "dtype"):
        data = (data,)
    if isinstance(data, str):
        raise TypeError(f"`data` must be arrays (x, y) or a dataset of batches. Received: {data!r}")
    if isinstance(data, (tuple, list)) and not data:
        raise ValueError(f"`data` is empty: pass at least one batch. Received: {data!r}")
    if isinstance(data, (tuple, list)):
        sizes = {len(array) for array in keras.tree.flatten(tuple(data)) if array is not None}
        if len(sizes) > 1:
            raise ValueError(f"`data` has arrays of different lengths: {', '.join(map(str, sorted(sizes)))}.")
        data = tf.data.Dataset.from_tensor_slices(tuple(map(_lists_to_tuples, data))).batch(batch_size)
    elif isinstance(data, keras.utils.PyDataset):
        data = map(data.__getitem__, range(len(data)))
    elif not isinstance(data, Iterable):
        raise TypeError(f"`data` must be arrays (x, y) or a dataset of batches. Received: {data!r}")
    empty = True
    for index, batch in enumerate(data):
        if num_batches is not None and index >= num_batches:
            break
        empty = False
        yield keras.utils.unpack_x_y_sample_weight(batch)
    if empty:
        raise ValueError("`data` is empty: pass at least one batch.")


def inputs_only(model, data):
    """Returns data in the form that `batches` takes, where a dict or a list may be the inputs of a model alone."""
    inputs = getattr(model, "inputs", None)  # a subclassed model does not say
    several = isinstance(data, list) and len(data) > 1 and (inputs is None or len(data) == len(inputs))
    return (data,) if isinstance(data, dict) or several else data


def lists_to_arrays(data):
    """Converts lists of numbers in `(x, y)` to arrays; lists of arrays, for several inputs, stay."""
    if not isinstance(data, (tuple, list)):
        return data
    return tuple(
        np.asarray(part) if isinstance(part, list) and not any(hasattr(x, "shape") for x in part) else part
        for part in data
    )


def _lists_to_tuples(part):
    """Converts lists with an array for each input or output, at any depth: TensorFlow would stack them."""
    if isinstance(part, dict):
        return {key: _lists_to_tuples(value) for key, value in part.items()}
    if isinstance(part, (tuple, list)) and any(hasattr(leaf, "shape") for leaf in keras.tree.flatten(part)):
        return tuple(map(_lists_to_tuples, part))
    return part
