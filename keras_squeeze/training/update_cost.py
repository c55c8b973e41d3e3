"""How many mask updates a run can pay for: constants that were measured once, never a clock.

So the same run has the same updates on every machine, and after it was resumed. `benchmarks/mask_update.py` measures
the constants, on one core; the time of a step is what it takes at least, at a small batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keras_squeeze.schedules import UPDATES_BY_DEFAULT

SHARE = 0.02
"""The share of a run's time that updates may take; below the 3 % that are promised, since machines differ."""

FEWEST = 8
"""Updates that a run gets however short it is: bigger jumps cost accuracy."""

TOO_SHORT = (
    "this run was short: its mask updates took more than a few percent of its time; `frequency=` sets their number"
)


@dataclass(frozen=True)
class Cost:
    """Time of something that goes over arrays, in microseconds.

    Attributes:
        fixed: Whatever there is to do.
        per_array: For each array.
        per_thousand: For each thousand values.
    """

    fixed: float
    per_array: float
    per_thousand: float

    def of(self, sizes: Sequence[int]) -> float:
        """The time for arrays of these sizes."""
        return self.fixed + self.per_array * len(sizes) + self.per_thousand * sum(sizes) / 1000


STEP = Cost(fixed=550, per_array=55, per_thousand=6.5)
"""One training step, from a model's trainable weights; without what `CONVOLUTION` adds."""

CONVOLUTION = 1500
"""What a kernel that moves over a picture adds to a step: it is read many times."""

WEIGHTS = Cost(fixed=600, per_array=370, per_thousand=4.0)
"""One update of the masks of single weights."""

NEURONS = Cost(fixed=400, per_array=500, per_thousand=5.0)
"""One update of the masks of neurons."""

OBSERVED = Cost(fixed=10, per_array=10, per_thousand=1.2)
"""Recording the gradients of one batch."""


def step_time(trainable: Sequence[tuple[int, ...]]) -> float:
    """Estimates the time of a training step, in microseconds, from the shapes of a model's trainable weights."""
    kernels = sum(len(shape) >= 4 for shape in trainable)
    return STEP.of([math.prod(shape) for shape in trainable]) + CONVOLUTION * kernels


def affordable_updates(steps: int, trainable: Sequence[tuple[int, ...]], update: float) -> int:
    """Computes how many updates take at most `SHARE` of a run, from 1 to about a hundred.

    Args:
        steps: Optimizer steps of the run.
        trainable: Shapes of the model's trainable weights.
        update: Time of one update, in microseconds.
    """
    return max(1, min(int(SHARE * steps * step_time(trainable) / update), UPDATES_BY_DEFAULT))
