"""The channel graph: which slices of which weights belong to one neuron.

Every neuron of a model gets a number, and every tensor carries the numbers of its channels along one axis. The
layers are then applied to the numbers: a `Concatenate` concatenates them, a `Flatten` repeats them, an `Add` says
that two are the same neuron, a pooling layer passes them on. What a layer does is said by its rule
(`rules.py`); a layer without a rule freezes the neurons that enter it, so that what is not understood is not
changed.

Beside its number, every channel carries the constant that it provably is, or NaN. A neuron can be removed where all
that its consumers see of it is a constant zero, or a constant that can be moved into their bias.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from keras_squeeze.introspection.variables import read


@dataclass(frozen=True, eq=False)
class Channels:
    """What is known of one tensor.

    Attributes:
        shape: Its shape, the batch included; None where a size is not known.
        axis: The axis along which the neurons lie, counted from 0.
        ids: int64 array, the neuron of each channel along that axis.
        constants: float64 array, the value of each channel wherever it is the same at every position of every
            example, else NaN.
        copies: Whether the channels hold one and the same thing, as a mask does that was spread over them: then it is
            still there when some of them go. Of what was concatenated, each part on its own.
    """

    shape: tuple[int | None, ...]
    axis: int
    ids: np.ndarray
    constants: np.ndarray
    copies: bool = False

    def with_constants(self, constants) -> "Channels":
        return replace(self, constants=np.asarray(constants, "float64"), copies=False)

    def unknown(self) -> "Channels":
        """The same neurons, none of them constant."""
        return self.with_constants(np.full(len(self.ids), np.nan))


@dataclass(frozen=True, eq=False)
class Slices:
    """Where neurons lie in a weight: entry `i` along `axis` belongs to neuron `ids[i]`.

    `role` is `"output"` where the weight computes the neuron (zero it to mask the neuron), `"input"` where it reads
    it, and `"parameter"` where it only accompanies it. `blocks`: how often the neurons come along the axis, one block
    after the other, as for the gates of a recurrent layer. `rounded`: whether runtimes like widths that are multiples
    of something; they do not care about the number of attention heads.
    """

    variable: Any
    axis: int
    ids: np.ndarray
    role: str
    path: str
    blocks: int = 1
    rounded: bool = True

    @property
    def width(self) -> int:
        """Channels of the layer, in one block."""
        return len(self.ids) // self.blocks


@dataclass(frozen=True, eq=False)
class Fold:
    """Constants that a layer adds up: `bias += constants @ kernel`, over the inputs that are removed."""

    kernel: Any
    in_axis: int
    out_axis: int
    bias: Any
    ids: np.ndarray
    constants: np.ndarray


@dataclass(frozen=True, eq=False)
class Read:
    """A layer whose bias is added to what a kernel makes of the channels: what is missing there can be added to it."""

    layer: Any
    kernel: Any
    in_axis: int
    out_axis: int
    bias: Any
    channels: Channels


@dataclass(eq=False)
class ChannelGraph:
    """The neurons of a model. Rules call its methods; see `register_channel_rule`.

    Attributes:
        slices: Where neurons lie in weights.
        sources: Of these slices, the ones of kernels: what `produce` and `compute` were called with.
        options: Per layer (by identity), what depends on which neurons there are: name of an entry of its config or
            an argument of its call -> the neurons, and a function from a boolean array (True: kept) to the value.
        inputs: Per input tensor of a nested model (by identity), the channels that enter there.
        consumers: The layers that read neurons, the channels that enter them, and the number of the call.
        folds, reads: Where constants move into a bias exactly, and where what is removed could be made up for in one.
        rescaled: Per weight (by identity), a factor that it takes where neurons go: the neurons, and a function from a
            boolean array (True: kept) to it.
        work: Per layer (by identity), how its products without a kernel depend on neurons: fractions of them, each with
            the neurons that they grow with.
        calls: How many calls of layers there were.
        inexact: Whether layers may be cut whose statistics change with the number of their channels.
        assumed: Boolean per id: neurons taken to be masked. None: the weights are as they are.
        inexact_layers: Paths of the layers that made use of `inexact`.
        opaque_layers: `{path: reason}` of layers with weights of which nothing is known.
        droppable: Per call (by identity of its node), the inputs of a sum that are zero throughout.
        node, path, shapes, arguments: Of the call that the rule is for: its node in the graph, where its layer stands,
            the shapes of its outputs, and its `(args, kwargs)`.
    """

    inexact: bool = False
    assumed: np.ndarray | None = None
    slices: dict[tuple[int, int], Slices] = field(default_factory=dict)
    sources: dict[tuple[int, int], Slices] = field(default_factory=dict)
    options: dict[int, dict[str, tuple[np.ndarray, Callable[[np.ndarray], Any]]]] = field(default_factory=dict)
    inputs: dict[int, Channels] = field(default_factory=dict)
    consumers: list[tuple[Any, Channels, int]] = field(default_factory=list)
    rescaled: dict[int, tuple[np.ndarray, Callable[[np.ndarray], float]]] = field(default_factory=dict)
    work: dict[int, list[tuple[float, tuple[np.ndarray, ...]]]] = field(default_factory=dict)
    calls: int = 0
    folds: list[Fold] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    inexact_layers: list[str] = field(default_factory=list)
    opaque_layers: dict[str, str] = field(default_factory=dict)
    droppable: dict[int, list[int]] = field(default_factory=dict)
    node: Any = None
    path: str = ""
    shapes: list[tuple[int | None, ...]] = field(default_factory=list)
    arguments: tuple[tuple, dict] = ((), {})
    _count: int = 0
    _same: list[np.ndarray] = field(default_factory=list)
    _frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _blocked: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _folded: dict[int, np.ndarray] = field(default_factory=dict)

    # What a rule says.

    def produce(self, weight, axis: int, shape, *, blocks: int = 1, name: str = "", rounded: bool = True) -> Channels:
        """New neurons, one for each entry of a weight along an axis; they lie along the last axis of `shape`.

        `name`: what they are, where a layer computes neurons of several kinds; `blocks`, `rounded`: see `Slices`.
        """
        axis %= len(weight.shape)
        key = (id(weight), axis)
        if key not in self.slices:
            path = f"{self.path}/{name}" if name else self.path
            ids = np.tile(self._new_ids(weight.shape[axis] // blocks), blocks)
            self.slices[key] = self.sources[key] = Slices(weight, axis, ids, "output", path, blocks, rounded)
        slices = self.slices[key]
        ids = slices.ids[: slices.width]
        return Channels(tuple(shape), len(shape) - 1, ids, np.full(len(ids), np.nan))

    def compute(self, weight, axis: int, ids: np.ndarray, *, blocks: int = 1) -> None:
        """One more kernel that computes neurons, with an entry (in each block) for every one of them."""
        axis %= len(weight.shape)
        source = next(each for each in self.sources.values() if np.isin(ids, each.ids).all())
        self._attach(weight, axis, np.tile(ids, blocks), "output")
        slices = Slices(weight, axis, np.tile(ids, blocks), "output", source.path, blocks, source.rounded)
        self.sources.setdefault((id(weight), axis), slices)

    def follow(self, weight, axis: int, ids: np.ndarray, role: str = "output") -> None:
        """A weight has one entry for each of these neurons along an axis.

        `role="output"`: a masked neuron's entries are zero there; `"parameter"`: they may be anything.
        """
        self._attach(weight, axis, ids, role)

    def consume(self, layer, weight, axis: int, channels: Channels) -> None:
        """A weight reads these channels along an axis."""
        self._attach(weight, axis, channels.ids, "input")
        self.observe(layer, channels)

    def observe(self, layer, channels: Channels) -> None:
        """A layer is called with these channels: criteria that look at activations look there."""
        self.consumers.append((layer, channels, self.calls))

    def rescale(self, weight, ids: np.ndarray, factor: Callable[[np.ndarray], float]) -> None:
        """A weight is multiplied by a factor that depends on which of these neurons are kept."""
        self.rescaled[id(weight)] = ids, factor

    def count_work(self, layer, parts: list[tuple[float, tuple[np.ndarray, ...]]]) -> None:
        """What a layer multiplies without a kernel, such as queries by keys: see `work`."""
        self.work[id(layer)] = parts

    def require_constant(self, channels: Channels, zero: bool, reason: str) -> None:
        """Only channels that are constant (and zero, if asked) may go from here; the others stay for `reason`."""
        varying = np.isnan(channels.constants)
        self._blocked.append((channels.ids[varying], "its output is not constant where it is read"))
        if zero:
            other = ~varying & (channels.constants != 0)
            self._blocked.append((channels.ids[other], reason))

    def fold(self, kernel, in_axis: int, out_axis: int, bias, channels: Channels) -> None:
        """A layer's bias can take over the constants that it reads."""
        constants = np.nan_to_num(channels.constants)
        before = self._folded.setdefault(id(kernel), constants)
        if before is constants:
            self.folds.append(Fold(kernel, in_axis, out_axis, bias, channels.ids, constants))
        else:
            changed = before != constants
            self._blocked.append((channels.ids[changed], f"{self.path} is shared and reads it as two constants"))

    def unite(self, one: np.ndarray, other: np.ndarray) -> None:
        """Two arrays of ids are the same neurons, one by one."""
        different = one != other
        self._same.append(np.stack([one[different], other[different]]))

    def freeze(self, channels: Channels | np.ndarray, reason: str) -> None:
        """These neurons stay."""
        self._frozen.append((channels.ids if isinstance(channels, Channels) else channels, reason))

    def opaque(self, shape, reason: str) -> Channels:
        """The channels of a tensor of which nothing is known."""
        size = (shape[-1] or 0) if len(shape) > 1 else 0
        ids = self._new_ids(size)
        self.freeze(ids, reason)
        return Channels(tuple(shape), max(len(shape) - 1, 0), ids, np.full(size, np.nan))

    def option(self, layer, name: str, ids: np.ndarray, make: Callable[[np.ndarray], Any] | None = None) -> None:
        """An entry of a layer's config, or an argument of its call, depends on which of these neurons are kept.

        Args:
            layer: The layer or operation.
            name: The entry, such as `"units"`.
            ids: The neurons.
            make: Function from a boolean array over `ids` (True: kept) to the entry; None: it is their number.
        """
        options = self.options.setdefault(id(layer), {})
        if name in options:  # called once more
            self.unite(options[name][0], ids)
        else:
            options[name] = ids, make or (lambda kept: int(np.count_nonzero(kept)))

    def enter(self, tensor, channels: Channels) -> Channels:
        """These channels enter a nested model by one of its inputs; all calls of it share one width."""
        previous = self.inputs.setdefault(id(tensor), channels)
        if previous is not channels:
            if previous.axis == channels.axis:
                self.unite(previous.ids, channels.ids)
            else:
                self.freeze(previous, f"{self.path} is called with it along two axes")
                self.freeze(channels, f"{self.path} is called with it along two axes")
        return channels

    # What a rule may ask.

    def value(self, weight, ids: np.ndarray | None = None) -> np.ndarray:
        """A weight as float64; of masked neurons, if `ids` says which they are along its last axis, zero."""
        values = np.asarray(read(weight), "float64")
        if ids is not None and self.assumed is not None:
            values = np.where(self.assumed[ids], 0.0, values)
        return values

    def is_masked(self, ids: np.ndarray) -> np.ndarray | None:
        """Which neurons are taken to be masked; None where the weights themselves say it."""
        return None if self.assumed is None else self.assumed[ids]

    # What comes out.

    def classes(self) -> np.ndarray:
        """For each id the number of its neuron, from 0; ids that were united have the same."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(self._same, axis=1) if self._same else np.zeros((2, 0), "int64")
        edges = coo_array((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(self._count, self._count))
        return connected_components(edges, directed=False)[1]

    def frozen(self, classes: np.ndarray) -> dict[int, str]:
        """`{neuron: reason}` of those that stay for what they are."""
        return _first_reasons(self._frozen, classes)

    def blocked(self, classes: np.ndarray) -> dict[int, str]:
        """`{neuron: reason}` of those that stay for the values that are read of them."""
        return _first_reasons(self._blocked, classes)

    def _attach(self, weight, axis: int, ids: np.ndarray, role: str) -> None:
        axis %= len(weight.shape)
        slices = self.slices.setdefault((id(weight), axis), Slices(weight, axis, ids, role, self.path))
        if slices.ids is not ids:
            self.unite(slices.ids, ids)

    def _new_ids(self, count: int) -> np.ndarray:
        self._count += count
        return np.arange(self._count - count, self._count)


def _first_reasons(entries: Iterable[tuple[np.ndarray, str]], classes: np.ndarray) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for ids, reason in entries:
        for neuron in np.unique(classes[ids]).tolist():
            reasons.setdefault(neuron, reason)
    return reasons
