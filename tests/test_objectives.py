"""Fronts, volumes, budgets and scores, against their definitions."""

import itertools
import math

import numpy as np
import pytest

from keras_squeeze.search.objectives import (
    Budgets,
    direction_of,
    forgiving_score,
    goodness,
    hypervolume,
    is_size,
    knee_point,
    pareto_front,
    score,
)

DIRECTIONS = [list(x) for n in (1, 2, 3, 4) for x in itertools.product(("max", "min"), repeat=n)]


def better(a, b, direction):
    return a > b if direction == "max" else a < b


def beats(a, b, directions):
    """By the definition: nowhere worse, somewhere better."""
    worse = any(better(y, x, d) for x, y, d in zip(a, b, directions, strict=True))
    return not worse and any(better(x, y, d) for x, y, d in zip(a, b, directions, strict=True))


@pytest.mark.parametrize("levels", [3, 1000])
def test_front_is_what_no_other_point_beats(levels):
    rng = np.random.default_rng(levels)
    for directions, count in itertools.product(DIRECTIONS, (1, 2, 10, 40)):
        points = rng.integers(levels, size=(count, len(directions))).tolist()
        front = pareto_front(points, directions)
        best = {tuple(x) for x in points if not any(beats(other, x, directions) for other in points)}
        assert {tuple(points[index]) for index in front} == best
        assert len(front) == len(best), "each point once"
        assert all(points.index(points[index]) == index for index in front), "of equal ones the first"
        signs = [-1 if d == "max" else 1 for d in directions]
        keys = [[s * x for s, x in zip(signs, points[index], strict=True)] for index in front]
        assert keys == sorted(keys)


def test_front_of_dicts_names_and_arrays_agree():
    rows = [(0.9, 100), (0.8, 50), (0.7, 60), (0.95, 400)]
    dicts = [{"size": size, "accuracy": accuracy, "other": math.nan} for accuracy, size in rows]
    expected = [3, 0, 1]
    assert pareto_front(rows, ["max", "min"]) == expected
    assert pareto_front(np.array(rows), ("max", "min")) == expected
    assert pareto_front(dicts, {"accuracy": "max", "size": "min"}) == expected


def test_front_leaves_out_what_is_no_number_and_keeps_infinity():
    assert pareto_front([(math.nan, 1), (0.5, 2), (1.0, math.nan)], ["max", "min"]) == [1]
    assert pareto_front([(math.inf, 5), (1, 1)], ["max", "min"]) == [0, 1]
    assert pareto_front([], ["max", "min"]) == []
    assert pareto_front([], {"a": "max"}) == []


@pytest.mark.parametrize(
    ("points", "directions", "message"),
    [
        ([(1, 2)], ["max"], "1 values"),
        ([(1, 2), (1,)], ["max", "min"], "index 1"),
        ([(1, 2)], ["max", "maximum"], "maximum"),
        ([(1,)], "max", "Received: max"),
        ([(1,)], [], "directions"),
        ([{"a": 1}], {"a": "max", "b": "min"}, "lacks b"),
    ],
)
def test_front_names_what_does_not_fit(points, directions, message):
    with pytest.raises(ValueError, match=message):
        pareto_front(points, directions)


def grid_volume(points, directions, reference, levels):
    """Counts unit cells, each of which a point dominates wholly or not at all."""
    signs = np.array([1 if d == "min" else -1 for d in directions])
    losses, limit = np.asarray(points) * signs, np.asarray(reference) * signs
    cells = itertools.product(*(range(int(x) - levels, int(x)) for x in limit))
    return sum(any((point <= cell).all() for point in losses) for cell in map(np.array, cells))


def test_volume_is_the_count_of_dominated_cells():
    rng = np.random.default_rng(0)
    levels = 6
    for directions, count in itertools.product([x for x in DIRECTIONS if len(x) <= 3], (0, 1, 2, 7, 25)):
        reference = [0 if d == "max" else levels for d in directions]
        points = rng.integers(-1, levels + 2, size=(count, len(directions)))
        points = np.clip(points, 0, levels)
        assert hypervolume(points, directions, reference) == grid_volume(points, directions, reference, levels)


