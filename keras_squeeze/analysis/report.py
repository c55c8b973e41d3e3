"""What a model holds and what it computes: parameters, zeros, bits, bytes and multiply-accumulates by layer."""

import html
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import keras
import numpy as np

from keras_squeeze.analysis.encodings import encode
from keras_squeeze.analysis.energy import dram_pj, mac_pj
from keras_squeeze.analysis.grids import Grid, find_grid
from keras_squeeze.analysis.mac_counting import MacCount, count_macs
from keras_squeeze.analysis.tables import (
    LISTED,
    WIDTH,
    format_bytes,
    format_energy,
    group_by_reason,
    render_text,
    shorten,
)
from keras_squeeze.introspection.layer_table import mac_formula, spec_of, stored_variable
from keras_squeeze.introspection.selection import find_layers
from keras_squeeze.introspection.variables import Variable, read

_GRIDS: dict[type, Callable[[Any], dict[int, Grid]]] = {}
_ACTIVATION_BITS: dict[type, Callable[[Any], int | None]] = {}
_COLUMNS = ("layer", "kind", "parameters", "sparsity", "bits", "size", "compressed", "MACs", "effective")
_NARROW_COLUMNS = ("layer", "parameters", "sparsity", "compressed", "MACs", "effective")


@dataclass(frozen=True)
class LayerReport:
    """One layer of a `CompressionReport`, or the whole model.

    Attributes:
        path: Where the layer stands in the model, such as `"encoder/dense_1"`; `"total"` for the whole model.
        kind: Its class.
        parameters: Number of values in all its weights; a weight that two layers share counts for the first.
        compressible: Number of values in its compressible weights: kernels and embeddings, not biases.
        zeros: How many of those are zero.
        bits: Bits that each of those takes (where there are none, that each parameter takes); of a quantized weight
            those of an integer on its grid.
        dense_bytes: Bytes of all its weights as they are.
        compressed_bytes: What `save_packed` writes for all its weights: each in the smallest of several forms,
            quantized ones as integers of their bits, sparse ones without their zeros, entropy-coded.
        macs: Multiply-accumulates of one inference, all calls of the layer together; None where unknown.
        effective_macs: Those whose weight is not zero. What is saved only where the hardware skips zeros.
        levels: The most distinct values that a quantized weight has for one scale; None where nothing is quantized.
        sqnr_db: Signal-to-quantization-noise ratio in decibels, `10 log10(sum w**2 / sum (w - q)**2)`, of weights that
            are trained on a grid: the lower, the more the layer suffers. None where nothing is lost or the real weights
            are gone.
        energy_pj: Picojoules of one inference, an estimate (see `analysis/energy.py`): the multiply-accumulates whose
            weight is not zero, at the bits of weights and activations, and reading every weight once from DRAM, zeros
            left out where a bit mask pays. Activations in memory are left out, and tables that are only looked up in.
            That is hardware which skips zeros. None where the MACs are unknown.
    """

    path: str
    kind: str
    parameters: int
    compressible: int
    zeros: int
    bits: float
    dense_bytes: int
    compressed_bytes: int
    macs: int | None
    effective_macs: int | None
    levels: int | None = None
    sqnr_db: float | None = None
    energy_pj: float | None = None

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of the compressible weights."""
        return self.zeros / self.compressible if self.compressible else 0.0

    def to_dict(self) -> dict:
        return {**asdict(self), "sparsity": self.sparsity}


@dataclass
class CompressionReport:
    """A model's parameters, zeros, bits, bytes and multiply-accumulates; prints as a table.

    Attributes:
        name: The model's name.
        layers: A `LayerReport` for every layer that holds weights, in the model's order.
        total: A `LayerReport` of the whole model.
        skipped: `(path, reason)` of layers with weights that cannot be compressed.
        frozen: `(path, reason)` of neurons that cannot be pruned.
        notes: What these numbers leave out, in sentences.
        widths: `{layer path: (channels, channels that are not masked)}`, where neurons were pruned.
    """

    name: str
    layers: list[LayerReport]
    total: LayerReport
    skipped: list[tuple[str, str]] = field(default_factory=list)
    frozen: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The report as dicts, lists, strings and numbers."""
        return {
            "name": self.name,
            "layers": [layer.to_dict() for layer in self.layers],
            "total": self.total.to_dict(),
            "skipped": [list(entry) for entry in self.skipped],
            "frozen": [list(entry) for entry in self.frozen],
            "notes": list(self.notes),
            "widths": {path: list(pair) for path, pair in self.widths.items()},
        }

    def to_json(self, **kwargs) -> str:
        """The report as JSON; the arguments are those of `json.dumps`, such as `indent=2`."""
        return json.dumps(self.to_dict(), **kwargs)

    def to_dataframe(self):
        """A `pandas.DataFrame` with a row for every layer, without the total."""
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("`to_dataframe` needs pandas: pip install pandas") from None
        return pd.DataFrame([layer.to_dict() for layer in self.layers], columns=list(self.total.to_dict()))

    def __str__(self) -> str:
        return render_text(lambda box: self._table(_COLUMNS, box), self._remarks())

    def __rich_console__(self, console, options):
        from rich.box import SIMPLE_HEAD
        from rich.text import Text

        wide = options.max_width >= WIDTH
        yield self._table(_COLUMNS if wide else _NARROW_COLUMNS, SIMPLE_HEAD)
        yield from (Text(line, style="dim") for line in self._remarks())

    def _repr_html_(self) -> str:
        rows = [_cells(row).values() for row in (*self.layers, self.total)]
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        remarks = "".join(f"<p>{html.escape(line)}</p>" for line in self._remarks())
        caption = f"<caption>{html.escape(self.name)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{remarks}"

    def _table(self, columns, box):
        from rich.table import Table
        from rich.text import Text

        rows, total = [_cells(layer) for layer in self.layers], _cells(self.total)
        table = Table(title=Text(self.name), title_justify="left", box=box, show_footer=True, collapse_padding=True)
        for name in columns:
            shape: dict = {"justify": "right", "no_wrap": True}
            if name in ("layer", "kind"):  # the others keep their figures whole, these two share what is left
                shape = {"overflow": "fold", "min_width": min(12, max(len(row[name]) for row in [*rows, total]))}
            table.add_column(name, footer=Text(total[name], style="bold"), **shape)
        for layer, row in zip(self.layers, rows, strict=True):
            table.add_row(*(Text(row[name], style="green" if layer.zeros else "") for name in columns))
        return table

    def _remarks(self) -> list[str]:
        narrower = [f"{path} {before} -> {after}" for path, (before, after) in self.widths.items() if after < before]
        pruned = [f"channels: {', '.join(narrower)}"] if narrower else []
        worst = sorted((x.sqnr_db, x.path) for x in self.layers if x.sqnr_db is not None)[:LISTED]
        noisy = [f"{path} {ratio:.1f} dB" for ratio, path in worst]
        noise = [f"signal-to-quantization-noise ratio, lowest first: {', '.join(noisy)}"] if noisy else []
        energy = []
        if self.total.energy_pj:
            energy = [f"energy of one inference, an estimate: {format_energy(self.total.energy_pj)}"]
        return [
            *self.notes,
            *energy,
            *noise,
            *pruned,
            *group_by_reason("skipped", self.skipped),
            *group_by_reason("frozen", self.frozen),
        ]


