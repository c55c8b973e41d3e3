"""`export`: a model as a `.tflite` file that was loaded, run and compared with the model before it counts."""

import contextlib
import logging
import pathlib
import warnings
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_squeeze.criteria import batches
from keras_squeeze.deployment.writing import write_file
from keras_squeeze.quantization.conversion import calibrate, finalize, inputs_only, quantize_aware
from keras_squeeze.quantization.fake_quantize import FakeQuantize, converting
from keras_squeeze.quantization.wrapper import QuantizeAware
from keras_squeeze.selection import require_tensorflow

PRECISIONS = ("float32", "int8")

_SAMPLES = 16
_KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "CONV_3D")
_EDGES = ("QUANTIZE", "DEQUANTIZE")


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with the model.

    Attributes:
        path: The file.
        num_bytes: Its size.
        precision: `"float32"` or `"int8"`.
        max_abs_error: The largest difference between the file's outputs and the model's, over the sample inputs.
        agreement: Fraction of the sample inputs with the same answer: the same output is the largest; of a single
            output between 0 and 1 the side of one half; of another single output within a hundredth of what it varies
            by.
        float_ops: Operations that compute in float although the file is int8, but for the conversion at its ends.
        other_integers: Quantized weights that the file does not have as they were trained: in float, or on another
            grid.
    """

    path: pathlib.Path
    num_bytes: int
    precision: str
    max_abs_error: float
    agreement: float
    float_ops: list[str] = field(default_factory=list)
    other_integers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left = f"; in float: {', '.join(self.float_ops)}" if self.float_ops else ""
        left += f"; not as trained: {', '.join(self.other_integers)}" if self.other_integers else ""
        return (
            f"{self.path}: {self.num_bytes:,} bytes, {self.precision}, largest difference to the model "
            f"{self.max_abs_error:.3g}, same answer for {self.agreement:.1%} of the sample inputs{left}"
        )


def export(
    model: keras.Model, path, *, precision: str | None = None, calibration_data=None, allow_float: bool = False
) -> ExportResult:
    """Writes a model as a `.tflite` file for LiteRT, loads it, runs it, and compares it with the model.

    Args:
        model: A built Functional or Sequential model, with or without quantizers.
        path: Where the file goes; its name ends in `.tflite`. What is there is replaced only once the new file is known
            to run.
        precision: None: as trained, which is `"int8"` for a model with quantizers and `"float32"` for another.
            `"float32"`: weights and activations in float; weights of a model with quantizers are on their grids.
            `"int8"`: of a model with quantizers the very integers that it was trained with; of another one, quantized
            after training with the ranges that it has on `calibration_data`.
        calibration_data: Inputs: an array (for several inputs a list or a dict of arrays), `(x, y)`, or a
            `tf.data.Dataset` of batches. A model with quantizers that has seen no data is calibrated with it. The
            comparison uses the first
            of them; without, random numbers within the range of the inputs.
        allow_float: Whether quantized layers may compute in float, or with other integers than they were trained with,
            where the converter has no integer kernel for them.

    Returns:
        An `ExportResult`; print it.

    Raises:
        TypeError, ValueError: no such model, precision or file name; int8 without ranges; a quantized layer that was
            left in float. An earlier file at `path` is then as it was.

    Example:

    ```python
    print(ks.export(q, "model.tflite"))
    ```
    """
    require_tensorflow()
    path = pathlib.Path(path)
    _check(model, path, precision)
    quantized = _has_quantizers(model)
    precision = precision or ("int8" if quantized else "float32")
    shipped = model
    if precision == "float32" and quantized:
        shipped = finalize(model, activations="drop")
    if precision == "int8" and not quantized:
        if calibration_data is None:
            raise ValueError(
                f"Model '{model.name}' has no quantizers, so int8 needs to know the ranges of its activations. Pass "
                "calibration_data=inputs, or train what keras_squeeze.quantize_aware(model) returns."
            )
        shipped = quantize_aware(model)
        calibrate(shipped, calibration_data)
    wrappers = [layer for layer in shipped._flatten_layers() if isinstance(layer, QuantizeAware)]
    ranges = _ranges(shipped)
    if calibration_data is not None and ranges and not any(layer.is_known for layer in ranges):
        calibrate(shipped, calibration_data)
    _check_ready(shipped)
    if precision == "int8":
        _check_activations(shipped)
    content = convert(shipped, integers=precision == "int8")
    difference, agreement = _compare(content, model, _samples(model, calibration_data))
    float_ops, other = [], []
    if precision == "int8":
        float_ops, other = _float_ops(content), _other_integers(content, wrappers)
    names = [f"{wrapper.name}/" for wrapper in wrappers]
    kernels = [op for op in float_ops if op.split(" ")[0] in _KERNELS and any(name in op for name in names)]
    if (kernels or other) and not allow_float:
        raise ValueError(
            f"Model '{model.name}': the converter has no integer kernel for quantized layers. In float: "
            f"{', '.join(kernels) or 'none'}; weights in float or on another grid: {', '.join(other) or 'none'}. "
            "Nothing was written. An integer kernel needs a rounded input and output: quantize activations as well, "
            'and begin a model that was wrapped by hand with keras_squeeze.FakeQuantize("int8"). Or leave these layers '
            "out (quantize_aware(layers=...)), or pass allow_float=True."
        )
    write_file(path, content)
    return ExportResult(path, len(content), precision, difference, agreement, float_ops, other)


def convert(model: keras.Model, *, integers: bool = False) -> bytes:
    """The model as the content of a `.tflite` file with a batch of one.

    Raises:
        ValueError: it is not built, or leaves a size of its inputs open.
    """
    import tensorflow as tf

    require_tensorflow()
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(f"Model '{model.name}' has no inputs of a known shape: build it with `keras.Input(shape)`.")
    for tensor in inputs:
        if None in tensor.shape[1:]:
            raise ValueError(
                f"Input '{tensor.name}' of model '{model.name}' has shape {tensor.shape}: a file needs to know every "
                "size. "
                "Rebuild the model with an input of a fixed shape."
            )
    specs = [tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype, name=tensor.name) for tensor in inputs]
    structure = getattr(model, "_inputs_struct", None)
    packed = keras.tree.pack_sequence_as(structure, specs) if structure is not None else specs[0]

    def predict(tensors):
        if not integers:
            return model(tensors, training=False)
        with converting():
            return model(tensors, training=False)

    function = tf.function(predict).get_concrete_function(packed)
    with _quiet():
        # Without a second argument, the model: it would leave variables in the graph, and LiteRT compute nonsense.
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    if integers:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with _quiet():
        try:
            return converter.convert()
        except Exception as problem:
            if type(problem).__name__ != "ConverterError":
                raise
            reason = str(problem).strip().splitlines()[0][:300]
            raise ValueError(
                f"The converter cannot take model '{model.name}': {reason} If it computes in half precision, build it "
                'with the dtype policy "float32" and load its weights.'
            ) from None


@contextlib.contextmanager
def _quiet():
    """Keeps back what the converter says to all who do not give it a model, or data for its own quantization."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _ranges(model) -> list[FakeQuantize]:
    """The quantizers of activations that keep a range."""
    found = [layer for layer in model._flatten_layers() if isinstance(layer, FakeQuantize)]
    return [layer for layer in found if layer.channels is None and layer.built and layer.range_state is not None]


