"""What tfmot's modules become: a namespace each; and what stands in them for names that are not offered here."""

import sys
import types
from collections.abc import Mapping
from typing import Any, NoReturn


class Refusal:
    """Stands for a class or function of tfmot that is not offered: each use is an error that says what to do instead.

    Args:
        name: Its name in tfmot, such as `"quantization.keras.QuantizeConfig"`.
        instead: What to use, a sentence.
    """

    def __init__(self, name: str, instead: str):
        self._name, self._instead = name, instead
        self.__name__ = name.rpartition(".")[2]
        self.__doc__ = f"Not offered. {instead}"

    def _refuse(self, use: str) -> NoReturn:
        raise NotImplementedError(
            f"tfmot.{self._name} is not part of keras_squeeze.tfmot_compat. {self._instead} Received: {use}"
        )

    def __call__(self, *args, **kwargs):
        arguments = [*map(_short, args), *(f"{name}={_short(value)}" for name, value in kwargs.items())]
        self._refuse(f"{self.__name__}({', '.join(arguments)})")

    def __mro_entries__(self, bases):
        self._refuse(f"a class derived from {self.__name__}")

    def __instancecheck__(self, instance):
        return False  # there is none

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        self._refuse(f"{self.__name__}.{attribute}")

    def __repr__(self) -> str:
        return f"<tfmot.{self._name}, not offered>"


def namespace(path: str, doc: str, members: Mapping[str, Any]) -> types.ModuleType:
    """A module with the members, under a dotted path below this package, for `import` and as a value.

    Args:
        path: Such as `"sparsity.keras"`.
        doc: What it is for.
        members: Its public names. A string refuses the name: it says what to use instead.
    """
    module = types.ModuleType(f"{__package__}.{path}", doc)
    for name, member in members.items():
        setattr(module, name, Refusal(f"{path}.{name}", member) if isinstance(member, str) else member)
    module.__all__ = sorted(members)  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return module


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
