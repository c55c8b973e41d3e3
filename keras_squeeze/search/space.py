"""What a search may vary, and the recipe that its choices make."""

import contextlib
import inspect
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_squeeze import checks, quantizers
from keras_squeeze.introspection.selection import compile_patterns, find_layers
from keras_squeeze.recipes.recipe import Recipe, read_mapping
from keras_squeeze.recipes.steps import FineTune, PruneNeurons, PruneWeights, Quantize, Step
from keras_squeeze.schedules import PolynomialDecay

FLOAT_BITS = 32
"""What `bits` is where weights stay in float."""

_NAMES = {8: "int8", 2: "ternary", 1: "binary"}


@dataclass(frozen=True)
class Dimension:
    """One thing that varies, or not: a fixed value, a range of floats, or choices.

    Attributes:
        name: Of the hyperparameter.
        choices: The values; one alone is fixed.
        low, high, step: Of a range instead; `step` may be None.
        logarithmic: Whether values of a range are spread evenly over its logarithm.
    """

    name: str
    choices: tuple = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    logarithmic: bool = False

    @property
    def varies(self) -> bool:
        return not self.choices or len(self.choices) > 1

    @property
    def may_be_positive(self) -> bool:
        return not self.choices or any(value is not None and value > 0 for value in self.choices)

    def where_positive(self, hp, name: str | None = None):
        """A context in which hyperparameters are inactive where this one is 0."""
        positive = [value for value in self.choices if value > 0]
        if not positive or len(positive) == len(self.choices):
            return contextlib.nullcontext()
        return hp.conditional_scope(name or self.name, positive)

    def value(self, hp, name: str | None = None):
        """The value in a trial; `name`: another one for the hyperparameter, such as that of a group."""
        name = name or self.name
        if not self.varies:
            return self.choices[0]
        if self.choices:
            return hp.Choice(name, list(self.choices), default=self.choices[0])
        if self.logarithmic:
            return hp.Float(name, self.low, self.high, sampling="log", default=self.high)
        return hp.Float(name, self.low, self.high, step=self.step, default=self.low)


