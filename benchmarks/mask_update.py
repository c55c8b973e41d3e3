"""What one mask update costs when all the weights of a large model compete.

Timed is what the callback does at one update: `MagnitudePruning(..., allocation="global").update(step)` on a built
model. Beside it, `numpy.partition(numpy.abs(flat), k)` on the same weights, already joined in one array: no exact
selection of a threshold can do much less.
"""

import functools
import math
import pathlib
import statistics
import time
from dataclasses import dataclass

import numpy as np
import tables
from measuring import Bar, Estimate, advance, bars_table, in_turn, own_process, progress_bar, warn_if_busy
from rich.console import Console

LAYERS = 4
LIMIT = 2.0  # both the time, in that of numpy.partition, and the extra memory, in that of the weights


@dataclass(frozen=True)
class Case:
    """An update from one sparsity to another."""

    weights: int
    zeros: float
    target: float

    @property
    def side(self) -> int:
        return math.isqrt(self.weights // LAYERS)

    @property
    def size(self) -> int:
        return LAYERS * self.side**2

    @property
    def name(self) -> str:
        return f"{self.zeros:.0%} -> {self.target:.0%} zeros"


class Subject:
    """A model in the state before the update, and the callback that will update it."""

    def __init__(self, case: Case):
        import keras

        import keras_squeeze as ks

        initializers = [keras.initializers.RandomNormal(stddev=1.0, seed=seed) for seed in range(LAYERS)]
        dense = [keras.layers.Dense(case.side, use_bias=False, kernel_initializer=each) for each in initializers]
        self.model = keras.Sequential([keras.Input((case.side,)), *dense])
        self.kernels = [layer.kernel for layer in dense]
        self.optimizer = keras.optimizers.SGD()
        self.pruning = ks.MagnitudePruning(ks.schedules.Constant(case.target), allocation="global")
        # Half of a normal distribution's values lie below the quartile of its absolute values, and so on.
        smallest = statistics.NormalDist().inv_cdf((1 + case.zeros) / 2)
        for kernel in self.kernels:
            kernel.assign(keras.ops.where(keras.ops.abs(kernel) >= smallest, kernel, 0.0))

    def attach(self) -> None:
        self.pruning.detach()
        self.pruning.attach(self.model, self.optimizer, total_steps=1)


class TimedSubject(Subject):
    """With a copy of the weights, to begin every repetition from the same state."""

    def __init__(self, case: Case):
        super().__init__(case)
        self.flat = np.concatenate([kernel.numpy().ravel() for kernel in self.kernels])

    def restore(self) -> None:
        for kernel, values in zip(self.kernels, np.split(self.flat, LAYERS), strict=True):
            kernel.assign(values.reshape(kernel.shape).copy())


_subject = functools.lru_cache(maxsize=1)(TimedSubject)


def time_update(case: Case) -> float:
    """Seconds of one update."""
    subject = _subject(case)
    subject.restore()
    subject.attach()
    start = time.perf_counter()
    subject.pruning.update(0)
    seconds = time.perf_counter() - start
    if abs(subject.pruning.sparsity - case.target) > 1 / case.size:
        raise RuntimeError(f"The update led to a sparsity of {subject.pruning.sparsity}, not {case.target}.")
    return seconds


def time_partition(case: Case) -> float:
    """Seconds that NumPy takes to find the threshold."""
    flat = _subject(case).flat
    start = time.perf_counter()
    np.partition(np.abs(flat), round(case.size * case.target))
    return time.perf_counter() - start


def memory_of_update(case: Case) -> float:
    """Extra memory at the peak of one update, over that of the weights. Needs a process of its own."""
    subject = Subject(case)
    subject.attach()
    return _extra_memory(lambda: subject.pruning.update(0)) / (4 * case.size)


def memory_of_partition(case: Case) -> float:
    """The same for NumPy."""
    flat = np.random.default_rng(0).standard_normal(case.size, dtype="float32")
    return _extra_memory(lambda: np.partition(np.abs(flat), round(case.size * case.target))) / (4 * case.size)


def _extra_memory(function) -> int:
    """Bytes by which resident memory rose at the highest point of a call, as Linux counts them."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@dataclass(frozen=True)
class Result:
    case: Case
    update: Estimate
    partition: Estimate
    ratio: Estimate
    memory: Estimate
    partition_memory: Estimate


def measure(case: Case, repetitions: int, memory_runs: int, on_run) -> Result:
    """Times both sides in turn after one round that is thrown away; memory in a new process each time."""
    times = []
    with own_process() as process:
        for repetition in range(-1, repetitions):
            times.append(
                in_turn(
                    repetition,
                    lambda: process.submit(time_update, case).result(),
                    lambda: process.submit(time_partition, case).result(),
                )
            )
            on_run()
    memory: dict = {memory_of_update: [], memory_of_partition: []}
    for _ in range(memory_runs):
        for function, samples in memory.items():
            with own_process() as process:
                samples.append(process.submit(function, case).result())
        on_run()
    update, partition = zip(*times[1:], strict=True)
    ratios = [ours / numpys for ours, numpys in times[1:]]
    return Result(case, *map(Estimate.of, (update, partition, ratios, *memory.values())))


def full_table(results: list[Result]) -> str:
    header = ("update", "one update, s", "numpy.partition, s", "ratio [95 %]", "memory", "numpy.partition, memory")
    rows = [
        (
            result.case.name,
            f"{result.update.median:.2f}",
            f"{result.partition.median:.2f}",
            result.ratio.text(2),
            result.memory.text(2),
            f"{result.partition_memory.median:.2f}",
        )
        for result in results
    ]
    return tables.markdown(header, rows)


def bars(results: list[Result]) -> list[Bar]:
    times = [Bar(f"{result.case.name}: time over numpy.partition's", LIMIT, result.ratio) for result in results]
    return times + [
        Bar(f"{result.case.name}: extra memory over the weights'", LIMIT, result.memory) for result in results
    ]


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--weights", type=int, default=100_000_000, help="size of the model (100 million)")
    parser.add_argument("--repetitions", type=int, default=7, help="timed repetitions of each side (7)")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes in which memory is measured (3)")
    args = tables.parse(parser)
    if args.quick:
        args.weights, args.repetitions, args.memory_runs = 4_000_000, 1, 1
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    cases = [Case(args.weights, *change) for change in ((0.0, 0.03), (0.0, 0.5), (0.8, 0.81))]
    results = []
    with progress_bar(console) as progress:
        for case in cases:
            task = progress.add_task(case.name, total=args.repetitions + 1 + args.memory_runs)
            on_run = functools.partial(advance, progress, task)
            results.append(measure(case, args.repetitions, args.memory_runs, on_run))
    note = (
        f"{cases[0].size:,} float32 weights in {LAYERS} Dense layers, {args.repetitions} repetitions; memory is that "
        f"above what the model and its masks hold already, as a multiple of the weights. {tables.machine()}"
    )
    text = f"{full_table(results)}\n\n{bars_table(bars(results))}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("mask_update", text)


if __name__ == "__main__":
    main()