def summarize(model: keras.Model, *, input_shape=None) -> CompressionReport:
    """Reports what a model holds and computes: parameters, zeros, bits, bytes and MACs of every layer.

    The model is only read. MACs are those of one inference with a batch of one, counted from the shapes that the
    layers are called with; biases, activations, normalizations and products outside of layers are not counted,
    and a layer inside a loop that TensorFlow runs counts once. Quantization by Keras to 4 bits is reported as it is
    stored, two values to a byte.

    Args:
        model: A built Keras model: Sequential, Functional, subclassed, nested.
        input_shape: Shape of one example without the batch, as in `keras.Input(shape)`; for several inputs a list of
            shapes, or a dict from the inputs' names to shapes. Only MACs depend on it. Needed where the model
            leaves sizes open, such as the length of a text; by default the shape that the model was built with.

    Returns:
        A `CompressionReport`: print it, or use `.total`, `.layers`, `.to_dict()`, `.to_dataframe()`. Where MACs
        cannot be counted they are None, and the report says why.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: The model is not built, or `input_shape` is not a shape or contradicts the model's inputs.

    Example:

    ```python
    report = ks.summarize(model)
    print(report)
    report.total.sparsity, report.total.macs
    ```
    """
    selection = find_layers(model)
    members = list(layers_with_own_weights(model))
    count = count_macs(model, [(path, layer) for path, layer, _ in members], input_shape)
    grids, activation_bits = grids_of(model), _activation_bits(model)
    kernels_found = {id(weight) for _, layer, _ in members for _, weight in _kernels(layer)}
    stored = {
        id(weight): _Stored.measured(weight, grids.get(id(weight)), id(weight) in kernels_found)
        for _, _, own in members
        for weight in own
    }
    layers, counted = [], set()
    for path, layer, own in members:
        weights = [stored[id(weight)] for weight in own]
        new = [weight for weight in weights if weight not in counted]
        counted.update(new)
        kernels = {name: stored[id(weight)] for name, weight in _kernels(layer) if id(weight) in stored}
        macs = None if count.by_layer is None else count.by_layer.get(id(layer), {})
        layers.append(_layer_report(path, type(layer).__name__, weights, new, kernels, macs, activation_bits))
    return CompressionReport(
        model.name, layers, _total(layers), list(selection.skipped), notes=_notes(selection, count)
    )


