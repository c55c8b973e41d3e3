"""What is changed in a `.tflite` file after the converter: names, the types at its ends, weights of 4 bits."""

import re
from collections.abc import Sequence

import numpy as np

_FOUR_BITS = (-8, 7)
_EIGHT_BITS = (-128, 127)

# Operations that read weights of 4 bits beside inputs of 8 bits. Depthwise convolutions do, too, but several times more
# slowly, and have next to no weights.
_FOUR_BIT_KERNELS = ("CONV_2D", "FULLY_CONNECTED")


def edit(
    content: bytes,
    *,
    inputs: list[str],
    outputs: list[str],
    integer_io: bool = False,
    four_bits: bool = False,
    weights: Sequence[tuple[np.ndarray, tuple[int, ...]]] = (),
) -> bytes:
    """Changes a file.

    Args:
        content: What the converter wrote.
        inputs, outputs: The names that the signature of the file gives.
        integer_io: Whether integers go in and come out, instead of floats that are rounded at once.
        four_bits: Whether integer weights that fit are stored in 4 bits, where LiteRT has a kernel for them.
        weights: Of a file in float, the weights that are stored as integers, of 4 bits where they fit, else of 8, and
            turned into floats again when the file is run: pairs of integers and the axes of their outputs. What is not
            found stays as it is.

    Raises:
        ValueError: an input or an output is not rounded at once, so that it cannot be an integer.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.convert_bytearray_to_object(content)
    graph = model.subgraphs[0]
    graph.inputs = _ordered(graph, graph.inputs, r"input_(\d+)")
    graph.outputs = _ordered(graph, graph.outputs, r"Identity(?:_(\d+))?")
    if integer_io:
        _take_integers(model, graph, inputs)
        _give_integers(model, graph, outputs)
    for names, places in ((inputs, graph.inputs), (outputs, graph.outputs)):
        for name, place in zip(names, places, strict=True):
            graph.tensors[place].name = name
    model.signatureDefs = [_signature(graph, inputs, outputs)]
    if four_bits:
        _store_in_four_bits(model)
    if weights:
        _store_weights(model, weights)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def fit_four_bits(integers: np.ndarray) -> bool:
    return bool(integers.min() >= _FOUR_BITS[0] and integers.max() <= _FOUR_BITS[1])


def constants(content: bytes) -> list[tuple[int, np.ndarray]]:
    """Bits and values of every constant of 4 or 8 bits that a file has."""
    from tensorflow.lite.python import schema_py_generated as schema
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.convert_bytearray_to_object(content)
    found = []
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is None or not len(data) or tensor.sparsity is not None:
                continue
            shape = [] if tensor.shape is None else list(tensor.shape)
            if tensor.type == schema.TensorType.INT4:
                found.append((4, _unpacked(np.asarray(data), shape)))
            elif tensor.type == schema.TensorType.INT8:
                found.append((8, np.asarray(data).view("int8").reshape(shape)))
    return found


def _ordered(graph, places, pattern: str) -> list[int]:
    """The ends of a file in the order of the model's, by the numbers in their names."""
    numbers = [re.search(pattern, _text(graph.tensors[place].name)) for place in places]
    if not all(numbers):
        return list(places)
    keys = [int(match[1] or 0) for match in numbers if match]
    return [place for _, place in sorted(zip(keys, map(int, places), strict=True))]


def _signature(graph, inputs: list[str], outputs: list[str]):
    from tensorflow.lite.python import schema_py_generated as schema

    signature = schema.SignatureDefT()
    signature.signatureKey = "serving_default"
    signature.subgraphIndex = 0
    signature.inputs, signature.outputs = [], []
    for names, places, entries in (
        (inputs, graph.inputs, signature.inputs),
        (outputs, graph.outputs, signature.outputs),
    ):
        for name, place in zip(names, places, strict=True):
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name, place
            entries.append(entry)
    return signature


def _take_integers(model, graph, names: list[str]) -> None:
    """Drops the operations that round the inputs."""
    for end, place in enumerate(graph.inputs):
        if not _is_float(graph.tensors[place]):
            continue
        readers = [operator for operator in graph.operators if place in operator.inputs]
        if len(readers) != 1 or _kind(model, readers[0]) != "QUANTIZE":
            raise ValueError(
                f"Input '{names[end]}' is not rounded before it is used, so that it cannot be an integer. Pass "
                "integer_io=False."
            )
        graph.inputs[end] = int(readers[0].outputs[0])
        graph.operators.remove(readers[0])


