"""The API of tensorflow-model-optimization (tfmot) for Keras 3 models: change one import, keep the pipeline.

```python
from keras_squeeze import tfmot_compat as tfmot

pruned = tfmot.sparsity.keras.prune_low_magnitude(model)
pruned.fit(x, y, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
final = tfmot.sparsity.keras.strip_pruning(pruned)
```

A layer over this package: names, arguments, defaults and meanings are those of tfmot 0.8.1, masks come from
`MagnitudePruning` and quantizers from `quantize_aware`. Where tfmot has a bug, this is right, and the docstring says
so. What is not offered raises an error that names what to use instead. Nothing here imports tfmot or tf_keras, save
`from_tf_keras`, which brings models over, and which leaves `tf.keras` and the environment as they were.
"""

from keras_squeeze.tfmot_compat import clustering, experimental, quantization, sparsity
from keras_squeeze.tfmot_compat.migration import from_tf_keras

__version__ = "0.8.1"
"""The version of tfmot whose API this is; programs ask for it."""

__all__ = ["clustering", "experimental", "from_tf_keras", "quantization", "sparsity"]
