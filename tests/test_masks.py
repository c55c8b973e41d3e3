"""Masks against a brute force in plain Python, and against cases worked out by hand."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from keras_squeeze.weight_pruning.masks import select_masks
from keras_squeeze.weight_pruning.patterns import Blocks, NOfM, Unstructured, get_pattern
from keras_squeeze.weight_pruning.weight_allocation import erk_sparsities, keep_count

# The brute force. A unit is (score, [index, ...]): the values at these indices live or die together.


def single_values(scores, alive, axis):
    return [(score_or_dead(scores, alive, [i]), [i]) for i in np.ndindex(*scores.shape)]


def blocks(shape, pool):
    def units(scores, alive, axis):
        steps = (1,) * (scores.ndim - len(shape)) + tuple(shape)
        borders = [range(0, length, step) for length, step in zip(scores.shape, steps, strict=True)]
        for corner in itertools.product(*borders):
            ranges = [
                range(start, min(start + step, length))
                for start, step, length in zip(corner, steps, scores.shape, strict=True)
            ]
            inside = list(itertools.product(*ranges))
            yield score_or_dead(scores, alive, inside, pool), inside

    return units


def worst_of_groups(n, m):
    def units(scores, alive, axis):
        lengths = list(scores.shape)
        length, lengths[axis] = lengths[axis], 1
        for lane in np.ndindex(*lengths):
            for start in range(0, length, m):
                group = []
                for position in range(start, min(start + m, length)):
                    index = list(lane)
                    index[axis] = position
                    group.append(tuple(index))
                best_first = sorted(group, key=lambda i: -score_or_dead(scores, alive, [i]))
                for index in sorted(best_first[n:]):
                    yield score_or_dead(scores, alive, [index]), [index]

    return units


def score_or_dead(scores, alive, indices, pool=max):
    if not any(alive[i] for i in indices):
        return -math.inf
    return pool([Fraction(float(scores[i])) for i in indices])


def mean(values):
    return sum(values) / len(values)


def kept_units(units, count, floors):
    """`{(weight, number)}` of the `count` best units; as many of the best of every weight as `floors` say are in it."""
    forced = set()
    for weight, (own, floor) in enumerate(zip(units, floors, strict=True)):
        best_first = sorted(range(len(own)), key=lambda number: -own[number][0])
        forced |= {(weight, number) for number in best_first[:floor]}
    every = [(weight, number) for weight, own in enumerate(units) for number in range(len(own))]
    every.sort(key=lambda unit: (unit not in forced, -units[unit[0]][unit[1]][0]))
    return set(every[: max(count, len(forced))])


def densities_by_bisection(shapes, density, floors=None):
    """Erdos-Renyi-kernel densities `scale * sum(shape) / prod(shape)` between floor and 1 that meet the target."""
    sizes = [math.prod(shape) for shape in shapes]
    floors = floors or [0.0] * len(shapes)

    def at(scale):
        return [
            min(1.0, max(floor, scale * sum(shape) / size))
            for shape, size, floor in zip(shapes, sizes, floors, strict=True)
        ]

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(d * size for d, size in zip(at(middle), sizes, strict=True))
        low, high = (middle, high) if kept < density * sum(sizes) else (low, middle)
    return at(low)


def best_of_outputs(own, shape, dead):
    """The number of the best unit of every output, along the last axis, that is not dead."""
    best = set()
    for output in range(shape[-1]):
        reaching = [number for number, (_, indices) in enumerate(own) if any(i[-1] == output for i in indices)]
        number = max(reaching, key=lambda number: (own[number][0], -number))
        best |= {number} if own[number][0] > dead else set()
    return best


def floor_of(own, shape, share, covers):
    """A fifth of the overall density, and a unit of every output unless outputs have one value each."""
    fifth = math.ceil(Fraction(1, 5) * Fraction(1 - share) * len(own))
    reach = 0
    if covers and math.prod(shape) > shape[-1]:
        reach = len({frozenset(i[-1] for i in indices) for _, indices in own})
    return min(max(fifth, reach), len(own)), bool(reach)


def brute_force(units, shapes, share, allocation, covers, dead=0):
    """The masks that prune a share of the units."""
    if allocation == "uniform":
        counts = [max(round(len(own) * (1 - share)), int(covers)) for own in units]
        kept = {(weight, n) for weight, own in enumerate(units) for _, n in kept_units([own], counts[weight], [0])}
    else:
        least = [floor_of(own, shape, share, covers) for own, shape in zip(units, shapes, strict=True)]
        floors, reaching = [floor for floor, _ in least], [reaches for _, reaches in least]
        if allocation == "global":
            kept = kept_units(units, round(sum(map(len, units)) * (1 - share)), floors)
            counts = [sum(weight == other for other, _ in kept) for weight in range(len(units))]
        else:
            least = [floor / len(own) for floor, own in zip(floors, units, strict=True)]
            densities = densities_by_bisection(shapes, 1 - share, least)
            exact = [len(own) * density for own, density in zip(units, densities, strict=True)]
            counts = [math.floor(value + 1e-6) for value in exact]
            by_remainder = sorted(range(len(exact)), key=lambda weight: (counts[weight] - exact[weight], weight))
            for weight in by_remainder[: max(round(sum(map(len, units)) * (1 - share)) - sum(counts), 0)]:
                counts[weight] += 1
            counts = [max(count, floor) for count, floor in zip(counts, floors, strict=True)]
        kept = set()
        for weight, (own, shape) in enumerate(zip(units, shapes, strict=True)):
            best = best_of_outputs(own, shape, dead) if reaching[weight] else set()
            ranked = sorted(range(len(own)), key=lambda n: (n not in best, -own[n][0]))
            by_score = {n for _, n in kept_units([own], counts[weight], [0])}
            kept |= {(weight, n) for n in (ranked[: counts[weight]] if best - by_score else by_score)}
    masks = [np.ones(shape, bool) for shape in shapes]
    for weight, own in enumerate(units):
        for number, (_, indices) in enumerate(own):
            if (weight, number) not in kept:
                for index in indices:
                    masks[weight][index] = False
    return masks


SHAPES = [(9, 4), (11, 8), (2, 3, 6, 5), (1, 7), (5, 1)]
PATTERNS = {
    "unstructured": ("unstructured", single_values, 1, 1),
    "2:4": ("2:4", worst_of_groups(2, 4), 1 / 2, 0),
    "1:4": ("1:4", worst_of_groups(1, 4), 3 / 4, 0),
    "3:4": ("3:4", worst_of_groups(3, 4), 1 / 4, 0),
    "2:3": ("2:3", worst_of_groups(2, 3), 1 - 2 / 3, 0),
    "(1, 4)": ((1, 4), blocks((1, 4), mean), 1, 1),
    "[3, 2]": ([3, 2], blocks((3, 2), mean), 1, 1),
    "(4,)": ((4,), blocks((4,), mean), 1, 1),
    "max of (2, 2)": (Blocks((2, 2), "max"), blocks((2, 2), max), 1, 1),
}


def random_scores(rng, pattern, shape):
    """Few different values, so that ties decide. Across the groups of n:m no order is promised: all different."""
    if isinstance(pattern, str) and ":" in pattern:
        return rng.permutation(math.prod(shape)).reshape(shape).astype("float32") + rng.random(dtype="float32")
    return rng.integers(-3, 4, shape).astype("float32")


@pytest.mark.parametrize("some_dead", [False, True], ids=["", "some dead"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "erk", "auto"])
@pytest.mark.parametrize("name", PATTERNS)
def test_masks_equal_the_brute_force(name, allocation, some_dead):
    pattern, make_units, max_sparsity, at_least = PATTERNS[name]
    rng = np.random.default_rng(3)
    scores = [random_scores(rng, pattern, shape) for shape in SHAPES]
    alive = [rng.random(shape) > 0.4 * some_dead for shape in SHAPES]
    axes = [0, 1, 2, 1, -2]
    units = [list(make_units(*arguments)) for arguments in zip(scores, alive, axes, strict=True)]
    for share in (0, 0.25, 0.5, 0.875, 1 - 2**-10):  # exact in binary: they round alike in every precision
        masks = select_masks(
            scores,
            share * max_sparsity,
            allocation=allocation,
            pattern=pattern,
            input_axes=axes,
            alive=alive if some_dead else None,
        )
        expected = brute_force(units, SHAPES, share, allocation, bool(at_least), -math.inf if some_dead else 0)
        for mask, correct in zip(masks, expected, strict=True):
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, correct, err_msg=f"share {share}", strict=True)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", (1, 2)])
@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
def test_generators_will_do(allocation, pattern):
    rng = np.random.default_rng(4)
    scores = [rng.random((8, 4)), rng.random((4, 8)), rng.random((8, 8))]
    alive = [s > 0.2 for s in scores]
    axes = [0, 1, 1]
    masks = select_masks(scores, 0.4, allocation=allocation, pattern=pattern, alive=alive, input_axes=axes)
    again = select_masks(
        iter(scores), 0.4, allocation=allocation, pattern=pattern, alive=iter(alive), input_axes=iter(axes)
    )
    for one, other in zip(masks, again, strict=True):
        np.testing.assert_array_equal(one, other)


# How many are kept.


@pytest.mark.parametrize(("size", "share", "kept"), [(5, 0.5, 2), (10, 0.25, 8), (6, 0.75, 2), (7, 0.99, 1)])
def test_keep_count_rounds_half_to_even_and_keeps_one(size, share, kept):
    assert keep_count(size, share) == kept


@pytest.mark.parametrize("offset", [-3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("base", [8, 1000, 2**24, 2**26])
def test_keep_count_is_exact_for_exact_shares(base, offset):
    size = base + offset
    for share in (Fraction(1, 2), Fraction(3, 4), Fraction(7, 8)):
        assert keep_count(size, float(share)) == round(size * (1 - share))


def test_keep_count_of_very_many_counts_single_units():
    """In float32 `1 - 2**-25` is 1, and 2**25 - 1 is 2**25."""
    assert keep_count(2**25, 2**-25) == 2**25 - 1
    assert keep_count(2**25 - 1, 0.0) == 2**25 - 1


@pytest.mark.parametrize(("at_least", "kept"), [(0, 0), (1, 1), (3, 3)])
def test_keep_count_at_least(at_least, kept):
    assert keep_count(10, 0.99, at_least) == kept


# Ties.


def test_of_equal_values_the_earlier_weight_is_kept():
    masks = select_masks([np.ones((2, 4)), np.ones((2, 2)), np.ones((2, 2))], 0.25, allocation="global")
    assert [mask.sum() for mask in masks] == [8, 2, 2]  # 12 of 16 stay, one of each output of the last


def test_of_equal_values_the_lower_index_is_kept():
    (mask,) = select_masks([np.ones((3, 4), "float32")], 0.5)
    np.testing.assert_array_equal(mask.ravel(), [True] * 6 + [False] * 6)


def test_of_equal_blocks_the_lower_index_is_kept():
    (mask,) = select_masks([np.ones((4, 4), "float32")], 0.5, pattern=(2, 2))
    np.testing.assert_array_equal(mask, [[True] * 4] * 2 + [[False] * 4] * 2)


def test_in_a_group_of_equal_values_the_lower_index_is_kept():
    (mask,) = select_masks([np.ones((8, 3), "float32")], 0.5, pattern="2:4")
    np.testing.assert_array_equal(mask, [[True] * 3, [True] * 3, [False] * 3, [False] * 3] * 2)


# What is zero already goes first.


def test_zeros_go_first_whatever_their_score():
    alive = np.array([[True, False, True], [False, True, True]])
    (mask,) = select_masks([np.float32([[1, 9, 2], [8, 3, 4]])], 0.5, alive=[alive])
    np.testing.assert_array_equal(mask, [[False, False, True], [False, True, True]])


def test_a_block_with_one_zero_is_not_dead():
    scores = np.float32([[5, 5, 9, 9, 1, 1]])
    alive = np.array([[True, False, False, False, True, True]])
    (mask,) = select_masks([scores], 1 / 3, pattern=(1, 2), alive=[alive])
    np.testing.assert_array_equal(mask, [[True, True, False, False, True, True]])


def test_zeros_go_first_in_every_group():
    scores = np.float32([[9], [8], [1], [2]])
    alive = np.array([[False], [True], [True], [True]])
    (mask,) = select_masks([scores], 0.5, pattern="2:4", alive=[alive])
    np.testing.assert_array_equal(mask, [[False], [True], [False], [True]])


def test_a_weight_that_is_all_zeros_has_a_mask_of_the_right_size():
    (mask,) = select_masks([np.ones((2, 4), "float32")], 0.5, alive=[np.zeros((2, 4), bool)])
    assert mask.sum() == 4


# Allocation.


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("unstructured", [1, 5, 1]),  # 7 of the 28 values
        ((1, 2), [2, 4, 2]),  # round(3.5) = 4 of the 14 blocks
    ],
)
def test_global_keeps_one_unit_of_every_weight(pattern, kept):
    scores = [np.float32([[1, 2, 3, 4]]), np.full((5, 4), 100, "float32"), np.zeros((1, 4), "float32")]
    masks = select_masks(scores, 0.75, allocation="global", pattern=pattern)
    assert [int(mask.sum()) for mask in masks] == kept
    assert masks[0][0, -1]
    assert masks[2][0, 0]


def test_erk_by_hand():
    """Sums 4 and 24, sizes 4 and 80; 42 to keep. scale * 28 = 42 asks 6 of the first four: it stays dense, and
    the second keeps the other 38 of 80."""
    assert erk_sparsities([(2, 2), (4, 20)], 0.5) == pytest.approx([0, 1 - 38 / 80])


def test_erk_by_hand_without_a_dense_weight():
    """Sums 20 and 40, sizes 100 and 400; 100 to keep, in the ratio 1 : 2."""
    assert erk_sparsities([(10, 10), (20, 20)], 0.8) == pytest.approx([1 - 100 / 3 / 100, 1 - 200 / 3 / 400])


ERK_SHAPES = [(3, 3, 3, 16), (3, 3, 16, 64), (1, 1, 64, 256), (256, 10), (5, 5), (1, 1)]


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99])
def test_erk_meets_the_target_and_the_rule(sparsity):
    densities = [1 - part for part in erk_sparsities(ERK_SHAPES, sparsity)]
    sizes = [math.prod(shape) for shape in ERK_SHAPES]
    assert sum(d * size for d, size in zip(densities, sizes, strict=True)) == pytest.approx((1 - sparsity) * sum(sizes))
    assert all(0 <= density <= 1 for density in densities)
    assert densities == pytest.approx(densities_by_bisection(ERK_SHAPES, 1 - sparsity))


def test_erk_makes_a_larger_weight_of_the_same_kind_sparser():
    parts = erk_sparsities([(8, 8), (16, 16), (32, 32), (64, 64)], 0.9)
    assert parts == sorted(parts)
    assert parts[0] < parts[-1]


# n:m.


def zeros_in_groups(mask, axis, m):
    """For each group of `m` positions along the axis, the zeros in every lane."""
    lanes = np.moveaxis(mask, axis, -1)
    return [np.count_nonzero(~lanes[..., start : start + m], axis=-1) for start in range(0, lanes.shape[-1], m)]


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 8)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_n_of_m_fills_up_gradually_and_is_complete_at_its_maximum(n, m, axis, allocation):
    rng = np.random.default_rng(4)
    scores = [rng.random((8, 16, 8), dtype="float32"), rng.random((16, 8, 24), dtype="float32")]
    size = sum(s.size for s in scores)
    for share in (0, 0.1, 0.5, 0.9, 1):
        target = share * (1 - n / m)
        masks = select_masks(scores, target, allocation=allocation, pattern=f"{n}:{m}", input_axes=[axis, axis])
        zeros = sum(int(np.count_nonzero(~mask)) for mask in masks)
        assert zeros == pytest.approx(target * size, abs=0.5 if allocation == "global" else 1)
        for mask in masks:
            groups = zeros_in_groups(mask, axis, m)
            assert max(int(group.max()) for group in groups) <= m - n
            if share == 1:
                assert all((group == m - n).all() for group in groups)


@pytest.mark.parametrize(("length", "zeros"), [(9, [2, 2, 0]), (10, [2, 2, 0]), (11, [2, 2, 1]), (3, [1]), (2, [0])])
def test_a_shorter_group_at_the_end_keeps_n(length, zeros):
    (mask,) = select_masks([np.random.default_rng(5).random((length, 3))], 0.5, pattern="2:4")
    groups = zeros_in_groups(mask, 0, 4)
    assert [set(group.tolist()) for group in groups] == [{count} for count in zeros]


def test_n_of_m_runs_along_the_last_but_one_axis_by_default():
    scores = np.float32([[1, 4], [2, 3], [3, 2], [4, 1]])
    (mask,) = select_masks([scores], 0.5, pattern="2:4")
    np.testing.assert_array_equal(mask, [[False, True], [False, True], [True, False], [True, False]])


# Blocks.


def test_blocks_by_hand():
    """1 to 20 as 5 x 4 in blocks of 2 x 2: the means are 3.5, 5.5, 11.5, 13.5, 17.5, 19.5; the best three stay."""
    (mask,) = select_masks([np.arange(1, 21, dtype="float32").reshape(5, 4)], 0.5, pattern=(2, 2))
    kept_blocks = np.array([[False, False], [False, True], [True, True]])
    np.testing.assert_array_equal(mask, np.repeat(np.repeat(kept_blocks, 2, 0), 2, 1)[:5])


@pytest.mark.parametrize(("shape", "kept"), [((3, 1), [0, 1]), ((9, 1), [0, 1]), ((1, 4), [2]), ((1, 9), [2])])
def test_a_block_may_span_a_whole_dimension(shape, kept):
    scores = np.float32([[9, 7, 1, 2], [1, 1, 1, 1], [4, 5, 4, 5]])
    (mask,) = select_masks([scores], 0.5, pattern=shape)
    if shape[1] == 1:
        expected = np.tile(np.isin(range(4), kept), (3, 1))
    else:
        expected = np.zeros((3, 4), bool)  # sums 19, 4, 18; round(3 / 2) = 2 of the 3 rows stay
        expected[[0, 2]] = True
    np.testing.assert_array_equal(mask, expected)


def test_a_block_at_the_border_counts_only_its_own_values():
    scores = np.float32([[2, 2, 2, 2, 3]])  # the last block is one value; padded with zeros its mean would be 1.5
    (mask,) = select_masks([scores], 2 / 3, pattern=(1, 2))
    np.testing.assert_array_equal(mask, [[False] * 4 + [True]])


def test_max_and_mean_of_a_block_differ():
    scores = np.float32([[9, 0, 5, 5]])
    (by_mean,) = select_masks([scores], 0.5, pattern=(1, 2))
    (by_max,) = select_masks([scores], 0.5, pattern=Blocks((1, 2), "max"))
    np.testing.assert_array_equal(by_mean, [[False, False, True, True]])
    np.testing.assert_array_equal(by_max, ~by_mean)


# What is refused.


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("foo", ValueError, "'unstructured', 'n:m'.*Received: 'foo'"),
        ("2:4:8", ValueError, "Received: '2:4:8'"),
        ("2:", ValueError, "Received: '2:'"),
        ("-1:4", ValueError, "Received: '-1:4'"),
        ("4:2", ValueError, "n=4, m=2"),
        ("4:4", ValueError, "n=4, m=4"),
        ("0:4", ValueError, "n=0, m=4"),
        ((0, 4), ValueError, r"positive ints.*\(0, 4\)"),
        ((), ValueError, r"Received: \(\)"),
        ((1.5, 4), ValueError, r"\(1\.5, 4\)"),
        (None, TypeError, "Received: None"),
        (4, TypeError, "Received: 4"),
    ],
)
def test_an_impossible_pattern_is_refused(pattern, error, message):
    with pytest.raises(error, match=message):
        get_pattern(pattern)
    with pytest.raises(error, match=message):
        select_masks([np.ones((4, 4))], 0.5, pattern=pattern)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match=r"'mean' or 'max'.*'median'"):
        Blocks((1, 4), "median")


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ValueError, match=r"'uniform', 'global', 'erk'.*'layerwise'"):
        select_masks([np.ones((4, 4))], 0.5, allocation="layerwise")


@pytest.mark.parametrize(("pattern", "limit"), [("2:4", 0.5), ("3:4", 0.25), ("1:4", 0.75)])
def test_more_sparsity_than_the_pattern_allows_is_refused(pattern, limit):
    with pytest.raises(ValueError, match=f"at most {limit}.*sparsity={limit + 0.01}"):
        select_masks([np.ones((4, 4))], limit + 0.01, pattern=pattern)


def test_a_block_with_more_axes_than_the_weight_is_refused():
    Blocks((2, 2)).check((4, 4), "dense/kernel")
    with pytest.raises(ValueError, match=r"dense/kernel.*\(4, 4\).*\(2, 2, 2\)"):
        Blocks((2, 2, 2)).check((4, 4), "dense/kernel")


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("unstructured", Unstructured()),
        ("2:4", NOfM(2, 4)),
        ("12:16", NOfM(12, 16)),
        ((1, 4), Blocks((1, 4))),
        ([3], Blocks((3,))),
    ],
)
def test_patterns_by_name(identifier, expected):
    pattern = get_pattern(identifier)
    assert type(pattern) is type(expected)
    assert pattern.get_config() == expected.get_config()


def test_a_pattern_stays_itself():
    pattern = NOfM(1, 2)
    assert get_pattern(pattern) is pattern
