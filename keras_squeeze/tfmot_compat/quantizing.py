"""tfmot's calls for quantization-aware training, over `quantize_aware`."""

import re

import keras

from keras_squeeze.introspection.functional import Rebuilder, functional_of, require_graph
from keras_squeeze.introspection.selection import find_layers
from keras_squeeze.quantization.conversion import quantize_aware
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.tfmot_compat.pruning_wrapper import PruneLowMagnitude
from keras_squeeze.tfmot_compat.schemes import Default8BitQuantizeScheme, QuantizationScheme
from keras_squeeze.tfmot_compat.wrapping import TransparentWrapper, Unwrapper
from keras_squeeze.tfmot_compat.zero_preserving import preserve_zeros

CONFIGS_INSTEAD = (
    "Which grid a layer takes is an argument here: keras_squeeze.quantize_aware(model, "
    'weights={"dense": keras_squeeze.quantizers.Affine(4), "conv": "int8"}, activations="int8"), with regular '
    "expressions for the paths of layers; or for one layer keras_squeeze.QuantizeAware(layer, weights=..., "
    "activations=...). keras_squeeze.register_layer names the weights of a layer of your own."
)

DEFAULT_SCHEME = Default8BitQuantizeScheme()


@keras.saving.register_keras_serializable("keras_squeeze.tfmot_compat")
class QuantizeAnnotate(TransparentWrapper):
    """Marks a layer for `quantize_apply`; it computes what the layer computes."""


def quantize_scope(*args):
    """A scope for custom objects of your own; what this package puts into a model loads without one.

    Args:
        *args: Dictionaries from names to classes or functions.
    """
    for objects in args:
        if not isinstance(objects, dict):
            raise TypeError(f"`quantize_scope` takes dictionaries {{name: class}}. Received: {objects!r}")
    return keras.saving.custom_object_scope({name: value for objects in args for name, value in objects.items()})


def quantize_annotate_layer(to_annotate, quantize_config=None):
    """Marks one layer for `quantize_apply`.

    Args:
        to_annotate: A layer.
        quantize_config: None; see the error for what takes its place.

    Returns:
        The layer in a wrapper that computes the same.

    Raises:
        ValueError: it is no layer.
        NotImplementedError: there is a `quantize_config`.
    """
    if quantize_config is not None:
        raise NotImplementedError(
            f"`quantize_config` is not supported. {CONFIGS_INSTEAD} Received: quantize_config={quantize_config!r}"
        )
    if not isinstance(to_annotate, keras.Layer) or isinstance(to_annotate, keras.Model):
        raise ValueError(
            f"`to_annotate` must be a Keras layer; for models there is quantize_annotate_model. Received: "
            f"{to_annotate!r} of type {type(to_annotate).__name__}"
        )
    return QuantizeAnnotate(to_annotate)


def quantize_annotate_model(to_annotate):
    """Marks all layers of a model for `quantize_apply`.

    Args:
        to_annotate: A Sequential or Functional model; unlike in tfmot with nested ones, too.

    Returns:
        A new model with the same layers, each in a wrapper that computes the same; not compiled.

    Raises:
        TypeError, ValueError: it is no such model.
    """
    _check_model(to_annotate)
    if functional_of(to_annotate) is None:
        return type(to_annotate)([_annotated(layer) for layer in to_annotate.layers], name=to_annotate.name)
    return _Annotator().rebuild(to_annotate)


def quantize_apply(model, scheme=DEFAULT_SCHEME, quantized_layer_name_prefix="quant_"):
    """Copies a model for quantization-aware training of the layers that are marked.

    Quantizers stand where `keras_squeeze.quantize_aware` puts them, which supports more layers than tfmot (Conv1D,
    recurrent, attention, ...), begins ranges with the first batch, and trains the integers that
    `keras_squeeze.export` writes.

    Args:
        model: A built Sequential or Functional model with marked layers. It stays as it is.
        scheme: `Default8BitQuantizeScheme()`, `DefaultNBitQuantizeScheme(...)`, or for a pruned model
            `Default8BitPrunePreserveQuantizeScheme()`.
        quantized_layer_name_prefix: What the names of quantized layers begin with; outputs of the model keep theirs, by
            which losses and metrics are given.

    Returns:
        A new model, not compiled.

    Raises:
        TypeError, ValueError: it is no such model, no layer is marked, or `keras_squeeze.quantize_aware` refuses it.
    """
    _check_model(model)
    require_graph(model, "")  # built
    if not any(isinstance(layer, QuantizeAnnotate) for layer in model._flatten_layers()):
        raise ValueError(
            f"No layer of model '{model.name}' is marked for quantization. Mark some with quantize_annotate_layer, or "
            "all: quantize_model(model)."
        )
    unwrapper = Unwrapper(QuantizeAnnotate)
    return _quantize(unwrapper.unwrap(model), unwrapper.unwrapped, scheme, quantized_layer_name_prefix)


