"""`advise`: what will make a model smaller and faster on a target, and what will not, before anything is trained.

A rule is a function from a `Case` to a sentence, or to None where it does not fit; `RULES` lists them, the most
important first. The ratios that they quote stand in `MEASURED`, and `benchmarks/advice_rules.py` measures them again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import keras
from keras import layers

from keras_squeeze import checks
from keras_squeeze.analysis.report import CompressionReport, LayerReport, layers_with_own_weights, summarize
from keras_squeeze.analysis.tables import format_bytes
from keras_squeeze.evaluation.expectations import (
    MULTIPLE,
    is_convolution,
    output_units,
    saved_bytes,
    unit_of,
    width_of,
    without_neurons,
)
from keras_squeeze.evaluation.plans import Plan, Zeros, label, plan_of, read_recipe, shrunk, wrappers_of, zeros_of
from keras_squeeze.introspection.functional import functional_of
from keras_squeeze.introspection.selection import CompressibleLayer, Selection, find_layers
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.quantizers import Affine, Quantizer

# What is added to a ratio that was measured on x86.
TARGETS = {"x86": "", "arm": "; not measured on Arm", "microcontroller": "; not measured on microcontrollers"}


class Ratio(NamedTuple):
    """What a change made of a network: its latency, and the bytes of its file, over those in float32.

    None: not measured yet.
    """

    latency: float | None
    num_bytes: float | None = None


MEASURED: Mapping[tuple[str, str], Ratio] = {
    ("convolutional", "80% zeros"): Ratio(1.00, 1.00),
    ("convolutional", "80% zeros, sparse-encoded"): Ratio(0.99, 0.29),
    ("convolutional", "95% zeros"): Ratio(1.00, 1.00),
    ("convolutional", "95% zeros, sparse-encoded"): Ratio(1.00, 0.08),
    ("convolutional", "2:4 zeros"): Ratio(1.00, 1.00),
    ("convolutional", "dynamic-range int8"): Ratio(1.91, 0.27),
    ("convolutional", "static int8"): Ratio(0.47, 0.28),
    ("convolutional", "binary weights"): Ratio(0.47, 0.28),
    ("convolutional", "half of the neurons"): Ratio(0.31, 0.35),
    ("convolutional", "65 wide over 64"): Ratio(1.53, 1.03),
    ("convolutional", "65 wide over 72"): Ratio(0.91, 0.82),
    ("dense", "80% zeros"): Ratio(0.95, 1.00),
    ("dense", "80% zeros, sparse-encoded"): Ratio(1.03, 0.30),
    ("dense", "95% zeros"): Ratio(0.96, 1.00),
    ("dense", "95% zeros, sparse-encoded"): Ratio(0.95, 0.08),
    ("dense", "2:4 zeros"): Ratio(1.13, 1.00),
    ("dense", "dynamic-range int8"): Ratio(0.18, 0.25),
    ("dense", "static int8"): Ratio(0.26, 0.25),
    ("dense", "binary weights"): Ratio(0.25, 0.26),
    ("dense", "half of the neurons"): Ratio(0.22, 0.32),
    ("dense", "1025 wide over 1024"): Ratio(1.22, 1.00),
    ("dense", "1025 wide over 1032"): Ratio(1.05, 0.99),
    ("tiny", "static int8"): Ratio(0.97, 0.62),
}
NETWORKS = {
    "convolutional": "MobileNetV2",
    "dense": "a network of four dense layers",
    "tiny": "a dense network of 1,392 MACs",
}
TINY_MACS = 1_392

_NOTABLE = 0.01  # of all bytes or MACs; less is not worth a sentence
_DIED = 0.1  # of all parameters; less may belong to neurons that died in training, and nobody pruned
LISTED = 3
_INT8 = Affine(8)

# Layers that were not measured.
_RECURRENT = (layers.RNN, layers.Bidirectional)
_ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)


@dataclass(frozen=True, eq=False)
class Case:
    """What a rule looks at.

    Attributes:
        model: The model; it is only read.
        plan: What is intended, or where nothing is, what the model has.
        planned: Whether it is intended, so that its bytes are to be expected rather than counted.
        target: Where the model is to run.
        report: What the model holds and computes.
        found: Its compressible layers.
        zeros: Its zeros.
    """

    model: keras.Model
    plan: Plan
    planned: bool
    target: str
    report: CompressionReport
    found: Selection
    zeros: Zeros

    @cached_property
    def rows(self) -> dict[str, LayerReport]:
        return {row.path: row for row in self.report.layers}

    @cached_property
    def shrunk(self) -> tuple[int, int] | None:
        """`(parameters, MACs)` without the neurons that are zero throughout; None where none can be taken out."""
        return shrunk(self.model) if self.zeros.channels else None

    @cached_property
    def kind(self) -> str:
        """The network of the benchmark that is most like the model: by where most of its MACs are, or else bytes."""
        return "convolutional" if self.in_convolutions > 0.5 else "dense"

    @cached_property
    def unmeasured(self) -> str | None:
        """What the model mainly is, where no network like it was measured."""
        if functional_of(self.model) is None:
            return "subclassed models"
        recurrent, attention = (self.share(self.of_classes(*kinds)) for kinds in (_RECURRENT, _ATTENTION))
        if recurrent + attention <= 0.5:
            return None
        return "recurrent layers" if recurrent >= attention else "attention layers"

    @cached_property
    def in_convolutions(self) -> float:
        """The share of the MACs, or where these are not known of the bytes, that convolutions have."""
        return self.share(
            [path for path, layer in self.members.items() if is_convolution(CompressibleLayer(path, layer, (), ()))]
        )

    @cached_property
    def members(self) -> dict[str, keras.Layer]:
        """The layers of the report's rows; a wrapper's is the layer that it quantizes."""
        return {
            path: layer.layer if isinstance(layer, QuantizeAware) else layer
            for path, layer, _ in layers_with_own_weights(self.model)
        }

    def of_classes(self, *classes: type) -> list[str]:
        return [path for path, layer in self.members.items() if isinstance(layer, classes)]

    def share(self, paths: list[str]) -> float:
        """The part of the MACs, or where these are not known of the bytes, that is theirs."""
        measure = "dense_bytes" if self.report.total.macs is None else "macs"
        return sum(getattr(self.rows[path], measure) for path in paths) / max(getattr(self.report.total, measure), 1)

    @property
    def is_tiny(self) -> bool:
        """Whether the model computes no more than the network that int8 was measured not to make faster."""
        ratio, macs = MEASURED["tiny", "static int8"].latency, self.report.total.macs
        return not self.unmeasured and ratio is not None and ratio > 0.9 and macs is not None and macs <= TINY_MACS

    def expected_bytes(self, sparsity: float, quantizer: Quantizer | None) -> int:
        """The bytes of all weights with so many zeros and this quantizer."""
        return self.report.total.compressed_bytes - saved_bytes(self.model, self.found, sparsity, quantizer)

    @property
    def int8_bytes(self) -> int:
        """The bytes of all weights in a .tflite file that computes in int8, which packs nothing."""
        total = self.report.total
        return total.compressible + 4 * (total.parameters - total.compressible)

    def measured(self, change: str) -> Ratio:
        return MEASURED[self.kind, change]

    def took(self, change: str) -> str:
        """How long the benchmark's network took with a change, in words."""
        return f"{NETWORKS[self.kind]} {_times(self.measured(change).latency)}{self.where}"

    @property
    def where(self) -> str:
        """Where the ratios that are quoted come from."""
        return f" (LiteRT on x86, one thread{TARGETS[self.target]})"


