"""Importing tfmot without what that does to a process."""

import os
import warnings

_VARIABLE = "TF_USE_LEGACY_KERAS"


def import_tfmot():
    """The real tfmot, with `tf.keras` and the environment left as they are.

    Its import sets the environment variable `TF_USE_LEGACY_KERAS`, after which the first use of `tf.keras` in the
    process gives Keras 2. So `tf.keras` is settled before, by what the user has set, and the variable put back after.

    Raises:
        ImportError: tfmot, or tf_keras which it runs on, is not installed.
    """
    import tensorflow as tf

    before = os.environ.get(_VARIABLE)
    getattr(tf.keras, "__version__", None)  # the first access decides
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tensorflow_model_optimization as tfmot
    except ImportError as error:
        raise ImportError(
            f"This needs tensorflow-model-optimization and tf_keras ({error}). Install them: "
            "pip install tensorflow-model-optimization tf_keras"
        ) from None
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before
    return tfmot
