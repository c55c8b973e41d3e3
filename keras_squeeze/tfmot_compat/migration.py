"""`from_tf_keras`: a trained model of tf_keras as a Keras 3 model."""

import pathlib
import types
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_squeeze.tfmot_compat.isolation import import_tfmot
from keras_squeeze.tfmot_compat.layer_conversion import CannotConvert, convert_layer
from keras_squeeze.tfmot_compat.operations import call_operation, check_operation, is_operation

_QUANTIZED = ("QuantizeWrapper", "QuantizeWrapperV2", "QuantizeLayer", "QuantizeAnnotate", "QuantizeAwareActivation")
_CLUSTERED = ("ClusterWeights", "ClusterWeightsMHA", "ClusterWeightsRNN")


def from_tf_keras(model_or_path, custom_objects: Mapping[str, Any] | None = None) -> keras.Model:
    """Brings a trained model over from tf_keras (Keras 2) to Keras 3: same predictions, same zeros.

    A model that tfmot wrapped for pruning comes without the wrappers and with its masks applied; prune on with
    `keras_squeeze.KeepSparsity` or `prune_low_magnitude`. The optimizer and its state stay behind.

    Args:
        model_or_path: A Sequential or Functional model of tf_keras, nested ones included; or the path of one: `.h5`,
            `.keras` as tf_keras writes it, or the directory of a SavedModel that tf_keras wrote.
        custom_objects: For classes and functions of your own, by name: their Keras 3 form. A file with layer classes of
            your own is loaded with tf_keras first, and passed as a model.

    Returns:
        The Keras 3 model, under the names of the old one; not compiled.

    Raises:
        ValueError, TypeError: it is no such model, it is quantized or clustered by tfmot, or some of its layers have no
            counterpart in Keras 3; the message names all of them.
        ImportError: for a path, tf_keras is not installed.

    Example:

    ```python
    model = tfmot_compat.from_tf_keras("pruned.h5")
    ```
    """
    custom = dict(custom_objects or {})
    model = model_or_path
    if isinstance(model_or_path, (str, pathlib.Path)):
        model = _load(pathlib.Path(model_or_path), custom)
    if isinstance(model, keras.Model):
        raise TypeError(f"`model_or_path` is a Keras 3 model already. Received: {model!r}")
    if not any(base.__module__.startswith("tf_keras") for base in type(model).__mro__) or not hasattr(model, "layers"):
        raise TypeError(f"`model_or_path` must be a model of tf_keras, or a path. Received: {model!r}")
    _refuse_compressed(model)
    with keras.saving.custom_object_scope(custom):
        return _Migration(custom).run(model)


class _Migration:
    """Builds a model of tf_keras anew, call by call; shared layers stay shared, nested models nested."""

    def __init__(self, custom: Mapping[str, Any]):
        self.custom = custom
        self.made: dict[int, tuple[Any, Any]] = {}  # old and new layer, by the identity of the old one
        self.problems: list[str] = []

    def run(self, model) -> keras.Model:
        for layer in _leaves(model):
            self._try(layer)
        if self.problems:
            raise ValueError(
                f"Model '{model.name}' has layers without a counterpart in Keras 3: {'; '.join(self.problems)}. Build "
                "these in Keras 3 and copy their weights, or pass custom_objects={name of the class: Keras 3 class}. "
                f"Received: {model!r}"
            )
        new = self.model(model)
        for old, layer in self.made.values():
            if not hasattr(old, "layers"):
                _copy_weights(old, layer)
        return new

    def model(self, model) -> keras.Model:
        """The new model for an old one, always the same."""
        if id(model) not in self.made:
            sequential = type(model).__name__ == "Sequential"
            new = self._sequential(model) if sequential else self._functional(model)
            if not model.trainable:
                new.trainable = False
            self.made[id(model)] = model, new
        return self.made[id(model)][1]

    def _try(self, layer) -> None:
        if id(layer) in self.made:
            return
        try:
            if is_operation(layer):
                check_operation(layer)
            else:
                self.made[id(layer)] = layer, convert_layer(_unwrapped(layer), self.custom)
        except CannotConvert as reason:
            self.problems.append(f"{layer.name}: {reason}")

    def _sequential(self, model) -> keras.Model:
        new = keras.Sequential(name=model.name)
        for tensor in model.inputs or ():
            new.add(self._input(tensor))
        for layer in model.layers:
            if type(layer).__name__ != "InputLayer":
                new.add(self._new(layer))
        if not new.built:
            new.build(tuple(model._build_input_shape))
        return new

    def _functional(self, model) -> keras.Model:
        tensors: dict[int, Any] = {id(tensor): self._input(tensor).output for tensor in model.inputs}
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if not node.is_input:
                    arguments = (_replaced(part, tensors) for part in (node.call_args, node.call_kwargs))
                    outputs = self._call(node.layer, *arguments)
                    pairs = zip(_flat(node.outputs), _flat(outputs), strict=True)
                    tensors.update((id(old), new) for old, new in pairs)
        inputs, outputs = (_replaced(part, tensors) for part in (model._nested_inputs, model._nested_outputs))
        return keras.Model(inputs, outputs, name=model.name)

    def _call(self, layer, args, kwargs):
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if is_operation(layer):
            return call_operation(layer, args, kwargs)
        new = self._new(layer)
        if isinstance(new, (keras.layers.RNN, keras.layers.Bidirectional)) and isinstance(args[0], (list, tuple)):
            kwargs["initial_state"], args = list(args[0][1:]), (args[0][0], *args[1:])
        return new(*args, **kwargs)

    def _new(self, layer):
        return self.model(layer) if hasattr(layer, "layers") else self.made[id(layer)][1]

    def _input(self, tensor):
        layer = tensor._keras_history.layer
        self._try(layer)
        return self.made[id(layer)][1]