Rule = Callable[[Case], str | None]


def advise(model: keras.Model, recipe=None, *, target: str = "x86") -> list[str]:
    """Tells what will make a model smaller and faster, and what will not, before anything is trained.

    Bytes and multiply-accumulates (MACs) are those of this model, counted or computed; what is expected of one change
    leaves the removal of neurons by another out. Ratios of time cannot be known before there is a file: those that are
    quoted were measured on a network like it, which the sentence names. Measure the file itself with `measure_latency`.

    Args:
        model: A built Keras model. It is only read.
        recipe: What is intended, a dict with any of these keys: `"sparsity"`, the fraction of zeros; `"pattern"`,
            `"unstructured"`, `"2:4"` or a block shape; `"neurons"`, the fraction of the neurons to remove; `"weights"`
            and `"activations"`, quantizers or their names as in `quantize_aware`, with the same defaults. None: advice
            about the model as it is, with the zeros and the quantizers that it has.
        target: `"x86"`, `"arm"` or `"microcontroller"`. What was measured on x86 only says so.

    Returns:
        Sentences, the most important first.

    Raises:
        TypeError: `model` is not a Keras model, or `recipe` is not a dict.
        ValueError: the model is not built, the target is not known, or the recipe has an unknown key or an impossible
            value.

    Example:

    ```python
    print(*ks.advise(model, {"sparsity": 0.8, "weights": "int8"}), sep="\\n")
    ```
    """
    checks.one_of("target", target, TARGETS)
    plan = read_recipe(recipe)
    selection, report = find_layers(model), summarize(model)
    planned = not plan.is_empty and bool(selection.layers)
    zeros = zeros_of(model, report, selection)
    plan = plan if planned else plan_of(model, report, zeros.sparsity)
    case = Case(model, plan, planned, target, report, selection, zeros)
    findings = [finding for rule in RULES if (finding := rule(case)) is not None]
    return findings or [f"Model '{model.name}' has no weights: there is nothing in it to make smaller or faster."]


