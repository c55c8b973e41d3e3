"""Argument checks: what passes, what does not, and that the message says what was received."""

import math

import numpy as np
import pytest

from keras_squeeze import checks


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(2)])
def test_positive_int_takes_integers_of_python_and_numpy(value):
    returned = checks.positive_int("runs", value)
    assert returned == value
    assert type(returned) is int


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None, np.bool_(True), [1], math.nan])
def test_positive_int_refuses(value):
    with pytest.raises(ValueError, match=r"`runs` must be an int, at least 1. Received: runs="):
        checks.positive_int("runs", value)


def test_optional_int():
    assert checks.positive_int("runs", None, optional=True) is None
    assert checks.positive_int("runs", 4, optional=True) == 4
    with pytest.raises(ValueError, match=r"`runs` must be None or an int, at least 1. Received: runs=0"):
        checks.positive_int("runs", 0, optional=True)


def test_non_negative_int():
    assert checks.non_negative_int("seed", 0) == 0
    for value in (-1, False, 0.5):
        with pytest.raises(ValueError, match=rf"`seed` must be an int, at least 0. Received: seed={value}"):
            checks.non_negative_int("seed", value)


@pytest.mark.parametrize(
    ("check", "zero_is_allowed"), [(checks.non_negative_number, True), (checks.positive_number, False)]
)
def test_numbers(check, zero_is_allowed):
    for value in (1, 0.5, np.float32(2)):
        assert check("share", value) is value
    refused = [-1e-9, -1, math.inf, math.nan, *([] if zero_is_allowed else [0, 0.0])]
    for value in refused:
        with pytest.raises(ValueError, match=r"`share` must be a number, .* Received: share="):
            check("share", value)
    for value in (True, "0.5", None, []):
        with pytest.raises(TypeError, match=r"`share` must be a number, .* Received: share="):
            check("share", value)
    if zero_is_allowed:
        assert check("share", 0) == 0


def test_fraction_tells_percent_from_fractions():
    assert checks.fraction("sparsity", np.float32(0.5)) == 0.5
    assert checks.fraction("sparsity", 0) == 0.0
    with pytest.raises(ValueError, match=r"Received: sparsity=80. Sparsity is a fraction: for 80 % pass 0.8."):
        checks.fraction("sparsity", 80)
    for value in (1, 1.0, -0.1, math.nan, math.inf, 1e9):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            checks.fraction("sparsity", value)
    for value in (True, "0.5", None):
        with pytest.raises(TypeError, match="Received: sparsity="):
            checks.fraction("sparsity", value)


@pytest.mark.parametrize("choices", [("a", "b"), {"a": 1, "b": 2}])
def test_one_of(choices):
    assert checks.one_of("kind", "b", choices) == "b"
    for value in ("c", None, ["a"]):
        with pytest.raises(ValueError, match=r"`kind` must be one of 'a', 'b'. Received: kind="):
            checks.one_of("kind", value, choices)


def test_boolean():
    assert checks.boolean("sparse", True) is True
    assert checks.boolean("sparse", None, optional=True) is None
    for value in (1, "yes", None, np.bool_(True)):
        with pytest.raises(TypeError, match=r"`sparse` must be a bool. Received: sparse="):
            checks.boolean("sparse", value)
    with pytest.raises(TypeError, match=r"`sparse` must be a bool or None. Received: sparse=0"):
        checks.boolean("sparse", 0, optional=True)
