"""Wrappers that compute what their layer computes, what they are for being said by a subclass; and taking them off."""

import functools
import inspect

import keras
from keras.src.backend import compute_output_spec

from keras_squeeze.introspection.functional import Rebuilder, copy_layer, functional_of
from keras_squeeze.introspection.variables import read


class TransparentWrapper(keras.layers.Wrapper):
    """Wraps any layer, those included that are called on several tensors, and passes calls through.

    Args:
        layer: The layer, built or not.
        **kwargs: As for any layer; by default the precision of the wrapped one.

    Attributes:
        layer: The wrapped layer.
    """

    def __init__(self, layer, **kwargs):
        signature = inspect.signature(layer.call)
        takes_training = "training" in signature.parameters

        @functools.wraps(layer.call)
        def call(*args, training=None, **kwargs):
            if takes_training:
                kwargs["training"] = training
            return self._pass_through(args, kwargs, bool(training))

        vars(call)["__signature__"] = _with_training(signature)  # from which Keras reads the arguments of a call
        self.call = call
        kwargs.setdefault("dtype", layer.dtype_policy)
        shape = kwargs.pop("input_shape", getattr(layer, "_input_shape_arg", None))
        super().__init__(layer, **kwargs)
        if shape is not None:
            self._input_shape_arg = shape  # a Sequential model that begins with this layer is built by it
        self.supports_masking = layer.supports_masking
        vars(self.build)["__signature__"] = inspect.signature(layer.build)  # and the shapes that it is built with

    def build(self, *args, **kwargs):
        if self.layer.built:
            return
        if getattr(self.layer.build, "_is_default", False) and self.layer._layers:
            shape = next(iter((*args, *kwargs.values())))
            compute_output_spec(self.layer.call, keras.KerasTensor(shape))  # its parts are built by a call
        else:
            self.layer.build(*args, **kwargs)
        self.layer.built = True

    def _pass_through(self, args: tuple, kwargs: dict, training: bool):
        return self.layer(*args, **kwargs)

    def compute_mask(self, inputs, previous_mask=None):
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def get_build_config(self):
        return {"layer": self.layer.get_build_config()}

    def build_from_config(self, config):
        if not self.layer.built:
            self.layer.build_from_config(config["layer"])
        self.build()

    def get_weights(self):
        """The weights of the wrapped layer."""
        return self.layer.get_weights()

    def set_weights(self, weights):
        """Sets the weights of the wrapped layer."""
        self.layer.set_weights(weights)

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        layer = keras.saving.deserialize_keras_object(config.pop("layer"), custom_objects=custom_objects)
        return cls(layer, **config)


class Unwrapper(Rebuilder):
    """Copies models without wrappers of a kind.

    Args:
        wrapper_class: What is taken off.

    Attributes:
        unwrapped: The new layers that had wrappers.
    """

    def __init__(self, wrapper_class: type):
        super().__init__()
        self.wrapper_class = wrapper_class
        self.unwrapped: list[keras.Layer] = []

    def unwrap(self, model):
        """A new model of plain layers with the same weights; layers of one that is not built stay the same."""
        if functional_of(model) is None:
            layers = [layer.layer if self._is_wrapped(layer) else layer for layer in model.layers]
            return type(model)(layers, name=model.name)
        result = self.rebuild(model)
        for old, new in self.variables():
            new.assign(read(old))
        for layer in result._flatten_layers():
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()  # it computes with what it has derived from its weights
        return result

    def make(self, layer):
        if not self._is_wrapped(layer):
            return super().make(layer)
        new = copy_layer(layer.layer)
        self.unwrapped.append(new)
        return new

    def counterparts(self, old, new):
        return (old.layer, new) if self._is_wrapped(old) else (old, new)

    def _is_wrapped(self, layer) -> bool:
        return isinstance(layer, self.wrapper_class)


def _with_training(signature: inspect.Signature) -> inspect.Signature:
    """A signature that has a keyword `training`, too."""
    parameters = list(signature.parameters.values())
    if "training" in signature.parameters:
        return signature
    index = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(index, inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None))
    return signature.replace(parameters=parameters)