def zeros_without_a_place(case: Case) -> str | None:
    """Zeros on a grid that has none."""
    plan = case.plan
    if not case.planned or not plan.sparsity or plan.weights is None or plan.weights.has_zero:
        return None
    return (
        f"{plan.zeros} have no place in {label(plan.weights)} weights, whose grid has no zero: quantize_aware refuses "
        'pruned weights there. Use "ternary" weights, or leave the pruning out.'
    )


def no_integer_kernel(case: Case) -> str | None:
    """Bits that LiteRT has no integer kernels for."""
    weights, activations = case.plan.weights, case.plan.activations
    if weights is None or (weights.bits <= 8 and (activations is None or activations.bits == 8)):
        return None
    inputs = "in float" if activations is None else f"of {activations.bits} bits"
    return (
        f"Weights of {weights.bits} bits with activations {inputs} have no integer kernel in LiteRT, which takes "
        "weights of at most 8 bits with activations of 8: such a model runs in float32, with "
        f"{format_bytes(case.report.total.dense_bytes)} of weights and no faster. Packed, its weights take "
        f"{_packed(case)}."
    )


def dead_neurons(case: Case) -> str | None:
    """Neurons that are zero throughout, and computed all the same."""
    if case.shrunk is not None:
        return (
            "Whole neurons are zero, and still stored and computed: `keras_squeeze.shrink(model)` takes them out and "
            f"leaves {_left(case, *case.shrunk)}."
        )
    if not case.zeros.channels or not wrappers_of(case.model):
        return None
    return (
        f"{case.zeros.channels} channels are zero throughout, and still stored and computed: `keras_squeeze.shrink` "
        "takes such neurons out before quantize_aware, not after it. Shrink the model that was quantized, and quantize "
        "what is left."
    )


def weights_only(case: Case) -> str | None:
    """Integers for weights between activations in float."""
    plan = case.plan
    if plan.weights is None or plan.activations is not None or plan.weights.bits > 8 or plan.has_binary_inputs:
        return None
    if case.unmeasured:
        return None
    mixed, static = (case.measured(change).latency for change in ("dynamic-range int8", "static int8"))
    if mixed is not None and static is not None and mixed <= static:
        return None
    slower = "leaves speed unused"
    if mixed is not None and mixed > 1:
        measure = "bytes" if case.report.total.macs is None else "MACs"
        convolutions = f"convolutions, which have {case.in_convolutions:.0%} of the {measure},"
        slower = f"makes {convolutions if case.kind == 'convolutional' else 'dense layers'} slower"
    return (
        f"Quantizing the weights and not the activations (dynamic range) {slower}: with weights in int8, "
        f"{case.took('dynamic-range int8')}; with activations in int8 as well it {_times(static)}. Quantize both: the "
        f"weights take {_packed(case, sparse=False)} either way."
    )


