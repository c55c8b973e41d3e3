"""What tests read from a `.tflite` file, without this package."""

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

PLAIN = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


def interpreter(path, **options):
    interpreter = Interpreter(str(path), **options)
    interpreter.allocate_tensors()
    return interpreter


def run(path, batch, **options):
    """The file's only output for a batch, one example after the other."""
    file = interpreter(path, **options)
    rows = []
    for example in batch:
        file.set_tensor(file.get_input_details()[0]["index"], example[np.newaxis])
        file.invoke()
        rows.append(file.get_tensor(file.get_output_details()[0]["index"])[0])
    return np.stack(rows)


def operations(path):
    """`(operation, types of what it reads, types of what it gives)`, without a delegate that would hide them."""
    file = interpreter(path, experimental_op_resolver_type=PLAIN)
    types = {detail["index"]: np.dtype(detail["dtype"]).name for detail in file.get_tensor_details()}
    return [
        (op["op_name"], [types[i] for i in op["inputs"] if i in types], [types[i] for i in op["outputs"]])
        for op in file._get_ops_details()
    ]


def integers_in(path) -> list[np.ndarray]:
    """The int8 constants of a file with more than one dimension."""
    file = interpreter(path, experimental_op_resolver_type=PLAIN)
    found = []
    for detail in file.get_tensor_details():
        if detail["dtype"] == np.int8 and len(detail["shape"]) > 1:
            try:
                found.append(file.get_tensor(detail["index"]))
            except ValueError:
                continue  # computed, not stored
    return found


def tensors(path, type_name: str) -> list[tuple[list[int], np.ndarray]]:
    """Shape and bytes of every stored tensor of a type, such as `"INT4"`."""
    from tensorflow.lite.python import schema_py_generated as schema

    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    wanted = getattr(schema.TensorType, type_name)
    found = []
    for place in range(model.SubgraphsLength()):
        graph = model.Subgraphs(place)
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            data = model.Buffers(tensor.Buffer())
            if tensor.Type() == wanted and data.DataLength():
                found.append(([tensor.Shape(i) for i in range(tensor.ShapeLength())], data.DataAsNumpy()))
    return found
