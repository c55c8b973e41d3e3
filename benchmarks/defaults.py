"""Which defaults cost least accuracy: settings of pruning over seven networks, several strengths and two lengths.

Every factor is screened alone, from the default; then the product of the two best values of every factor is trained,
and the leading five on several seeds and at both lengths. A row is written as soon as a training ends, and a run that
was stopped goes on where it was.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import tables
from defaults_rows import Rows
from defaults_tables import (
    PROMISES,
    Promise,
    cells_table,
    choices_table,
    describe_bars,
    final_bars,
    finalists_table,
    promised_bars,
    screening_table,
)
from defaults_training import DEFAULTS, Cell, Job, Settings, prepare_dense, train_row
from measuring import advance, progress_bar, warn_if_busy
from networks import use_one_thread
from rich.console import Console

GUIDE = pathlib.Path(__file__).parent.parent / "docs" / "guides" / "defaults.md"
ROWS = pathlib.Path(__file__).with_name("defaults_rows.jsonl")
STAGES = ("screen", "product", "final", "bars")
PROCESSES, FINALISTS, FIRST_ESTIMATE, LATER_ESTIMATES = 2, 5, 20, 100

BY_COST = ("mlp", "recurrent", "characters_biases", "characters_batch_norm", "transformer", "ds_cnn", "resnet8")
STRENGTHS = {"weights": (0.8, 0.95, 0.9, 0.5), "neurons": (0.5, 0.7)}  # the most telling first

FACTORS: dict[str, dict[str, dict[str, dict[str, str]]]] = {  # technique, factor, value: changes of the default
    "weights": {
        "allocation": {
            "auto": {},
            "global": {"allocation": "global", "left_out": ""},
            "uniform": {"allocation": "uniform", "left_out": ""},
            "erk": {"left_out": ""},
            "global, no depthwise": {"allocation": "global"},
            "uniform, no depthwise": {"allocation": "uniform"},
        },
        "takes part": {
            "no depthwise": {},
            "everything": {"left_out": ""},
            "no depthwise, no last": {"left_out": "depthwise+last"},
            "no depthwise, no first": {"left_out": "depthwise+first"},
            "no depthwise, no first, no last": {"left_out": "depthwise+first+last"},
            "no depthwise, no embeddings": {"left_out": "depthwise+embeddings"},
        },
        "criterion": {name: {"criterion": name} for name in ("magnitude", "lamp", "snip", "movement")},
        "schedule": {
            name: {"schedule": name}
            for name in ("polynomial", "polynomial to 0.5", "polynomial to 0.9", "cosine", "exponential", "one cycle")
        },
    },
    "neurons": {
        "allocation": {name: {"allocation": name} for name in ("global", "uniform")},
        "criterion": {
            name: {"criterion": name}
            for name in ("taylor", "l1", "l2", "geometric_median", "batch_norm_scale", "apoz", "mean_activation")
        },
        "schedule": {
            name: {"schedule": name} for name in ("polynomial", "polynomial to 0.5", "polynomial to 0.9", "cosine")
        },
    },
}
FIELDS = {"allocation": "allocation", "takes part": "left_out", "criterion": "criterion", "schedule": "schedule"}


@dataclass(frozen=True)
class Plan:
    """What is trained."""

    networks: Sequence[str] = BY_COST
    seeds: int = 5
    lengths: Sequence[int] = (100, 1000)  # the first is that of screening and product
    strengths: dict[str, Sequence[float]] = field(default_factory=lambda: STRENGTHS)
    values: int | None = None  # of every factor that are screened; None for all
    best: int = 2  # values of every factor that make the product
    promises: Sequence[Promise] = PROMISES
    dense_epochs: int | None = None

    def cells(self, technique: str, lengths: Sequence[int] | None = None) -> list[Cell]:
        """Returns the cells of a technique, the cheap and telling ones first."""
        lengths = self.lengths[:1] if lengths is None else lengths
        order = itertools.product(lengths, self.strengths[technique], self.networks)
        return [Cell(network, strength, steps) for steps, strength, network in order]

    def factors(self, technique: str) -> dict[str, dict[str, Settings]]:
        """Returns the settings that differ from the default in one factor, by factor and value."""
        return {
            factor: {
                value: replace(DEFAULTS[technique], **changes)
                for value, changes in itertools.islice(values.items(), self.values)
            }
            for factor, values in FACTORS[technique].items()
        }

    def product(self, technique: str, rows: Rows) -> list[Settings]:
        """Returns all combinations of the best values of every factor, of those that rows can rank."""
        best = {}
        for factor, values in self.factors(technique).items():
            ranked = rows.rank(values.values(), self.cells(technique))
            choices = dict.fromkeys(getattr(settings, FIELDS[factor]) for settings in ranked)
            best[FIELDS[factor]] = list(choices)[: self.best] or [getattr(DEFAULTS[technique], FIELDS[factor])]
        combinations = itertools.product(*best.values())
        return [replace(DEFAULTS[technique], **dict(zip(best, values, strict=True))) for values in combinations]

    def finalists(self, technique: str, rows: Rows) -> dict[str, Settings]:
        """Returns the default and the five that lead the product, named by letters."""
        ranked = rows.rank(self.product(technique, rows), self.cells(technique))[:FINALISTS]
        return {"default": DEFAULTS[technique], **dict(zip("ABCDE", ranked, strict=False))}

    def jobs(self, stage: str, technique: str, rows: Rows) -> list[Job]:
        """Returns the trainings of a stage in the order in which they run."""
        if stage == "bars":
            cells = [promise.cell for promise in self.promises if promise.technique == technique]
            return [Job(DEFAULTS[technique], cell, seed) for seed in range(self.seeds) for cell in cells]
        if stage == "final":
            chosen, seeds, lengths = list(self.finalists(technique, rows).values()), self.seeds, self.lengths
        elif stage == "product":
            chosen, seeds, lengths = [DEFAULTS[technique], *self.product(technique, rows)], 1, self.lengths[:1]
        else:
            factors = self.factors(technique).values()
            chosen, seeds, lengths = (
                [settings for values in factors for settings in values.values()],
                1,
                self.lengths[:1],
            )
        order = itertools.product(lengths, range(seeds), self.strengths[technique], chosen, self.networks)
        return [
            Job(settings, Cell(network, strength, steps), seed) for steps, seed, strength, settings, network in order
        ]


class Runner:
    """Trains rows that are missing, several at the same time, and writes them down.

    Args:
        pool: Processes that train.
        rows: Where rows are kept.
        console: Where to print estimates of the remaining time.
        hours: After this time nothing new is begun; None for no limit.
        dense_epochs: Epochs of the dense trainings; None for the networks' own.
    """

    def __init__(self, pool, rows: Rows, console: Console, hours: float | None, dense_epochs: int | None):
        self._pool, self._rows, self._console, self._dense_epochs = pool, rows, console, dense_epochs
        self._deadline = None if hours is None else time.monotonic() + 3600 * hours

    @property
    def is_over(self) -> bool:
        """Returns whether the time is spent."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def run(self, stage: str, jobs: Iterable[Job]) -> None:
        """Trains what is missing of a stage."""
        unique = {tuple(job.fields.values()): job for job in jobs}
        pending = [job for job in unique.values() if not self._rows.is_finished(job)]
        if not pending or self.is_over:
            return
        with progress_bar(self._console) as progress:
            dense = dict.fromkeys((job.cell.network, job.seed) for job in pending)
            task = progress.add_task("dense", total=len(dense))
            for _ in self._completed(prepare_dense, [(*pair, self._dense_epochs) for pair in dense]):
                advance(progress, task)
            task = progress.add_task(stage, total=len(pending))
            completed = self._completed(train_row, [(job, self._dense_epochs) for job in pending])
            for count, row in enumerate(completed, 1):
                self._rows.append(row)
                advance(progress, task)
                if count == FIRST_ESTIMATE or count % LATER_ESTIMATES == 0:
                    self._print_estimate(stage, [job for job in pending if not self._rows.is_finished(job)])

    def _completed(self, function: Callable, calls: Iterable[tuple]) -> Iterator:
        """Yields results as they come; few calls wait in the pool, so that the run can end in time."""
        queue, running = iter(calls), set()
        while True:
            while len(running) <= PROCESSES and not self.is_over:
                call = next(queue, None)
                if call is None:
                    break
                running.add(self._pool.submit(function, *call))
            if not running:
                return
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            yield from (future.result() for future in done)

    def _print_estimate(self, stage: str, pending: Sequence[Job]) -> None:
        minutes = self._rows.expected_seconds(pending) / PROCESSES / 60
        self._console.print(f"{stage}: {len(pending):,} trainings remain, about {minutes:,.0f} minutes.")


