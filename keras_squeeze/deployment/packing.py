"""`save_packed` and `load_packed`: a whole model in one small file, quantized and pruned weights at their real size.

`archives.py` says what is in such a file, `keras_squeeze.analysis.encodings` how a weight is stored.
"""

import json
import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import initialize_all_variables

from keras_squeeze.atomic_write import write_file
from keras_squeeze.deployment.archives import Archive, asset_name, first_line, size_of
from keras_squeeze.introspection.variables import read, require_tensorflow
from keras_squeeze.quantization.conversion import finalize
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware

MAX_BYTES = 4 << 30

_OTHERS = (".keras", ".h5", ".tflite")


def save_packed(model: keras.Model, path) -> int:
    """Writes a model, weights and architecture, as one small file.

    Every weight takes the smallest of several forms (see `analysis/encodings.py`): integers of a grid at their real
    number of bits, one for binary weights; nonzero values only, with their places; float values byte by byte; all of it
    entropy-coded. The optimizer and what `compile` was given are left out.

    Args:
        model: A built model that Keras can rebuild from its config. Of a model with quantizers the weights are saved on
            their grids: what is loaded is what `finalize(model)` returns.
        path: Where the file goes, for instance `"model.squeeze"`. What is there is replaced only once the new file was
            read back and found equal.

    Returns:
        The size of the file in bytes.

    Raises:
        TypeError, ValueError: no such model; it is not built, or cannot be rebuilt from its config.

    Example:

    ```python
    ks.save_packed(model, "model.squeeze")
    model = ks.load_packed("model.squeeze")
    ```
    """
    require_tensorflow()
    path = pathlib.Path(path)
    _check(model, path)
    if any(isinstance(layer, QuantizeAware) for layer in model._flatten_layers()):
        model = finalize(model)
    content = Archive.of(_config(model), _own_variables(model), _saved_assets(model)).to_bytes()
    write_file(path, content)
    return len(content)


def load_packed(
    path, *, custom_objects: dict | None = None, safe_mode: bool = True, max_bytes: int = MAX_BYTES
) -> keras.Model:
    """Reads what `save_packed` wrote: a model that predicts what the saved one predicted, bit for bit.

    Args:
        path: The file.
        custom_objects: Classes and functions of yours by name, where they are not registered with Keras.
        safe_mode: Whether to refuse files that hold Python code (`Lambda` layers), as Keras does. Turn it off only for
            files that you trust.
        max_bytes: How much memory the weights may take; a file that needs more is refused before it gets any.

    Returns:
        A model that is not compiled.

    Raises:
        ValueError: it is no packed model, of another version, damaged, or needs more than `max_bytes`; or Keras cannot
            rebuild the model. The message says which.
    """
    require_tensorflow()
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Pass the path of a file that save_packed wrote.")
    try:
        archive = Archive.from_bytes(path.read_bytes())
        model = _rebuilt(archive.config, custom_objects, safe_mode, max_bytes)
        _load(model, archive, max_bytes)
    except ValueError as problem:
        raise ValueError(f"{path} cannot be loaded as a packed model: {problem}") from None
    return model


def _check(model, path: pathlib.Path) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {model!r} of type {type(model).__name__}")
    if not model.built:
        raise ValueError(f"Model '{model.name}' has no weights yet. Build it or call it once, then save it.")
    if path.suffix in _OTHERS:
        raise ValueError(
            f"`path` must not end in {path.suffix}, which other tools take for a file of theirs. Received: "
            f"{str(path)!r}. Call it {path.with_suffix('.squeeze').name}, for instance."
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"`path` must be a file in a directory that is there. Received: {str(path)!r}")


