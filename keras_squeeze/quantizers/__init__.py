"""Quantizers: which grid a tensor is rounded to, and how the grid follows from its values."""

from keras_squeeze.quantizers.affine import RANGES, Affine
from keras_squeeze.quantizers.binary import Binary
from keras_squeeze.quantizers.fixed_point import FixedPoint
from keras_squeeze.quantizers.learned_step import LearnedStep
from keras_squeeze.quantizers.names import NAMES, get
from keras_squeeze.quantizers.quantizer import Quantizer
from keras_squeeze.quantizers.ternary import Ternary
from keras_squeeze.quantizers.uniform_quantizer import Grid, UniformQuantizer

__all__ = [
    "NAMES",
    "RANGES",
    "Affine",
    "Binary",
    "FixedPoint",
    "Grid",
    "LearnedStep",
    "Quantizer",
    "Ternary",
    "UniformQuantizer",
    "get",
]
