"""The channel rules of recurrent layers: a unit is a column of every gate, and a row of the recurrent kernel.

A masked unit is zero in all of its gates. It stays zero from one step to the next if it begins at zero and its
activation makes zero of zero: `h = o * act(c)` with `c = f * c + i * act(0)` in an LSTM (Hochreiter and Schmidhuber
1997), `h = z * h + (1 - z) * act(0)` in a GRU (Cho et al. 2014), `h = act(0)` in a simple one. So all that reads it,
the recurrent kernel included, reads zeros.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_squeeze.channel_graph.graph import ChannelGraph, Channels, Read
from keras_squeeze.channel_graph.shape_rules import arguments_of, evaluated, is_elementwise, mixed, registering

RECURRENT_RULES: dict[type, Callable] = {}

_rule_for = registering(RECURRENT_RULES)


@dataclass(frozen=True)
class _Gates:
    """How many gates a cell has, and which of them computes the candidate for its state."""

    count: int
    candidate: int


_CELLS = {
    keras.layers.LSTMCell: _Gates(4, 2),  # input, forget, candidate, output
    keras.layers.GRUCell: _Gates(3, 2),  # update, reset, candidate
    keras.layers.SimpleRNNCell: _Gates(1, 0),
}


@_rule_for("LSTM", "GRU", "SimpleRNN", "RNN")
def recurrent(layer, inputs, graph: ChannelGraph):
    arguments = arguments_of(layer, inputs, graph)
    sequence = arguments["sequences"]
    if not _is_understood(layer, sequence):
        return mixed(layer, inputs, graph)
    _freeze_masks(arguments, graph)
    return _through(layer, sequence, arguments.get("initial_state"), graph, graph.shapes)


@_rule_for("Bidirectional")
def bidirectional(layer, inputs, graph: ChannelGraph):
    arguments = arguments_of(layer, inputs, graph)
    sequence, states = arguments["sequences"], arguments.get("initial_state")
    directions = layer.forward_layer, layer.backward_layer
    understood = all(type(each) in RECURRENT_RULES and _is_understood(each, sequence) for each in directions)
    if not understood or len({_cells_of(each)[-1].units for each in directions}) > 1:
        return mixed(layer, inputs, graph)
    _freeze_masks(arguments, graph)
    path, results = graph.path, []
    for index, direction in enumerate(directions):
        half = 0 if states is None else len(states) // 2
        own = None if states is None else states[half * index : half * (index + 1)]
        graph.path = f"{path}/{direction.name}"
        results.append(_through(direction, sequence, own, graph, _shapes_of(direction, sequence)))
    graph.path = path
    (forward, *forward_states), (backward, *backward_states) = results
    graph.unite(forward.ids, backward.ids)  # Keras takes both to be equally wide
    merged = [forward, backward] if layer.merge_mode is None else [_merged(layer, forward, backward, graph)]
    return [*merged, *forward_states, *backward_states]


def _merged(layer, forward: Channels, backward: Channels, graph: ChannelGraph) -> Channels:
    one, other, shape = forward.constants, backward.constants, graph.shapes[0]
    if layer.merge_mode == "concat":
        ids = np.concatenate([forward.ids, backward.ids])
        return Channels(shape, len(shape) - 1, ids, np.concatenate([one, other]))
    if layer.merge_mode == "mul":
        constants = np.where((one == 0) | (other == 0), 0.0, one * other)
    else:
        constants = (one + other) / (2 if layer.merge_mode == "ave" else 1)
    return Channels(shape, len(shape) - 1, forward.ids, constants)


def _is_understood(layer, sequence) -> bool:
    """Whether a layer runs cells of Keras over the channels, which lie along the last axis."""
    cells = _cells_of(layer)
    if not all(type(cell) in _CELLS for cell in cells):
        return False
    functions = [
        function
        for cell in cells
        for function in (cell.activation, getattr(cell, "recurrent_activation", None))
        if function is not None
    ]
    fits = isinstance(sequence, Channels) and sequence.axis == len(sequence.shape) - 1 == 2
    return fits and all(map(is_elementwise, functions))


def _cells_of(layer) -> list:
    return list(getattr(layer.cell, "cells", [layer.cell]))


def _freeze_masks(given, graph: ChannelGraph) -> None:
    if isinstance(given.get("mask"), Channels):
        graph.freeze(given["mask"], f"{graph.path} takes it as a mask")


def _shapes_of(layer, sequence: Channels) -> list[tuple]:
    """The shapes of a layer's outputs."""
    shapes = layer.compute_output_shape(sequence.shape)
    return [tuple(shape) for shape in shapes] if layer.return_state else [tuple(shapes)]


