"""`tfmot.quantization.keras`: quantization-aware training."""

from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.tfmot_compat.clustering import CLUSTERING_INSTEAD
from keras_squeeze.tfmot_compat.namespaces import namespace
from keras_squeeze.tfmot_compat.quantizing import (
    CONFIGS_INSTEAD,
    quantize_annotate_layer,
    quantize_annotate_model,
    quantize_apply,
    quantize_model,
    quantize_scope,
)
from keras_squeeze.tfmot_compat.schemes import (
    Default8BitPrunePreserveQuantizeScheme,
    Default8BitQuantizeScheme,
    DefaultNBitQuantizeScheme,
)

_QUANTIZER = (
    "Quantizers are objects of keras_squeeze.quantizers, given to quantize_aware(model, weights=..., activations=...) "
    "or to QuantizeAware(layer, ...): "
)
_TRANSFORM = (
    "No graph is transformed: keras_squeeze.quantize_aware(model) places quantizers where integer kernels round, after "
    "batch normalization and ReLU, and keras_squeeze.shrink and keras_squeeze.finalize rebuild models."
)
_REGISTRY = (
    "The layers that can be quantized are those of this package's layer table; keras_squeeze.register_layer(MyLayer, "
    '["kernel"]) adds one.'
)
_SCHEME = f"{CONFIGS_INSTEAD} For other numbers of bits: DefaultNBitQuantizeScheme(num_bits_weight=4)."
_RANGE = "A fixed range is a property of the quantizer: keras_squeeze.quantizers.Affine(8, range=(0.0, 1.0))"
_TRANSFORMS = [
    *("ConcatTransform", *(f"ConcatTransform{count}Inputs" for count in (3, 4, 5, 6))),
    *("Conv2DBatchNormActivationQuantize", "Conv2DBatchNormQuantize", "Conv2DBatchNormReLUQuantize"),
    *("Conv2DReshapeBatchNormActivationQuantize", "Conv2DReshapeBatchNormQuantize"),
    *("Conv2DReshapeBatchNormReLUQuantize", "InputLayerQuantize", "LayerReLUQuantize", "LayerReluActivationQuantize"),
    *("SeparableConv1DQuantize", "SeparableConvQuantize"),
]


def _refusing(path: str, names, instead: str):
    return namespace(f"quantization.keras.{path}", "Not offered.", dict.fromkeys(names, instead))


_default_8bit = namespace(
    "quantization.keras.default_8bit",
    "The scheme with 8 bits.",
    {
        "Default8BitQuantizeLayoutTransform": _TRANSFORM,
        "Default8BitQuantizeRegistry": _REGISTRY,
        "Default8BitQuantizeScheme": Default8BitQuantizeScheme,
        "default_8bit_transforms": _refusing("default_8bit.default_8bit_transforms", _TRANSFORMS, _TRANSFORM),
    },
)
_default_n_bit = namespace(
    "quantization.keras.experimental.default_n_bit",
    "The scheme with a choice of bits.",
    {
        "DefaultNBitQuantizeLayoutTransform": _TRANSFORM,
        "DefaultNBitQuantizeRegistry": _REGISTRY,
        "DefaultNBitQuantizeScheme": DefaultNBitQuantizeScheme,
        "default_n_bit_transforms": _refusing(
            "experimental.default_n_bit.default_n_bit_transforms", _TRANSFORMS, _TRANSFORM
        ),
    },
)
_transformations = namespace(
    "quantization.keras.graph_transformations",
    "Not offered.",
    {
        "model_transformer": _refusing("graph_transformations.model_transformer", ["ModelTransformer"], _TRANSFORM),
        "transforms": _refusing(
            "graph_transformations.transforms", ["LayerNode", "LayerPattern", "Transform"], _TRANSFORM
        ),
    },
)
_quantizers = namespace(
    "quantization.keras.quantizers",
    "Not offered.",
    {
        "AllValuesQuantizer": f'{_QUANTIZER}Affine(8, range="min_max"), and calibration for the widest range so far.',
        "FixedQuantizer": f"{_QUANTIZER}Affine(8, range=(-1.0, 1.0)).",
        "LastValueQuantizer": f'{_QUANTIZER}Affine(8, range="min_max").',
        "MovingAverageQuantizer": f'{_QUANTIZER}Affine(8, range="moving_average").',
        "Quantizer": f"{_QUANTIZER}Affine, FixedPoint, LearnedStep, Ternary and Binary, with 1 to 16 bits.",
    },
)
AFTER_PRUNING = {
    "Default8BitClusterPreserveQuantizeScheme": CLUSTERING_INSTEAD,
    "Default8BitPrunePreserveQuantizeScheme": Default8BitPrunePreserveQuantizeScheme,
    "strip_clustering_cqat": CLUSTERING_INSTEAD,
}
_collab_opts = namespace("quantization.keras.collab_opts", "Quantization of pruned models.", AFTER_PRUNING)
keras = namespace(
    "quantization.keras",
    "Quantization-aware training, as tfmot spells it.",
    {
        "QuantizeConfig": CONFIGS_INSTEAD,
        "QuantizeLayoutTransform": _TRANSFORM,
        "QuantizeRegistry": _REGISTRY,
        "QuantizeScheme": _SCHEME,
        "QuantizeWrapper": QuantizeAware,
        "QuantizeWrapperV2": QuantizeAware,
        "collab_opts": _collab_opts,
        "default_8bit": _default_8bit,
        "experimental": namespace("quantization.keras.experimental", "", {"default_n_bit": _default_n_bit}),
        "fix_input_output_range": f"{_RANGE}, for the activations of keras_squeeze.quantize_aware.",
        "graph_transformations": _transformations,
        "quantize_annotate_layer": quantize_annotate_layer,
        "quantize_annotate_model": quantize_annotate_model,
        "quantize_apply": quantize_apply,
        "quantize_model": quantize_model,
        "quantize_scope": quantize_scope,
        "quantizers": _quantizers,
        "remove_input_range": (
            f"{_RANGE}; without activations there is no range at the inputs: "
            "keras_squeeze.quantize_aware(model, activations=None)."
        ),
    },
)
