"""The laws that every schedule, criterion and pattern obeys. A new one is one more row here."""

import inspect
import itertools
import json
import math

import keras
import numpy as np
import pytest

import keras_squeeze as ks
from keras_squeeze import schedules
from keras_squeeze.introspection.selection import select_layers
from keras_squeeze.weight_pruning import criteria, masks, patterns, weight_allocation

# Each row: an instance with no argument left at its default where that can be.
SCHEDULES = [
    schedules.Constant(0.7, begin=0.25),
    schedules.PolynomialDecay(0.9, initial=0.2, begin=0.1, end=0.8, frequency=3, power=2),
    schedules.Cosine(0.8, initial=0.1, begin=10, end=90, frequency=7),
    schedules.Exponential(0.9, initial=0.3, begin=0.0, end=70, frequency=9),
    schedules.OneCycle(0.6, initial=0.05, begin=20, end=1.0, frequency=1),
    schedules.Steps(0.95, initial=0.5, begin=0.05, end=0.6, num_steps=4),
]

# Each row: an instance, and the name by which `criterion=` finds one.
CRITERIA = [
    (criteria.Magnitude(), "magnitude"),
    (criteria.LAMP(), "lamp"),
    (criteria.Random(seed=3), "random"),
    (criteria.Movement(num_batches=2), "movement"),
    (criteria.SNIP(num_batches=None), "snip"),
]

# Each row: an instance, and what `pattern=` takes for it (None: only the instance).
PATTERNS = [
    (patterns.Unstructured(), "unstructured"),
    (patterns.NOfM(2, 4), "2:4"),
    (patterns.NOfM(1, 2), "1:2"),
    (patterns.Blocks([1, 4]), (1, 4)),
    (patterns.Blocks([2, 2], pooling="max"), None),
]

VARIANTS = [
    *((schedule, schedules) for schedule in SCHEDULES),
    *((criterion, criteria) for criterion, _ in CRITERIA),
    *((pattern, patterns) for pattern, _ in PATTERNS),
]
BY_NAME = [
    *((criterion, name, criteria.get) for criterion, name in CRITERIA),
    *((pattern, name, patterns.get_pattern) for pattern, name in PATTERNS if name is not None),
]


def name_of(value):
    return value.__name__ if inspect.ismodule(value) or inspect.isfunction(value) else repr(value)


def behavior(variant):
    """What a schedule, criterion or pattern does, as plain data."""
    if isinstance(variant, schedules.Schedule):
        steps = range(-1, TOTAL + 20)
        return [
            (variant(step, TOTAL), variant.last_update(step, TOTAL), variant.next_update(step, TOTAL)) for step in steps
        ]
    rng = np.random.default_rng(0)
    weight, gradient = rng.standard_normal((2, 8, 12)).astype("float32")
    if isinstance(variant, criteria.Criterion):
        return variant.needs_gradients, variant.scores(weight, gradient, path="a/kernel").tolist()
    return [mask.tolist() for mask in masks.select_masks([abs(weight), abs(gradient)], 0.3, pattern=variant)]


# Laws of all.


@pytest.mark.parametrize(("variant", "module"), VARIANTS, ids=name_of)
def test_the_config_survives_json_without_a_scope(variant, module):
    text = json.dumps(keras.saving.serialize_keras_object(variant))
    loaded = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(loaded) is type(variant)
    assert loaded.get_config() == variant.get_config()
    assert behavior(loaded) == behavior(variant)


@pytest.mark.parametrize(("variant", "module"), VARIANTS, ids=name_of)
def test_the_config_holds_every_argument(variant, module):
    assert set(variant.get_config()) == set(inspect.signature(type(variant)).parameters)


@pytest.mark.parametrize(("variant", "module"), VARIANTS, ids=name_of)
def test_where_one_is_asked_for_its_config_may_be_given(variant, module):
    get = patterns.get_pattern if module is patterns else module.get
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(variant)))
    assert behavior(get(config)) == behavior(variant)
    assert get(variant) is variant


@pytest.mark.parametrize(("variant", "module"), VARIANTS, ids=name_of)
def test_repr_is_what_makes_an_equal_one(variant, module):
    again = eval(repr(variant), vars(module))
    assert type(again) is type(variant)
    assert again.get_config() == variant.get_config()


