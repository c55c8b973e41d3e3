"""`tfmot.experimental`: quantizing what was pruned."""

from keras_squeeze.tfmot_compat.namespaces import namespace
from keras_squeeze.tfmot_compat.quantization import collab_opts

combine = namespace(
    "experimental.combine",
    "Quantization-aware training that keeps the zeros of a pruned model.",
    {name: getattr(collab_opts, name) for name in collab_opts.__all__},
)