def _give_integers(model, graph, names: list[str]) -> None:
    """Drops the operations that turn the outputs into floats."""
    makers = {
        int(operator.outputs[0]): operator for operator in graph.operators if _kind(model, operator) == "DEQUANTIZE"
    }
    floats = [place for place in graph.outputs if _is_float(graph.tensors[place])]
    for end, place in enumerate(graph.outputs):
        if place in floats and place not in makers:
            raise ValueError(
                f"Output '{names[end]}' is computed in float, so that it cannot be an integer. Pass integer_io=False."
            )
        graph.outputs[end] = int(makers[place].inputs[0]) if place in floats else place
    for place in set(floats):
        if not any(place in operator.inputs for operator in graph.operators):
            graph.operators.remove(makers[place])


def _store_in_four_bits(model) -> None:
    """Halves integer weights whose values fit; those that a kernel of 8 bits reads as well stay as they are."""
    from tensorflow.lite.python import schema_py_generated as schema

    packed: dict[int, int] = {}
    for graph in model.subgraphs:
        for place, tensor in enumerate(graph.tensors):
            data = model.buffers[tensor.buffer].data
            if data is None or not len(data) or tensor.type != schema.TensorType.INT8:
                continue
            readers = [operator for operator in graph.operators if place in operator.inputs]
            values = np.asarray(data).view("int8")
            if not readers or not all(_reads_weight(model, reader, place) for reader in readers):
                continue
            if not fit_four_bits(values):
                continue
            if tensor.buffer not in packed:
                packed[tensor.buffer] = _new_buffer(model, _packed(values))
            tensor.buffer = packed[tensor.buffer]
            tensor.type = schema.TensorType.INT4
            if all(_is_product(model, graph, reader) for reader in readers):
                tensor.shape = [int(tensor.shape[0]), int(tensor.shape[-1])]
                for reader in readers:
                    _make_product(model, reader)
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    for old in set(packed) - used:
        model.buffers[old].data = None


def _reads_weight(model, operator, place: int) -> bool:
    return _kind(model, operator) in _FOUR_BIT_KERNELS and int(operator.inputs[1]) == place


def _is_product(model, graph, operator) -> bool:
    """Whether a convolution multiplies every pixel with the same matrix."""
    options = operator.builtinOptions
    return (
        _kind(model, operator) == "CONV_2D"
        and list(graph.tensors[operator.inputs[1]].shape[1:3]) == [1, 1]
        and graph.tensors[operator.inputs[1]].shape[-1] == graph.tensors[operator.inputs[0]].shape[-1]
        and (options.strideH, options.strideW) == (1, 1)
    )


def _make_product(model, operator) -> None:
    """Turns a convolution into a product, for which LiteRT has a fast kernel with weights of 4 bits."""
    from tensorflow.lite.python import schema_py_generated as schema

    options = schema.FullyConnectedOptionsT()
    options.fusedActivationFunction, options.keepNumDims = operator.builtinOptions.fusedActivationFunction, True
    operator.builtinOptions, operator.builtinOptionsType = options, schema.BuiltinOptions.FullyConnectedOptions
    operator.opcodeIndex = _code(model, schema.BuiltinOperator.FULLY_CONNECTED, version=7)


def _store_weights(model, weights) -> None:
    """Puts integers and an operation that reads them as floats in the place of float weights."""
    from tensorflow.lite.python import schema_py_generated as schema

    code = _code(model, schema.BuiltinOperator.DEQUANTIZE, version=6)
    stored: dict[int, tuple] = {}  # buffer: new buffer, its type, scales, their axis
    for buffer, values in list(_float_constants(model)):
        matches = (_as_stored(values, integers, channel_axes) for integers, channel_axes in weights)
        found, scales, axis = next((match for match in matches if match is not None), (None, None, None))
        if found is not None:
            kind = schema.TensorType.INT4 if fit_four_bits(found) else schema.TensorType.INT8
            data = _packed(found) if fit_four_bits(found) else found.reshape(-1).view("uint8")
            stored[buffer] = _new_buffer(model, data), kind, scales, axis
    for graph in model.subgraphs:
        first = []
        for place in range(len(graph.tensors)):
            tensor = graph.tensors[place]
            if tensor.buffer not in stored or tensor.type != schema.TensorType.FLOAT32:
                continue
            buffer, kind, scales, axis = stored[tensor.buffer]
            source = schema.TensorT()
            source.shape, source.hasRank, source.name = list(tensor.shape), True, f"{_text(tensor.name)}_integers"
            source.type, source.buffer = kind, buffer
            source.quantization = schema.QuantizationParametersT()
            source.quantization.scale = [float(scale) for scale in scales]
            source.quantization.zeroPoint = [0] * len(scales)
            source.quantization.quantizedDimension = axis
            graph.tensors.append(source)
            tensor.buffer = 0
            operator = schema.OperatorT()
            operator.opcodeIndex, operator.inputs, operator.outputs = code, [len(graph.tensors) - 1], [place]
            operator.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
            operator.builtinOptions = schema.DequantizeOptionsT()
            first.append(operator)
        graph.operators = [*first, *(graph.operators or [])]
    for buffer in stored:
        model.buffers[buffer].data = None