def quantize_model(to_quantize, quantized_layer_name_prefix="quant_"):
    """Copies a model for quantization-aware training with 8 bits; see `quantize_apply`.

    Args:
        to_quantize: A built Sequential or Functional model. It stays as it is.
        quantized_layer_name_prefix: As in `quantize_apply`.

    Returns:
        A new model, not compiled.

    Raises:
        TypeError, ValueError: it is no such model, or `keras_squeeze.quantize_aware` refuses it.

    Example:

    ```python
    q = tfmot.quantization.keras.quantize_model(model)
    q.compile("adam", loss, metrics=["accuracy"])
    q.fit(x, y, epochs=2)
    ```
    """
    _check_model(to_quantize)
    if any(isinstance(layer, QuantizeAnnotate) for layer in to_quantize._flatten_layers()):
        to_quantize = Unwrapper(QuantizeAnnotate).unwrap(to_quantize)
    return _quantize(to_quantize, None, DEFAULT_SCHEME, quantized_layer_name_prefix)


class _Annotator(Rebuilder):
    def make(self, layer):
        return _annotated(layer) if isinstance(layer, keras.Layer) else super().make(layer)


def _annotated(layer):
    return layer if isinstance(layer, (QuantizeAnnotate, keras.layers.Lambda)) else QuantizeAnnotate(layer)


def _quantize(model, layers, scheme, prefix: str | None):
    if not isinstance(scheme, QuantizationScheme):
        raise TypeError(
            "`scheme` must be one of keras_squeeze.tfmot_compat, such as Default8BitQuantizeScheme(). "
            f"{CONFIGS_INSTEAD} Received: scheme={scheme!r}"
        )
    chosen = None if layers is None else {id(layer) for layer in layers}
    weights = {
        f"^{re.escape(entry.path)}$": scheme.weights_of(entry.layer)
        for entry in find_layers(model).layers
        if chosen is None or any(id(owner) in chosen for owner in (entry.layer, *entry.parents))
    }
    if not weights:
        raise ValueError(f"Model '{model.name}': none of the marked layers has weights that can be quantized.")
    result = quantize_aware(model, weights, scheme.activations, layers=layers)
    if scheme.preserves_zeros:
        result = preserve_zeros(result)
    outputs = {tensor._keras_history[0].name for tensor in functional_of(result).outputs}
    for layer in result._flatten_layers():
        if isinstance(layer, QuantizeAware) and layer.name not in outputs:
            layer.name = f"{prefix or ''}{layer.layer.name}"
    return result


def _check_model(model) -> None:
    if not isinstance(model, keras.Model):
        hint = ""
        if type(model).__module__.startswith("tf_keras"):
            hint = " Make a Keras 3 model of it first: keras_squeeze.tfmot_compat.from_tf_keras(model)."
        raise ValueError(f"A Keras model is needed. Received: {model!r} of type {type(model).__name__}.{hint}")
    if functional_of(model) is None and not isinstance(model, keras.Sequential):
        require_graph(model, "Wrap its layers where they are made instead: keras_squeeze.QuantizeAware(layer).")
    pruned = [layer.name for layer in model._flatten_layers() if isinstance(layer, PruneLowMagnitude)]
    if pruned:
        raise ValueError(
            f"Model '{model.name}' is still wrapped for pruning: {', '.join(pruned[:5])}. Take the wrappers off first: "
            "tfmot.sparsity.keras.strip_pruning(model)."
        )
