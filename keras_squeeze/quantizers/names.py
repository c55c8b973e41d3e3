"""Quantizers by name."""

import re
from collections.abc import Mapping

from keras_squeeze.quantizers.affine import Affine
from keras_squeeze.quantizers.binary import Binary
from keras_squeeze.quantizers.fixed_point import FixedPoint
from keras_squeeze.quantizers.quantizer import Quantizer
from keras_squeeze.quantizers.ternary import Ternary

NAMES: Mapping[str, Quantizer] = {
    "int8": Affine(8),
    "int4": Affine(4),
    "int2": Affine(2),
    "fixed8": FixedPoint(8),
    "ternary": Ternary(),
    "binary": Binary(),
    "binary_connect": Binary(scaled=False, clip=True),
    "xnor": Binary(inputs="straight_through"),
}
_NUMBERED = {"int": Affine, "fixed": FixedPoint}


def get(identifier) -> Quantizer | None:
    """A quantizer by its name, itself, or None.

    Args:
        identifier: A quantizer, None, or a string: `"int8"`, `"int4"`, `"int2"`, `"fixed8"` (any number of bits from 2
            to 16 in place of these), `"ternary"`, `"binary"`, `"binary_connect"`, `"xnor"`.

    Raises:
        ValueError: the name is not known.
        TypeError: it is neither.
    """
    if identifier is None or isinstance(identifier, Quantizer):
        return identifier
    if not isinstance(identifier, str):
        raise TypeError(
            "A quantizer must be a name, or an object of `keras_squeeze.quantizers` such as Affine(4), or None. "
            f"Received: {identifier!r}"
        )
    numbered = re.fullmatch(r"(int|fixed)(\d+)", identifier)
    if numbered:
        return _NUMBERED[numbered[1]](int(numbered[2]))
    if identifier not in NAMES:
        raise ValueError(
            f"Unknown quantizer. Received: {identifier!r}. Known: {', '.join(map(repr, NAMES))}; int and fixed take "
            "any number of bits from 2 to 16."
        )
    return NAMES[identifier]