def too_small(case: Case) -> str | None:
    """So little to compute that most of the time goes into calling the kernels."""
    if case.plan.weights is None or not case.is_tiny:
        return None
    return (
        f"With {case.report.total.macs:,} MACs this model is too small for quantization to make it faster: in int8, "
        f"{NETWORKS['tiny']} {_times(MEASURED['tiny', 'static int8'].latency)}{case.where}."
    )


def scattered_zeros(case: Case) -> str | None:
    """Zeros save bytes, and no time where kernels compute with them like with any other number."""
    plan = case.plan
    if not plan.sparsity or (plan.weights is not None and not plan.weights.has_zero):
        return None
    stored = "Stored sparsely" if plan.weights is None else f"Stored sparsely and in {label(plan.weights)}"
    stored = f"{stored}, its weights take {_packed(case)}"
    if case.unmeasured:
        return (
            f"{plan.zeros} make the model smaller; whether it is faster was not measured for {case.unmeasured}. "
            f"{stored}."
        )
    change = "2:4 zeros" if plan.pattern == "2:4" else "80% zeros"
    encoded = case.measured("80% zeros, sparse-encoded")
    size = "" if encoded.num_bytes is None else f", with {encoded.num_bytes:.2f} of the bytes"
    return (
        f"{plan.zeros} make the model smaller, not faster. Measured with {change}: {case.took(change)}. {stored}. "
        f"Measured in a sparse-encoded .tflite file with 80% zeros: {NETWORKS[case.kind]} "
        f"{_times(encoded.latency)}{size}."
    )


def few_bits(case: Case) -> str | None:
    """Fewer than 8 bits save bytes, and no time where kernels compute in 8."""
    weights = case.plan.weights
    if weights is None or weights.bits >= 8:
        return None
    packed = f"packed, the weights take {_packed(case)}"
    if weights.bits > 2:
        return f"Weights in {label(weights)} are a gain in size: {packed}. Whether it is faster was not measured."
    if case.unmeasured:
        return (
            f"Weights in {label(weights)} are a gain in size: {packed}. Whether it is faster was not measured for "
            f"{case.unmeasured}."
        )
    binary, static = case.measured("binary weights"), case.measured("static int8")
    ratio = "" if binary.num_bytes is None else f", a file with {binary.num_bytes:.2f} of the bytes"
    return (
        f"Weights in {label(weights)} are a gain in size only, which LiteRT stores and computes in int8: with binary "
        f"weights, {case.took('binary weights')}{ratio}; with int8 weights it {_times(static.latency)}. In a .tflite "
        f"file the weights take about {format_bytes(case.int8_bytes)}, a byte each; {packed}."
    )


def static_int8(case: Case) -> str | None:
    """Integers throughout: smaller and faster."""
    weights, activations = case.plan.weights, case.plan.activations
    if weights is None or activations is None or weights.bits != 8 or activations.bits != 8:
        return None
    if case.is_tiny:
        return f"Weights in {label(weights)} are smaller: they take {_packed(case, sparse=False)}."
    if case.unmeasured:
        return (
            f"Weights in {label(weights)} with activations in {label(activations)} are smaller: packed, they take "
            f"{_packed(case, sparse=False)}. Whether it is faster was not measured for {case.unmeasured}."
        )
    return (
        f"Weights in {label(weights)} with activations in {label(activations)} are smaller and faster: the weights "
        f"take {_packed(case, sparse=False)}; in int8, {case.took('static int8')}."
    )


