"""Masks and schedules against the real tensorflow-model-optimization, bit for bit.

The weights are random floats, so that there are no ties: of equal weights tfmot keeps all, this package exactly so many
as asked for.
"""

import os
import warnings

import numpy as np
import pytest
import tensorflow as tf

from keras_squeeze import schedules
from keras_squeeze.weight_pruning.criteria import Magnitude
from keras_squeeze.weight_pruning.masks import select_masks
from keras_squeeze.weight_pruning.patterns import Blocks, NOfM


@pytest.fixture(scope="module")
def tfmot():
    """Its import sets TF_USE_LEGACY_KERAS, which gives everything after it another `tf.keras`."""
    with pytest.MonkeyPatch.context() as environment, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        environment.setenv("TF_USE_LEGACY_KERAS", "0")  # so that what is there now is restored afterwards
        assert tf.keras.__version__.startswith("3.")  # the first access decides, and it is this one
        import tensorflow_model_optimization as tfmot

        return tfmot


@pytest.fixture(scope="module")
def pruning_of(tfmot):
    """`(schedule, weight, ...)` -> tfmot's pruning of one weight, its mask, and its step, to be moved by hand."""
    from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning

    def make(schedule, weight, block_size=(1, 1), pooling="AVG", m_by_n=None):
        step = tf.Variable(1)
        mask, threshold = tf.Variable(tf.ones_like(weight)), tf.Variable(0.0)
        pruning = Pruning(lambda: step, [(weight, mask, threshold)], schedule, block_size, pooling, m_by_n)
        return pruning, mask, step

    return make


@pytest.fixture
def tfmot_mask(tfmot, pruning_of):
    """`(weight, sparsity, ...)` -> the mask of tfmot for a constant sparsity."""

    def mask_of(weight, sparsity, **pattern):
        schedule = tfmot.sparsity.keras.ConstantSparsity(sparsity, begin_step=0, frequency=1)
        pruning, mask, _ = pruning_of(schedule, tf.Variable(weight), **pattern)
        pruning.conditional_mask_update()
        return mask.numpy().astype(bool)

    return mask_of


def our_mask(weight, sparsity, pattern="unstructured"):
    (mask,) = select_masks([Magnitude().scores(weight)], sparsity, pattern=pattern)
    return mask


def random_weight(rng, rank, longest):
    return rng.standard_normal(rng.integers(1, longest, rank)).astype("float32")


def test_the_import_leaves_keras_as_it_was(tfmot):
    assert os.environ.get("TF_USE_LEGACY_KERAS") != "1"
    assert tf.keras.__version__.startswith("3.")


# Masks.


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_unstructured_masks(tfmot_mask, rank):
    rng = np.random.default_rng(rank)
    for _ in range(50):
        weight = random_weight(rng, rank, {1: 500, 2: 40, 3: 12, 4: 8}[rank])
        sparsity = float(rng.choice([0, 0.5, 0.9, rng.random(), rng.random() ** 0.1]))
        np.testing.assert_array_equal(our_mask(weight, sparsity), tfmot_mask(weight, sparsity), err_msg=str(sparsity))


