"""Steps of a `Recipe`."""

from keras_squeeze.recipes.steps import (
    KINDS,
    Export,
    FineTune,
    PruneNeurons,
    PruneWeights,
    Quantize,
    Step,
    Task,
    TrainingStep,
)

__all__ = [
    "KINDS",
    "Export",
    "FineTune",
    "PruneNeurons",
    "PruneWeights",
    "Quantize",
    "Step",
    "Task",
    "TrainingStep",
]
