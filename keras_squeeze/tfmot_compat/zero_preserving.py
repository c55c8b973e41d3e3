"""Quantization-aware layers that hold the zeros of a pruned model, in any training, without a callback."""

import keras

from keras_squeeze.introspection.functional import Rebuilder, copy_layer
from keras_squeeze.introspection.layer_table import register_bookkeeping
from keras_squeeze.introspection.variables import read
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.training.mask_constraint import MaskConstraint


@keras.saving.register_keras_serializable("keras_squeeze.tfmot_compat")
class ZeroMask(keras.layers.Layer):
    """A mask that is saved with a model: where it is False, a weight is held at zero."""

    def build(self, input_shape):
        self.mask = self.add_weight(
            shape=input_shape, initializer="ones", dtype="bool", trainable=False, autocast=False, name="mask"
        )

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_squeeze.tfmot_compat")
class ZeroPreservingQuantizeAware(QuantizeAware):
    """`QuantizeAware` that holds the zeros which its layer had when it was made.

    The masks are constraints of the weights and are saved with the model, so that a plain `fit` keeps the zeros, also
    after loading.
    """

    def build(self, *args, **kwargs):
        super().build(*args, **kwargs)
        self.zero_masks = [ZeroMask(name=f"{w.name.replace('/', '_')}_zeros") for w in self.quantized_weights]
        for weight, holder in zip(self.quantized_weights, self.zero_masks, strict=True):
            holder.build(tuple(weight.variable.shape))
            holder.built = True
            constraint = MaskConstraint(weight.variable)
            constraint.mask = holder.mask
            weight.variable.constraint = constraint

    def hold_zeros(self) -> int:
        """Holds what is zero now, and returns how many weights that are; a weight that is all zero trains."""
        held = 0
        for weight, holder in zip(self.quantized_weights, self.zero_masks, strict=True):
            mask = read(weight.variable) != 0
            if mask.any():
                holder.mask.assign(mask)
                held += int((~mask).sum())
        return held


class ZeroPreserver(Rebuilder):
    """Puts `ZeroPreservingQuantizeAware` in the place of every `QuantizeAware` of a new model."""

    def make(self, layer):
        if not isinstance(layer, QuantizeAware):
            return super().make(layer)
        output = layer.output_quantizer and layer.output_quantizer.quantizer
        return ZeroPreservingQuantizeAware(copy_layer(layer.layer), layer.weight_quantizer, output, name=layer.name)

    def counterparts(self, old, new):
        return (old.layer, new.layer) if isinstance(old, QuantizeAware) else (old, new)


register_bookkeeping(ZeroMask)


def preserve_zeros(model):
    """A copy of a quantization-aware model, in training for the first time, that holds the zeros of its weights.

    Raises:
        ValueError: it has no zeros.
    """
    preserver = ZeroPreserver()
    result = preserver.rebuild(model)
    for old, new in preserver.variables():
        new.assign(read(old))
    layers = [layer for layer in result._flatten_layers() if isinstance(layer, ZeroPreservingQuantizeAware)]
    if not sum([layer.hold_zeros() for layer in layers]):
        raise ValueError(
            f"Model '{model.name}' has no zeros to preserve. Prune it first (prune_low_magnitude, then strip_pruning), "
            "or leave the scheme out. Received: scheme=Default8BitPrunePreserveQuantizeScheme()"
        )
    return result
