"""What a file is checked against: sample inputs, what the model gives for them, and how far apart two answers are."""

import itertools

import keras
import numpy as np

from keras_squeeze.data import batches, inputs_only
from keras_squeeze.quantization.fake_quantize import FakeQuantize

_SAMPLES = 64
_CHUNK = 16
_TINY = 1e-6
_FEW = 0.1


def sample_inputs(model, data) -> list[np.ndarray]:
    """A few examples for each input of the model.

    Raises:
        ValueError: `data` does not fit the model's inputs.
    """
    if data is not None:
        samples_by_batch = [
            keras.tree.flatten(x) for x, _, _ in itertools.islice(batches(inputs_only(model, data), None), 2)
        ]
        samples = [np.concatenate(parts)[:_SAMPLES] for parts in zip(*samples_by_batch, strict=True)]
        shapes, sample_shapes = ([tuple(x.shape[1:]) for x in each] for each in (model.inputs, samples))
        if [len(shape) for shape in shapes] != [len(shape) for shape in sample_shapes]:
            raise ValueError(
                f"`calibration_data` does not fit the inputs of model '{model.name}': expected examples of shape "
                f"{', '.join(map(str, shapes))}. Received: {', '.join(map(str, sample_shapes))}"
            )
        return samples
    rng = np.random.default_rng(0)
    return [_random(model, tensor, rng) for tensor in model.inputs]


def outputs_of(model, samples) -> list[np.ndarray]:
    """What a model gives for a list of arrays, one for each input."""
    structure = getattr(model, "_inputs_struct", None)
    outputs = []
    for start in range(0, len(samples[0]), _CHUNK):
        chunk = [sample[start : start + _CHUNK] for sample in samples]
        batch = keras.tree.pack_sequence_as(structure, chunk) if structure is not None else chunk[0]
        outputs.append([keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(model(batch, training=False))])
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def largest_difference(expected: list[np.ndarray], actual: list[np.ndarray]) -> float:
    """Over all outputs; infinite where only one of two values is a finite number."""
    pairs = zip(expected, actual, strict=True)
    return float(max(_differences(wanted, got).max(initial=0) for wanted, got in pairs))


def agreement(expected: list[np.ndarray], actual: list[np.ndarray]) -> float:
    """The fraction of examples with the same answer; see `ExportResult`."""
    return float(np.mean([_same_answers(wanted, got) for wanted, got in zip(expected, actual, strict=True)]))


def disagree(expected: list[np.ndarray], actual: list[np.ndarray], tolerance: float) -> bool:
    """Whether two lists of outputs are not the same but for rounding.

    That is so where a value is no finite number in one of them only, or where a tenth of the values of an output is
    further apart than `tolerance`, as a part of its largest. Fewer may be: rounding can flip a sign or a largest value.
    """
    return any(_disagree(wanted, got, tolerance) for wanted, got in zip(expected, actual, strict=True))


def _random(model, tensor, rng) -> np.ndarray:
    shape = (_CHUNK, *tensor.shape[1:])
    readers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Embedding)]
    if not keras.backend.is_float_dtype(tensor.dtype) or readers:
        vocabulary = min((layer.input_dim for layer in readers), default=2)
        return rng.integers(vocabulary, size=shape).astype(tensor.dtype)
    ranges = [
        keras.ops.convert_to_numpy(layer.range_state)
        for layer in model._flatten_layers()
        if isinstance(layer, FakeQuantize)
        and layer.name == f"quantized_{tensor._keras_history[0].name}"
        and layer.range_state is not None
        and layer.range_state.ndim
    ]
    low, high = ranges[0] if ranges else (0.0, 1.0)
    return rng.uniform(low, high, shape).astype(tensor.dtype)


def _differences(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Infinite where only one of two values is a finite number."""
    expected, actual = expected.astype("float64"), actual.astype("float64")
    same = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
    with np.errstate(invalid="ignore"):
        differences = np.where(same, 0, np.abs(actual - expected))
    return np.where(np.isnan(differences), np.inf, differences)


def _disagree(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> bool:
    differences = _differences(expected, actual)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=_TINY)
    return bool(np.isinf(differences).any() or np.mean(differences > tolerance * largest) > _FEW)


def _same_answers(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """A bool for every example."""
    if expected.shape[-1] > 1 and expected.ndim > 1:
        same = expected.argmax(-1) == actual.argmax(-1)
    elif expected.min() >= 0 and expected.max() <= 1:
        same = (expected > 0.5) == (actual > 0.5)
    else:
        same = np.abs(expected - actual) <= 0.01 * np.ptp(expected)
    return same.reshape(len(expected), -1).all(axis=1)
