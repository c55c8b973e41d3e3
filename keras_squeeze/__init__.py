"""Make Keras models really smaller and really faster, from inside `model.fit`."""

from keras_squeeze import criteria, schedules
from keras_squeeze.deployment.advice import advise
from keras_squeeze.deployment.comparison import Comparison, compare
from keras_squeeze.deployment.latency import Latency, measure_latencies, measure_latency
from keras_squeeze.deployment.litert import ExportResult, export
from keras_squeeze.deployment.packing import load_packed, save_packed
from keras_squeeze.pruning.channel_rules import register_channel_rule
from keras_squeeze.pruning.keep_sparsity import KeepSparsity
from keras_squeeze.pruning.magnitude import MagnitudePruning, prune_weights
from keras_squeeze.pruning.neuron import NeuronPruning, prune_neurons
from keras_squeeze.pruning.shrinking import shrink
from keras_squeeze.quantization import quantizers
from keras_squeeze.quantization.conversion import finalize, quantize_aware
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantization.scheduling import QuantizationSchedule
from keras_squeeze.quantization.wrapper import QuantizeAware
from keras_squeeze.report import CompressionReport, summarize
from keras_squeeze.selection import register_layer
from keras_squeeze.training import AfterTarget

__version__ = "0.1.0"

__all__ = [
    "AfterTarget",
    "Comparison",
    "CompressionReport",
    "ExportResult",
    "FakeQuantize",
    "KeepSparsity",
    "Latency",
    "MagnitudePruning",
    "NeuronPruning",
    "QuantizationSchedule",
    "QuantizeAware",
    "advise",
    "compare",
    "criteria",
    "export",
    "finalize",
    "load_packed",
    "measure_latencies",
    "measure_latency",
    "prune_neurons",
    "prune_weights",
    "quantize_aware",
    "quantizers",
    "register_channel_rule",
    "register_layer",
    "save_packed",
    "schedules",
    "shrink",
    "summarize",
]
