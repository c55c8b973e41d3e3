"""`mark_largest` against a stable sort, on every path through it."""

import numpy as np
import pytest

from keras_squeeze.weight_pruning import ranking
from keras_squeeze.weight_pruning.ranking import mark_largest


def marks_by_stable_sort(arrays, count):
    """Sorts all values in descending order, equal ones by position, and marks the first `count`."""
    joined = np.concatenate(arrays)
    marks = np.zeros(joined.size, bool)
    marks[np.argsort(-joined, kind="stable")[:count]] = True
    return np.split(marks, np.cumsum([array.size for array in arrays])[:-1])


def assert_marks_as_sorted(arrays, count):
    for marked, expected in zip(mark_largest(arrays, count), marks_by_stable_sort(arrays, count), strict=True):
        assert marked.dtype == bool
        np.testing.assert_array_equal(marked, expected)


def only_radix(monkeypatch):
    monkeypatch.setattr(ranking, "_nth_largest", ranking._nth_largest_by_radix)


PATHS = {
    "partition": lambda patch: patch.setattr(ranking, "_SMALL", 1 << 40),
    "sample": lambda patch: patch.setattr(ranking, "_SMALL", 0),
    "small sample": lambda patch: (patch.setattr(ranking, "_SMALL", 0), patch.setattr(ranking, "_SAMPLE", 9)),
    "radix": only_radix,
    "radix in chunks": lambda patch: (only_radix(patch), patch.setattr(ranking, "_CHUNK", 7)),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Which of its algorithms `mark_largest` uses; by default the size and the values of the data decide."""
    PATHS[request.param](monkeypatch)


VALUES = {
    "distinct": lambda rng, n: rng.permutation(n) - n / 2,
    "many ties": lambda rng, n: rng.integers(-3, 4, n),
    "not negative": lambda rng, n: rng.integers(0, 4, n) * rng.random(n),
    "all negative": lambda rng, n: -1 - rng.random(n),
    "mostly zero": lambda rng, n: rng.random(n) * (rng.random(n) < 0.1),
    "both zeros": lambda rng, n: rng.choice([0.0, -0.0], n),
    "both zeros and others": lambda rng, n: rng.choice([0.0, -0.0, 1.0, -1.0], n),
    "infinities": lambda rng, n: rng.choice([-np.inf, -1.0, 0.0, 2.0, np.inf], n),
    "only minus infinity": lambda rng, n: np.full(n, -np.inf),
    "only infinity": lambda rng, n: np.full(n, np.inf),
    "all equal": lambda rng, n: np.full(n, 0.25),
    "all the largest float": lambda rng, n: np.full(n, np.finfo("float32").max),
    "neighboring floats": lambda rng, n: (rng.integers(-9, 9, n) + (1 << 23)).astype("int32").view("float32"),
    "huge and tiny": lambda rng, n: rng.choice([-1, 1], n) * 10.0 ** rng.integers(-44, 38, n),
    "same upper half of the bits": lambda rng, n: 1 + rng.integers(0, 9, n) * 2.0**-23,
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_the_largest_are_those_that_come_first_in_a_stable_sort(make, path):
    rng = np.random.default_rng(0)
    for sizes in ([1], [40], [5, 1, 0, 30], [7, 7, 14]):
        arrays = [np.asarray(make(rng, size), "float32") for size in sizes]
        for count in range(sum(sizes) + 1):
            assert_marks_as_sorted(arrays, count)


@pytest.mark.parametrize("decimals", [1, 2, 9], ids=["few values", "many ties", "distinct"])
@pytest.mark.parametrize("zeros", [0, 0.5, 0.9], ids=["dense", "half pruned", "mostly pruned"])
def test_more_values_than_fit_one_chunk(decimals, zeros):
    rng = np.random.default_rng(1)
    sizes = (ranking._CHUNK + 3, 2 * ranking._CHUNK, 11)
    assert sum(sizes) > ranking._SMALL
    arrays = [rng.standard_normal(size).round(decimals).astype("float32") for size in sizes]
    for array in arrays:
        array[rng.random(array.size) < zeros] = 0
    for count in (1, sum(sizes) // 20, sum(sizes) // 2, sum(sizes) - 1):
        assert_marks_as_sorted([abs(array) for array in arrays], count)
        assert_marks_as_sorted(arrays, count)


@pytest.mark.parametrize("zeros", [0, 0.5, 0.9], ids=["dense", "half pruned", "mostly pruned"])
def test_a_sample_is_enough_for_random_weights(zeros, monkeypatch):
    """As for the weights of a network, which only become sparser; the radix selection would take twice the time."""
    monkeypatch.setattr(ranking, "_nth_largest_by_radix", lambda *_: pytest.fail("the sample misled"))
    rng = np.random.default_rng(3)
    values = abs(rng.standard_normal(300_000).astype("float32"))
    values[rng.random(values.size) < zeros] = 0
    for sparsity in (0.01, 0.3, 0.5, 0.75, 0.95, 0.999):
        if sparsity > zeros:
            assert_marks_as_sorted([values[:1000], values[1000:]], round(values.size * (1 - sparsity)))


def test_values_that_are_sorted_already():
    values = np.arange(-ranking._CHUNK, ranking._CHUNK, dtype="float32")
    for count in (1, 7, ranking._CHUNK, 2 * ranking._CHUNK - 1):
        assert_marks_as_sorted([values], count)
        assert_marks_as_sorted([values[::-1]], count)


def test_very_many_arrays_of_one_value():
    values = np.random.default_rng(2).standard_normal(ranking._SMALL + 1).astype("float32")
    assert_marks_as_sorted(list(values[:, np.newaxis]), 1000)


def test_equal_values_across_the_border_of_a_chunk():
    values = np.zeros(2 * ranking._CHUNK + 5, "float32")
    values[ranking._CHUNK - 2 : ranking._CHUNK + 3] = 1
    (marked,) = mark_largest([values], 4)
    np.testing.assert_array_equal(np.flatnonzero(marked), ranking._CHUNK + np.arange(-2, 2))


def test_of_equal_values_the_first_array_and_the_lower_index_win(path):
    marked = mark_largest([np.float32([1, 5, 1]), np.float32([1, 1])], 3)
    assert [m.tolist() for m in marked] == [[True, True, True], [False, False]]


def test_zero_and_minus_zero_are_equal(path):
    (marked,) = mark_largest([np.float32([-1, -0.0, 0.0, -0.0])], 2)
    assert marked.tolist() == [False, True, True, False]


@pytest.mark.parametrize("count", [-1, 0])
def test_none(count):
    assert [m.tolist() for m in mark_largest([np.float32([1, 2]), np.float32([3])], count)] == [[False] * 2, [False]]


@pytest.mark.parametrize("count", [3, 4])
def test_all(count):
    assert [m.tolist() for m in mark_largest([np.float32([1, 2]), np.float32([3])], count)] == [[True] * 2, [True]]


def test_the_arrays_may_be_strided_or_read_only_and_stay_as_they_are(path):
    rng = np.random.default_rng(2)
    strided = rng.standard_normal((20, 3)).astype("float32")[:, 1]
    locked = rng.standard_normal(9).astype("float32")
    locked.flags.writeable = False
    before = strided.copy()
    assert_marks_as_sorted([strided, locked], 13)
    np.testing.assert_array_equal(strided, before)
