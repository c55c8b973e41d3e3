"""Schedules against their formulas, and their updates against a list of all of them."""

import math
import os
import pathlib
import subprocess
import sys
from fractions import Fraction

import keras
import numpy as np
import pytest

from keras_squeeze import schedules
from keras_squeeze.schedules import Constant, Cosine, Exponential, OneCycle, PolynomialDecay, Steps

# Values.


@pytest.mark.parametrize("step", [10, 20, 60, 110])
def test_polynomial_decay_as_published(step):
    """Zhu & Gupta 2017, equation 1: `s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3`."""
    schedule = PolynomialDecay(0.9, begin=10, end=110)
    assert schedule(step) == pytest.approx(0.9 + (0.0 - 0.9) * (1 - (step - 10) / (110 - 10)) ** 3, abs=1e-12)


def decay(initial, final, p, power=3):
    return final + (initial - final) * (1 - p) ** power


def cosine(initial, final, p):
    return final + (initial - final) * (1 + math.cos(math.pi * p)) / 2


def exponential(initial, final, p):
    """The density moves geometrically from `1 - initial` to `1 - final`."""
    return 1 - (1 - initial) ** (1 - p) * (1 - final) ** p


def one_cycle(initial, final, p):
    def published(p):
        return (1 + math.exp(-14 + 6)) / (1 + math.exp(-14 * p + 6))

    return initial + (final - initial) * (published(p) - published(0)) / (published(1) - published(0))


def five_steps(initial, final, p):
    """As many fifths of the way, in the logarithm of the density, as are complete."""
    return exponential(initial, final, Fraction(math.floor(5 * p), 5))


@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.9), (0.3, 0.8), (0.5, 0.5), (0.8, 0.2), (0.0, 0.0)])
@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (PolynomialDecay, decay),
        (lambda *args: PolynomialDecay(*args, power=1.5), lambda i, f, p: decay(i, f, p, 1.5)),
        (Cosine, cosine),
        (Exponential, exponential),
        (OneCycle, one_cycle),
        (Steps, five_steps),
    ],
    ids=["PolynomialDecay", "power 1.5", "Cosine", "Exponential", "OneCycle", "Steps"],
)
def test_values_follow_the_formula(make, formula, initial, final):
    begin, end = 7, 107
    schedule = make(final, initial, begin, end)
    for step in range(150):
        position = min(max(Fraction(step - begin, end - begin), Fraction(0)), Fraction(1))
        assert schedule(step) == pytest.approx(float(formula(initial, final, position)), abs=1e-9)


def test_constant_jumps_at_its_begin():
    assert [Constant(0.7, begin=3)(step) for step in range(6)] == [0, 0, 0, 0.7, 0.7, 0.7]


def test_constant_jumps_at_once_by_default():
    assert Constant(0.7)(0) == 0.7
    assert Constant(0.7).span() == (0, 0)


@pytest.mark.parametrize("make", [PolynomialDecay, Cosine, Exponential, OneCycle, Steps])
def test_a_span_of_no_steps_is_one_jump(make):
    schedule = make(0.7, initial=0.2, begin=3, end=3)
    assert [schedule(step) for step in range(6)] == [0.2, 0.2, 0.2, 0.7, 0.7, 0.7]


# Times.


@pytest.mark.parametrize(
    ("begin", "end", "total", "span"),
    [
        (0.0, 0.75, 1000, (0, 750)),
        (0.1, 1.0, 1000, (100, 1000)),
        (0.0, 0.0, 1000, (0, 0)),
        (0.25, 0.5, 7, (2, 4)),  # 1.75 and 3.5, rounded
        (5, 60, None, (5, 60)),
        (5, 60, 10, (5, 60)),
        (5, 0.5, 1000, (5, 500)),
        (0.5, 600, 1000, (500, 600)),
        (0.0, 60, None, (0, 60)),
        (np.int64(5), np.int32(60), None, (5, 60)),
        (0, 1, 1000, (0, 1)),  # an int is a number of steps, also 1
        (1.0, 1.0, 1000, (1000, 1000)),
    ],
)
def test_ints_are_steps_and_floats_fractions_of_the_run(begin, end, total, span):
    assert PolynomialDecay(0.5, begin=begin, end=end).span(total) == span