def layers_with_own_weights(model) -> Iterator[tuple[str, keras.Layer, list[Variable]]]:
    """Every layer with weights of its own, once, in the model's order: its path, itself, those weights."""
    seen = set()

    def visit(layer, path):
        row = spec_of(layer)
        parts = [] if row is not None and row.whole else layer._layers
        inherited = {id(weight) for part in parts for weight in part.weights}
        own = [weight for weight in layer.weights if id(weight) not in inherited]
        if (own or mac_formula(layer)) and not (row and row.hidden):
            yield path or model.name, layer, own
        for part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                yield from visit(part, f"{path}/{part.name}" if path else part.name)

    yield from visit(model, "")


def _kernels(layer, part: bool = False) -> Iterator[tuple[str, Variable]]:
    """The weights that the layer table names, those included that cannot be pruned: integers, shared ones."""
    row = spec_of(layer)
    if row is not None and not row.whole:
        weights = ((name, stored_variable(layer, name)) for name in row.weights)
        yield from ((name, weight) for name, weight in weights if isinstance(weight, Variable))
    elif row is not None or part:
        for inner in layer._layers:
            yield from ((f"{inner.name}/{name}", weight) for name, weight in _kernels(inner, part=True))


@dataclass(frozen=True, eq=False)
class _Stored:
    """What one variable holds."""

    size: int
    nonzeros: int
    bits: int
    dense_bytes: int
    compressed_bytes: int
    levels: int | None = None
    signal: float = 0.0  # sums of squares
    noise: float = 0.0
    input_bits: int | None = None

    @classmethod
    def measured(cls, variable, grid: Grid | None = None, is_kernel: bool = False) -> "_Stored":
        """`grid`: what a wrapper says of a weight; of others that are kernels it is found out."""
        real = read(variable)
        if grid is None and is_kernel and np.issubdtype(real.dtype, np.floating):
            grid = find_grid(real)
        values = real if grid is None else grid.values
        size, nonzeros, smallest = values.size, int(np.count_nonzero(values)), encode(values).num_bytes
        if grid is None:
            return cls(size, nonzeros, 8 * values.itemsize, real.nbytes, smallest)
        return cls(
            size,
            nonzeros,
            grid.bits,
            real.nbytes,
            smallest,
            grid.levels,
            float(np.sum(np.square(real, dtype="float64"))),
            float(np.sum(np.square(real.astype("float64") - values))),
            grid.input_bits,
        )

    @property
    def density(self) -> float:
        return self.nonzeros / self.size if self.size else 1.0

    @property
    def read_bytes(self) -> float:
        """What is read of it for an inference: all of it, or a bit mask and what is not zero."""
        return min(self.size * self.bits, self.size + self.nonzeros * self.bits) / 8

    def mac_pj(self, activation_bits: int | None) -> float:
        """Energy of a product with one of these weights."""
        if self.levels is None:
            return mac_pj(None, None, self.bits)
        return mac_pj(self.bits, self.input_bits or activation_bits)


def register_grids(layer_class: type, grids: Callable[[Any], dict[int, Grid]]) -> None:
    """Tells the report what weights a wrapper quantizes: a function from the wrapper to their grids, by identity."""
    _GRIDS[layer_class] = grids


def register_activation_bits(layer_class: type, bits: Callable[[Any], int | None]) -> None:
    """Tells the report that a kind of layer quantizes activations: a function from the layer to their bits."""
    _ACTIVATION_BITS[layer_class] = bits


def _activation_bits(model) -> int | None:
    """The most bits that quantized activations of a model take; None where they are floats."""
    bits_found = [
        bits(layer)
        for layer in model._flatten_layers()
        for layer_class, bits in _ACTIVATION_BITS.items()
        if isinstance(layer, layer_class)
    ]
    return max((bits for bits in bits_found if bits), default=None)