class CompressionSpace:
    """What a search may vary.

    A number is fixed, two numbers are a range, more than two are choices; `{"values": [...]}` are choices and
    `{"min": ..., "max": ..., "step": ...}` is a range whatever their number.

    Args:
        neurons: Fraction of the neurons to remove, in [0, 1). 0: none.
        sparsity: Fraction of the weights to prune, in [0, 1). A trial with weights of one bit prunes none, since a
            binary grid has no zero.
        bits: Of the weights; always choices. 1 is binary, 2 ternary, 3 to 7 a grid with learned steps, 8 and more
            integers, 32 or None float.
        activation_bits: Of the activations, where weights have fewer than 32; always choices. 32 or None: float.
        criterion: By which neurons go: a name or choices of names, as in `NeuronPruning`.
        allocation: How sparsity is spread: `"auto"`, `"global"`, `"uniform"`, `"erk"`, or choices of these. Within the
            layers of a group it is spread evenly.
        groups: `{name: regular expression}`: groups of layers that get `bits` and `sparsity` of their own, named
            `bits/name` and `sparsity/name`. Layers in no group stay dense and in float. `per_layer` makes a group of
            every layer.
        schedule_end: When pruning ends, as a fraction of its step, in (0, 1].
        learning_rate: Of the optimizer; None: as the model was compiled. Two numbers are a range on a log scale.
        fine_tuning: The part of the epochs for training on at the end, relative to one of the steps before; 0: none.
        distillation: Weight of the teacher's answers in that; see `FineTune`.

    Raises:
        TypeError, ValueError: a value outside its range, or a space in which nothing varies.

    Example:

    ```python
    space = ks.CompressionSpace(neurons=(0.0, 0.7), sparsity=(0.0, 0.95), bits=(8, 4, 2, 1))
    ```
    """

    def __init__(
        self,
        *,
        neurons=(0.0, 0.7),
        sparsity=(0.0, 0.95),
        bits=(8, 4, 2, 1),
        activation_bits=8,
        criterion="auto",
        allocation="auto",
        groups: Mapping[str, str] | None = None,
        schedule_end=0.75,
        learning_rate=None,
        fine_tuning=0.0,
        distillation=0.0,
    ):
        self._given = {name: value for name, value in locals().items() if name != "self"}
        self.neurons = _numbers("neurons", neurons, below=1.0)
        self.sparsity = _numbers("sparsity", sparsity, below=1.0)
        self.bits = _bits("bits", bits)
        self.activation_bits = _bits("activation_bits", activation_bits, least=2)
        self.criterion = _words("criterion", criterion)
        self.allocation = _words("allocation", allocation)
        self.groups = _groups(groups)
        self.schedule_end = _numbers("schedule_end", schedule_end, below=1.0, inclusive=True)
        self.learning_rate = _rate("learning_rate", learning_rate)
        self.fine_tuning = _numbers("fine_tuning", fine_tuning)
        self.distillation = _numbers("distillation", distillation)
        if not any(dimension.varies for dimension in vars(self).values() if isinstance(dimension, Dimension)):
            raise ValueError(
                "Nothing varies in this space: give a range or choices for at least one of its arguments, such as "
                f"neurons=(0.0, 0.7) or bits=(8, 4). Received: {self!r}"
            )
        for value in self.criterion.choices:
            PruneNeurons(0.5, criterion=value)  # raises for a name that is not known
        for value in self.allocation.choices:
            PruneWeights(0.5, allocation=value)

    @classmethod
    def per_layer(cls, model: keras.Model, **options) -> "CompressionSpace":
        """A space in which every layer that can be compressed has bits and sparsity of its own.

        Args:
            model: A built model.
            options: As for `CompressionSpace`, without `groups`.
        """
        paths = [entry.path for entry in find_layers(model).layers]
        return cls(groups={path: f"^{re.escape(path)}$" for path in paths}, **options)

    @classmethod
    def load(cls, path) -> "CompressionSpace":
        """Reads a `.yaml` or `.json` file with the arguments by name.

        Raises:
            TypeError, ValueError: there is no such file, or no space in it.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(f"There is no file {path}. Pass a .yaml or .json file with a space.")
        values = read_mapping(path)
        if not isinstance(values, Mapping):
            raise TypeError(f"{path} must hold names and values such as `neurons: [0.0, 0.7]`. Received: {values!r}")
        names = list(cls().to_dict())
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ValueError(f"{path}: a space has {', '.join(names)}. Received: {', '.join(map(repr, unknown))}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The arguments by name, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name, value in self._given.items()
        }

    def recipe(self, hp) -> Recipe:
        """The recipe of a trial, for users with a `HyperModel` of their own, too.

        Args:
            hp: A `keras_tuner.HyperParameters`. What varies is declared there, under the names of the arguments.
        """
        rate = {"learning_rate": self.learning_rate.value(hp)}
        end = self.schedule_end.value(hp)
        bits = {group: self.bits.value(hp, _name("bits", group)) for group in self.groups or [""]}
        steps = [self._neurons(hp, end, rate), self._weights(hp, bits, end, rate)]
        steps += [self._quantization(hp, bits, rate), self._fine_tuning(hp, rate)]
        return Recipe(step for step in steps if step is not None)

    def _neurons(self, hp, end: float, rate: dict) -> Step | None:
        neurons = self.neurons.value(hp)
        with self.neurons.where_positive(hp):
            criterion = self.criterion.value(hp) if self.neurons.may_be_positive else None
        return PruneNeurons(_schedule(neurons, end), criterion=criterion, **rate) if neurons else None

    def _weights(self, hp, bits: dict[str, int], end: float, rate: dict) -> Step | None:
        """The step that prunes weights; groups of layers have a schedule each."""
        if not self.sparsity.may_be_positive:
            return None
        schedules: dict[str, Any] = {}
        allocation: Any = None
        for group in bits:
            with self._where_zeros_can_be(hp, group):
                sparsity = self.sparsity.value(hp, _name("sparsity", group))
                with self.sparsity.where_positive(hp, _name("sparsity", group)):
                    allocation = None if self.groups else self.allocation.value(hp)
            if sparsity and bits[group] != 1:
                schedules[group] = _schedule(sparsity, end)
        if not schedules:
            return None
        if not self.groups:
            return PruneWeights(schedules[""], allocation=allocation, **rate)
        by_path = {self.groups[group]: schedule for group, schedule in schedules.items()}
        return PruneWeights(by_path, layers=list(by_path), allocation="uniform", **rate)

    def _where_zeros_can_be(self, hp, group: str):
        """A binary grid has no zero; `sparsity` is inactive there."""
        with_zero = [value for value in self.bits.choices if value != 1]
        if 1 not in self.bits.choices or not with_zero:
            return contextlib.nullcontext()
        return hp.conditional_scope(_name("bits", group), with_zero)

    def _quantization(self, hp, bits: dict[str, int], rate: dict) -> Step | None:
        few = [value for value in self.bits.choices if value != FLOAT_BITS]
        if not few:
            return None
        scoped = not self.groups and FLOAT_BITS in self.bits.choices
        with hp.conditional_scope("bits", few) if scoped else contextlib.nullcontext():
            activations = self.activation_bits.value(hp)
        chosen = {group: _quantizer(value) for group, value in bits.items() if value != FLOAT_BITS}
        if not chosen:
            return None
        weights = {self.groups[group]: value for group, value in chosen.items()} if self.groups else chosen[""]
        return Quantize(weights, None if activations == FLOAT_BITS else f"int{activations}", **rate)

    def _fine_tuning(self, hp, rate: dict) -> Step | None:
        share = self.fine_tuning.value(hp)
        with self.fine_tuning.where_positive(hp):
            distillation: Any = self.distillation.value(hp) if self.fine_tuning.may_be_positive else None
        return FineTune(distillation, share=share, **rate) if share else None

    def __repr__(self) -> str:
        default = {name: p.default for name, p in _parameters().items()}
        arguments = [f"{name}={value!r}" for name, value in self._given.items() if value != default[name]]
        return f"CompressionSpace({', '.join(arguments)})"


def _parameters():
    return {name: p for name, p in inspect.signature(CompressionSpace.__init__).parameters.items() if name != "self"}


def _schedule(final: float, end: float) -> Any:
    """A plain number where the schedule is what a number stands for."""
    schedule = PolynomialDecay(final, end=end)
    return final if schedule.get_config() == PolynomialDecay(final).get_config() else schedule


def _name(name: str, group: str) -> str:
    return f"{name}/{group}" if group else name


def _quantizer(bits: int):
    """Of the grids with so many bits the one that lost least in training."""
    if bits in _NAMES:
        return _NAMES[bits]
    return f"int{bits}" if bits > 8 else quantizers.LearnedStep(bits)


def _numbers(name: str, value, *, below: float = float("inf"), inclusive: bool = False) -> Dimension:
    """A dimension of numbers in [0, below)."""
    step = None
    if isinstance(value, Mapping):
        value, step, is_range = _explicit(name, value)
    else:
        is_range = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for number in values:
        if not checks.is_number(number):
            raise TypeError(f"`{name}` must be a number, two for a range, or choices. Received: {name}={value!r}")
        if not (0 <= number < below or (inclusive and number == below)):
            limit = f"[0, {below:g}{']' if inclusive else ')'}" if below < float("inf") else "at least 0"
            raise ValueError(f"`{name}` must be {'in ' if below < float('inf') else ''}{limit}. Received: {value!r}")
    if not values:
        raise ValueError(f"`{name}` has no values. Received: {name}={value!r}")
    if not is_range:
        return Dimension(name, tuple(dict.fromkeys(float(number) for number in values)))
    low, high = map(float, values)
    if low > high:
        raise ValueError(f"The range of `{name}` ends before it begins. Received: {name}={value!r}")
    return Dimension(name, (low,)) if low == high else Dimension(name, low=low, high=high, step=step)


def _explicit(name: str, value: Mapping) -> tuple[list, float | None, bool]:
    if set(value) == {"values"}:
        return list(value["values"]), None, False
    if {"min", "max"} <= set(value) <= {"min", "max", "step"}:
        return [value["min"], value["max"]], value.get("step"), True
    forms = '{"values": [...]} or {"min": ..., "max": ..., "step": ...}'
    raise ValueError(f"`{name}` as a dict is {forms}. Received: {dict(value)!r}")


def _rate(name: str, value) -> Dimension:
    if value is None:
        return Dimension(name, (None,))
    dimension = _numbers(name, value)
    if 0 in dimension.choices or (not dimension.choices and dimension.low == 0):
        raise ValueError(f"`{name}` must be above 0. Received: {name}={value!r}")
    return Dimension(name, dimension.choices, dimension.low, dimension.high, logarithmic=not dimension.choices)


def _bits(name: str, value, least: int = 1) -> Dimension:
    values = value["values"] if isinstance(value, Mapping) and set(value) == {"values"} else value
    values = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    values = [FLOAT_BITS if bits is None else bits for bits in values]
    for bits in values:
        if not checks.is_int(bits):
            raise TypeError(f"`{name}` must be whole numbers of bits, or None for float. Received: {name}={value!r}")
        if not least <= bits <= 16 and bits != FLOAT_BITS:
            raise ValueError(f"`{name}` must be in [{least}, 16], or None for float. Received: {name}={value!r}")
    if not values:
        raise ValueError(f"`{name}` has no values; None leaves it in float. Received: {name}={value!r}")
    return Dimension(name, tuple(dict.fromkeys(map(int, values))))


def _words(name: str, value) -> Dimension:
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not values or not all(isinstance(each, str) for each in values):
        raise TypeError(f"`{name}` must be a name, or a list of names. Received: {name}={value!r}")
    return Dimension(name, tuple(dict.fromkeys(values)))


def _groups(groups) -> dict[str, str]:
    if groups is None:
        return {}
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(name, str) for name in groups):
        raise TypeError(f"`groups` must be {{name: regular expression}}. Received: groups={groups!r}")
    compile_patterns(groups.values())
    return dict(groups)
