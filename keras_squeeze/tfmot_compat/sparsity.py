"""`tfmot.sparsity.keras`: pruning by magnitude."""

from keras_squeeze.tfmot_compat.namespaces import namespace
from keras_squeeze.tfmot_compat.pruning import prune_low_magnitude, prune_scope, strip_pruning
from keras_squeeze.tfmot_compat.pruning_callbacks import PruningSummaries, UpdatePruningStep
from keras_squeeze.tfmot_compat.pruning_policies import PruneForLatencyOnXNNPack, PruningPolicy
from keras_squeeze.tfmot_compat.pruning_schedules import ConstantSparsity, PolynomialDecay, PruningSchedule
from keras_squeeze.tfmot_compat.pruning_wrapper import PrunableLayer, PruneLowMagnitude

keras = namespace(
    "sparsity.keras",
    "Pruning by magnitude, as tfmot spells it.",
    {
        "ConstantSparsity": ConstantSparsity,
        "PolynomialDecay": PolynomialDecay,
        "PrunableLayer": PrunableLayer,
        "PruneForLatencyOnXNNPack": PruneForLatencyOnXNNPack,
        "PruneLowMagnitude": PruneLowMagnitude,
        "PruningPolicy": PruningPolicy,
        "PruningSchedule": PruningSchedule,
        "PruningSummaries": PruningSummaries,
        "UpdatePruningStep": UpdatePruningStep,
        "prune_low_magnitude": prune_low_magnitude,
        "prune_scope": prune_scope,
        "strip_pruning": strip_pruning,
    },
)