@pytest.mark.parametrize("times", [{"begin": 0, "end": 0.75}, {"begin": 0.1, "end": 60}, {}])
def test_fractions_of_an_unknown_number_of_steps(times):
    schedule = PolynomialDecay(0.5, **times)
    for ask in (schedule.span, lambda total: schedule(3, total), lambda total: schedule.last_update(3, total)):
        with pytest.raises(ValueError, match="steps_per_epoch"):
            ask(None)


def test_begin_after_end_once_the_number_of_steps_is_known():
    schedule = PolynomialDecay(0.5, begin=600, end=0.5)
    assert schedule.span(1200) == (600, 600)
    with pytest.raises(ValueError, match=r"begin=600 \(step 600\), end=0.5 \(step 500\)"):
        schedule.span(1000)


# Updates.


def assert_updates_are(schedule, updates, total=None):
    for step in range(-2, updates[-1] + 5):
        assert schedule.last_update(step, total) == max((u for u in updates if u <= step), default=None)
        assert schedule.next_update(step, total) == min((u for u in updates if u > step), default=None)


@pytest.mark.parametrize("frequency", [1, 2, 3, 7, 10, 11, 50, 1000])
@pytest.mark.parametrize(("begin", "end"), [(0, 30), (5, 37), (4, 5), (6, 6), (0, 0)])
def test_updates_come_every_so_many_steps_and_at_the_end_whatever_divides(begin, end, frequency):
    schedule = PolynomialDecay(0.5, begin=begin, end=end, frequency=frequency)
    assert_updates_are(schedule, sorted({*range(begin, end + 1, frequency), end}))


def test_updates_of_fractional_times():
    schedule = Cosine(0.5, begin=0.1, end=0.5, frequency=15)
    assert_updates_are(schedule, [10, 25, 40, 50], total=100)


def updates_of(schedule, total=None):
    update, updates = schedule.next_update(-1, total), []
    while update is not None:
        updates.append(update)
        update = schedule.next_update(update, total)
    return updates


@pytest.mark.parametrize("span", [1, 2, 99, 100])
def test_a_short_span_is_updated_at_every_step(span):
    assert_updates_are(OneCycle(0.5, begin=3, end=3 + span), list(range(3, 3 + span + 1)))


@pytest.mark.parametrize("span", [100, 101, 199, 200, 250, 999, 12345, 10**6])
def test_a_long_span_is_divided_evenly_into_at_most_a_hundred(span):
    updates = updates_of(PolynomialDecay(0.5, begin=3, end=3 + span))
    assert (updates[0], updates[-1]) == (3, 3 + span)
    (every,) = set(np.diff(updates[:-1]))
    assert updates[-1] - updates[-2] <= every
    assert every == math.ceil(Fraction(span, 100))  # one step less would be more than a hundred


@pytest.mark.parametrize("num_steps", [1, 2, 5, 7, 30])
@pytest.mark.parametrize(("begin", "end"), [(0, 30), (5, 36), (4, 5), (6, 6)])
def test_steps_are_updated_where_they_jump(begin, end, num_steps):
    schedule = Steps(0.9, begin=begin, end=end, num_steps=num_steps)
    jumps = {begin + math.ceil(Fraction((end - begin) * jump, num_steps)) for jump in range(num_steps + 1)}
    assert_updates_are(schedule, sorted(jumps))
    for step in range(begin + 1, end + 1):
        assert (schedule(step) > schedule(step - 1)) == (step in jumps)


