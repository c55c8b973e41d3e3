"""Settings and data that all tests share."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

# Two logical devices, so that MirroredStrategy has something to mirror. Must come before TensorFlow starts.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(autouse=True)
def fresh_keras():
    """Every test begins with the same seeds, names and precision."""
    keras.utils.clear_session(free_memory=False)  # which takes longer than most tests
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")


@pytest.fixture(autouse=True, scope="module")
def free_memory():
    """What the tests of a file left behind goes."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's handwritten digits: (1797, 8, 8, 1) float32 in [0, 1], and integer labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images[..., np.newaxis] / 16).astype("float32"), data.target.astype("int32")
