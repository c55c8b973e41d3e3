"""What one mask update costs when all the weights of a large model compete.

Timed is what the callback does at one update: `MagnitudePruning(..., allocation="global").update(step)` on a built
model. Beside it, `numpy.partition(numpy.abs(flat), k)` on the same weights, already joined in one array: no exact
selection of a threshold can do much less.

`--constants` measures instead what `keras_squeeze/training/update_cost.py` takes an update and a training step to cost:
stacks of Dense layers of several sizes and depths, one thread, least squares over the relative errors.
"""

import functools
import itertools
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


STACKS = ((2, 32), (2, 256), (2, 1024), (8, 32), (8, 256), (8, 640), (24, 32), (24, 256))  # layers, width
COSTS = ("STEP", "WEIGHTS", "NEURONS", "OBSERVED")


def time_stack(layers: int, width: int, repetitions: int) -> dict[str, tuple[list[int], float]]:
    """Measures the costs of one stack of Dense layers: `{constant: (sizes of the arrays, microseconds)}`."""
    import keras
    import tensorflow as tf

    import keras_squeeze as ks
    from keras_squeeze.neuron_pruning import neuron_criteria
    from keras_squeeze.neuron_pruning.neurons import Neurons

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    x, y = np.zeros((32, width), "float32"), np.zeros((32, width), "float32")

    def model():
        dense = [keras.layers.Dense(width, activation="relu") for _ in range(layers)]
        built = keras.Sequential([keras.Input((width,)), *dense])
        built.compile("adam", "mse")
        return built

    def start(trained):
        """Returns a function that makes one training step."""
        data = tf.data.Dataset.from_tensors((x, y)).repeat()
        trained.make_train_function()
        iterator = iter(trained.distribute_strategy.experimental_distribute_dataset(data))
        return lambda: trained.train_function(iterator)

    plain, observed = model(), model()
    observer = neuron_criteria.Taylor().observe(Neurons(observed), observed.optimizer)
    kernels = [math.prod(layer.kernel.shape) for layer in plain.layers]
    trainable = [math.prod(variable.shape) for variable in plain.trainable_variables]
    step, with_observer = _time_in_turn([start(plain), start(observed)], repetitions)
    observer.detach()
    times = {"STEP": (trainable, step), "OBSERVED": (trainable, max(with_observer - step, 1.0))}
    schedule = ks.schedules.PolynomialDecay(0.9, begin=0, end=10_000, frequency=1)
    weights, neurons = ks.MagnitudePruning(schedule), ks.NeuronPruning(schedule, criterion="l1", round_to=1)
    for name, pruning in (("WEIGHTS", weights), ("NEURONS", neurons)):
        pruned, counts = model(), itertools.count(1)
        pruning.attach(pruned, pruned.optimizer, total_steps=10_000)

        def update(pruning=pruning, counts=counts) -> None:
            pruning.update(next(counts))

        # A step before every update: in training, what an update reads is in no cache.
        _, microseconds = _time_in_turn([start(pruned), update], repetitions)
        times[name] = kernels if name == "WEIGHTS" else trainable, microseconds
        pruning.detach()
    return times


def _time_in_turn(functions: list, repetitions: int) -> list[float]:
    """Calls functions in turn; the median of each in microseconds, the first call left out."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repetitions + 1):
        for function, own in zip(functions, seconds, strict=True):
            begin = time.perf_counter()
            function()
            own.append(time.perf_counter() - begin)
    return [1e6 * statistics.median(own[1:]) for own in seconds]


def fit_cost(samples: list[tuple[list[int], float]]) -> np.ndarray:
    """Fits `fixed + per_array * arrays + per_thousand * values / 1000`, none below 0, to microseconds."""
    from scipy.optimize import nnls

    rows = np.array([[1.0, len(sizes), sum(sizes) / 1000] for sizes, _ in samples])
    times = np.array([microseconds for _, microseconds in samples])
    return nnls(rows / times[:, None], np.ones(len(times)))[0]


def constants_table(repetitions: int, on_run) -> str:
    """Measures all stacks, each in a process of its own, and sets the fitted constants beside those in use."""
    from keras_squeeze.training import update_cost

    samples: dict[str, list] = {name: [] for name in COSTS}
    for layers, width in STACKS:
        with own_process() as process:
            for name, sample in process.submit(time_stack, layers, width, repetitions).result().items():
                samples[name].append(sample)
        on_run()
    rows = []
    for name in COSTS:
        used = getattr(update_cost, name)
        fitted = fit_cost(samples[name])
        ratios = [used.of(sizes) / microseconds for sizes, microseconds in samples[name]]
        texts = (
            f"{value:.3g} ({own:g})"
            for value, own in zip(fitted, (used.fixed, used.per_array, used.per_thousand), strict=True)
        )
        rows.append((name, *texts, f"{min(ratios):.2f} to {max(ratios):.2f}"))
    header = (
        "microseconds",
        "fixed (in use)",
        "per array (in use)",
        "per 1,000 values (in use)",
        "in use over measured",
    )
    return tables.markdown(header, rows)


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--constants", action="store_true", help="measure the constants of update_cost.py instead")
    parser.add_argument("--weights", type=int, default=100_000_000, help="size of the model (100 million)")
    parser.add_argument("--repetitions", type=int, default=7, help="timed repetitions of each side (7)")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes in which memory is measured (3)")
    args = tables.parse(parser)
    if args.quick:
        args.weights, args.repetitions, args.memory_runs = 4_000_000, 1, 1
    return args


def write_constants(args, console: Console) -> None:
    """Measures and prints the constants, and writes them with `--write`."""
    repetitions = 2 if args.quick else 30
    with progress_bar(console) as progress:
        task = progress.add_task("stacks", total=len(STACKS))
        table = constants_table(repetitions, functools.partial(advance, progress, task))
    text = f"{table}\n\nMedians of {repetitions} repetitions, batch 32, one thread. {tables.machine()}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("update_costs", text)


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    if args.constants:
        write_constants(args, console)
        return
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