def _float_constants(model):
    """Buffer and values of every float constant with more than one dimension."""
    from tensorflow.lite.python import schema_py_generated as schema

    seen = set()
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            many = tensor.shape is not None and len(tensor.shape) > 1
            if data is None or not many or tensor.type != schema.TensorType.FLOAT32 or tensor.buffer in seen:
                continue
            seen.add(tensor.buffer)
            yield tensor.buffer, np.asarray(data).view("float32").reshape(list(tensor.shape))


def _as_stored(values: np.ndarray, integers: np.ndarray, channel_axes) -> tuple[np.ndarray, np.ndarray, int] | None:
    """The integers that a weight in a file stands for, their scales and the axis of these; None where it is another.

    The file has the weight's axes in another order, and batch normalization multiplied into every channel: a channel is
    known by its sorted magnitudes, up to a factor.
    """
    if not channel_axes:  # one scale for all
        match = _as_stored(values[..., np.newaxis], integers[..., np.newaxis], (-1,))
        return None if match is None else (match[0][..., 0], match[1], 0)
    axes = [axis % integers.ndim for axis in channel_axes]
    last = [axis for axis in range(integers.ndim) if axis not in axes] + sorted(axes)
    channels = int(np.prod([integers.shape[axis] for axis in axes]))
    if integers.size != values.size or integers.min() < _EIGHT_BITS[0] or integers.max() > _EIGHT_BITS[1]:
        return None
    expected = np.sort(np.abs(integers.transpose(last).reshape(-1, channels)), axis=0).astype("float64")
    for axis in (0, values.ndim - 1):
        if values.shape[axis] != channels:
            continue
        rows = np.moveaxis(values, axis, -1).reshape(-1, channels).astype("float64")
        found = np.sort(np.abs(rows), axis=0)
        largest = expected[-1]
        scales = np.where(largest > 0, found[-1] / np.maximum(largest, 1), 0)
        if np.all(np.abs(found - expected * scales) <= 1e-5 * np.maximum(found[-1], 1e-30)):
            scales = np.where(scales > 0, scales, 1.0)
            shape = [channels if place == axis else 1 for place in range(values.ndim)]
            return np.rint(values / scales.reshape(shape)).astype("int8"), scales.astype("float32"), axis
    return None


def _packed(values: np.ndarray) -> np.ndarray:
    """Two integers of 4 bits in a byte, the first in its lower half."""
    flat = values.reshape(-1).astype("uint8") & 0xF
    flat = np.append(flat, np.zeros(len(flat) % 2, "uint8"))
    return flat[::2] | (flat[1::2] << 4)


def _unpacked(data: np.ndarray, shape: list[int]) -> np.ndarray:
    halves = np.stack([data & 0xF, data >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))].astype("int8")
    return np.where(halves > _FOUR_BITS[1], halves - 16, halves).astype("int8").reshape(shape)


def _new_buffer(model, data: np.ndarray) -> int:
    from tensorflow.lite.python import schema_py_generated as schema

    buffer = schema.BufferT()
    buffer.data = data
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _code(model, builtin: int, version: int) -> int:
    """The place of an operation in the file's list of those it has."""
    from tensorflow.lite.python import schema_py_generated as schema

    for place, known in enumerate(model.operatorCodes):
        if max(known.builtinCode, known.deprecatedBuiltinCode) == builtin and known.version >= version:
            return place
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _kind(model, operator) -> str:
    from tensorflow.lite.tools import flatbuffer_utils

    return flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) or "CUSTOM"


def _is_float(tensor) -> bool:
    from tensorflow.lite.python import schema_py_generated as schema

    return tensor.type == schema.TensorType.FLOAT32


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