def _load(path: pathlib.Path, custom: Mapping[str, Any]):
    """Loads with tf_keras, whatever tfmot put into the model."""
    if not path.exists():
        raise ValueError(f"There is no such file or directory. Received: {str(path)!r}")
    tfmot = import_tfmot()
    import tf_keras

    functions = {name: value for name, value in custom.items() if isinstance(value, types.FunctionType)}
    try:
        with (
            tfmot.sparsity.keras.prune_scope(),
            tfmot.quantization.keras.quantize_scope(),
            tfmot.clustering.keras.cluster_scope(),
            tf_keras.utils.custom_object_scope(functions),
        ):
            return tf_keras.models.load_model(path, compile=False)
    except Exception as error:  # whatever a file is refused for
        raise ValueError(
            f"tf_keras cannot load this file: {error} A file of Keras 3 is loaded by keras.models.load_model. With "
            f"layer classes of your own, load it with tf_keras, and pass the model. Received: {str(path)!r}"
        ) from error


def _refuse_compressed(model) -> None:
    for kinds, how in ((_QUANTIZED, "quantized"), (_CLUSTERED, "clustered")):
        found = [layer.name for layer in _leaves(model) if type(layer).__name__ in kinds]
        if found:
            raise ValueError(
                f"Model '{model.name}' was {how} by tfmot, whose ranges have no counterpart here: "
                f"{', '.join(found[:5])}. Bring the float model over that it was made from, and quantize that: "
                f"keras_squeeze.quantize_aware(from_tf_keras(float_model)). Received: {model!r}"
            )
    if not hasattr(model, "_nodes_by_depth") and type(model).__name__ != "Sequential":
        raise ValueError(
            f"Model '{model.name}' is subclassed: it is not known how its layers are connected. Build it in Keras 3 "
            f"and copy its weights, layer by layer. Received: {model!r}"
        )
    if not model.built:
        raise ValueError(f"Model '{model.name}' is not built, so that it has no weights yet. Received: {model!r}")


def _leaves(model):
    """The layers of a model, those of nested models in their place."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _leaves(layer)
        else:
            yield layer


def _is_pruned(layer) -> bool:
    return type(layer).__name__ == "PruneLowMagnitude"


def _unwrapped(layer):
    return layer.layer if _is_pruned(layer) else layer


def _copy_weights(old, new) -> None:
    """Gives a layer the weights of its counterpart, masks applied."""
    masks = {id(weight): mask.numpy() for weight, mask, _ in (old.pruning_vars if _is_pruned(old) else ())}
    values = [weight.numpy() for weight in _unwrapped(old).weights]
    for index, weight in enumerate(_unwrapped(old).weights):
        if id(weight) in masks:
            values[index] = np.where(masks[id(weight)] != 0, values[index], 0).astype(values[index].dtype)
    if isinstance(new, keras.layers.Normalization) and new.weights:
        values = [np.reshape(value, weight.shape) for value, weight in zip(values, new.weights, strict=False)]
    if [value.shape for value in values] != [tuple(weight.shape) for weight in new.weights]:
        raise ValueError(
            f"'{old.name}': the weights of {type(_unwrapped(old)).__name__} are others in Keras 3. Received shapes "
            f"{[value.shape for value in values]}, expected {[tuple(weight.shape) for weight in new.weights]}"
        )
    new.set_weights(values)
    if isinstance(new, keras.layers.Normalization):
        new.finalize_state()  # it computes with what it has derived from its weights


def _replaced(structure, tensors: Mapping[int, Any]):
    """A structure with tensors of Keras 3 in the place of those of tf_keras."""
    if isinstance(structure, dict):
        return {name: _replaced(part, tensors) for name, part in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(_replaced(part, tensors) for part in structure)
    return tensors.get(id(structure), structure)


def _flat(structure) -> list:
    if isinstance(structure, (list, tuple)):
        return [leaf for part in structure for leaf in _flat(part)]
    if isinstance(structure, dict):
        return [leaf for name in sorted(structure) for leaf in _flat(structure[name])]
    return [structure]
