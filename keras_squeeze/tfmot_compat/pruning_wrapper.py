"""`PruneLowMagnitude`: the wrapper that says how a layer is pruned."""

from abc import ABC, abstractmethod

import keras
import numpy as np
from keras.src.backend import in_stateless_scope

from keras_squeeze import checks
from keras_squeeze.introspection.layer_table import in_table, register_bookkeeping
from keras_squeeze.introspection.selection import CompressibleWeight, layer_weights
from keras_squeeze.introspection.variables import read
from keras_squeeze.tfmot_compat import pruning_schedules
from keras_squeeze.tfmot_compat.layer_pruning import LayerPruning
from keras_squeeze.tfmot_compat.pruning_schedules import DEFAULT
from keras_squeeze.tfmot_compat.wrapping import TransparentWrapper
from keras_squeeze.weight_pruning.patterns import Blocks, NOfM, Pattern, Unstructured

_POOLING = {"AVG": "mean", "MAX": "max"}


class PrunableLayer(ABC):
    """Base class of layers of your own that say which of their weights are pruned.

    Example:

    ```python
    class Adapter(keras.layers.Layer, tfmot.sparsity.keras.PrunableLayer):
        def get_prunable_weights(self):
            return [self.down, self.up]
    ```
    """

    @abstractmethod
    def get_prunable_weights(self) -> list:
        """The variables to prune; asked once the layer is built."""


