"""Make Keras models really smaller and really faster, from inside `model.fit`."""

import importlib
from typing import TYPE_CHECKING, Any

from keras_squeeze import criteria, plots, quantizers, schedules, steps
from keras_squeeze.analysis.report import CompressionReport, summarize
from keras_squeeze.channel_graph.rules import register_channel_rule
from keras_squeeze.deployment.litert import ExportResult, export
from keras_squeeze.deployment.packing import load_packed, save_packed
from keras_squeeze.evaluation.advice import advise
from keras_squeeze.evaluation.comparison import Comparison, compare
from keras_squeeze.evaluation.latency import Latency, measure_latencies, measure_latency
from keras_squeeze.evaluation.layer_sensitivity import sensitivity
from keras_squeeze.evaluation.sensitivity_profile import Sensitivity
from keras_squeeze.introspection.layer_table import register_layer
from keras_squeeze.neuron_pruning.neuron_overview import NeuronOverview, prunable_neurons
from keras_squeeze.neuron_pruning.neuron_pruning import NeuronPruning, prune_neurons
from keras_squeeze.neuron_pruning.shrinking import shrink
from keras_squeeze.quantization.conversion import finalize, quantize_aware
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantization.quantization_schedule import QuantizationSchedule
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.recipes.recipe import Recipe
from keras_squeeze.search.objectives import pareto_front
from keras_squeeze.search.space import CompressionSpace
from keras_squeeze.training.after_target import AfterTarget
from keras_squeeze.training.recalibration import recalibrate_batch_norm
from keras_squeeze.weight_pruning.keep_sparsity import KeepSparsity
from keras_squeeze.weight_pruning.magnitude_pruning import MagnitudePruning, prune_weights

if TYPE_CHECKING:
    from keras_squeeze.search.hypermodel import CompressionHyperModel
    from keras_squeeze.search.oracle import ParetoOracle
    from keras_squeeze.search.tuner import CompressionTuner

__version__ = "0.1.0"

__all__ = [
    "AfterTarget",
    "Comparison",
    "CompressionHyperModel",
    "CompressionReport",
    "CompressionSpace",
    "CompressionTuner",
    "ExportResult",
    "FakeQuantize",
    "KeepSparsity",
    "Latency",
    "MagnitudePruning",
    "NeuronOverview",
    "NeuronPruning",
    "ParetoOracle",
    "QuantizationSchedule",
    "QuantizeAware",
    "Recipe",
    "Sensitivity",
    "advise",
    "compare",
    "criteria",
    "export",
    "finalize",
    "load_packed",
    "measure_latencies",
    "measure_latency",
    "pareto_front",
    "plots",
    "prunable_neurons",
    "prune_neurons",
    "prune_weights",
    "quantize_aware",
    "quantizers",
    "recalibrate_batch_norm",
    "register_channel_rule",
    "register_layer",
    "save_packed",
    "schedules",
    "sensitivity",
    "shrink",
    "steps",
    "summarize",
]

# What needs Keras Tuner is imported when it is asked for: that takes a second.
_ON_DEMAND = {
    "CompressionHyperModel": "keras_squeeze.search.hypermodel",
    "CompressionTuner": "keras_squeeze.search.tuner",
    "ParetoOracle": "keras_squeeze.search.oracle",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_DEMAND[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
