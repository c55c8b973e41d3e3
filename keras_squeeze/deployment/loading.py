"""Models and examples from files, with errors that say what is wrong with the file."""

import pathlib
import warnings
import zipfile

import keras
import numpy as np

from keras_squeeze.deployment.packing import load_packed

_BRINGS_CODE = (
    "{} brings Python code, such as a `Lambda` layer. If you trust where it comes from, pass safe_mode=False, which is "
    "--unsafe on the command line."
)


def load_model(path, *, safe_mode: bool = True, compiled: bool = False) -> keras.Model:
    """Loads a `.keras` file or what `save_packed` wrote.

    Args:
        path: The file. One whose name ends in `.keras` is Keras's own, any other one a packed one.
        safe_mode: False lets a file bring Python code of its own, in `Lambda` layers, and run it.
        compiled: Whether to compile it as it was when it was saved, without the state of its optimizer. Where the file
            does not say how, or names a loss or metric that Keras does not know, it is not compiled.

    Returns:
        A Keras model.

    Raises:
        ValueError: there is no such file, it is no model, it needs a class that Keras does not know, or it brings code.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Pass a .keras or a packed file.")
    if path.suffix == ".tflite":
        raise ValueError(f"A .tflite file is finished and does not become a Keras model again. Received: {path}")
    if path.suffix != ".keras":
        return _packed(path, safe_mode)
    if not zipfile.is_zipfile(path):  # Keras says of such a file that it is not there
        raise ValueError(f"{path} is no model that Keras can load: no .keras file, or cut off.")
    if compiled:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the state of the optimizer does not fit
                return keras.models.load_model(path, safe_mode=safe_mode)
        except Exception:  # it says below what is wrong, unless only the loss or a metric is not known
            return load_model(path, safe_mode=safe_mode)
    try:
        return keras.models.load_model(path, compile=False, safe_mode=safe_mode)
    except Exception as error:  # of whatever kind, the file is why
        reasons = " ".join(map(str, _chain(error)))
        if safe_mode and "safe_mode=False" in reasons:
            raise ValueError(_BRINGS_CODE.format(path)) from None
        raise ValueError(f"{path} is no model that Keras can load: {_chain(error)[-1]}") from None


def _packed(path: pathlib.Path, safe_mode: bool) -> keras.Model:
    try:
        return load_packed(path, safe_mode=safe_mode)
    except ValueError as error:
        if safe_mode and "safe_mode=False" in str(error):
            raise ValueError(_BRINGS_CODE.format(path)) from None
        raise


def load_examples(path) -> tuple:
    """Reads inputs, and targets where there are any, from a NumPy file.

    Args:
        path: A `.npy` file with the inputs, or a `.npz` file with `x` and perhaps `y`; for several inputs their names
            instead of `x`.

    Returns:
        `(x, y)`: an array or a dict of arrays, and an array or None.

    Raises:
        ValueError: there is no such file, or no inputs in it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Pass a .npy or .npz file.")
    try:
        content = np.load(path)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no .npy or .npz file of numbers: {error}") from None
    if isinstance(content, np.ndarray):
        return content, None
    with content:
        try:
            arrays = {name: content[name] for name in content.files}
        except ValueError as error:
            raise ValueError(f"{path} holds something else than numbers: {error}") from None
    y = arrays.pop("y", None)
    if not arrays:
        raise ValueError(f"{path} has no inputs: expected x, or the names of several inputs. Received: y alone or none")
    return arrays["x"] if list(arrays) == ["x"] else arrays, y


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the first cause last."""
    found = [error]
    while found[-1].__cause__ or found[-1].__context__:
        found.append(found[-1].__cause__ or found[-1].__context__)  # type: ignore[arg-type]
    return found