@pytest.mark.parametrize(("variant", "name", "get"), BY_NAME, ids=name_of)
def test_lookup_by_name(variant, name, get):
    assert type(get(name)) is type(variant)
    if isinstance(variant, patterns.Pattern):
        assert get(name).get_config() == variant.get_config()


@pytest.mark.parametrize(
    ("base", "module"),
    [(schedules.Schedule, schedules), (criteria.Criterion, criteria), (patterns.Pattern, patterns)],
    ids=name_of,
)
def test_every_public_class_has_a_row(base, module):
    defined = {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)} - {
        base,
        criteria.GradientCriterion,
        schedules.TfmotSchedule,
    }
    assert defined == {type(variant) for variant, home in VARIANTS if home is module}


@pytest.mark.parametrize(("variant", "module"), VARIANTS, ids=name_of)
def test_every_one_is_documented(variant, module):
    assert type(variant).__doc__.strip()


# Laws of schedules.

TOTAL = 120


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_is_exact_at_both_ends(schedule):
    begin, end = schedule.span(TOTAL)
    assert all(schedule(step, TOTAL) == schedule.initial for step in range(begin))
    assert all(schedule(step, TOTAL) == schedule.final for step in range(end, TOTAL + 20))
    if begin < end:
        assert schedule(begin, TOTAL) == schedule.initial
        assert schedule.initial <= schedule(end - 1, TOTAL) < schedule.final


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_is_bounded_and_monotone(schedule):
    values = [schedule(step, TOTAL) for step in range(TOTAL + 20)]
    assert values == sorted(values)
    assert schedule.initial <= values[0] <= values[-1] <= schedule.final
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if "initial" in s.get_config()], ids=repr)
def test_a_schedule_that_falls_is_monotone_too(schedule):
    falling = type(schedule)(**{**schedule.get_config(), "final": schedule.initial, "initial": schedule.final})
    values = [falling(step, TOTAL) for step in range(TOTAL + 20)]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (falling.initial, falling.final)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_updates_begin_at_the_begin_and_end_at_the_end(schedule):
    begin, end = schedule.span(TOTAL)
    updates = list(itertools.takewhile(lambda step: step is not None, iterate_updates(schedule)))
    assert updates == sorted(set(updates))
    assert (updates[0], updates[-1]) == (begin, end)
    for step in range(-1, TOTAL + 20):
        assert schedule.last_update(step, TOTAL) == max((u for u in updates if u <= step), default=None)
        assert schedule.next_update(step, TOTAL) == min((u for u in updates if u > step), default=None)


def iterate_updates(schedule):
    update = schedule.next_update(-1, TOTAL)
    while True:
        yield update
        update = schedule.next_update(update, TOTAL)


# Laws of criteria.


@pytest.mark.parametrize(("criterion", "name"), CRITERIA, ids=name_of)
@pytest.mark.parametrize("shape", [(5,), (6, 4), (3, 3, 2, 4), (1, 1)])
def test_scores_are_finite_float32_and_do_not_depend_on_the_call(criterion, name, shape):
    rng = np.random.default_rng(1)
    weight, gradient = (rng.standard_normal(shape).astype("float32") for _ in range(2))
    before = weight.copy(), gradient.copy()
    scores = criterion.scores(weight, gradient, path="a/kernel")
    assert scores.dtype == "float32"
    assert scores.shape == shape
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, criterion.scores(weight, gradient, path="a/kernel"))
    np.testing.assert_array_equal([weight, gradient], before)


@pytest.mark.parametrize(("criterion", "name"), CRITERIA, ids=name_of)
def test_where_zero_is_lowest_nothing_is_below_it(criterion, name):
    rng = np.random.default_rng(2)
    weight, gradient = rng.standard_normal((2, 40)).astype("float32")
    weight[::3] = 0
    scores = criterion.scores(weight, gradient, path="a/kernel")
    if criterion.zero_is_lowest:
        assert scores[weight == 0].max() <= scores[weight != 0].min()


# Laws of criterion, allocation and pattern together, on a model.

ALL_WAYS = list(itertools.product([c for c, _ in CRITERIA], weight_allocation.ALLOCATIONS, [p for p, _ in PATTERNS]))


def way_of(value):
    return value if isinstance(value, str) else repr(value)


