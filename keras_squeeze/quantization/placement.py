"""Where quantizers stand in a model, so that what is trained is what integer kernels compute.

An integer kernel takes a convolution or a product, the batch normalization after it and a ReLU as one, and rounds once
at the end. So the end of such a unit gets a quantizer, and so do sums, concatenations and global mean pooling; what
only moves values, or keeps their grid as poolings do, gets none.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import layers
from keras.src.ops import numpy as operations  # what `+` between tensors becomes

from keras_squeeze.introspection.functional import functional_of, nodes_of
from keras_squeeze.introspection.selection import layer_weights

LOW_BITS = 4  # below it, the first and the last layer of a model keep what they have

# The softmax and the sigmoid kernels of TensorFlow Lite give 1/256 a step.
FIXED_RANGES = {"softmax": (0.0, 255 / 256), "sigmoid": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}

_FUSED = ("linear", "relu", "relu6")
_NON_NEGATIVE = ("relu", "relu6", "sigmoid", "softmax", "softplus", "hard_sigmoid", "exponential")

_MOVING = (
    *(layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D),
    *(layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D),  # their kernel keeps the scale
    *(layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D),
    *(layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D),
    *(layers.Cropping1D, layers.Cropping2D, layers.Cropping3D),
    *(layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D),
    *(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
    *(layers.Flatten, layers.Reshape, layers.Permute, layers.RepeatVector, layers.Identity),
)
_COMPUTING = (
    *(layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum, layers.Concatenate),
    *(layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D),
)
_OPERATIONS = (operations.Add, operations.Subtract, operations.Multiply, operations.Maximum, operations.Minimum)
_ACTIVATIONS = (layers.Activation, layers.ReLU, layers.LeakyReLU, layers.PReLU, layers.ELU, layers.Softmax)


@dataclass
class Placement:
    """What `place` found; layers by their identity.

    Attributes:
        quantized: Layers whose output gets a quantizer.
        signed: Whether that output can be negative.
        ends: Inputs of the model and layers that give its outputs.
        bypassed: ReLUs that only layers with binary inputs read: their sign is taken from what enters the ReLU.
        left: What is left in float and was not asked about: paths of layers without weights to quantize.
    """

    quantized: dict[int, bool] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    bypassed: set[int] = field(default_factory=set)
    left: list[str] = field(default_factory=list)


def activation_name(layer) -> str | None:
    """The name of the activation that a layer is or ends in; None where it has none that is known."""
    if isinstance(layer, layers.ReLU):
        plain = not layer.negative_slope and not layer.threshold
        return {None: "relu", 6: "relu6"}.get(layer.max_value, "relu_cut") if plain else "leaky_relu"
    if isinstance(layer, layers.Softmax):
        return "softmax"
    if isinstance(layer, layers.RNN):
        return None
    activation = getattr(layer, "activation", None)
    return getattr(activation, "__name__", None) if callable(activation) else None


def splits(layer) -> bool:
    """Whether an integer kernel computes the activation of a layer apart from its product, so that both are rounded."""
    return getattr(layer, "activation", None) is not None and activation_name(layer) not in _FUSED


def place(model, selected: Iterable[keras.Layer], binary: Iterable[keras.Layer]) -> Placement:
    """Finds where quantizers stand.

    Args:
        model: A Functional or Sequential model.
        selected: The layers whose weights are quantized.
        binary: Those of them whose inputs are binarized.

    Raises:
        ValueError: a layer with binary inputs reads values that cannot be negative.
    """
    placement = Placement()
    selected, binary = {id(layer) for layer in selected}, {id(layer) for layer in binary}
    _place(model, "", selected, binary, placement)
    functional = functional_of(model)
    links = _links(model)
    outer = [*functional.inputs, *(links.get(id(tensor), tensor) for tensor in functional.outputs)]
    placement.ends = {id(tensor._keras_history[0]) for tensor in outer}
    return placement


class _Level:
    """One functional model: who makes its tensors, and who reads them."""

    def __init__(self, model, nested: bool = False):
        self.nested = nested
        self.functional = functional_of(model)
        self.nodes = list(nodes_of(self.functional))
        self.maker = {id(tensor): node for node in self.nodes for tensor in node.output_tensors}
        self.readers: dict[int, list] = {}
        for node in self.nodes:
            for tensor in node.input_tensors:
                self.readers.setdefault(id(tensor), []).append(node)
        for tensor in self.functional.outputs:
            self.readers.setdefault(id(tensor), []).append(None)  # the world

    def only_reader(self, node):
        """The layer that alone reads the output of a call; None where there are others."""
        readers = [reader for tensor in node.output_tensors for reader in self.readers.get(id(tensor), [])]
        return readers[0].operation if len(readers) == 1 and readers[0] is not None else None


def only_reader(model) -> Iterator[tuple[Any, Any]]:
    """Every call of a model, nested ones left out, with the layer that alone reads its output, or None."""
    level = _Level(model)
    yield from ((node, level.only_reader(node)) for node in level.nodes)


def _place(model, prefix: str, selected: set[int], binary: set[int], placement: Placement) -> None:
    level = _Level(model, nested=bool(prefix))
    for tensor in level.functional.inputs if not prefix else ():
        if _is_read_as_integers(level, tensor, selected):
            placement.quantized[id(tensor._keras_history[0])] = True
    for node in level.nodes:
        layer = node.operation
        path = f"{prefix}{layer.name}"
        if functional_of(layer) is not None:
            _place(layer, f"{path}/", selected, binary, placement)
            continue
        if _computes(layer, selected):
            rounds = not _continues(level.only_reader(node), layer)
        elif isinstance(layer, _MOVING):
            continue
        else:
            rounds = _is_read_as_integers(level, node.output_tensors[0], selected)
            if any(map(_is_float, node.output_tensors)) and path not in placement.left and not _has_weights(layer):
                placement.left.append(path)
        if rounds:
            placement.quantized[id(layer)] = placement.quantized.get(id(layer), False) or _signed(level, node)
    for node in level.nodes:
        if id(node.operation) in binary:
            _check_signs(level, node, f"{prefix}{node.operation.name}", binary, placement)


def _computes(layer, selected: set[int]) -> bool:
    """Whether an integer kernel computes a layer, so that what it reads and what it gives has to be rounded."""
    return id(layer) in selected or isinstance(
        layer, (*_COMPUTING, *_ACTIVATIONS, *_OPERATIONS, layers.BatchNormalization)
    )


def _is_read_as_integers(level: "_Level", tensor, selected: set[int]) -> bool:
    """Whether a float tensor gets, at once or through what only moves values, to a layer that computes with "
    "integers."""
    if not _is_float(tensor):
        return False
    for node in level.readers.get(id(tensor), []):
        if node is None:
            if level.nested:
                return True  # by what follows the model, as far as is known here
            continue
        inner = functional_of(node.operation)
        if inner is not None:
            entry = next(i for i, outside in enumerate(node.input_tensors) if outside is tensor)
            if _is_read_as_integers(_Level(node.operation, nested=True), inner.inputs[entry], selected):
                return True
        elif isinstance(node.operation, _MOVING):
            if _is_read_as_integers(level, node.output_tensors[0], selected):
                return True
        elif _computes(node.operation, selected) and not isinstance(node.operation, layers.Embedding):
            return True  # the indices of an Embedding are no quantities, whatever their type
    return False