def grids_of(model) -> dict[int, Grid]:
    """The grids of the weights that a model's wrappers quantize, by the identity of the variable."""
    grid_of_weight: dict[int, Grid] = {}
    for layer in model._flatten_layers():
        for layer_class, grids in _GRIDS.items():
            if isinstance(layer, layer_class):
                grid_of_weight.update(grids(layer))
    return grid_of_weight


def _layer_report(
    path, kind, weights: list[_Stored], new: list[_Stored], kernels, macs, activation_bits
) -> LayerReport:
    """`new`: the weights that no layer before it has; `kernels`: the compressible weights by name."""
    countable = [weight for weight in kernels.values() if weight in new]
    return LayerReport(
        path=path,
        kind=kind,
        parameters=sum(weight.size for weight in new),
        compressible=sum(weight.size for weight in countable),
        zeros=sum(weight.size - weight.nonzeros for weight in countable),
        bits=_mean((weight.bits, weight.size) for weight in (kernels.values() or weights)),
        dense_bytes=sum(weight.dense_bytes for weight in new),
        compressed_bytes=sum(weight.compressed_bytes for weight in new),
        macs=None if macs is None else round(sum(macs.values())),
        effective_macs=None
        if macs is None
        else round(sum(n * (kernels[name].density if name in kernels else 1) for name, n in macs.items())),
        levels=max((kernel.levels for kernel in kernels.values() if kernel.levels is not None), default=None),
        sqnr_db=_decibels(kernels.values()),
        energy_pj=None if macs is None else _energy(new, kernels, macs, activation_bits),
    )


def _energy(new: list[_Stored], kernels: dict[str, _Stored], macs: dict[str, float], activation_bits) -> float:
    looked_up = {kernels[name] for name, number in macs.items() if name in kernels and not number}
    read_once = dram_pj(sum(weight.read_bytes for weight in new if weight not in looked_up))
    without_weight = mac_pj(activation_bits, activation_bits)
    return read_once + sum(
        number * (kernels[name].density * kernels[name].mac_pj(activation_bits) if name in kernels else without_weight)
        for name, number in macs.items()
    )


def _total(layers: list[LayerReport]) -> LayerReport:
    sums: dict[str, Any] = {}
    for name in ("parameters", "compressible", "zeros", "dense_bytes", "compressed_bytes"):
        sums[name] = sum(getattr(layer, name) for layer in layers)
    for name in ("macs", "effective_macs", "energy_pj"):
        values = [getattr(layer, name) for layer in layers]
        sums[name] = None if None in values else sum(values)
    bits = _mean((x.bits, x.compressible if sums["compressible"] else x.parameters) for x in layers)
    levels = max((x.levels for x in layers if x.levels is not None), default=None)
    return LayerReport(path="total", kind="", bits=bits, levels=levels, **sums)


def _decibels(kernels: Iterable[_Stored]) -> float | None:
    kernels = list(kernels)
    signal, noise = sum(kernel.signal for kernel in kernels), sum(kernel.noise for kernel in kernels)
    return round(10 * math.log10(signal / noise), 2) if signal and noise else None


def _mean(weighted: Iterable[tuple[float, int]]) -> float:
    weighted = list(weighted)
    whole = sum(weight for _, weight in weighted)
    mean = sum(value * weight for value, weight in weighted) / whole if whole else 0
    return int(mean) if mean == int(mean) else round(mean, 2)


def _notes(found, count: MacCount) -> list[str]:
    if count.by_layer is None:
        return [f"MACs not counted: {count.problem}"]
    without = [entry.path for entry in found.layers if mac_formula(entry.layer) is None]
    without += [path for path in found.unknown if path not in without]
    notes = [f"no MAC formula: {shorten(without)}"] if without else []
    return notes + [f"MACs not counted: {path}: {reason}" for path, reason in count.failed]


def _cells(row: LayerReport) -> dict[str, str]:
    """A row of the table by column."""
    cells = (
        row.path,
        row.kind,
        f"{row.parameters:,}",
        f"{row.sparsity:.1%}" if row.compressible else "-",
        f"{row.bits:g}",
        format_bytes(row.dense_bytes),
        format_bytes(row.compressed_bytes),
        *("-" if macs is None else f"{macs:,}" for macs in (row.macs, row.effective_macs)),
    )
    return dict(zip(_COLUMNS, cells, strict=True))
