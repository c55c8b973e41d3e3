"""The steps of a recipe: what is done to a model, in which way, and for which part of the training.

A step is a small immutable object. Its fields are numbers, strings, lists and dicts of these, schedules, criteria and
quantizers, so that it goes to JSON and back.
"""

import dataclasses
import pathlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from keras_squeeze import checks, quantizers, schedules
from keras_squeeze.deployment.litert import export
from keras_squeeze.deployment.packing import save_packed
from keras_squeeze.introspection.selection import compile_patterns, find_layers
from keras_squeeze.introspection.variables import read
from keras_squeeze.neuron_pruning import neuron_criteria
from keras_squeeze.neuron_pruning.neuron_pruning import NeuronPruning, prune_neurons
from keras_squeeze.neuron_pruning.shrinking import shrink
from keras_squeeze.quantization.conversion import calibrate, finalize, quantize_aware
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantization.quantization_schedule import QuantizationSchedule
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.quantizers import Quantizer
from keras_squeeze.recipes.distillation import distilled
from keras_squeeze.weight_pruning.keep_sparsity import KeepSparsity
from keras_squeeze.weight_pruning.magnitude_pruning import MagnitudePruning, prune_weights

Fit = Callable[..., None]
"""`fit(model, *callbacks)`: trains for the epochs of the step."""


@dataclass(frozen=True)
class Task:
    """What a step gets to work with.

    Attributes:
        model: The model so far; it is the step's to change.
        teacher: The model that the recipe began with.
        sample: Some of the training data, `(x, y)` or batches of it: for criteria that need it, and for ranges.
        fit: Trains a model for the epochs of the step; None where it has none.
        directory: Where files go; None where none was given.
    """

    model: keras.Model
    teacher: keras.Model
    sample: Any
    fit: Fit | None
    directory: pathlib.Path | None