def _continues(reader, layer) -> bool:
    """Whether a reader belongs to the unit that a layer is part of, so that nothing is rounded between them."""
    if reader is None or (splits(layer) and not isinstance(layer, _ACTIVATIONS)):
        return False
    if isinstance(layer, (*_ACTIVATIONS, layers.Concatenate)) or activation_name(layer) not in (None, "linear"):
        return False
    if isinstance(reader, layers.BatchNormalization):
        return not isinstance(layer, (layers.BatchNormalization, *_COMPUTING, *_OPERATIONS))
    return isinstance(reader, (layers.ReLU, layers.Activation)) and activation_name(reader) in _FUSED


def _signed(level: _Level, node) -> bool:
    """Whether the output of a call can be negative."""
    layer = node.operation
    if activation_name(layer) in (*_NON_NEGATIVE, "relu_cut"):
        return False
    passes = isinstance(layer, (*_MOVING, *_COMPUTING, *_OPERATIONS)) and not isinstance(
        layer, (layers.Subtract, operations.Subtract)
    )
    constant = isinstance(layer, _OPERATIONS) and len(node.input_tensors) < 2  # one side is a number, of any sign
    if not passes or constant or activation_name(layer) not in (None, "linear"):
        return True
    makers = [level.maker.get(id(tensor)) for tensor in node.input_tensors]
    return any(maker is None or _signed(level, maker) for maker in makers)