def test_constant_is_updated_once():
    assert_updates_are(Constant(0.5, begin=4), [4])
    assert_updates_are(Constant(0.5, begin=0.5), [50], total=100)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"final": 80}, ValueError, r"`final` must be in \[0, 1\).*final=80.*for 80 % pass 0\.8"),
        ({"final": 1.0}, ValueError, r"Received: final=1\.0"),
        ({"final": -0.1}, ValueError, r"Received: final=-0\.1"),
        ({"final": math.nan}, ValueError, "Received: final=nan"),
        ({"final": math.inf}, ValueError, "Received: final=inf"),
        ({"final": True}, TypeError, "`final` must be a number.*Received: final=True"),
        ({"final": "x"}, TypeError, "Received: final='x'"),
        ({"final": None}, TypeError, "Received: final=None"),
        ({"initial": 1.5}, ValueError, r"Received: initial=1\.5"),
        ({"begin": -1}, ValueError, "`begin` must not be negative. Received: begin=-1"),
        ({"begin": -0.5}, ValueError, r"Received: begin=-0\.5"),
        ({"end": 1.5}, ValueError, r"optimizer steps are an int.*Received: end=1\.5"),
        ({"end": 100.0}, ValueError, r"Received: end=100\.0"),
        ({"end": math.nan}, ValueError, "Received: end=nan"),
        ({"end": True}, TypeError, "Received: True"),
        ({"end": "0.5"}, TypeError, "Received: '0.5'"),
        ({"begin": 20, "end": 10}, ValueError, "begin=20, end=10"),
        ({"begin": 0.9, "end": 0.5}, ValueError, r"begin=0\.9, end=0\.5"),
        ({"frequency": 0}, ValueError, "Received: frequency=0"),
        ({"frequency": -5}, ValueError, "Received: frequency=-5"),
        ({"frequency": True}, ValueError, "Received: frequency=True"),
        ({"frequency": 0.1}, ValueError, r"Received: frequency=0\.1"),
        ({"power": 0}, ValueError, "`power` must be a positive number. Received: power=0"),
        ({"power": math.nan}, ValueError, "Received: power=nan"),
        ({"power": "3"}, ValueError, "Received: power='3'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        PolynomialDecay(**{"final": 0.5, **arguments})


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, None])
def test_bad_number_of_steps(num_steps):
    with pytest.raises(ValueError, match=f"Received: num_steps={num_steps}"):
        Steps(0.5, num_steps=num_steps)


# get


@pytest.mark.parametrize("number", [0, 0.0, 0.5, np.float64(0.5), np.float32(0.5)])
def test_a_number_is_the_final_sparsity_of_polynomial_decay(number):
    schedule = schedules.get(number)
    assert type(schedule) is PolynomialDecay
    assert schedule.get_config() == PolynomialDecay(float(number)).get_config()


def test_a_schedule_stays_itself():
    schedule = Cosine(0.5)
    assert schedules.get(schedule) is schedule


def test_a_config_becomes_its_schedule():
    schedule = schedules.get(keras.saving.serialize_keras_object(Steps(0.9, num_steps=3)))
    assert type(schedule) is Steps
    assert schedule.get_config() == Steps(0.9, num_steps=3).get_config()


@pytest.mark.parametrize("number", [80, 1, 1.0, -0.1, math.nan])
def test_a_number_that_is_no_sparsity(number):
    with pytest.raises(ValueError, match=f"Received: sparsity={number}"):
        schedules.get(number)


@pytest.mark.parametrize("identifier", ["polynomial", None, True, [0.5], object(), PolynomialDecay, lambda step: 0.5])
def test_what_is_no_schedule(identifier):
    with pytest.raises(TypeError, match=r"A schedule must be.*Received: "):
        schedules.get(identifier)


def test_the_config_of_something_else_is_no_schedule():
    with pytest.raises(TypeError, match=r"A schedule must be.*Received: "):
        schedules.get(keras.saving.serialize_keras_object(keras.losses.MeanSquaredError()))


NOT_NEEDED = "tensorflow_model_optimization keras_tuner matplotlib ai_edge_litert pandas sklearn"


def test_pruning_imports_nothing_that_it_does_not_need():
    """In the process of this test their import fails, except that of rich, which Keras itself needs."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED.split()!r}))
import keras, tensorflow
before = set(sys.modules)
import keras_squeeze
keras_squeeze.MagnitudePruning(0.5)
print([name for name in set(sys.modules) - before if name.partition('.')[0] in {[*NOT_NEEDED.split(), "rich"]!r}])
"""
    root = pathlib.Path(schedules.__file__).parents[1]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert done.stdout == "[]\n", done.stderr
