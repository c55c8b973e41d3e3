"""What the pruning callbacks add to the time of `fit`, at their defaults, for runs of several lengths.

The cost of a run is the time between its steps that our code takes (updates of masks, logs), plus its steps times the
difference between the median step with the callback and without it, over the time of its steps without it. Steps are
timed in turn: two `fit`s in one process, of which only one moves, an epoch each. The first step, which traces, is left
out of both and reported apart.
"""

import contextlib
import functools
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tables
from measuring import Bar, Estimate, advance, bars_table, own_process, progress_bar, warn_if_busy
from rich.console import Console
from training_fits import FIT_NETWORKS, FIT_SHAPES

NAMES = {"mlp": "MLP 784-1024-1024-10", "resnet8": "ResNet-8, 32x32x3"}
LENGTHS = {100: 0.10, 600: 0.03, 5000: 0.03}  # optimizer steps and the highest cost that is promised
FIRST_TRACE = 1.5
EPOCH = 15  # steps
STRENGTHS = {"weights": 0.9, "neurons": 0.5}


@dataclass(frozen=True)
class Cell:
    """A network, a batch size, and what is pruned."""

    network: str
    batch: int
    technique: str

    @property
    def name(self) -> str:
        return f"{NAMES[self.network]}, batch {self.batch}, {self.technique}"

    def model(self):
        """Builds and compiles the network."""
        import keras

        model = FIT_NETWORKS[self.network](keras)
        model.compile(keras.optimizers.Adam(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    def callback(self, **schedule):
        """Makes the callback; without arguments at its defaults."""
        import keras_squeeze as ks

        make = {"weights": ks.MagnitudePruning, "neurons": ks.NeuronPruning}[self.technique]
        strength = STRENGTHS[self.technique]
        return make(ks.schedules.PolynomialDecay(strength, **schedule) if schedule else strength)


@dataclass(frozen=True)
class Times:
    """Seconds, as measured.

    Attributes:
        steps: `(plain, with the callback)`, median of an epoch, for each pair of epochs.
        update: Mean time between two steps at which masks change.
        other: Mean time that our code takes between two other steps.
        first: `(plain, with the callback)` of the first step, which traces.
    """

    steps: list[tuple[float, float]]
    update: float
    other: float
    first: tuple[float, float]

    def costs(self, steps: int, updates: int) -> list[float]:
        """The cost of a run for each pair."""
        between = updates * self.update + (steps - updates) * self.other
        return [between / (steps * plain) + (own - plain) / plain for plain, own in self.steps]


def measure(cell: Cell, pairs: int) -> Times:
    """Measures one cell in this process."""
    import keras

    keras.utils.set_random_seed(0)
    update, other = _time_between_steps(cell)
    gc.collect()
    steps, first = _time_steps(cell, pairs)
    return Times(steps, update, other, first)


def count_updates(cell: Cell, steps: int) -> int:
    """Counts the mask updates of a run at the defaults."""
    model, callback = cell.model(), cell.callback()
    callback.attach(model, model.optimizer, total_steps=steps)
    schedule = callback._course if cell.technique == "neurons" else callback._groups[0].schedule
    callback.detach()
    updates, step = 0, -1
    while (step := schedule.next_update(step, steps)) is not None:
        updates += 1
    return updates


def _time_between_steps(cell: Cell, steps: int = 150) -> tuple[float, float]:
    """Times our code between the steps of a run: at updates, and elsewhere."""
    from keras_squeeze.training.fit_run import FitRun

    between: dict[bool, list[float]] = {True: [], False: []}
    inside = [0.0]

    @contextlib.contextmanager
    def timed():
        own = FitRun._train_and_advance

        def train_and_advance(run, iterator):
            step = run._train_function

            def timed_step(iterator):
                begin = time.perf_counter()
                logs = step(iterator)
                inside[0] = time.perf_counter() - begin
                return logs

            run._train_function = timed_step
            before = [callback.next_update for callback in run.callbacks]
            begin = time.perf_counter()
            logs = own(run, iterator)
            seconds = time.perf_counter() - begin - inside[0]
            run._train_function = step
            between[before != [callback.next_update for callback in run.callbacks]].append(seconds)
            return logs

        FitRun._train_and_advance = train_and_advance
        try:
            yield
        finally:
            FitRun._train_and_advance = own

    x, y = _data(cell, steps)
    with timed():
        cell.model().fit(x, y, batch_size=cell.batch, verbose=0, callbacks=[cell.callback(frequency=10)])
    return float(np.mean(between[True][1:])), float(np.mean(between[False][1:]))


def _time_steps(cell: Cell, pairs: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Runs two `fit`s that take turns, an epoch each; the updates of the one with a callback come after all of them."""
    import keras

    turn = threading.Semaphore(1), threading.Semaphore(0)
    medians: tuple[list[float], list[float]] = ([], [])
    first = [0.0, 0.0]
    x, y = _data(cell, EPOCH)

    class Clock(keras.callbacks.Callback):
        def __init__(self, side: int):
            super().__init__()
            self.side = side

        def on_epoch_begin(self, epoch, logs=None):
            turn[self.side].acquire()
            self.times = [time.perf_counter()]

        def on_train_batch_end(self, batch, logs=None):
            self.times.append(time.perf_counter())

        def on_epoch_end(self, epoch, logs=None):
            seconds = np.diff(self.times)
            if epoch == 0:
                first[self.side] = float(seconds[0])
            else:
                medians[self.side].append(float(np.median(seconds)))
            turn[1 - self.side].release()

    def fit(side: int, model, callbacks: list) -> None:
        model.fit(x, y, batch_size=cell.batch, epochs=1 + pairs, verbose=0, callbacks=[*callbacks, Clock(side)])

    late = cell.callback(begin=1.0, end=1.0)
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(fit, 0, cell.model(), []), pool.submit(fit, 1, cell.model(), [late])]:
            job.result()
    return list(zip(*medians, strict=True)), (first[0], first[1])


@functools.lru_cache(maxsize=1)
def _data(cell: Cell, steps: int):
    """Noise: the time of a step does not depend on what is learned."""
    rng = np.random.default_rng(0)
    count = steps * cell.batch
    return rng.random((count, *FIT_SHAPES[cell.network]), dtype="float32"), rng.integers(10, size=count)


@dataclass(frozen=True)
class Result:
    cell: Cell
    times: Times
    updates: dict[int, int]

    def cost(self, steps: int) -> Estimate:
        return Estimate.of(self.times.costs(steps, self.updates[steps]))


def full_table(results: list[Result]) -> str:
    header = ("network, batch, pruned", "plain step, ms", "update, ms", *(f"cost at {n:,} steps" for n in LENGTHS))
    rows = []
    for result in results:
        plain = np.median([plain for plain, _ in result.times.steps])
        costs = [f"{result.cost(n).text()} ({result.updates[n]} updates)" for n in LENGTHS]
        rows.append((result.cell.name, f"{plain * 1e3:.1f}", f"{result.times.update * 1e3:.1f}", *costs))
    return tables.markdown(header, rows)


def bars(results: list[Result]) -> list[Bar]:
    promised = [
        Bar(f"{result.cell.name}: cost at {steps:,} steps", limit, result.cost(steps))
        for result in results
        for steps, limit in LENGTHS.items()
    ]
    ratios = [result.times.first[1] / result.times.first[0] for result in results]
    return [
        *promised,
        Bar("first step, which traces, over plain, median of all rows", FIRST_TRACE, Estimate.of(ratios)),
    ]


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of epochs (24)")
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES), help="all")
    args = tables.parse(parser)
    if args.quick:
        args.pairs = 2
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    cells = [
        Cell(network, batch, technique) for network in args.networks for batch in (32, 128) for technique in STRENGTHS
    ]
    results = []
    with progress_bar(console) as progress:
        task = progress.add_task("cells", total=len(cells))
        for cell in cells:
            with own_process() as process:
                times = process.submit(measure, cell, args.pairs).result()
                updates = {steps: process.submit(count_updates, cell, steps).result() for steps in LENGTHS}
            results.append(Result(cell, times, updates))
            advance(progress, task)
            console.print(full_table(results[-1:]), soft_wrap=True)
    note = f"{args.pairs} pairs of epochs of {EPOCH} steps. {tables.machine()}"
    text = f"{full_table(results)}\n\n{bars_table(bars(results))}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("callback_cost", text)


if __name__ == "__main__":
    main()