def _check_signs(level: _Level, node, path: str, binary: set[int], placement: Placement) -> None:
    """The sign of what cannot be negative is a constant: it has to be taken before the ReLU."""
    if not node.input_tensors or level.maker.get(id(node.input_tensors[0])) is None:
        return
    maker = level.maker[id(node.input_tensors[0])]
    while isinstance(maker.operation, _MOVING) and maker.input_tensors:
        above = level.maker.get(id(maker.input_tensors[0]))
        if above is None:
            return
        maker = above
    if _signed(level, maker):
        return
    producer = maker.operation
    once = sum(other.operation is producer for other in level.nodes) == 1
    before = level.maker.get(id(maker.input_tensors[0])) if maker.input_tensors else None
    after_norm = before is not None and isinstance(before.operation, layers.BatchNormalization)
    if isinstance(producer, _ACTIVATIONS) and after_norm and once and _only_signs(level, maker, binary):
        placement.bypassed.add(id(producer))
        placement.quantized.pop(id(producer), None)
        return
    raise ValueError(
        f"{path}: its inputs are binarized, and '{producer.name}' gives no negative values, so that all signs would be "
        "the same and nothing could be learned. Put batch normalization before it and no activation between: batch "
        "norm, "
        f'sign, {type(node.operation).__name__}, pooling; or binarize the weights only (weights="binary").'
    )


def _only_signs(level: _Level, node, binary: set[int]) -> bool:
    """Whether only layers with binary inputs read the output of a call, at once or through what only moves values."""
    for tensor in node.output_tensors:
        for reader in level.readers.get(id(tensor), []):
            if reader is None or id(reader.operation) in binary:
                if reader is None:
                    return False
            elif not (isinstance(reader.operation, _MOVING) and _only_signs(level, reader, binary)):
                return False
    return True


def find_ends(model, selected: Iterable[keras.Layer]) -> set[int]:
    """The selected layers that no other selected one comes before, or after, by their identity.

    Nested models count as what is in them.
    """
    chosen = {id(layer) for layer in selected}
    nodes, links = _flat_nodes(model), _links(model)
    ends: set[int] = set()
    for ordered, forwards in ((nodes, True), (list(reversed(nodes)), False)):
        reached: set[int] = set()  # tensors with a selected layer before them; then: after them
        for node in ordered:
            inputs = {id(links.get(id(tensor), tensor)) for tensor in node.input_tensors}
            outputs = {id(tensor) for tensor in node.output_tensors}
            near, far = (inputs, outputs) if forwards else (outputs, inputs)
            is_chosen = id(node.operation) in chosen
            if is_chosen and not near & reached:
                ends.add(id(node.operation))
            if is_chosen or near & reached:
                reached |= far
    return ends


def _flat_nodes(model) -> list:
    nodes = []
    for node in nodes_of(functional_of(model)):
        nodes += [node] if functional_of(node.operation) is None else _flat_nodes(node.operation)
    return nodes


def _links(model) -> dict:
    """For the inputs of nested models, and for what they give, the tensor inside the model that it is in the end."""
    links: dict = {}
    for node in nodes_of(functional_of(model)):
        inner = functional_of(node.operation)
        if inner is None:
            continue
        for inside, outside in zip(inner.inputs, node.input_tensors, strict=True):
            links[id(inside)] = links.get(id(outside), outside)
        links.update(_links(node.operation))
        for inside, outside in zip(inner.outputs, node.output_tensors, strict=True):
            links[id(outside)] = links.get(id(inside), inside)
    return links


def _has_weights(layer) -> bool:
    """Whether a layer has weights that could be quantized, and so was left out on purpose."""
    return isinstance(layer, keras.Layer) and bool(layer_weights(layer)[0])


def _is_float(tensor) -> bool:
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))
