"""The largest values of many arrays together: exact, deterministic, and without joining the arrays.

`numpy.partition` needs all values in one array, and becomes some fifteen times slower when most of them are equal, as
the zeros of a pruned model are. Here a small sample says between which two values the threshold must lie, one
pass over the arrays checks that it does and gathers the few values between, and those are partitioned. Where the
sample misleads (a weight with few distinct values), a radix selection finds the threshold in two passes.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

_CHUNK = 1 << 17
_HALF = 1 << 16
_SIGN = np.uint32(1 << 31)
_SMALL = 1 << 15  # below, partitioning one joined copy is faster
_SAMPLE = 1 << 14


def mark_largest(arrays: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Marks the `count` largest values over several flat arrays.

    Args:
        arrays: Flat float32 arrays without NaN; infinities are allowed.
        count: How many to mark, from 0 to the total size.

    Returns:
        One boolean array per array. Of equal values the first are marked, in the order of the arrays and then of
        their indices.
    """
    arrays = [np.asarray(array, "float32") for array in arrays]
    if count <= 0:
        return [np.zeros(array.size, bool) for array in arrays]
    if count >= sum(array.size for array in arrays):
        return [np.ones(array.size, bool) for array in arrays]
    threshold, equal_wanted, equal_found = _nth_largest(arrays, count)
    if equal_wanted == equal_found:
        return [array >= threshold for array in arrays]
    marks = [array > threshold for array in arrays]
    for array, mark in zip(arrays, marks, strict=True):
        for start in range(0, array.size, _CHUNK):
            if not equal_wanted:
                return marks
            first_equal = np.flatnonzero(array[start : start + _CHUNK] == threshold)[:equal_wanted]
            mark[start + first_equal] = True
            equal_wanted -= first_equal.size
    return marks


def _nth_largest(arrays: Sequence[np.ndarray], n: int) -> tuple[np.float32, int, int]:
    """The value at place `n`, from 1, in descending order.

    Returns:
        The value, how many of those that equal it are among the first `n`, and how many equal it.
    """
    total = sum(array.size for array in arrays)
    if total < _SMALL:
        return _nth_of(np.concatenate(arrays), n)
    nth = _nth_largest_between(arrays, n, *_bracket(arrays, total, n))
    return nth or _nth_largest_by_radix(arrays, n)


def _nth_of(values: np.ndarray, n: int) -> tuple[np.float32, int, int]:
    nth = np.partition(values, values.size - n)[values.size - n]
    return nth, n - int(np.count_nonzero(values > nth)), int(np.count_nonzero(values == nth))


def _bracket(arrays: Sequence[np.ndarray], total: int, n: int) -> tuple[np.float32, np.float32]:
    """Two values between which the n-th largest probably lies: four standard errors around a sample's quantile."""
    stride = max(1, total // _SAMPLE)
    parts, first = [], stride // 2
    for array in arrays:  # as if they were one
        parts.append(array[first::stride])
        first = (first - array.size) % stride
    sample = np.sort(np.concatenate(parts))
    share_below = 1 - n / total
    position = share_below * sample.size
    margin = 4 * math.sqrt(sample.size * share_below * (1 - share_below)) + 2
    low = sample[max(int(position - margin), 0)]
    high = sample[min(int(position + margin), sample.size - 1)]
    if low == sample[0]:  # most likely the zeros of what is pruned already: too many to gather, and none is it
        with np.errstate(over="ignore"):  # infinity follows the largest float
            low = np.nextafter(low, np.float32(np.inf))
    return low, high


def _nth_largest_between(arrays: Sequence[np.ndarray], n: int, low, high) -> tuple[np.float32, int, int] | None:
    """As `_nth_largest` if the value lies between two that few others lie between, else None."""
    above, between, gathered = 0, [], 0
    limit = sum(array.size for array in arrays) // 8
    for chunk in _chunks(arrays):
        above += int(np.count_nonzero(chunk > high))
        between.append(chunk[(chunk >= low) & (chunk <= high)])
        gathered += between[-1].size
        if above >= n or gathered > limit:
            return None
    return _nth_of(np.concatenate(between), n - above) if gathered >= n - above else None


def _nth_largest_by_radix(arrays: Sequence[np.ndarray], n: int) -> tuple[np.float32, int, int]:
    """As `_nth_largest`, from two histograms: of the upper and of the lower half of the values' bits."""
    high_counts = np.zeros(_HALF, np.int64)
    for keys in _sortable_keys(arrays):
        high_counts += np.bincount(keys >> 16, minlength=_HALF)
    high, n = _bucket_of_nth_from_top(high_counts, n)
    low_counts = np.zeros(_HALF, np.int64)
    for keys in _sortable_keys(arrays):
        low_counts += np.bincount(keys[keys >> 16 == high] & (_HALF - 1), minlength=_HALF)
    low, n = _bucket_of_nth_from_top(low_counts, n)
    key = np.uint32(high << 16 | low)
    bits = key ^ _SIGN if key & _SIGN else ~key
    return bits.view(np.float32), n, int(low_counts[low])


def _chunks(arrays: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for array in arrays:
        for start in range(0, array.size, _CHUNK):
            yield array[start : start + _CHUNK]


def _sortable_keys(arrays: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Chunks of unsigned integers in the order of the float values (sign bit flipped, or all if negative)."""
    for chunk in _chunks(arrays):
        if chunk.min() >= 0:
            yield chunk.view(np.uint32) | _SIGN
        else:
            bits = (chunk + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
            yield bits ^ (-(bits >> 31) | _SIGN)


def _bucket_of_nth_from_top(counts: np.ndarray, n: int) -> tuple[int, int]:
    """The bucket that holds the n-th value from the top, and its rank inside the bucket."""
    from_top = np.cumsum(counts[::-1])
    position = int(np.searchsorted(from_top, n))
    before = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, n - before