def wrapped_by_hand(case: Case) -> str | None:
    """Models that quantize_aware refuses."""
    if not case.planned or case.plan.weights is None or functional_of(case.model) is not None:
        return None
    return (
        "The model is subclassed, and quantize_aware takes Functional and Sequential models only: wrap its "
        f"compressible layers, {len(case.found.layers)} of them, by hand with keras_squeeze.QuantizeAware. No file of "
        "such a model was measured."
    )


def recurrent_in_float(case: Case) -> str | None:
    """Layers that the converter leaves in float."""
    paths = case.of_classes(*_RECURRENT)
    if case.plan.weights is None or not paths or (share := case.share(paths)) < _NOTABLE:
        return None
    measure = "bytes" if case.report.total.macs is None else "MACs"
    return (
        f"Recurrent layers stay in float in a .tflite file, with {share:.0%} of the {measure} ({_listed(paths)}): its "
        "converter has no integer kernel for them."
    )


def fewer_neurons(case: Case) -> str | None:
    """Neurons that are gone are not computed, wherever the model runs."""
    fraction = case.plan.neurons
    if not fraction:
        return None
    savings = without_neurons(case.model, fraction)
    if isinstance(savings, str):
        return f"No neuron can be removed: {savings}."
    measured = f"with half of its neurons gone, {case.took('half of the neurons')}"
    if case.unmeasured:
        measured = f"how much faster that is was not measured for {case.unmeasured}"
    return (
        f"Removing {fraction:.0%} of the neurons, evenly and to widths that are multiples of {MULTIPLE}, leaves "
        f"{_left(case, *savings)}. What is gone is computed nowhere: {measured}."
    )


def odd_widths(case: Case) -> str | None:
    """Kernels compute several channels at once, and the rest of them apart."""
    outputs = output_units(case.model, case.found)
    widths = [
        (case.rows[entry.path].macs or 0, entry, width)
        for entry in case.found.layers
        if (width := width_of(entry)) > MULTIPLE and width % MULTIPLE and id(unit_of(entry)) not in outputs
        if (slower := _width_ratios(entry)[0].latency) is None or slower > 1.05
    ]
    macs, total = sum(macs for macs, *_ in widths), case.report.total.macs
    if not widths or case.unmeasured or (total and macs < _NOTABLE * total):
        return None
    widths.sort(key=lambda item: -item[0])
    names = _listed([f"{entry.path} ({width})" for _, entry, width in widths])
    share = f", with {macs / total:.0%} of the MACs" if total else ""
    below, above = _width_ratios(widths[0][1])
    wide = "convolutions 65 channels" if is_convolution(widths[0][1]) else "dense layers 1025 units"
    narrower, wider = (64, 72) if is_convolution(widths[0][1]) else (1024, 1032)
    return (
        f"Widths that are no multiple of {MULTIPLE} waste time: {names}{share}. Take a multiple of {MULTIPLE} near "
        f"it: {wide} wide {_times(below.latency)} as {narrower}, and {_times(above.latency)} as "
        f"{wider}{case.where}."
    )


def prospects(case: Case) -> str | None:
    """What each technique would do to a model that nothing was done to yet."""
    if not case.plan.is_empty or not case.found.layers:
        return None
    if case.shrunk is not None and case.shrunk[0] < (1 - _DIED) * case.report.total.parameters:
        return None
    before = format_bytes(case.report.total.dense_bytes)
    eight, sparse = (format_bytes(case.expected_bytes(*how)) for how in ((0.0, _INT8), (0.8, None)))
    savings = without_neurons(case.model, 0.5)
    if isinstance(savings, str):
        neurons = f"No neuron can be removed: {savings}."
    else:
        neurons = f"Removing neurons makes it smaller and faster (half: {_left(case, *savings)})."
    size = f"weights: about {eight} instead of {before}"
    integers = f"Int8 weights and activations make it smaller and faster ({size})."
    if case.unmeasured:
        integers = f"Int8 makes it smaller ({size}); whether faster was not measured for {case.unmeasured}."
    return (
        f"Nothing is compressed yet. {neurons} {integers} Zeros make it smaller only (80%, stored sparsely: about "
        f"{sparse} instead of {before})."
    )


