"""Schemes of `quantize_apply`: which quantizers the layers of a model get."""

from dataclasses import dataclass

import keras

from keras_squeeze.quantizers import Affine


@dataclass(frozen=True)
class QuantizationScheme:
    """How weights and activations are quantized.

    Attributes:
        num_bits_weight, num_bits_activation: 2 to 16.
        disable_per_axis: One scale for the whole of a weight, in every layer. Otherwise each output channel has its
            own, except in Dense layers, as in tfmot.
        preserves_zeros: Whether weights that are zero stay so while the model trains.
    """

    num_bits_weight: int = 8
    num_bits_activation: int = 8
    disable_per_axis: bool = False
    preserves_zeros: bool = False

    @property
    def activations(self) -> Affine:
        return Affine(self.num_bits_activation)

    def weights_of(self, layer) -> Affine:
        per_tensor = self.disable_per_axis or isinstance(layer, keras.layers.Dense)
        return Affine(self.num_bits_weight, per_channel=False if per_tensor else None)


def Default8BitQuantizeScheme(disable_per_axis=False) -> QuantizationScheme:  # noqa: N802 - a class in tfmot
    """8 bits for weights and activations; depthwise convolutions, unlike in tfmot, with a scale for each channel."""
    return QuantizationScheme(disable_per_axis=disable_per_axis)


def DefaultNBitQuantizeScheme(  # noqa: N802 - a class in tfmot
    disable_per_axis=False, num_bits_weight=8, num_bits_activation=8
) -> QuantizationScheme:
    """Other numbers of bits for weights and activations."""
    return QuantizationScheme(num_bits_weight, num_bits_activation, disable_per_axis)


def Default8BitPrunePreserveQuantizeScheme() -> QuantizationScheme:  # noqa: N802 - a class in tfmot
    """8 bits, and weights that are zero stay zero while the model trains, without a callback."""
    return QuantizationScheme(preserves_zeros=True)
