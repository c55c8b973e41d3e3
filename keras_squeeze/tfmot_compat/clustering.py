"""`tfmot.clustering.keras`: not offered; every name says what is."""

from keras_squeeze.tfmot_compat.quantization import clustering as keras  # noqa: F401 - the namespace
