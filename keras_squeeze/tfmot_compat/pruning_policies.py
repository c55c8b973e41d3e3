"""Policies: which layers of a model `prune_low_magnitude` wraps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from keras import layers
from keras.src.ops import numpy as operations  # what `+` between tensors becomes

from keras_squeeze.introspection.functional import nodes_of, require_graph

_ELEMENTWISE = (
    *(layers.Add, layers.Multiply, layers.ZeroPadding2D, layers.ReLU, layers.LeakyReLU, layers.ELU, layers.Dropout),
    *(operations.Add, operations.Subtract, operations.Multiply),
)
_ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "sigmoid")


class PruningPolicy(ABC):
    """Base class: which layers are pruned, and which models can be."""

    @abstractmethod
    def allow_pruning(self, layer) -> bool:
        """Whether a layer is wrapped."""

    @abstractmethod
    def ensure_model_supports_pruning(self, model) -> None:
        """Raises a `ValueError` for a model that the policy is not for."""


class PruneForLatencyOnXNNPack(PruningPolicy):
    """Prunes the convolutions with 1x1 kernels only, in models for which XNNPACK has sparse kernels.

    XNNPACK computes with sparse weights between a 3x3 convolution of three channels with a stride of two, after a
    `ZeroPadding2D(1)`, and a `GlobalAveragePooling2D`, where all layers between are of kinds that it knows. In any
    other model zeros do not make inference faster; `keras_squeeze.advise` says what does.

    Reference: Elsen et al. 2020, "Fast Sparse ConvNets", https://arxiv.org/abs/1911.09723
    """

    def allow_pruning(self, layer):
        return type(layer) is layers.Conv2D and layer.kernel_size == (1, 1)

    def ensure_model_supports_pruning(self, model):
        graph = _Graph(require_graph(model, "XNNPACK's sparse inference needs a Sequential or Functional one."))
        starts = _search(graph.inputs, lambda op: _is_start(op, graph.producers(op)), graph.consumers)
        if not starts:
            raise ValueError(
                f"Model '{model.name}' does not begin as sparse inference needs it: on the way from every input there "
                "must be ZeroPadding2D(1) and then Conv2D(..., 3, strides=2, padding='valid') of three channels. "
                f"Received: {', '.join(op.name for op in graph.operations[:5])}, ..."
            )
        ends = _search(graph.outputs, lambda op: isinstance(op, layers.GlobalAveragePooling2D), graph.producers)
        if not ends:
            raise ValueError(
                f"Model '{model.name}' does not end as sparse inference needs it: on the way to every output there "
                "must be a GlobalAveragePooling2D(keepdims=True). Received: ..., "
                f"{', '.join(op.name for op in graph.operations[-5:])}"
            )
        between = [reader for start in starts for reader in graph.consumers(start)]
        for op in _reached(between, ends, graph.consumers):
            if not _is_supported(op, graph.producers(op)):
                raise ValueError(
                    f"'{op.name}': XNNPACK's sparse inference has no such {type(op).__name__}. Received: "
                    f"{op.get_config()}. Prune without the policy, or see which layers it has: "
                    "https://github.com/tensorflow/tensorflow/tree/master/tensorflow/lite/delegates/xnnpack"
                )


class _Graph:
    """Who gives whom what, in a functional model with nested ones."""

    def __init__(self, functional):
        self.operations: list = []
        self._producers: dict[int, list] = {}
        self._consumers: dict[int, list] = {}
        for node in nodes_of(functional):
            self.operations.append(node.operation)
            for tensor in node.input_tensors:
                maker = tensor._keras_history[0]
                self._producers.setdefault(id(node.operation), []).append(maker)
                self._consumers.setdefault(id(maker), []).append(node.operation)
        self.inputs = [tensor._keras_history[0] for tensor in functional.inputs]
        self.outputs = [tensor._keras_history[0] for tensor in functional.outputs]

    def producers(self, operation) -> list:
        return self._producers.get(id(operation), [])

    def consumers(self, operation) -> list:
        return self._consumers.get(id(operation), [])


def _search(sources: Iterable, found: Callable, following: Callable) -> list:
    """The first operations of a kind on all ways from the sources; none where a way ends without one."""
    stops, ways, seen = [], list(sources), set()
    while ways:
        op = ways.pop()
        if id(op) in seen:
            continue
        seen.add(id(op))
        if found(op):
            stops.append(op)
        elif not following(op):
            return []
        else:
            ways += following(op)
    return stops


def _reached(sources: Iterable, ends: Iterable, following: Callable) -> list:
    """The operations on the ways from the sources to the ends, without these."""
    inner, ways, seen = [], list(sources), {id(op) for op in ends}
    while ways:
        op = ways.pop()
        if id(op) not in seen:
            seen.add(id(op))
            inner.append(op)
            ways += following(op)
    return inner


def _is_start(op, producers: list) -> bool:
    return (
        type(op) is layers.Conv2D
        and tuple(op.kernel.shape[:3]) == (3, 3, 3)
        and op.strides == (2, 2)
        and op.padding == "valid"
        and _pads_by(producers, 1)
    )


def _is_supported(op, producers: list) -> bool:
    if hasattr(op, "layer"):  # wrapped already
        op = op.layer
    if isinstance(op, layers.DepthwiseConv2D):
        return op.depth_multiplier == 1 and op.dilation_rate == (1, 1) and _is_supported_window(op, producers)
    if type(op) is layers.Conv2D:
        return op.groups == 1 and op.dilation_rate == op.kernel_size == op.strides == (1, 1)
    if isinstance(op, layers.GlobalAveragePooling2D):
        return op.keepdims
    if isinstance(op, layers.BatchNormalization):
        return op.axis in (-1, 3)
    if isinstance(op, layers.UpSampling2D):
        return op.interpolation == "bilinear"
    if isinstance(op, layers.Activation):
        return getattr(op.activation, "__name__", None) in _ACTIVATIONS
    return isinstance(op, _ELEMENTWISE)


def _is_supported_window(op, producers: list) -> bool:
    """3x3 or 5x5, either with SAME padding and a stride of one, or with as much padding by a layer before it."""
    if op.kernel_size not in ((3, 3), (5, 5)):
        return False
    if op.padding == "same":
        return op.strides == (1, 1)
    return op.strides in ((1, 1), (2, 2)) and _pads_by(producers, op.kernel_size[0] // 2)


def _pads_by(producers: list, size: int) -> bool:
    if len(producers) != 1:
        return False
    padding = producers[0].layer if hasattr(producers[0], "layer") else producers[0]
    return isinstance(padding, layers.ZeroPadding2D) and padding.padding == ((size, size), (size, size))