def _check_activations(model) -> None:
    others = [f"{layer.name} ({layer.quantizer.bits} bits)" for layer in _ranges(model) if layer.quantizer.bits != 8]
    if others:
        raise ValueError(
            f"LiteRT's integer kernels take activations of 8 bits. Received: {', '.join(others[:5])}. Train with "
            'activations="int8", or export with precision="float32".'
        )


def _check_ready(model) -> None:
    """Says what is missing before anything is traced, where an error would be buried."""
    for layer in model._flatten_layers():
        if isinstance(layer, FakeQuantize):
            layer.follow_variables()
            if layer.mixing:
                raise ValueError(
                    f"'{layer.name}' is still mixed with float: fit it to the end of a QuantizationSchedule, then "
                    "export."
                )
            if not layer.is_known:
                raise ValueError(
                    f"'{layer.name}' has seen no data, so that its range is not known. Train the model, or "
                    "pass calibration_data=inputs."
                )


def predict_file(file, inputs, names=()) -> list[np.ndarray]:
    """What LiteRT computes for a batch, one example after the other.

    Args:
        file: Path of a `.tflite` file, or its content as bytes.
        inputs: An array for each input, with the examples along the first axis.
        names: The names of these inputs, where a file with several may have them in another order.

    Returns:
        An array for each output.
    """
    from ai_edge_litert.interpreter import Interpreter

    source = {"model_content": file} if isinstance(file, bytes) else {"model_path": str(file)}
    interpreter = Interpreter(**source)
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()
    places = [_place_of(detail["name"], list(names), place) for place, detail in enumerate(details)]
    rows = []
    for index in range(len(inputs[0])):
        for place, detail in zip(places, details, strict=True):
            interpreter.set_tensor(detail["index"], inputs[place][index : index + 1].astype(detail["dtype"]))
        interpreter.invoke()
        rows.append([interpreter.get_tensor(detail["index"])[0] for detail in _outputs_in_order(interpreter)])
    return [np.stack(column) for column in zip(*rows, strict=True)]