@dataclass(frozen=True)
class Step(ABC):
    """Base class."""

    kind: ClassVar[str]

    @abstractmethod
    def run(self, task: Task) -> keras.Model:
        """Does the step; returns the model to go on with."""

    def intent(self) -> dict[str, Any]:
        """What the step does to a model, in the words that `advise` takes."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The step as strings, numbers, lists and dicts; what has its default is left out."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {"step": self.kind, **{name: _plain(value) for name, value in values.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Step":
        """The step that `to_dict` made.

        Raises:
            ValueError: a name that this kind of step does not have.
        """
        field_names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in field_names]
        if unknown:
            raise ValueError(
                f"The step {cls.kind!r} has no {', '.join(map(repr, unknown))}. It has: {', '.join(field_names)}. "
                f"Received: {dict(values)!r}"
            )
        return cls(**{name: _object(value) for name, value in values.items()})


@dataclass(frozen=True)
class TrainingStep(Step):
    """Base class of the steps that train.

    Args:
        share: The step's part of the epochs, relative to those of the other steps, at least 0. 0: in one shot, without
            training.
        learning_rate: Of the optimizer in this step; None: as the model was compiled.
    """

    share: float = dataclasses.field(default=1.0, kw_only=True)
    learning_rate: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        checks.non_negative_number("share", self.share)
        rate = self.learning_rate
        if rate is not None and (not checks.is_number(rate) or not rate > 0):
            raise ValueError(f"`learning_rate` must be None or a number above 0. Received: learning_rate={rate!r}")
        _check_layers(getattr(self, "layers", None))


@dataclass(frozen=True)
class PruneNeurons(TrainingStep):
    """Removes neurons, gradually while the model trains, and rebuilds the model without them.

    Args:
        schedule: The final fraction of the neurons to remove, or a schedule. None where a target is given.
        target_macs, target_params: Instead: the fraction of the MACs or parameters to keep.
        layers: A regular expression, or a list of them.
        allocation, criterion, round_to, allow_inexact: As in `NeuronPruning`; criteria that look at data, and without
            training those that use gradients, get some of the training data.
    """

    kind = "prune_neurons"
    schedule: Any = None
    target_macs: float | None = None
    target_params: float | None = None
    layers: Any = None
    allocation: str = "auto"
    criterion: Any = "auto"
    round_to: int = 8
    allow_inexact: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.schedule is None and self.target_macs is None and self.target_params is None:
            object.__setattr__(self, "schedule", 0.5)
        self._callback(())  # checks the arguments

    def run(self, task):
        if task.fit is not None:
            task.fit(task.model, self._callback(task.sample))
        else:
            final = None if self.schedule is None else schedules.get(self.schedule).final
            prune_neurons(task.model, final, **self._how(task.sample))
        return shrink(task.model, allow_inexact=self.allow_inexact)

    def intent(self):
        return {"neurons": 0.0 if self.schedule is None else schedules.get(self.schedule).final}

    def _callback(self, sample) -> NeuronPruning:
        observes = isinstance(neuron_criteria.get(self.criterion), neuron_criteria.GradientNeuronCriterion)
        return NeuronPruning(self.schedule, **self._how(None if observes else sample))

    def _how(self, sample) -> dict[str, Any]:
        names = ("target_macs", "target_params", "layers", "allocation", "criterion", "round_to", "allow_inexact")
        kwargs = {name: getattr(self, name) for name in names}
        return {**kwargs, "data": sample}


@dataclass(frozen=True)
class PruneWeights(TrainingStep):
    """Prunes single weights, gradually while the model trains. Later steps keep the zeros.

    Args:
        schedule: The final sparsity, a schedule, or `{regular expression: sparsity or schedule}`.
        layers: A regular expression, or a list of them.
        allocation, pattern, criterion: As in `MagnitudePruning`; without training, criteria that use gradients get some
            of the training data.
    """

    kind = "prune_weights"
    schedule: Any = 0.9
    layers: Any = None
    allocation: str = "auto"
    pattern: Any = "unstructured"
    criterion: Any = "magnitude"

    def __post_init__(self):
        super().__post_init__()
        self._callback()

    def run(self, task):
        if task.fit is not None:
            task.fit(task.model, self._callback(), *_beside(task.model))
        elif isinstance(self.schedule, Mapping):
            for pattern, schedule in self.schedule.items():
                prune_weights(
                    task.model, schedules.get(schedule).final, **{**self._how(task.sample), "layers": pattern}
                )
        else:
            prune_weights(task.model, schedules.get(self.schedule).final, **self._how(task.sample))
        return task.model

    def intent(self):
        by_path = isinstance(self.schedule, Mapping)
        chosen = list(self.schedule.values()) if by_path else [self.schedule]
        return {"sparsity": max((schedules.get(each).final for each in chosen), default=0.0), "pattern": self.pattern}

    def _callback(self) -> MagnitudePruning:
        return MagnitudePruning(self.schedule, **self._how(None))

    def _how(self, sample) -> dict[str, Any]:
        kwargs = {name: getattr(self, name) for name in ("layers", "allocation", "pattern", "criterion")}
        return {**kwargs, "data": sample}


@dataclass(frozen=True)
class Quantize(TrainingStep):
    """Trains with quantized weights and activations. Without training their ranges are measured.

    Args:
        weights, activations: As in `quantize_aware`: a name, a quantizer, or for `weights` a dict by regular
            expression. Left out, `activations` are what `quantize_aware` takes by default.
        layers: A regular expression, or a list of them.
        delay, freeze, num_bits, ramp: As in `QuantizationSchedule`.
    """

    kind = "quantize"
    weights: Any = "int8"
    activations: Any = "default"
    layers: Any = None
    delay: float = 0.0
    freeze: float = 0.9
    num_bits: Any = None
    ramp: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for quantizer in self.weights.values() if isinstance(self.weights, Mapping) else [self.weights]:
            quantizers.get(quantizer)
        if self.activations != "default":
            quantizers.get(self.activations)
        self._schedule()

    def run(self, task):
        model = quantize_aware(task.model, self.weights, self.activations, layers=self.layers)
        if task.fit is not None:
            task.fit(model, self._schedule(), *_zeros_of(model))
        elif needs_ranges(model):
            calibrate(model, task.sample)
        return model

    def intent(self):
        weights = self.weights
        if isinstance(weights, Mapping):
            chosen = [quantizers.get(each) for each in weights.values()]
            weights = min((each for each in chosen if each), key=lambda each: each.bits)
        return {"weights": weights, **({} if self.activations == "default" else {"activations": self.activations})}

    def _schedule(self) -> QuantizationSchedule:
        return QuantizationSchedule(self.delay, self.freeze, self.num_bits, ramp=self.ramp)


@dataclass(frozen=True)
class FineTune(TrainingStep):
    """Trains on, with the zeros and the grids that are there.

    Args:
        distillation: The weight of a loss that draws the model to the answers of the one that the recipe began with;
            0: the targets alone.
        temperature: Of the distillation, above 0; see `Distillation`.
    """

    kind = "fine_tune"
    distillation: float = 0.0
    temperature: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        checks.non_negative_number("distillation", self.distillation)
        checks.positive_number("temperature", self.temperature)

    def run(self, task):
        if task.fit is None:
            return task.model
        model = task.model
        if self.distillation:
            model = distilled(model, task.teacher, self.distillation, self.temperature)
        task.fit(model, *_beside(task.model))
        return task.model


@dataclass(frozen=True)
class Export(Step):
    """Writes a file: `.tflite` by `export`, `.keras` after `finalize`, anything else by `save_packed`.

    Args:
        path: Its name, inside the directory that is passed to `Recipe.fit`.
        precision, allow_float: As in `export`, for a `.tflite` file.
    """

    kind = "export"
    path: str = "model.tflite"
    precision: str | None = None
    allow_float: bool = False

    def run(self, task):
        path = pathlib.Path(self.path) if task.directory is None else task.directory / self.path
        if path.suffix == ".tflite":
            export(
                task.model,
                path,
                precision=self.precision,
                calibration_data=task.sample,
                allow_float=self.allow_float,
            )
        elif path.suffix == ".keras":
            finished(task.model).save(path)
        else:
            save_packed(task.model, path)
        return task.model


KINDS: dict[str, type[Step]] = {step.kind: step for step in (PruneNeurons, PruneWeights, Quantize, FineTune, Export)}


def finished(model: keras.Model) -> keras.Model:
    """The model that ships: wrappers off where it has any, weights on their grids."""
    return finalize(model) if is_quantized(model) else model


def is_quantized(model: keras.Model) -> bool:
    return any(isinstance(layer, (QuantizeAware, FakeQuantize)) for layer in model._flatten_layers())


def needs_ranges(model: keras.Model) -> bool:
    """Whether activations are quantized, whose ranges come from data."""
    return any(isinstance(layer, FakeQuantize) and layer.channels is None for layer in model._flatten_layers())


def _beside(model: keras.Model) -> list[keras.callbacks.Callback]:
    """What keeps the zeros and the statistics of what was done before."""
    return [*_zeros_of(model), *([QuantizationSchedule()] if is_quantized(model) else [])]


def _zeros_of(model: keras.Model) -> list[KeepSparsity]:
    """Holds the zeros of a model that was pruned."""
    arrays = [read(weight.variable) for entry in find_layers(model).layers for weight in entry.weights]
    pruned = any(0 < np.count_nonzero(array) < array.size for array in arrays)
    return [KeepSparsity()] if pruned else []


def _check_layers(layers) -> None:
    """Layers by name only: others would not survive JSON."""
    if layers is None:
        return
    patterns = [layers] if isinstance(layers, str) else layers
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"In a recipe, `layers` must be a regular expression or a list of them. Received: layers={layers!r}"
        )
    compile_patterns(patterns)


def _plain(value):
    """What JSON takes."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Quantizer) and value in quantizers.NAMES.values():
        return next(name for name, known in quantizers.NAMES.items() if known == value)
    try:
        return keras.saving.serialize_keras_object(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"A recipe cannot be written with this in it: {value!r} ({error})") from None


def _object(value):
    """The opposite."""
    if isinstance(value, Mapping) and "class_name" in value and "config" in value:
        return keras.saving.deserialize_keras_object(dict(value))
    if isinstance(value, Mapping):
        return {name: _object(part) for name, part in value.items()}
    return [_object(part) for part in value] if isinstance(value, list) else value
