"""How many mask updates a run gets: what it can pay for, at least eight, and what `frequency` says."""

import keras
import numpy as np
import pytest
from networks import ZerosAtEveryStep, residual_convnet, small_convnet

import keras_squeeze as ks
from keras_squeeze.schedules import UPDATES_BY_DEFAULT
from keras_squeeze.training.update_cost import (
    CONVOLUTION,
    FEWEST,
    SHARE,
    STEP,
    WEIGHTS,
    Cost,
    affordable_updates,
    step_time,
)


def test_cost_by_hand():
    assert Cost(fixed=10, per_array=2, per_thousand=3).of([1000, 500]) == 10 + 2 * 2 + 3 * 1.5


def test_affordable_updates_by_hand():
    update = WEIGHTS.of([1_000_000])
    assert affordable_updates(2000, [(1000, 1000)], update) == int(SHARE * 2000 * STEP.of([1_000_000]) / update)
    step = STEP.of([9 * 64 * 64, 64]) + CONVOLUTION
    assert affordable_updates(500, [(3, 3, 64, 64), (64,)], update) == int(SHARE * 500 * step / update)
    assert affordable_updates(1, [(10,)], update) == 1
    assert affordable_updates(10**9, [(10,)], update) == UPDATES_BY_DEFAULT


@pytest.mark.parametrize("steps", [30, 100, 1000, 30_000])
def test_updates_cost_at_most_their_share_unless_they_are_the_fewest(steps):
    model = small_convnet()
    pruning = ks.MagnitudePruning(0.5)
    pruning.attach(model, model.optimizer, total_steps=steps)
    updates, step = 0, 0
    while pruning.next_update is not None:
        step = pruning.next_update
        pruning.update(step)
        updates += 1
    pruning.detach()
    trainable = [tuple(v.shape) for v in model.trainable_variables]
    paid = WEIGHTS.of([kernel.size for kernel in map(np.asarray, (v for v in model.get_weights() if v.ndim > 1))])
    affordable = SHARE * steps * step_time(trainable) / paid
    assert updates - 1 <= max(affordable, FEWEST)  # the one at the beginning prunes nothing
    assert updates >= min(FEWEST, 0.75 * steps)
    assert step == round(0.75 * steps)


@pytest.mark.parametrize("make", [ks.MagnitudePruning, ks.NeuronPruning])
def test_frequency_is_obeyed(digits, make):
    x, y = digits
    model = residual_convnet()
    seen = ZerosAtEveryStep()
    schedule = ks.schedules.PolynomialDecay(0.6, begin=0, end=25, frequency=5)
    pruning = make(schedule, round_to=1) if make is ks.NeuronPruning else make(schedule)
    model.fit(x, y, batch_size=64, verbose=0, callbacks=[pruning, seen])
    changes = (np.flatnonzero(np.diff(seen.at_batch)) + 2).tolist()
    wanted = {5, 10, 15, 20, 25} if make is ks.MagnitudePruning else {8, 10, 15, 20, 25}  # eight batches of gradients
    assert set(changes) <= wanted | {5}
    assert len(changes) >= 4


def test_a_run_too_short_for_eight_updates_at_that_price_says_so(digits, capsys):
    x, y = digits
    keras.utils.set_random_seed(0)
    small_convnet().fit(x, y, batch_size=64, verbose=2, callbacks=[ks.MagnitudePruning(0.5)])
    assert "its mask updates took more than" in capsys.readouterr().out
    schedule = ks.schedules.PolynomialDecay(0.5, frequency=1)
    small_convnet().fit(x, y, batch_size=64, verbose=2, callbacks=[ks.MagnitudePruning(schedule)])
    assert "mask updates took more than" not in capsys.readouterr().out