def two_layers(kernel=None):
    """A compiled model whose hidden layer has a unit that never fires, and data for it."""
    keras.utils.set_random_seed(4)
    hidden = keras.layers.Dense(12, activation="relu", name="hidden")
    model = keras.Sequential([keras.Input((16,)), hidden, keras.layers.Dense(8, name="out")])
    model.compile("sgd", "mse")
    if kernel is not None:
        for layer in model.layers:
            layer.kernel.assign(kernel(layer.kernel.shape))
    hidden.bias.assign([0] * 11 + [-1000])
    rng = np.random.default_rng(5)
    return model, (rng.standard_normal((32, 16)).astype("float32"), rng.standard_normal((32, 8)).astype("float32"))


def prune(model, data, sparsity, criterion, allocation, pattern):
    data = data if criterion.needs_gradients else None
    ks.prune_weights(model, sparsity, criterion=criterion, allocation=allocation, pattern=pattern, data=data)
    return [layer.kernel.numpy() == 0 for layer in model.layers]


def count(zeros):
    return sum(int(z.sum()) for z in zeros)


def assert_sparsity(zeros, target, allocation, pattern):
    """To within half a unit, of every weight or, where all compete, of all together."""
    unit = math.prod(pattern.shape) if isinstance(pattern, patterns.Blocks) else 1
    if allocation == "uniform":
        for z in zeros:
            assert z.sum() == pytest.approx(target * z.size, abs=unit / 2)
    tolerance = unit / 2 * (1 if allocation == "global" else len(zeros))
    assert count(zeros) == pytest.approx(target * sum(z.size for z in zeros), abs=tolerance)


@pytest.mark.parametrize(("criterion", "allocation", "pattern"), ALL_WAYS, ids=way_of)
def test_the_achieved_sparsity_is_the_target_and_pruning_once_more_changes_nothing(criterion, allocation, pattern):
    model, data = two_layers()
    for sparsity in (0.19, 0.45):
        zeros = prune(model, data, sparsity, criterion, allocation, pattern)
        assert_sparsity(zeros, sparsity, allocation, pattern)
    for once, again in zip(zeros, prune(model, data, 0.45, criterion, allocation, pattern), strict=True):
        np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize(("criterion", "allocation", "pattern"), ALL_WAYS, ids=way_of)
def test_masks_are_deterministic_and_exact_under_ties(criterion, allocation, pattern):
    results = [prune(*two_layers(np.ones), 0.45, criterion, allocation, pattern) for _ in range(2)]
    for once, again in zip(*results, strict=True):
        np.testing.assert_array_equal(once, again)
    assert_sparsity(results[0], 0.45, allocation, pattern)


def some_zeros(shape):
    """A tenth of a kernel, among its first values, which win ties; at most one in every group of two or four."""
    values = np.random.default_rng(6).standard_normal(shape)
    values[::4].flat[: values.size // 10] = 0
    return values


# Blocks are left out, which zeros need not fill, and "erk", which may ask for fewer zeros than a weight has.
ONE_BY_ONE = [way for way in ALL_WAYS if way[1] not in ("erk", "auto") and not isinstance(way[2], patterns.Blocks)]


@pytest.mark.parametrize(("criterion", "allocation", "pattern"), ONE_BY_ONE, ids=way_of)
def test_what_is_zero_stays_zero_and_counts(criterion, allocation, pattern):
    """Also where weights that are not zero have no gradient, as those of a unit that never fires."""
    model, data = two_layers(some_zeros)
    before = [layer.kernel.numpy() == 0 for layer in model.layers]
    after = prune(model, data, 0.125, criterion, allocation, pattern)
    for zero_before, zero_after in zip(before, after, strict=True):
        assert zero_after[zero_before].all()
    assert_sparsity(after, 0.125, allocation, pattern)


@pytest.mark.parametrize("pattern", [p for p, _ in PATTERNS if isinstance(p, patterns.NOfM)], ids=repr)
@pytest.mark.parametrize("allocation", weight_allocation.ALLOCATIONS)
def test_n_of_m_is_complete_in_the_model(pattern, allocation):
    model, data = two_layers()
    prune(model, data, pattern.max_sparsity, criteria.Magnitude(), allocation, pattern)
    for weight in select_layers(model).weights:
        lanes = np.moveaxis(weight.variable.numpy(), weight.input_axis, -1)
        kept = np.count_nonzero(lanes.reshape(-1, pattern.m), axis=1)
        assert (kept == pattern.n).all()
