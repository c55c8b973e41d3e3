"""`prune_low_magnitude` wraps what is to be pruned, `strip_pruning` takes the wrappers off."""

import contextlib
import warnings

import keras

from keras_squeeze.introspection.functional import Rebuilder, functional_of
from keras_squeeze.tfmot_compat.pruning_policies import PruningPolicy
from keras_squeeze.tfmot_compat.pruning_schedules import DEFAULT
from keras_squeeze.tfmot_compat.pruning_wrapper import PruneLowMagnitude, can_be_pruned
from keras_squeeze.tfmot_compat.wrapping import Unwrapper


def prune_scope():
    """Does nothing, since models with wrapped layers load without a scope. For programs that were written with one."""
    return contextlib.nullcontext()


def prune_low_magnitude(
    to_prune,
    pruning_schedule=DEFAULT,
    block_size=(1, 1),
    block_pooling_type="AVG",
    pruning_policy=None,
    sparsity_m_by_n=None,
    **kwargs,
):
    """Wraps a model, a layer or a list of layers, to be pruned by `UpdatePruningStep` while it trains.

    As in tfmot, a wrapped model shares its layers with the model that it was made from, and is not compiled. Unlike
    there, one layer that cannot be pruned does not stop the others: it is left as it is and named in one warning.

    Args:
        to_prune: A Sequential or Functional model, nested ones included; a layer; or a list of layers.
        pruning_schedule, block_size, block_pooling_type, sparsity_m_by_n: As in `PruneLowMagnitude`.
        pruning_policy: For models: a `PruningPolicy`, which says which layers are wrapped.
        **kwargs: For a layer: as for any layer, such as `input_shape`.

    Returns:
        The wrapped layer, the list of them, or a new model.

    Raises:
        ValueError, TypeError: something else is to be pruned, or an argument is outside its range.

    Example:

    ```python
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=1000)
    pruned = tfmot.sparsity.keras.prune_low_magnitude(model, pruning_schedule=schedule)
    ```
    """
    options = {
        "pruning_schedule": pruning_schedule,
        "block_size": block_size,
        "block_pooling_type": block_pooling_type,
        "sparsity_m_by_n": sparsity_m_by_n,
    }
    if pruning_policy is not None and not isinstance(pruning_policy, PruningPolicy):
        raise TypeError(f"`pruning_policy` must be a `PruningPolicy`. Received: {pruning_policy!r}")
    if isinstance(to_prune, list):
        return [_wrap_in_list(layer, options) for layer in to_prune]
    if isinstance(to_prune, keras.Model):
        _check_model(to_prune, "Wrap its layers where they are made instead.")
        if pruning_policy is not None:
            pruning_policy.ensure_model_supports_pruning(to_prune)
        return _wrap_model(to_prune, pruning_policy, options)
    if isinstance(to_prune, keras.Layer):
        return PruneLowMagnitude(to_prune, **options, **kwargs)
    hint = ""
    if type(to_prune).__module__.startswith("tf_keras"):
        hint = " For models of tf_keras: keras_squeeze.tfmot_compat.from_tf_keras(model) makes a Keras 3 model of it."
    raise ValueError(
        "`to_prune` must be a Sequential or Functional Keras model, a Keras layer or a list of layers. Received: "
        f"{to_prune!r} of type {type(to_prune).__name__}.{hint}"
    )


def strip_pruning(model):
    """Takes the wrappers off a pruned model; the zeros stay where they are.

    Unlike in tfmot, what comes back has weights of its own: the wrapped model can train on.

    Args:
        model: A model with `PruneLowMagnitude` layers.

    Returns:
        A new model of plain Keras layers, under their own names, not compiled.

    Raises:
        ValueError: it is no Sequential or Functional model.

    Example:

    ```python
    final = tfmot.sparsity.keras.strip_pruning(pruned)
    ```
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: {model!r} of type {type(model).__name__}")
    _check_model(model, "Take its layers out by hand: `wrapper.layer`.")
    return Unwrapper(PruneLowMagnitude).unwrap(model)


class _Wrapper(Rebuilder):
    """Puts wrappers around the layers of a model, which stay the same."""

    def __init__(self, policy: PruningPolicy | None, options: dict):
        super().__init__()
        self.policy, self.options_of_pruning = policy, options
        self.unknown: list[str] = []

    def make(self, layer):
        if not isinstance(layer, keras.Layer):
            return super().make(layer)
        if _is_wrapped(layer) or (self.policy is not None and not self.policy.allow_pruning(layer)):
            return layer
        if not can_be_pruned(layer):
            self.unknown += [layer.name] if layer.trainable_variables or not layer.built else []
            return layer
        return PruneLowMagnitude(layer, **self.options_of_pruning)


def _wrap_model(model, policy, options):
    wrapper = _Wrapper(policy, options)
    if functional_of(model) is None:
        result = type(model)([wrapper.make(layer) for layer in model.layers], name=model.name)
    else:
        result = wrapper.rebuild(model)
    if wrapper.unknown:
        warnings.warn(
            f"Model '{model.name}': not pruned, because it is not known which of their weights can be: "
            f"{', '.join(wrapper.unknown)}. Derive their classes from tfmot.sparsity.keras.PrunableLayer, or name the "
            "weights with keras_squeeze.register_layer.",
            stacklevel=3,
        )
    return result


def _wrap_in_list(layer, options):
    if _is_wrapped(layer):
        return layer
    if isinstance(layer, keras.layers.InputLayer):
        return type(layer).from_config(layer.get_config())
    return PruneLowMagnitude(layer, **options)


def _is_wrapped(layer) -> bool:
    return isinstance(layer, PruneLowMagnitude)


def _check_model(model, instead: str) -> None:
    if functional_of(model) is None and not isinstance(model, keras.Sequential):
        raise ValueError(
            f"Model '{model.name}' is subclassed: it is not known how its layers are connected. {instead} Received: "
            f"{model!r}"
        )