def test_volume_of_four_objectives_is_what_chance_finds():
    rng = np.random.default_rng(4)
    points = rng.random((12, 4))
    directions = ["max", "min", "max", "min"]
    probes = rng.random((100_000, 4))
    signs = np.array([1, -1, 1, -1])
    hit = np.zeros(len(probes), bool)
    for point in points:
        hit |= (probes * signs <= point * signs).all(axis=1)
    spread = math.sqrt(hit.mean() * (1 - hit.mean()) / len(probes))
    assert hypervolume(points, directions, [0, 1, 0, 1]) == pytest.approx(hit.mean(), abs=5 * spread)


def test_volume_grows_with_the_front_only():
    directions, reference = ["max", "min"], (0.5, 10)
    before = hypervolume([(0.8, 5)], directions, reference)
    assert before == pytest.approx(0.3 * 5)
    assert hypervolume([(0.8, 5), (0.7, 6)], directions, reference) == pytest.approx(before)
    assert hypervolume([(0.8, 5), (0.9, 8)], directions, reference) == pytest.approx(before + 0.1 * 2)
    assert hypervolume([(0.8, 10), (0.5, 1)], directions, reference) == 0, "not better than the reference"
    assert hypervolume([{"a": 1.0}], {"a": "max"}, {"a": 0.25}) == 0.75
    with pytest.raises(ValueError, match="reference"):
        hypervolume([(1, 1)], directions, (math.nan, 1))
    with pytest.raises(ValueError, match="2 values"):
        hypervolume([(1, 1)], directions, (1,))


def test_knee_is_farthest_from_the_line_between_the_ends():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = rng.random((30, 2)) * [1, 1000]
        front = pareto_front(points, ["max", "min"])
        best, last = points[front[0]], points[front[-1]]
        span = np.abs(best - last)
        if not span.all():
            continue
        along = (last - best) / span
        distances = [
            abs(along[0] * ((points[i] - best) / span)[1] - along[1] * ((points[i] - best) / span)[0]) for i in front
        ]
        ahead = [((points[i] - best) / span * [1, -1]).sum() for i in front]  # on the good side of the line
        expected = front[int(np.argmax([d if a >= 0 else -d for d, a in zip(distances, ahead, strict=True)]))]
        assert knee_point(points, ["max", "min"]) == expected


def test_knee_of_few_points():
    assert knee_point([(0.9, 100), (0.89, 10), (0.3, 9)], ["max", "min"]) == 1
    assert knee_point([(1, 1)], ["max", "min"]) == 0
    assert knee_point([(1, 1, 1), (2, 2, 2)], ["max"] * 3) == 1
    with pytest.raises(ValueError, match="knee"):
        knee_point([], ["max"])
    with pytest.raises(ValueError, match="knee"):
        knee_point([(math.nan,)], ["max"])


def test_budgets_say_what_is_kept_and_by_how_much_not():
    budgets = Budgets.of(max_size_bytes=50_000, min_val_accuracy=0.9)
    assert budgets.met_by({"size_bytes": 50_000, "val_accuracy": 0.9})
    assert budgets.violation({"size_bytes": 100_000, "val_accuracy": 1}) == pytest.approx(math.log(2))
    assert budgets.violation({"size_bytes": 1, "val_accuracy": 0.45}) == pytest.approx(math.log(1.5))
    assert budgets.text() == "size_bytes <= 50,000 and val_accuracy >= 0.9"
    assert Budgets.of().met_by({})
    assert Budgets.of().text() == ""
    assert budgets == Budgets.of(max_size_bytes=50_000, min_val_accuracy=0.9)
    assert hash(budgets)


def test_violation_is_graded_on_both_sides_of_zero():
    for limit, (kind, away) in itertools.product(
        [-1e300, -5, -1e-9, 0, 1e-300, 0.5, 3, 1e12], [("max", 1), ("min", -1)]
    ):
        budgets = Budgets.of(**{f"{kind}_loss": limit})
        steps = [np.nextafter(limit, away * math.inf), *(limit + away * (abs(limit) or 1) * x for x in (0.1, 1, 10))]
        values = [budgets.violation({"loss": float(x)}) for x in steps]
        assert values == sorted(values)
        assert values[0] > 0
        assert len(set(values)) == len(values)
        assert budgets.violation({"loss": limit}) == 0
        assert budgets.violation({"loss": -away * math.inf}) == 0
        assert budgets.violation({"loss": away * math.inf}) == math.inf
        assert not budgets.met_by({"loss": math.nan})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"size_bytes": 5}, "max_<metric>"),
        ({"max_": 5}, "max_<metric>"),
        ({"max_size_bytes": "5"}, "finite number"),
        ({"max_size_bytes": True}, "finite number"),
        ({"max_size_bytes": math.nan}, "finite number"),
        ({"max_size_bytes": None}, "finite number"),
        ({"min_val_accuracy": 0.9, "max_val_accuracy": 0.8}, "val_accuracy"),
    ],
)
def test_budgets_name_what_is_wrong(limits, message):
    with pytest.raises(ValueError, match=message):
        Budgets.of(**limits)


