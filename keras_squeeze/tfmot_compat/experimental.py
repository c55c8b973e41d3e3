"""`tfmot.experimental`: quantizing what was pruned."""

from keras_squeeze.tfmot_compat.namespaces import namespace
from keras_squeeze.tfmot_compat.quantization import AFTER_PRUNING

combine = namespace(
    "experimental.combine", "Quantization-aware training that keeps the zeros of a pruned model.", AFTER_PRUNING
)
