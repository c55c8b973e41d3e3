"""What is read back from a `.tflite` file: what it computes, in which types, and with which integers."""

import numpy as np

from keras_squeeze.deployment.editing import constants, fit_four_bits

_ENDS = ("QUANTIZE", "DEQUANTIZE")


def predict_file(file, inputs) -> list[np.ndarray]:
    """What LiteRT computes.

    Args:
        file: Path of a `.tflite` file, or its content as bytes.
        inputs: An array for each input of the file, with the examples along the first axis. For an input of integers,
            floats are rounded with its scale.

    Returns:
        An array for each output; integers that have a scale are given as floats.

    Raises:
        ValueError, RuntimeError: LiteRT cannot load or run the file.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(**({"model_content": file} if isinstance(file, bytes) else {"model_path": str(file)}))
    details = interpreter.get_input_details()
    size = len(inputs[0])
    if details and details[0].get("shape_signature", [1])[:1] == [-1]:
        batch_size = size
        for detail in details:
            interpreter.resize_tensor_input(detail["index"], [size, *detail["shape"][1:]])
    else:
        batch_size = int(details[0]["shape"][0]) if details else 1
    interpreter.allocate_tensors()
    batches = []
    for start in range(0, size, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), size - 1)  # the last batch is filled up
        for detail, array in zip(details, inputs, strict=True):
            interpreter.set_tensor(detail["index"], _as_input(array[rows], detail))
        interpreter.invoke()
        outputs = interpreter.get_output_details()
        batches.append([_as_floats(interpreter.get_tensor(detail["index"]), detail) for detail in outputs])
    return [np.concatenate(column)[:size] for column in zip(*batches, strict=True)]


def float_ops(content: bytes) -> list[str]:
    """`OPERATION name of its output` of everything that gives floats, but for the conversion at the ends."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # a delegate would hide operations
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=plain)
    tensors = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    left = []
    for operation in interpreter._get_ops_details():
        outputs = [tensors[index] for index in operation["outputs"] if index in tensors]
        if operation["op_name"] not in _ENDS and any(np.issubdtype(x["dtype"], np.floating) for x in outputs):
            left.append(f"{operation['op_name']} {outputs[0]['name']}")
    return left


def compare_integers(content: bytes, wrappers) -> tuple[list[str], list[str]]:
    """The weights of `QuantizeAware` layers whose integers a file does not have, and those that take 8 bits for 4.

    What is compared is how often each magnitude occurs: the converter reorders weights, and turns the sign of an output
    whose batch normalization has a negative gamma.
    """
    stored = [(bits, _magnitudes(array)) for bits, array in constants(content)]
    missing, large = [], []
    for wrapper in wrappers:
        for name, (integers, _, zero_point) in wrapper.to_integers().items():
            integers = integers - zero_point
            expected = _magnitudes(integers)
            bits = [bits for bits, counts in stored if np.array_equal(expected, counts)]
            if not bits:
                missing.append(f"{wrapper.layer.name}/{name}")
            elif fit_four_bits(integers) and 4 not in bits:
                large.append(f"{wrapper.layer.name}/{name}")
    return missing, large


def _as_input(array: np.ndarray, detail) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    if scale and np.issubdtype(detail["dtype"], np.integer) and np.issubdtype(array.dtype, np.floating):
        ends = np.iinfo(detail["dtype"])
        array = np.clip(np.round(array / scale) + zero_point, ends.min, ends.max)
    return array.astype(detail["dtype"])


def _as_floats(array: np.ndarray, detail) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    if scale and np.issubdtype(array.dtype, np.integer):
        return ((array.astype("float32") - zero_point) * np.float32(scale)).astype("float32")
    return array


def _magnitudes(integers: np.ndarray) -> np.ndarray:
    return np.bincount(np.abs(integers.astype("int64")).reshape(-1), minlength=1 << 8)