def _through(layer, sequence: Channels, states, graph: ChannelGraph, shapes: Sequence[tuple]) -> list[Channels]:
    """The channels of a layer's outputs: of the sequence or its last step, then of the states."""
    cells = _cells_of(layer)
    path, x, last_states = graph.path, sequence, []
    first_states = _by_cell(states, cells)
    for index, cell in enumerate(cells):
        if cell is not getattr(layer, "cell", None) or not hasattr(layer, "units"):
            graph.path = f"{path}/{cell.name}"
        x = _cell(cell, cell if index else layer, x, first_states[index], graph)
        owner = layer if hasattr(layer, "units") else cell
        graph.option(owner, "units", x.ids)
        if layer.stateful:
            graph.freeze(x, f"{path} is stateful")
        last_states += [x] * len(_as_list(cell.state_size))
    graph.path = path
    # The sequence or its last step, and the states of all cells where they are asked for.
    outputs = zip(shapes, [x, *last_states], strict=False)
    return [Channels(tuple(shape), len(shape) - 1, y.ids, y.constants) for shape, y in outputs]


def _by_cell(states, cells: list) -> list[list]:
    """The initial states of each cell; of several cells they are given one by one or in a list for each."""
    if states is None:
        return [[] for _ in cells]
    if len(cells) == 1:
        return [keras.tree.flatten(states)]
    flat, by_cell = keras.tree.flatten(states), []
    for cell in cells:
        count = len(_as_list(cell.state_size))
        by_cell.append(flat[:count])
        flat = flat[count:]
    return by_cell


def _cell(cell, watched, x: Channels, states: list, graph: ChannelGraph) -> Channels:
    """One cell at every step; `watched`: the layer that is called with its inputs."""
    gates = _CELLS[type(cell)]
    kernel, recurrent_kernel, bias = cell.kernel, cell.recurrent_kernel, cell.bias
    output = graph.produce(kernel, 1, (x.shape[0], cell.units), blocks=gates.count)
    graph.compute(recurrent_kernel, 1, output.ids, blocks=gates.count)
    graph.follow(recurrent_kernel, 0, output.ids, "input")
    if bias is not None:
        graph.follow(bias, -1, np.tile(output.ids, gates.count))
    _read(cell, watched, x, graph)
    begins_at_zero = _joined_states(states, output, graph)
    masked = graph.is_masked(output.ids)
    zero = masked if masked is not None else ~_candidate_moves(cell, gates, graph)
    if evaluated(cell.activation, np.zeros(1))[0] != 0:
        zero = np.zeros(len(output.ids), bool)
    output = output.with_constants(np.where(zero & begins_at_zero, 0.0, np.nan))
    graph.require_constant(output, True, f"the recurrent kernel of {graph.path} reads it, and it is not zero")
    return output


def _read(cell, watched, x: Channels, graph: ChannelGraph) -> None:
    """The kernel reads the input at every step, so that the bias can take over what is constant."""
    graph.follow(cell.kernel, 0, x.ids, "input")
    graph.observe(watched, x)
    if cell.bias is None:
        graph.require_constant(x, True, f"its output is constant but not zero, and {graph.path} has no bias")
        return
    graph.require_constant(x, False, "")
    graph.fold(cell.kernel, 0, 1, cell.bias, x)
    graph.reads.append(Read(watched, cell.kernel, 0, 1, cell.bias, x))


def _joined_states(states: list, output: Channels, graph: ChannelGraph) -> np.ndarray:
    """Initial states are the units' own. Returns which units begin at zero."""
    at_zero = np.ones(len(output.ids), bool)
    for state in states:
        if isinstance(state, Channels) and state.axis == 1 and len(state.ids) == len(output.ids):
            graph.unite(state.ids, output.ids)
            at_zero &= state.constants == 0
        else:
            graph.freeze(output, f"{graph.path} begins with a given state")
            at_zero[:] = False
    return at_zero


def _candidate_moves(cell, gates: _Gates, graph: ChannelGraph) -> np.ndarray:
    """Whether anything but zero can come into the state of each unit."""
    moves = np.zeros(cell.units, bool)
    for weight in (cell.kernel, cell.recurrent_kernel, cell.bias):
        if weight is not None:
            values = graph.value(weight).reshape(-1, gates.count, cell.units)
            moves |= np.any(values[:, gates.candidate] != 0, axis=0)
    return moves


def _as_list(states) -> list:
    return list(states) if isinstance(states, (list, tuple)) else [states]