def test_sparsities_at_which_rounding_decides(tfmot_mask):
    """`size * (1 - sparsity)` is half an odd number, or one step of a float beside it, in either precision."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        size = int(rng.integers(2, 3000))
        weight = rng.standard_normal((size, 1)).astype("float32")
        border = 1 - (int(rng.integers(1, size)) - 0.5) / size
        for sparsity in (
            border,
            np.nextafter(border, 0),
            np.nextafter(border, 1),
            float(np.nextafter(np.float32(border), np.float32(0))),
            float(np.nextafter(np.float32(border), np.float32(1))),
        ):
            assert our_mask(weight, sparsity).sum() == tfmot_mask(weight, sparsity).sum(), (size, sparsity)


@pytest.mark.parametrize(("pooling", "ours"), [("AVG", "mean"), ("MAX", "max")])
def test_blocks(tfmot_mask, pooling, ours):
    """The last block may be one row or column short. One that spans a whole dimension tfmot cannot have, and where
    more is missing, it pools windows other than the blocks (see below)."""
    rng = np.random.default_rng(6)
    for _ in range(80):
        block = tuple(int(size) for size in rng.integers(1, 6, 2))
        shape = [int(size * rng.integers(2, 7) - rng.integers(0, min(size, 2))) for size in block]
        weight = rng.standard_normal(shape).astype("float32")
        sparsity = float(rng.choice([0, 0.5, rng.random()]))
        np.testing.assert_array_equal(
            our_mask(weight, sparsity, Blocks(block, ours)),
            tfmot_mask(weight, sparsity, block_size=block, pooling=pooling),
            err_msg=f"{block}, {shape}, {sparsity}",
        )


def test_where_a_block_is_short_of_more_tfmot_scores_it_by_other_values(tfmot_mask):
    """Blocks of four over six columns. tfmot pads one column on either side when it pools, so that the windows are
    columns 0-2 and 3-5; yet what it prunes are columns 0-3 and 4-5. Here a block is scored by its own values."""
    weight = np.float32([[0, 0, 0, 9, 1, 2], [3, 3, 3, 3, 3, 3]])  # means 0, 4, 3, 3 there; 2.25, 1.5, 3, 3 here
    keep = np.array([[False, True], [True, True]])
    blocks = {"block_size": (1, 4), "pooling": "AVG"}
    np.testing.assert_array_equal(tfmot_mask(weight, 0.25, **blocks), np.repeat(keep, [4, 2], axis=1))
    keep = np.array([[True, False], [True, True]])
    np.testing.assert_array_equal(our_mask(weight, 0.25, (1, 4)), np.repeat(keep, [4, 2], axis=1))


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize(("zeros", "of"), [(2, 4), (1, 4), (3, 4), (1, 2), (2, 3), (5, 8)])
def test_n_of_m(tfmot_mask, zeros, of, rank):
    """The lengths do not divide: there are tails of every length."""
    rng = np.random.default_rng(7)
    for length in range(1, 2 * of + 2):
        weight = rng.standard_normal((*rng.integers(1, 4, rank - 2), length, rng.integers(1, 7))).astype("float32")
        pattern = NOfM(of - zeros, of)
        np.testing.assert_array_equal(
            our_mask(weight, pattern.max_sparsity, pattern), tfmot_mask(weight, 0.0, m_by_n=(zeros, of))
        )


# Schedules.

DECAYS = [
    {"initial_sparsity": 0.0, "final_sparsity": 0.9, "begin_step": 10, "end_step": 110, "frequency": 10},
    {"initial_sparsity": 0.3, "final_sparsity": 0.8, "begin_step": 0, "end_step": 50, "frequency": 7},
    {"initial_sparsity": 0.5, "final_sparsity": 0.875, "begin_step": 3, "end_step": 40, "frequency": 1, "power": 1},
    {"initial_sparsity": 0.1, "final_sparsity": 0.99, "begin_step": 5, "end_step": 6, "frequency": 100, "power": 2},
]


@pytest.fixture(params=DECAYS)
def decay(tfmot, request):
    return tfmot.sparsity.keras.PolynomialDecay(**request.param)


@pytest.fixture(params=[(0.5, 4, 30, 10), (0.5, 4, 30, 7), (0.8, 0, -1, 10), (0.8, 5, -1, 100)])
def constant(tfmot, request):
    return tfmot.sparsity.keras.ConstantSparsity(*request.param)


def value(tfmot_schedule, step):
    return float(tfmot_schedule(tf.constant(step))[1])


def is_update(tfmot_schedule, step):
    return bool(tfmot_schedule(tf.constant(step))[0])


def test_a_tfmot_schedule_keeps_its_values(decay):
    ours = schedules.get(decay)
    assert [ours(step) for step in range(150)] == [value(decay, step) for step in range(150)]
    assert (ours.initial, ours.final) == (value(decay, decay.begin_step), value(decay, decay.end_step))


def test_a_constant_tfmot_schedule_keeps_its_values(constant):
    ours = schedules.get(constant)
    assert [ours(step, 100) for step in range(120)] == [value(constant, step) for step in range(120)]


def assert_updates_as_tfmot_and_at_the_end(schedule, end, total_steps):
    ours = schedules.get(schedule)
    updates = sorted({*(step for step in range(end + 1) if is_update(schedule, step)), end})
    for step in range(end + 20):
        assert ours.last_update(step, total_steps) == max((u for u in updates if u <= step), default=None)
        assert ours.next_update(step, total_steps) == min((u for u in updates if u > step), default=None)


def test_a_tfmot_schedule_keeps_its_updates(decay):
    assert_updates_as_tfmot_and_at_the_end(decay, decay.end_step, None)


def test_a_constant_tfmot_schedule_keeps_its_updates(constant):
    never_ends = constant.end_step == -1
    assert_updates_as_tfmot_and_at_the_end(constant, 101 if never_ends else constant.end_step, 101)


def test_our_polynomial_decay_is_that_of_tfmot(decay):
    config = decay.get_config()["config"]
    ours = schedules.PolynomialDecay(
        config["final_sparsity"],
        config["initial_sparsity"],
        config["begin_step"],
        config["end_step"],
        config["frequency"],
        config["power"],
    )
    for step in range(150):
        assert ours(step) == pytest.approx(value(decay, step), abs=1e-6)


def test_masks_over_a_whole_schedule(decay, pruning_of):
    """Weights move between the updates; what is pruned stays zero."""
    rng = np.random.default_rng(8)
    weight = tf.Variable(rng.standard_normal((9, 23)).astype("float32"))
    pruning, mask, step = pruning_of(decay, weight)
    ours = schedules.get(decay)
    expected, updates = np.ones(weight.shape, bool), 0
    for now in range(1, 130):
        step.assign(now)
        if is_update(decay, now):
            expected = our_mask(weight.numpy(), ours(now))
            updates += 1
        pruning.conditional_mask_update()
        pruning.weight_mask_op()
        np.testing.assert_array_equal(mask.numpy().astype(bool), expected)
        moved = weight.numpy() + 0.1 * rng.standard_normal(weight.shape).astype("float32")
        weight.assign(np.where(expected, moved, 0))
    assert updates >= 1


# What is refused.


def test_a_tfmot_schedule_without_times(tfmot):
    class Timeless(tfmot.sparsity.keras.PruningSchedule):
        begin_step = 0

        def __call__(self, step):
            return True, 0.5

        def get_config(self):
            return {}

    with pytest.raises(TypeError, match=r"lacks: end_step, frequency"):
        schedules.get(Timeless())


def test_a_tfmot_schedule_has_no_config_of_ours(decay):
    with pytest.raises(TypeError, match=r"use one of keras_squeeze.schedules instead"):
        schedules.get(decay).get_config()
