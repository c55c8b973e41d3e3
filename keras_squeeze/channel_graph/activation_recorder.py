"""What layers are called with while data goes through a model."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_squeeze.channel_graph.graph import ChannelGraph, Channels
from keras_squeeze.data import batches

See = Callable[[Any, Channels, np.ndarray], None]


def observe(model: keras.Model, graph: ChannelGraph, data, num_batches: int | None, see: See) -> None:
    """Runs a model on data and shows what enters the layers that read neurons.

    Args:
        model: The model.
        graph: Its channel graph.
        data: `(x, y)` or batches.
        num_batches: How many of them; None for all.
        see: Called as `see(layer, channels, values)` for each of `graph.consumers`; `values` has the shape (positions,
            channels).
    """
    calls: dict[int, tuple[Any, dict[int, list[Channels]]]] = {}
    for layer, channels, call in graph.consumers:
        calls.setdefault(id(layer), (layer, {}))[1].setdefault(call, []).append(channels)
    with contextlib.ExitStack() as stack:
        for layer, by_call in calls.values():
            stack.enter_context(_watched(layer, _in_turn(layer, list(by_call.values()), see)))
        for x, _, _ in batches(data, num_batches):
            model(x, training=False)


def _in_turn(layer, calls: list[list[Channels]], see: See) -> Callable[[Any], None]:
    """A shared layer is called several times, always in the same order."""
    turn = 0

    def seen(tensor) -> None:
        nonlocal turn
        values = np.asarray(keras.ops.convert_to_numpy(tensor))
        for channels in calls[turn % len(calls)]:
            flat = np.moveaxis(values, channels.axis, -1)
            see(layer, channels, flat.reshape(-1, flat.shape[-1]))
        turn += 1

    return seen


@contextlib.contextmanager
def _watched(layer, seen: Callable[[Any], None]):
    """Shows every input of a layer to a function."""
    call = layer.call

    def watched(inputs, *args, **kwargs):
        seen(inputs)
        return call(inputs, *args, **kwargs)

    vars(layer)["call"] = watched
    try:
        yield
    finally:
        del vars(layer)["call"]