def _config(model) -> str:
    """The model's configuration as JSON, tried out: a file whose model cannot be rebuilt is of no use."""
    try:
        config = _stripped(keras.saving.serialize_keras_object(model), "compile_config")
        text = json.dumps(config, separators=(",", ":"))
        again = _rebuilt(text, None, safe_mode=False, max_bytes=None, allocate=False)
    except Exception as problem:  # whatever a layer of the user's raises
        raise ValueError(
            f"Model '{model.name}' cannot be rebuilt from its config: {first_line(problem)} Keras needs that as well "
            "to load a .keras file: register your classes with @keras.saving.register_keras_serializable(), and give "
            "them get_config."
        ) from None
    shapes = [[(v.shape, v.dtype) for v in each.weights] for each in (model, again)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Model '{model.name}', rebuilt from its config, has other weights: {len(shapes[1])} in place of "
            f"{len(shapes[0])}, or of other shapes. Does a layer leave something out of get_config, or make weights "
            "outside of build?"
        )
    return text


def _rebuilt(config: str, custom_objects, safe_mode: bool, max_bytes: int | None, allocate: bool = True) -> keras.Model:
    """The model of a configuration, with new weights; without `allocate` with shapes only."""
    try:
        parsed = _parsed(config)
        with keras.StatelessScope(initialize_variables=False):  # variables get their memory later
            model = _deserialized(_stripped(parsed, "stateful"), custom_objects, safe_mode)
        needed = sum(math.prod(v.shape) * size_of(v.dtype) for v in model.variables)
        if max_bytes is not None and needed > max_bytes:
            raise ValueError(
                f"its weights take {needed:,} bytes, more than max_bytes={max_bytes:,}. If you trust it, pass a larger "
                "number."
            )
        if allocate and '"stateful": true' in json.dumps(parsed):  # such states cannot be made in the scope
            return _deserialized(parsed, custom_objects, safe_mode)
        if allocate:
            initialize_all_variables()
        return model
    finally:
        global_state.set_global_attribute("uninitialized_variables", [])


def _parsed(config: str):
    try:
        return _stripped(json.loads(config), "compile_config")
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"its model's configuration is not understood ({first_line(problem)})") from None


def _stripped(config, name: str):
    """A configuration without the entries of a name, wherever they stand."""
    if isinstance(config, dict):
        return {key: _stripped(value, name) for key, value in config.items() if key != name}
    return [_stripped(value, name) for value in config] if isinstance(config, (list, tuple)) else config


def _deserialized(config, custom_objects, safe_mode: bool) -> keras.Model:
    try:
        model = keras.saving.deserialize_keras_object(config, custom_objects=custom_objects, safe_mode=safe_mode)
    except Exception as problem:  # Keras raises whatever a strange config leads to
        raise ValueError(f"Keras cannot rebuild the model. {first_line(problem)}") from None
    if not isinstance(model, keras.Model):
        raise ValueError(f"it holds a {type(model).__name__} in place of a model")
    return model


def _own_variables(model) -> Iterator[tuple[int, str, np.ndarray]]:
    """What every layer saves: its place among the model's layers, a key, and the values."""
    for index, layer in enumerate(model._flatten_layers()):
        store: dict[str, Any] = {}
        layer.save_own_variables(store)
        for key, value in store.items():
            yield index, key, read(value) if isinstance(value, keras.Variable) else np.asarray(value)


def _load(model, archive: Archive, max_bytes: int) -> None:
    """Puts the weights and the assets of an archive into a rebuilt model."""
    layers = list(model._flatten_layers())
    for index, arrays in archive.arrays(len(layers), max_bytes):
        _hand(layers[index], "load_own_variables", arrays)
    for index, files in archive.files(len(layers)):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                pathlib.Path(folder, name).write_bytes(content)
            _hand(layers[index], "load_assets", folder)


def _hand(layer, method: str, saved) -> None:
    try:
        getattr(layer, method)(saved)
    except Exception as problem:  # a layer's own way of loading
        raise ValueError(f"'{layer.name}' does not take what was saved for it. {first_line(problem)}") from None


def _saved_assets(model) -> dict[str, bytes]:
    """The files that layers keep, under the names of their members."""
    assets = {}
    for index, layer in enumerate(model._flatten_layers()):
        save = getattr(layer, "save_assets", None)  # only some layers have it
        if save is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            save(folder)
            for file in sorted(pathlib.Path(folder).iterdir()):
                assets[asset_name(index, file.name)] = file.read_bytes()
    return assets
