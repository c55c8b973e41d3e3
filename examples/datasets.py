"""The data of all examples: images and labels, by the name that `--dataset` has.

The handwritten digits come with scikit-learn; the others are downloaded by Keras when they are asked for.
"""

import argparse

import keras
import numpy as np

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10")


def arguments(description: str, **numbers: int) -> argparse.Namespace:
    """The options of an example, from the command line.

    Args:
        description: What the example shows; its first line is the help.
        numbers: Its whole numbers by name, such as `epochs`, and what they are by default.

    Returns:
        `dataset`, and the numbers.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--dataset", choices=NAMES, default="digits", help="(default: %(default)s)")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    return parser.parse_args()


def load(name: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test data.

    Args:
        name: One of `NAMES`.

    Returns:
        `(images, labels), (images, labels)`: images (n, height, width, channels) in [0, 1], labels from 0 to 9.
    """
    train, test = _digits() if name == "digits" else getattr(keras.datasets, name).load_data()
    return _prepared(*train), _prepared(*test)


def _digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = data.images * (255 / 16)  # as the others are
    return (images[500:], data.target[500:]), (images[:500], data.target[:500])


def _prepared(images, labels) -> tuple[np.ndarray, np.ndarray]:
    if images.ndim == 3:  # no axis for colors
        images = images[..., np.newaxis]
    return (images / 255).astype("float32"), labels.reshape(-1).astype("int32")
