"""`export`: a model as a `.tflite` file that was loaded, run and compared with the model before it counts."""

import pathlib
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.atomic_write import write_file
from keras_squeeze.deployment.checking import agreement, disagree, largest_difference, outputs_of, sample_inputs
from keras_squeeze.deployment.converting import convert_traced, trace, without_zero_gammas, zero_gammas
from keras_squeeze.deployment.editing import fit_four_bits
from keras_squeeze.deployment.inspecting import compare_integers, float_ops, predict_file
from keras_squeeze.introspection.selection import find_layers
from keras_squeeze.introspection.variables import read, require_tensorflow
from keras_squeeze.quantization.conversion import calibrate, finalize, quantize_aware
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware

PRECISIONS = ("float32", "float16", "int8", "int4")

_KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "CONV_3D")

# How far a file in float may be from the model, as a part of the largest output: rounding adds up over many layers, and
# a wrong file is off by as much as the outputs are large.
_TOLERANCES = {"float32": 1e-2, "float16": 1e-1}

_MANY_ZEROS = 0.3  # the converter encodes no weight with a smaller part


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with the model.

    Attributes:
        path: The file.
        num_bytes: Its size.
        precision: `"float32"`, `"float16"`, `"int8"` or `"int4"`.
        max_abs_error: The largest difference between the file's outputs and the model's, over the sample inputs.
        agreement: Fraction of the sample inputs with the same answer: the same output is the largest; of a single
            output between 0 and 1 the side of one half; of another single output within a hundredth of what it varies
            by.
        float_ops: Operations that compute in float although the file is to compute in integers, but for the conversion
            at its ends.
        other_integers: Quantized weights that the file does not have as they were trained: in float, or on another
            grid.
        sparse: Whether weights are stored without their zeros.
        notes: What was decided on the way, and why, in sentences.
    """

    path: pathlib.Path
    num_bytes: int
    precision: str
    max_abs_error: float
    agreement: float
    float_ops: list[str] = field(default_factory=list)
    other_integers: list[str] = field(default_factory=list)
    sparse: bool = False
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        in_float = f"; in float: {', '.join(self.float_ops)}" if self.float_ops else ""
        in_float += f"; not as trained: {', '.join(self.other_integers)}" if self.other_integers else ""
        in_float += "".join(f"\n  {note}" for note in self.notes)
        return (
            f"{self.path}: {self.num_bytes:,} bytes, {self.precision}, largest difference to the model "
            f"{self.max_abs_error:.3g}, same answer for {self.agreement:.1%} of the sample inputs{in_float}"
        )


def export(
    model: keras.Model,
    path,
    *,
    precision: str | None = None,
    calibration_data=None,
    allow_float: bool = False,
    sparse: bool | None = None,
    integer_io: bool = False,
    batch_size: int | None = 1,
) -> ExportResult:
    """Writes a model as a `.tflite` file for LiteRT, loads it, runs it, and compares it with the model.

    The file has a signature with the names of the model's inputs and outputs: `interpreter.get_signature_runner()`.

    Args:
        model: A built Functional or Sequential model, with or without quantizers.
        path: Where the file goes; its name ends in `.tflite`. What is there is replaced only once the new file is known
            to run.
        precision: None: as trained, which is `"int8"` for a model with quantizers and `"float32"` for another.
            `"float32"`: weights and activations in float; weights of a model with quantizers are on their grids.
            `"float16"`: the same with weights stored in float16, at half the bytes; it computes in float32.
            `"int8"`: of a model with quantizers the very integers that it was trained with; of another one, quantized
            after training with the ranges that it has on `calibration_data`. Where the activations have no quantizers,
            the weights are stored as integers and turned into floats at each inference.
            `"int4"`: weights that were trained on a grid of at most 4 bits (`"int4"`, `LearnedStep(4)`, `"ternary"`,
            ...) are stored in 4 bits, as the very integers. Where the activations have 8 bits, it computes in integers
            like `"int8"`: dense layers and convolutions, of which those with a window larger than one are slower in
            LiteRT than in int8. It has no such kernel for others, or none that is fast: they keep 8 bits, and `notes`
            names them. Where the activations have no quantizers, or such as no kernel takes, the weights of all layers
            are stored as integers and turned into floats at each inference, which takes longer than one of a float32
            file. A model without quantizers is quantized after training, with `calibration_data` its activations as
            well.
        calibration_data: Inputs: an array (for several inputs a list or a dict of arrays), `(x, y)`, or a
            `tf.data.Dataset` of batches. A model with quantizers that has seen no data is calibrated with it. The
            comparison uses its first examples, 64 at most; without data, 16 of random numbers within the range of the
            inputs.
        allow_float: Whether quantized layers may compute in float, or with other integers than they were trained with,
            where the converter has no integer kernel for them.
        sparse: Whether weights are stored without their zeros. None: in float32 and float16, where that makes the file
            smaller and LiteRT runs it. True: attempted in int8 as well. `notes` tells which file was kept, and why.
            LiteRT fills the zeros in again when it loads the file; other runtimes may not.
        integer_io: Whether integers of 8 bits go in and come out, with the scales that
            `interpreter.get_input_details()` and `get_output_details()` tell, where the file computes in integers.
        batch_size: Examples at a time. None: any number, by `interpreter.resize_tensor_input`; not for recurrent
            layers, whose loops the converter writes for a fixed number only.

    Returns:
        An `ExportResult`; print it.

    Raises:
        TypeError, ValueError: no such model, precision or file name; int8 without ranges; a quantized layer that was
            left in float; a file that LiteRT cannot run, or that computes something else. An earlier file at `path` is
            then as it was.

    Example:

    ```python
    print(ks.export(q, "model.tflite"))
    ```
    """
    require_tensorflow()
    path = pathlib.Path(path)
    _check(model, path, precision, batch_size, sparse)
    plan = _plan(model, precision, calibration_data)
    if integer_io and not plan.integers:
        raise ValueError(
            f"A file that computes in float has no integers at its ends. Received: integer_io=True for "
            f"{plan.precision} of model '{model.name}'. Pass precision=\"int8\" or integer_io=False."
        )
    function = trace(plan.traced, integers=plan.integers, batch_size=batch_size)
    samples = sample_inputs(model, calibration_data)
    options = {"precision": _converter_precision(plan), **_edits(plan), "integer_io": integer_io}
    content = convert_traced(model, function, **options)
    actual = _run(content, model, samples)
    expected = outputs_of(model, samples)
    _check_outputs(plan, actual, expected if plan.traced is model else outputs_of(plan.traced, samples))
    whole = content
    if sparse or (sparse is None and plan.precision in ("float32", "float16") and _has_zeros(plan)):
        content, actual, note = _without_zeros(model, plan, function, options, content, actual, samples)
        plan.notes.append(note)
    left_in_float: list[str] = []
    other: list[str] = []
    if plan.wrapped is not None:
        left_in_float, other = _check_integers(model, plan, content, allow_float)
    write_file(path, content)
    return ExportResult(
        path,
        len(content),
        plan.precision,
        largest_difference(expected, actual),
        agreement(expected, actual),
        left_in_float,
        other,
        content is not whole,
        plan.notes,
    )


@dataclass
class _Plan:
    """What is to be done.

    Attributes:
        precision: One of `PRECISIONS`.
        traced: The model that goes through the converter.
        wrapped: The model whose integers the file must have; None where there are none.
        integers: Whether the file computes in integers.
        notes: See `ExportResult`.
    """

    precision: str
    traced: keras.Model
    wrapped: keras.Model | None = None
    integers: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def wrappers(self) -> list[QuantizeAware]:
        return [] if self.wrapped is None else _wrappers(self.wrapped)


def _plan(model, precision: str | None, data) -> _Plan:
    quantized = any(isinstance(layer, (QuantizeAware, FakeQuantize)) for layer in model._flatten_layers())
    precision = precision or ("int8" if quantized else "float32")
    in_float = precision in ("float32", "float16")
    if in_float and not quantized:
        return _Plan(precision, model)
    wrapped = model if quantized else _quantized_after_training(model, precision, data)
    activations = _activation_quantizers(wrapped)
    measured = [layer for layer in activations if layer.range_state is not None]
    if data is not None and measured and not any(layer.is_known for layer in measured):
        calibrate(wrapped, data)
    _check_ready(wrapped)
    signs = any(wrapper.binary_inputs for wrapper in _wrappers(wrapped))
    if in_float:
        return _Plan(precision, finalize(wrapped, activations="keep" if signs else "drop"))
    if precision == "int4":
        _check_four_bits(wrapped)
    bits = {layer.quantizer.bits for layer in activations}
    if precision == "int8" and bits - {8}:
        others = [f"{layer.name} ({layer.quantizer.bits} bits)" for layer in activations if layer.quantizer.bits != 8]
        raise ValueError(
            f"LiteRT's integer kernels take activations of 8 bits. Received: {', '.join(others[:5])}. Train with "
            'activations="int8", or export with precision="float32".'
        )
    if signs or bits == {8}:
        return _Plan(precision, wrapped, wrapped, integers=True)
    why = f"LiteRT has no kernel for activations of {min(bits)} bits" if bits else "the activations have no quantizers"
    note = f"Weights are stored as integers and turned into floats at each inference, which takes time: {why}."
    return _Plan(precision, finalize(wrapped, activations="drop"), wrapped, notes=[note])


def _quantized_after_training(model, precision: str, data) -> keras.Model:
    if data is None and precision == "int8":
        raise ValueError(
            f"Model '{model.name}' has no quantizers, so int8 needs to know the ranges of its activations. Pass "
            "calibration_data=inputs, or train what keras_squeeze.quantize_aware(model) returns."
        )
    return quantize_aware(model, precision, "int8" if data is not None else None)


def _check_four_bits(wrapped) -> None:
    if not any(fit_four_bits(integers) for wrapper in _wrappers(wrapped) for integers, _ in _weights(wrapper)):
        raise ValueError(
            f"Model '{wrapped.name}' has no weights of at most 4 bits. Train it with "
            'keras_squeeze.quantize_aware(model, "int4"), or quantize it after training: '
            'export(keras_squeeze.finalize(q, activations="drop"), path, precision="int4").'
        )


def _converter_precision(plan: _Plan) -> str:
    return plan.precision if plan.wrapped is None else "int8" if plan.integers else "float32"


def _edits(plan: _Plan) -> dict:
    """What is to be changed in the file that the converter writes; see `editing.edit`."""
    weights = [] if plan.integers else [weight for wrapper in plan.wrappers for weight in _weights(wrapper)]
    return {"four_bits": plan.precision == "int4", "weights": weights}


def _weights(wrapper: QuantizeAware) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """The integers of every weight, and the axes of its outputs."""
    pairs = zip(wrapper.quantized_weights, wrapper.to_integers().values(), strict=True)
    return [(integers - zero_point, weight.channel_axes) for weight, (integers, _, zero_point) in pairs]


def _without_zeros(model, plan: _Plan, function, options, content, outputs, samples):
    """The smaller of a file and the same without zeros, its outputs, and a sentence about it."""
    if plan.precision == "int4" or options["weights"]:
        return content, outputs, f"Not stored sparse: {plan.precision} is stored with its zeros."
    if not _has_zeros(plan):
        return content, outputs, f"Not stored sparse: no weight has more than {_MANY_ZEROS:.0%} zeros."
    sparse = convert_traced(model, function, sparse=True, **options)
    sizes = f"{len(sparse):,} bytes instead of {len(content):,}"
    if len(sparse) >= len(content):
        return content, outputs, f"Not stored sparse: that would be {sizes}."
    try:
        again = predict_file(sparse, samples)
    except (RuntimeError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[-1]
        return content, outputs, f"Not stored sparse, which would be {sizes}: LiteRT cannot run that file ({reason})."
    if disagree(outputs, again, _TOLERANCES["float32"]):
        return content, outputs, f"Not stored sparse, which would be {sizes}: LiteRT computes something else with it."
    return sparse, again, f"Stored sparse: {sizes}. For a runtime that cannot read that, pass sparse=False."


def _has_zeros(plan: _Plan) -> bool:
    weights = [weight.variable for entry in find_layers(plan.traced).layers for weight in entry.weights]
    return any(np.mean(read(variable) == 0) > _MANY_ZEROS for variable in weights)


def _run(content: bytes, model, samples) -> list[np.ndarray]:
    try:
        return predict_file(content, samples)
    except (RuntimeError, ValueError) as problem:
        raise ValueError(
            f"LiteRT cannot run what the converter made of model '{model.name}': {problem} Nothing was written."
        ) from None


def _check_outputs(plan: _Plan, actual, expected) -> None:
    """Refuses a file that computes something else than what the converter got."""
    if disagree(expected, actual, _TOLERANCES.get(_converter_precision(plan), np.inf)):
        half = ' Weights beyond 65504, the largest number of float16, need precision="float32".'
        raise ValueError(
            f"Model '{plan.traced.name}': the file gives other outputs than the model; the largest difference is "
            f"{largest_difference(expected, actual):.3g}. Nothing was written. Does the model compute the same each "
            f"time it is called?{half if plan.precision == 'float16' else ''}"
        )


def _check_integers(model, plan: _Plan, content: bytes, allow_float: bool) -> tuple[list[str], list[str]]:
    """What is left in float, and the weights that the file has otherwise than they were trained."""
    left_in_float = float_ops(content) if plan.integers else []
    with without_zero_gammas(plan.wrapped):
        other, large = compare_integers(content, plan.wrappers)
    if large and plan.precision == "int4":
        plan.notes.append(f"Stored in 8 bits, since LiteRT has no fast kernel that reads 4: {', '.join(large)}.")
    names = [f"{wrapper.name}/" for wrapper in plan.wrappers]
    kernels = [op for op in left_in_float if op.split(" ")[0] in _KERNELS and any(name in op for name in names)]
    if (kernels or other) and not allow_float:
        zeros = ", ".join(sorted({f"'{norm.name}'" for _, norm in zero_gammas(plan.wrapped)}))
        hint = (
            f" Batch normalization with a gamma of zero ({zeros}): keras_squeeze.shrink(model) first." if zeros else ""
        )
        raise ValueError(
            f"Model '{model.name}': the converter has no integer kernel for quantized layers. In float: "
            f"{', '.join(kernels) or 'none'}; weights in float or on another grid: {', '.join(other) or 'none'}. "
            "Nothing was written. An integer kernel needs a rounded input and output: quantize activations as well, "
            'and begin a model that was wrapped by hand with keras_squeeze.FakeQuantize("int8"). Or leave these layers '
            f"out (quantize_aware(layers=...)), or pass allow_float=True.{hint}"
        )
    return left_in_float, other


def _wrappers(model) -> list[QuantizeAware]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, QuantizeAware)]


def _activation_quantizers(model) -> list[FakeQuantize]:
    fake_quantizers = [layer for layer in model._flatten_layers() if isinstance(layer, FakeQuantize)]
    return [layer for layer in fake_quantizers if layer.channels is None and layer.built]


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


def _check(model, path: pathlib.Path, precision, batch_size, sparse) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {model!r} of type {type(model).__name__}")
    if path.suffix != ".tflite":
        raise ValueError(f"`path` must end in .tflite. Received: {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no directory {path.absolute().parent} for `path`. Make it first.")
    if path.is_dir():
        raise ValueError(f"`path` must be a file. Received a directory: {str(path)!r}")
    if precision is not None and precision not in PRECISIONS:
        precisions = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"`precision` must be None or one of {precisions}. Received: precision={precision!r}")
    checks.boolean("sparse", sparse, optional=True)
    checks.positive_int("batch_size", batch_size, optional=True)