def where_the_bytes_are(case: Case) -> str | None:
    return _largest(case, "dense_bytes", "the bytes of the weights", format_bytes)


def where_the_macs_are(case: Case) -> str | None:
    if case.report.total.macs is None:
        return next((note for note in case.report.notes if note.startswith("MACs not counted")), None)
    return _largest(case, "macs", "the MACs", lambda macs: f"{macs:,}")


def what_stays(case: Case) -> str | None:
    """Layers that cannot be compressed, where they hold a part of the bytes that matters."""
    owners: dict[str, str] = {}
    for path, reason in case.report.skipped:
        row = max((name for name in case.rows if f"{path}/".startswith(f"{name}/")), key=len, default=None)
        if row is not None and not _is_quantized(case.rows[row]):
            owners.setdefault(row, reason)
    held, total = sum(case.rows[path].dense_bytes for path in owners), case.report.total.dense_bytes
    if not total or held < _NOTABLE * total:
        return None
    by_reason: dict[str, list[str]] = {}
    for path in sorted(owners, key=lambda path: -case.rows[path].dense_bytes):
        by_reason.setdefault(owners[path], []).append(path)
    names = "; ".join(f"{_listed(paths)}: {reason}" for reason, paths in list(by_reason.items())[:LISTED])
    return f"Not compressed whatever is done: {held / total:.0%} of the bytes of the weights ({names})."


RULES: tuple[Rule, ...] = (
    zeros_without_a_place,
    no_integer_kernel,
    dead_neurons,
    weights_only,
    too_small,
    scattered_zeros,
    few_bits,
    static_int8,
    wrapped_by_hand,
    recurrent_in_float,
    fewer_neurons,
    odd_widths,
    prospects,
    where_the_bytes_are,
    where_the_macs_are,
    what_stays,
)
"""All rules, the most important first. A new one is a function and its place in this list."""


def _largest(case: Case, name: str, what: str, shown) -> str | None:
    """The layers that hold most of something, with their shares."""
    total = getattr(case.report.total, name)
    held = sorted(((getattr(row, name), row.path) for row in case.report.layers), key=lambda pair: -pair[0])
    parts = [f"{path} {value / total:.0%} ({shown(value)})" for value, path in held[:LISTED] if value]
    if not parts:
        return None
    return f"Where {what} are, {shown(total)} in all: {', '.join(parts)}."


def _is_quantized(row: LayerReport) -> bool:
    """Whether its weights are on a grid, or stored as integers."""
    return row.levels is not None or row.bits <= 8


def _packed(case: Case, *, sparse: bool = True) -> str:
    """The bytes of the weights, each stored as small as it can be: counted, or expected from the plan.

    `sparse`: whether what is planned counts with the zeros.
    """
    before = format_bytes(case.report.total.dense_bytes)
    if not case.planned:
        return f"{format_bytes(case.report.total.compressed_bytes)} instead of {before}"
    expected = case.expected_bytes(case.plan.sparsity if sparse else 0.0, case.plan.weights)
    return f"about {format_bytes(expected)} instead of {before}"


def _left(case: Case, parameters: int, macs: int) -> str:
    total = case.report.total
    text = f"{parameters:,} of {total.parameters:,} parameters"
    if not total.macs:
        return text
    return f"{macs:,} of {total.macs:,} MACs ({macs / total.macs:.0%}) and {text}"


def _width_ratios(entry: CompressibleLayer) -> tuple[Ratio, Ratio]:
    """A width of one too many against the multiple of 8 below it, and the one above it."""
    if is_convolution(entry):
        return MEASURED["convolutional", "65 wide over 64"], MEASURED["convolutional", "65 wide over 72"]
    return MEASURED["dense", "1025 wide over 1024"], MEASURED["dense", "1025 wide over 1032"]


def _times(ratio: float | None) -> str:
    return "was not timed yet" if ratio is None else f"took {ratio:.2f} times as long"


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
