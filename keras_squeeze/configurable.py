"""Variants that are saved as the arguments they were made with: schedules, criteria, patterns."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import keras

from keras_squeeze import checks

Variant = TypeVar("Variant")


class Configurable:
    """Base class of objects that their config describes completely."""

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, as JSON has them."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]):
        """Creates an object from what `get_config` returned."""
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def resolve(
    argument: str, identifier, base: type[Variant], by_name: Mapping[str, Callable[[], Variant]], allowed: str
) -> Variant:
    """Turns a name, a serialized object or an object into an object.

    Args:
        argument: Name of the argument, for messages.
        identifier: An instance of `base`, what `keras.saving.serialize_keras_object` made of one, or a key of
            `by_name`.
        base: The class that the object must have.
        by_name: Constructors by name.
        allowed: What the argument may be, for the message.

    Raises:
        ValueError: An unknown name; the message lists the known ones.
        TypeError: Anything else.
    """
    if isinstance(identifier, base):
        return identifier
    if isinstance(identifier, dict):
        restored = keras.saving.deserialize_keras_object(identifier)
        if isinstance(restored, base):
            return restored
    if isinstance(identifier, str):
        return by_name[checks.one_of(argument, identifier, by_name)]()
    raise TypeError(f"`{argument}` must be {allowed}. Received: {identifier!r}")