@keras.saving.register_keras_serializable("keras_squeeze.tfmot_compat")
class PruneLowMagnitude(TransparentWrapper):
    """Marks a layer for `UpdatePruningStep`, which prunes it by its schedule while the model trains.

    It computes what the layer computes: the masks are constraints of the layer's own weights, which are exactly zero
    after every optimizer step. They stay when `fit` ends; `strip_pruning` makes a model without them. A saved model
    loads without a scope; unlike in tfmot the config is complete, and what is saved is sparse.

    Args:
        layer: Any layer. One with weights needs an entry in this package's layer table (`keras_squeeze.register_layer`)
            or a method `get_prunable_weights`.
        pruning_schedule: When to prune, and how much. By default `ConstantSparsity(0.5, 0)`.
        block_size: Shape of the blocks that are pruned together, along the last two axes of a weight. Unlike in tfmot,
            a block may span an axis, and convolutions can have blocks.
        block_pooling_type: `"AVG"` or `"MAX"` of the magnitudes in a block decides about it.
        sparsity_m_by_n: `(m, n)`: m zeros in every n weights along the inputs. The zeros come by the schedule, and are
            all there at its end; tfmot ignores the schedule.
        **kwargs: As for any layer, such as `input_shape`.

    Attributes:
        layer: The wrapped layer.
        pruning_step: Variable: steps that it has been pruned for, -1 before the first `fit`.
        pruning: What prunes it; None before the first `fit` of this object.

    Raises:
        ValueError, TypeError: an argument outside its range, or a layer that cannot be pruned.
    """

    def __init__(
        self,
        layer,
        pruning_schedule=DEFAULT,
        block_size=(1, 1),
        block_pooling_type="AVG",
        sparsity_m_by_n=None,
        **kwargs,
    ):
        _check_layer(layer)
        kwargs["name"] = f"prune_low_magnitude_{layer.name}"
        super().__init__(layer, **kwargs)
        self.pruning_schedule = pruning_schedules.get(pruning_schedule)
        self.block_size = _two_ints("block_size", block_size)
        if block_pooling_type not in _POOLING:
            raise ValueError(f'`block_pooling_type` must be "AVG" or "MAX". Received: {block_pooling_type!r}')
        self.block_pooling_type = block_pooling_type
        self.sparsity_m_by_n = None if not sparsity_m_by_n else _two_ints("sparsity_m_by_n", sparsity_m_by_n)
        self.pattern = self._make_pattern()
        self.pruning: LayerPruning | None = None

    def build(self, *args, **kwargs):
        super().build(*args, **kwargs)
        self.pruning_step = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(-1),
            dtype="int64",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
            name="pruning_step",
        )
        self.prunes = bool(self.weights_to_prune())
        for weight in self.weights_to_prune():
            self.pattern.check(tuple(weight.variable.shape), weight.path)

    def _pass_through(self, args, kwargs, training):
        if not training or not self.prunes or in_stateless_scope():
            return self.layer(*args, **kwargs)
        if self.pruning is None or not (self.pruning.driven or self.pruning.reached):
            raise RuntimeError(
                f"'{self.name}' is in training, and nothing updates its masks. Pass the callback: "
                "model.fit(..., callbacks=[tfmot.sparsity.keras.UpdatePruningStep()]); in a loop of your own call its "
                "set_model(model) and on_train_begin() first. To train without pruning: strip_pruning(model)."
            )
        with self.pruning.before_step():
            return self.layer(*args, **kwargs)

    def weights_to_prune(self) -> list[CompressibleWeight]:
        """The weights of the layer that are pruned: those that tfmot prunes.

        A depthwise kernel is left alone. Frozen weights are pruned, too, since wrapping names the layer.
        """
        layer = self.layer
        if hasattr(layer, "get_prunable_weights"):
            named = [(getattr(v, "name", str(i)), v) for i, v in enumerate(layer.get_prunable_weights())]
            return [CompressibleWeight(name, f"{layer.name}/{name}", variable, -2) for name, variable in named]
        if isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
            return []
        return [weight for weight in layer_weights(layer)[0] if weight.name != "depthwise_kernel"]

    @property
    def pruning_vars(self) -> list[tuple]:
        """For each pruned weight the variable, its mask (boolean array, True keeps) and the least magnitude kept."""
        triples = []
        for weight in self.weights_to_prune():
            values = np.abs(read(weight.variable))
            mask = self.pruning.mask_of(weight.variable) if self.pruning else np.ones(values.shape, bool)
            triples.append((weight.variable, mask, float(values[mask].min()) if mask.any() else 0.0))
        return triples

    def save_own_variables(self, store):
        if self.pruning is not None:
            self.pruning.note_step()
        super().save_own_variables(store)

    def get_config(self):
        return {
            **super().get_config(),
            "pruning_schedule": keras.saving.serialize_keras_object(self.pruning_schedule),
            "block_size": list(self.block_size),
            "block_pooling_type": self.block_pooling_type,
            "sparsity_m_by_n": self.sparsity_m_by_n and list(self.sparsity_m_by_n),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        schedule = keras.saving.deserialize_keras_object(config.pop("pruning_schedule"), custom_objects=custom_objects)
        return super().from_config({**config, "pruning_schedule": schedule}, custom_objects)

    def _make_pattern(self) -> Pattern:
        if self.sparsity_m_by_n is not None:
            zeros, of = self.sparsity_m_by_n
            if not 0 < zeros < of:
                raise ValueError(
                    "`sparsity_m_by_n=(m, n)` asks for m zeros in every n weights, 0 < m < n. Received: "
                    f"sparsity_m_by_n={self.sparsity_m_by_n}"
                )
            return NOfM(of - zeros, of)
        if self.block_size == (1, 1):
            return Unstructured()
        return Blocks(self.block_size, _POOLING[self.block_pooling_type])


def can_be_pruned(layer) -> bool:
    """Whether `PruneLowMagnitude` takes a layer: one of Keras's, in the layer table, or with a method of its own."""
    of_keras = type(layer).__module__.partition(".")[0] == "keras"
    return of_keras or in_table(layer) or hasattr(layer, "get_prunable_weights")


def _check_layer(layer) -> None:
    if not isinstance(layer, keras.Layer) or isinstance(layer, (keras.Model, PruneLowMagnitude)):
        raise ValueError(f"`PruneLowMagnitude` wraps one layer, not wrapped yet. Received: {layer!r}")
    if not can_be_pruned(layer):
        class_name = type(layer).__name__
        raise ValueError(
            f"'{layer.name}': it is not known which weights of a {class_name} can be pruned. Derive {class_name} from "
            "tfmot.sparsity.keras.PrunableLayer, which asks for `get_prunable_weights`, or name them: "
            f"keras_squeeze.register_layer({class_name}, [names of its weights]). Received: {layer!r}"
        )


def _two_ints(name: str, value) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or not all(map(checks.is_int, pair)):
        raise ValueError(f"`{name}` must be two ints, such as (2, 4). Received: {name}={value!r}")
    return pair


register_bookkeeping(PruneLowMagnitude)