def describe(plan: Plan, techniques: Sequence[str], rows: Rows) -> str:
    """Returns all tables that the rows are enough for."""
    parts, bars = [], []
    for technique in techniques:
        title = {"weights": "Weights", "neurons": "Neurons"}[technique]
        screened = screening_table(rows, plan.factors(technique), plan.cells(technique))
        parts += [f"### {title}: one factor at a time, {plan.lengths[0]} steps", screened]
        named = plan.finalists(technique, rows)
        cells = [cell for cell in plan.cells(technique, plan.lengths) if rows.is_in_final(named.values(), cell)]
        if cells:
            parts += [
                f"### {title}: the default and the leading five",
                finalists_table(rows, named, cells, plan.seeds),
                cells_table(rows, named, cells, plan.seeds),
            ]
            bars += final_bars(rows, technique, named, cells, plan.seeds)
    promises = [promise for promise in plan.promises if promise.technique in techniques]
    by_technique = {technique: plan.cells(technique, plan.lengths) for technique in techniques}
    bars += promised_bars(rows, promises, by_technique, plan.seeds)
    versions = rows.versions()
    note = f"{len(rows):,} trainings, at most {plan.seeds} seeds. {tables.machine()}"
    if len(versions) > 1:
        note = f"Rows of {len(versions)} versions of the package ({', '.join(versions)}). {note}"
    parts += ["### Bars", describe_bars(bars)] if bars else []
    return "\n\n".join((*parts, note))


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="what to train (all)")
    parser.add_argument("--techniques", nargs="+", choices=tuple(DEFAULTS), default=list(DEFAULTS), help="both")
    parser.add_argument("--networks", nargs="+", choices=BY_COST, default=BY_COST, help="all")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the final and of the bars (5)")
    parser.add_argument("--hours", type=float, help="begin nothing after so many hours; 0 prints the tables only")
    parser.add_argument("--rows", type=pathlib.Path, help=f"file of finished trainings ({ROWS.name})")
    args = tables.parse(parser)
    args.stages = STAGES if args.stage == "all" else (args.stage,)
    names = [name for name in BY_COST if name in args.networks]
    args.plan = Plan(names, args.seeds, promises=[promise for promise in PROMISES if promise.cell.network in names])
    if args.quick:
        args.plan = _make_quick(args.plan)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="defaults_")) if args.quick and args.rows is None else ROWS.parent
    args.rows = Rows(args.rows or folder / ROWS.name)
    return args


def _make_quick(plan: Plan) -> Plan:
    """Makes a plan of minutes."""
    names = [name for name in ("mlp", "ds_cnn") if name in plan.networks] or plan.networks[:1]
    promises = [
        replace(promise, cell=replace(promise.cell, steps=20))
        for promise in plan.promises
        if promise.cell.network in names
    ]
    strengths = {technique: values[:1] for technique, values in plan.strengths.items()}
    return Plan(names, 1, (20,), strengths, 2, 1, promises, dense_epochs=1)


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=use_one_thread) as pool:
        runner = Runner(pool, args.rows, console, args.hours, args.plan.dense_epochs)
        for stage in args.stages:
            jobs = [args.plan.jobs(stage, technique, args.rows) for technique in args.techniques]
            runner.run(stage, itertools.chain(*jobs))
    text = describe(args.plan, args.techniques, args.rows)
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("defaults", text)
        factors = {technique: args.plan.factors(technique) for technique in args.techniques}
        cells = {technique: args.plan.cells(technique) for technique in args.techniques}
        choices = choices_table(args.rows, factors, cells)
        tables.write("defaults", f"{choices}\n\n{tables.machine()}", GUIDE)


if __name__ == "__main__":
    main()