def _check(model, path: pathlib.Path, precision) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {model!r} of type {type(model).__name__}")
    if path.suffix != ".tflite":
        raise ValueError(f"`path` must end in .tflite. Received: {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no directory {path.absolute().parent} for `path`. Make it first.")
    if path.is_dir():
        raise ValueError(f"`path` must be a file. Received a directory: {str(path)!r}")
    if precision is not None and precision not in PRECISIONS:
        known = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"`precision` must be None or one of {known}. Received: precision={precision!r}")


def _has_quantizers(model) -> bool:
    return any(isinstance(layer, (QuantizeAware, FakeQuantize)) for layer in model._flatten_layers())


def _samples(model, data) -> list[np.ndarray]:
    """A few examples for each input of the model."""
    if data is not None:
        x = next(iter(batches(inputs_only(model, data), 1)))[0]
        return [keras.ops.convert_to_numpy(part)[:_SAMPLES] for part in keras.tree.flatten(x)]
    rng = np.random.default_rng(0)
    return [_random(model, tensor, rng) for tensor in model.inputs]


def _random(model, tensor, rng) -> np.ndarray:
    shape = (_SAMPLES, *tensor.shape[1:])
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


def _compare(content: bytes, model, samples) -> tuple[float, float]:
    """The largest difference between a file and a model, and the fraction of equal answers."""
    structure = getattr(model, "_inputs_struct", None)
    batch = keras.tree.pack_sequence_as(structure, samples) if structure is not None else samples[0]
    expected = [keras.ops.convert_to_numpy(part) for part in keras.tree.flatten(model(batch, training=False))]
    try:
        actual = predict_file(content, samples, [tensor.name for tensor in model.inputs])
    except (RuntimeError, ValueError) as problem:
        raise ValueError(f"LiteRT cannot run what the converter made of model '{model.name}': {problem}") from None
    pairs = list(zip(expected, actual, strict=True))
    difference = max(float(np.abs(got.astype("float64") - wanted).max()) for wanted, got in pairs)
    return difference, float(np.mean([_same_answers(wanted, got) for wanted, got in pairs]))


def _same_answers(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """A bool for every example."""
    if expected.shape[-1] > 1 and expected.ndim > 1:
        same = expected.argmax(-1) == actual.argmax(-1)
    elif expected.min() >= 0 and expected.max() <= 1:
        same = (expected > 0.5) == (actual > 0.5)
    else:
        same = np.abs(expected - actual) <= 0.01 * np.ptp(expected)
    return same.reshape(len(expected), -1).all(axis=1)


def _other_integers(content: bytes, wrappers) -> list[str]:
    """The weights whose integers the file does not have.

    What is compared is how often each magnitude occurs: the converter reorders weights, and turns the sign of an output
    whose batch normalization has a negative gamma.
    """
    stored = [_magnitudes(array) for array in _integer_constants(content)]
    missing = []
    for wrapper in wrappers:
        for name, (integers, _, zero_point) in wrapper.to_integers().items():
            expected = _magnitudes(integers - zero_point)
            if not any(np.array_equal(expected, counts) for counts in stored):
                missing.append(f"{wrapper.layer.name}/{name}")
    return missing


def _magnitudes(integers: np.ndarray) -> np.ndarray:
    return np.bincount(np.abs(integers.astype("int64")).reshape(-1), minlength=1 << 8)


def _integer_constants(content: bytes) -> list[np.ndarray]:
    interpreter = _plain_interpreter(content)
    constants = []
    for detail in interpreter.get_tensor_details():
        if detail["dtype"] == np.int8 and len(detail["shape"]):
            try:
                constants.append(interpreter.get_tensor(detail["index"]))
            except ValueError:
                continue  # it is computed, and not there before the first inference
    return constants


def _plain_interpreter(content: bytes):
    """An interpreter without a delegate, which would hide operations and weights."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter(model_content=content, experimental_op_resolver_type=plain)


def _place_of(name: str, names: list[str], default: int) -> int:
    """Which input of the model one of the file is; the converter may change their order."""
    matches = [
        place for place, known in enumerate(names) if name in (known, f"serving_default_{known}:0", f"{known}:0")
    ]
    return matches[0] if matches else default


def _outputs_in_order(interpreter):
    """The file's outputs in the order of the model's; outputs called Identity, Identity_1, ... come sorted by name."""
    details = interpreter.get_output_details()
    return sorted(details, key=lambda detail: (len(detail["name"]), detail["name"])) if len(details) > 1 else details


def _float_ops(content: bytes) -> list[str]:
    """`OPERATION name of its output` of everything that gives floats, but for the conversion at the ends."""
    interpreter = _plain_interpreter(content)
    tensors = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    left = []
    for operation in interpreter._get_ops_details():
        outputs = [tensors[index] for index in operation["outputs"] if index in tensors]
        if operation["op_name"] not in _EDGES and any(np.issubdtype(x["dtype"], np.floating) for x in outputs):
            left.append(f"{operation['op_name']} {outputs[0]['name']}")
    return left
