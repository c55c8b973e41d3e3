"""What the operations of an inference cost in energy: an estimate, to compare models with, not a measurement.

The costs are those of a 45 nm process at 0.9 V (Horowitz 2014, "Computing's energy problem", figure 1.1.9):

| operation | pJ |
|---|---:|
| 8-bit integer: add, multiply | 0.03, 0.2 |
| 32-bit integer: add, multiply | 0.1, 3.1 |
| 16-bit float: add, multiply | 0.4, 1.1 |
| 32-bit float: add, multiply | 0.9, 3.7 |
| 32 bits from DRAM | about 640 |

Between them, an addition of integers costs in proportion to its bits, and a product of integers a quadratic function of
them; the two coefficients below are the ones that the two products of the table fix. Newer processes cost less, in
about the same proportions.
"""

import math

_FLOAT = {16: (0.4, 1.1), 32: (0.9, 3.7)}  # add, multiply
_ADD_PER_BIT = 0.1 / 32
_MULTIPLY = (0.002995, 0.001042)  # per bit squared, per bit: 0.2 at 8 bits, 3.1 at 32
_DRAM_PER_BYTE = 640 / 4
_ACCUMULATOR_BITS = 32


def mac_pj(weight_bits: int | None, activation_bits: int | None, float_bits: int = 32) -> float:
    """Picojoules of one multiply-accumulate.

    Args:
        weight_bits, activation_bits: Of the integers that are multiplied; None: a float. Integers of two sizes cost
            what their geometric mean does. With weights of one or two bits (-1, 0, 1) nothing is multiplied.
        float_bits: Of the floats, 16 or 32. Other sizes cost what 32 bits do.
    """
    multiplies = weight_bits is None or weight_bits > 2
    if weight_bits is None or activation_bits is None:
        add, multiply = _FLOAT.get(float_bits, _FLOAT[32])
        return add + multiply * multiplies
    product = weight_bits * activation_bits
    square, linear = _MULTIPLY
    return _ADD_PER_BIT * _ACCUMULATOR_BITS + (square * product + linear * math.sqrt(product)) * multiplies


def dram_pj(num_bytes: float) -> float:
    """Picojoules to read bytes from DRAM once."""
    return _DRAM_PER_BYTE * num_bytes
