"""`tfmot.clustering.keras`: not offered; every name says what is."""

from keras_squeeze.tfmot_compat.namespaces import namespace

CLUSTERING_INSTEAD = (
    "For few distinct values per weight there are grids of few bits: keras_squeeze.quantize_aware(model, "
    'weights="int4") trains on 15 values, and keras_squeeze.save_packed stores them in 4 bits.'
)


def _refusing(path: str, *names: str):
    return namespace(f"clustering.keras{path}", "Not offered.", dict.fromkeys(names, CLUSTERING_INSTEAD))


keras = _refusing(
    "",
    *("CentroidInitialization", "ClusterableLayer", "ClusteringAlgorithm", "ClusteringSummaries"),
    *("cluster_scope", "cluster_weights", "strip_clustering"),
)
keras.clusterable_layer = _refusing(".clusterable_layer", "ClusterableLayer")  # type: ignore[attr-defined]
keras.experimental = _refusing(".experimental", "cluster_weights")  # type: ignore[attr-defined]