def test_a_missing_metric_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"size_bytes.*: loss, val_loss"):
        Budgets.of(max_size_bytes=5).violation({"val_loss": 1, "loss": 2})
    with pytest.raises(ValueError, match=r"'val_accuracy'.*val_loss"):
        score({"val_loss": 1}, "val_accuracy", "max", Budgets())


@pytest.mark.parametrize("direction", ["max", "min"])
def test_goodness_is_monotone_and_bounded(direction):
    values = [-math.inf, -1e300, -7, -1, -1e-9, 0.0, 1e-9, 0.25, 1, 1.5, 80, 1e300, math.inf]
    found = [goodness(x, direction) for x in values]
    assert found == sorted(found, reverse=direction == "min")
    assert all(-1 <= x <= 2 for x in found)
    assert math.isnan(goodness(math.nan, direction))


def test_an_accuracy_is_its_own_goodness():
    assert [goodness(x, "max") for x in (0, 0.3, 1)] == [0, 0.3, 1]


def test_every_feasible_score_is_above_every_other_one_and_those_are_graded():
    budgets = Budgets.of(max_size_bytes=1000)
    for direction in ("max", "min"):
        inside = [score({"m": m, "size_bytes": 1000}, "m", direction, budgets) for m in (-1e300, -3, 0, 0.5, 9, 1e300)]
        sizes = [np.nextafter(1000, 2000), 1001, 2000, 1e9, math.inf]
        outside = [score({"m": 1e300, "size_bytes": float(x)}, "m", direction, budgets) for x in sizes]
        assert min(inside) > max(outside)
        assert outside == sorted(outside, reverse=True)
        assert len(set(outside)) == len(outside)
    assert score({"m": 0.7, "size_bytes": 2000}, "m", "max", budgets) == pytest.approx(-1 - math.log(2))


def test_forgiving_factor_gives_what_it_says():
    def worth(accuracy, size, **kwargs):
        return forgiving_score({"a": accuracy, "s": size}, "a", "max", "s", 1000, **kwargs)

    assert worth(0.9, 1000) == pytest.approx(0.9)
    assert worth(0.9, 500) == pytest.approx(0.9 * 1.08)
    assert worth(0.9, 4000) == pytest.approx(0.9 * 0.84)
    assert worth(0.9, 100, percent=5, rate=10) == pytest.approx(0.9 * 1.05)
    assert worth(-0.9, 500) > worth(-0.9, 1000), "smaller is never worse"
    loss = {"loss": 2.0, "s": 500}
    assert forgiving_score(loss, "loss", "min", "s", 1000) == pytest.approx(-2.0 * 0.92)
    with pytest.raises(ValueError, match="positive"):
        worth(0.9, 0)
    with pytest.raises(ValueError, match="rate"):
        worth(0.9, 5, rate=1)
    with pytest.raises(ValueError, match="'s'"):
        forgiving_score({"a": 1}, "a", "max", "s", 1000)


@pytest.mark.parametrize(
    ("names", "direction"),
    [
        (["size_bytes", "tflite_bytes", "macs", "energy_pj", "latency_ms", "parameters"], "min"),
        (["val_loss", "loss", "val_mean_squared_error", "max_abs_error", "mse", "val_mae"], "min"),
        (["val_accuracy", "acc", "sparse_categorical_accuracy", "auc", "val_precision", "recall"], "max"),
        (["f1_score", "r2_score", "mean_io_u", "cosine_similarity", "val_true_positives"], "max"),
        (["false_positives", "kl_divergence"], "min"),
    ],
)
def test_directions_that_are_known(names, direction):
    assert {name: direction_of(name) for name in names} == dict.fromkeys(names, direction)


def test_an_unknown_direction_has_to_be_said():
    with pytest.raises(ValueError, match=r'keras_tuner.Objective\(.val_psnr., "max"\)'):
        direction_of("val_psnr")


def test_sizes_are_told_from_metrics():
    assert all(map(is_size, ["size_bytes", "packed_bytes", "macs", "latency_ms"]))
    assert not any(map(is_size, ["val_accuracy", "val_loss"]))
