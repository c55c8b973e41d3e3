"""How fast searches find the best trade-offs: oracles replayed on the trials that `search_trials.py` recorded.

No training: a trial's metrics are looked up. Every oracle gets the same space, and is run with the same seeds.
"""

import functools
import math
import multiprocessing
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor

import measuring
import numpy as np
import search_trials
import tables
from measuring import Bar, Estimate
from rich.console import Console

SEEDS = range(10)
TRIALS = 40
ACCURACY, SIZE = "val_accuracy", "packed_bytes"
POINTS_BELOW = 0.10  # of the reference point, below the float accuracy; its size is that of the float model
ENOUGH = 0.95  # of the best hypervolume

RANDOM, UNSEEDED, SEEDED = "random", "tpe, limit", "tpe, seeded, limit"
LONG = {RANDOM: 80, SEEDED: 80}  # trials, of those that are asked when they have found enough
ORACLES = (RANDOM, "tpe", UNSEEDED, "tpe, seeded", SEEDED, "nsga2", "Bayesian, forgiving", "Bayesian, budget")


class Table:
    """The recorded trials of one task."""

    def __init__(self, task: str):
        found = search_trials.load(task)
        self.float, self.profile = found["float"], found["sensitivity"]
        self.space = search_trials.space(task)
        recorded = {_key(trial["values"]): trial["metrics"] for trial in found["trials"]}
        self.metrics = {_key(values): recorded[_key(values)] for values in search_trials.grid(task)}
        self.best = self.volume(self.metrics.values())

    def look_up(self, values: dict) -> dict:
        return self.metrics[_key(values)]

    def volume(self, metrics) -> float:
        """The hypervolume of some trials, bytes on a log scale."""
        from keras_squeeze.search.objectives import hypervolume

        reference = (self.float[ACCURACY] - POINTS_BELOW, math.log(self.float[SIZE]))
        points = [(each[ACCURACY], math.log(each[SIZE])) for each in metrics]
        return hypervolume(points, ["max", "min"], reference)


def _key(values: dict) -> tuple:
    sparsity = None if values["bits"] == 1 else round(values["sparsity"], 3)
    return values["bits"], round(values["neurons"], 3), sparsity


@functools.cache
def _table(task: str) -> Table:
    return Table(task)


def replay(task: str, name: str, seed: int, trials: int) -> tuple[list[float], list[dict]]:
    """The hypervolume after each trial, and what the trials measured."""
    import keras_tuner

    table = _table(task)
    hp = keras_tuner.HyperParameters()
    table.space.recipe(hp)
    seen, volumes = [], []
    with tempfile.TemporaryDirectory() as folder:
        oracle = _oracle(name, hp, seed, trials, table)
        oracle._set_project_dir(folder, "replay")
        oracle.verbose = 0
        oracle.save = oracle._save_trial = lambda *_: None  # nothing is to be resumed
        if "seeded" in name:
            oracle.enqueue(_first(table))
        for _ in range(trials):
            trial = oracle.create_trial("tuner")
            if trial.status != "RUNNING":
                break
            metrics = table.look_up(trial.hyperparameters.values)
            oracle.update_trial(trial.trial_id, {**metrics, "score": _score(name, metrics, table)})
            trial.status = "COMPLETED"
            oracle.end_trial(trial)
            seen.append(metrics)
            volumes.append(table.volume(seen))
    return volumes + [volumes[-1]] * (trials - len(volumes)), seen


def _first(table: Table) -> list[dict]:
    from keras_squeeze.evaluation.sensitivity_profile import Sensitivity
    from keras_squeeze.search.seeding import first_configurations

    return first_configurations(Sensitivity.from_dict(table.profile), table.space)


def _oracle(name: str, hp, seed: int, trials: int, table: Table):
    import keras_tuner

    from keras_squeeze.search.oracle import ParetoOracle

    options = {"max_trials": trials, "hyperparameters": hp, "seed": seed + 1}
    if name == "random":
        return keras_tuner.oracles.RandomSearchOracle(objective=keras_tuner.Objective(ACCURACY, "max"), **options)
    if name.startswith("Bayesian"):
        return keras_tuner.oracles.BayesianOptimizationOracle(
            objective=keras_tuner.Objective("score", "max"), **options
        )
    limit = {f"min_{ACCURACY}": table.float[ACCURACY] - POINTS_BELOW} if "limit" in name else None
    return ParetoOracle([ACCURACY, SIZE], sampler=name.partition(",")[0], budgets=limit, **options)


def _score(name: str, metrics: dict, table: Table) -> float:
    """What a tuner with one objective maximizes."""
    from keras_squeeze.search.objectives import Budgets, forgiving_score, score

    if "budget" in name:
        return score(metrics, ACCURACY, "max", Budgets.of(**{f"max_{SIZE}": table.float[SIZE] / 30}))
    return forgiving_score(metrics, ACCURACY, "max", SIZE, table.float[SIZE])


def main() -> None:
    args = tables.parse(tables.make_parser(__doc__))
    console = Console()
    seeds = SEEDS[:1] if args.quick else SEEDS
    runs = [(task, name, seed) for task in search_trials.TASKS for name in ORACLES for seed in seeds]
    with _pool() as pool, measuring.progress_bar(console) as progress:
        bar = progress.add_task("replaying", total=len(runs))
        futures = {run: pool.submit(replay, *run, LONG.get(run[1], TRIALS)) for run in runs}
        volumes, seen = {}, {}
        for run, future in futures.items():
            volumes[run], seen[run] = future.result()
            measuring.advance(progress, bar)
    texts = {"search_replay": _report(volumes, seeds), "search_techniques": _techniques(seen, seeds)}
    front = _front_page(seen, seeds)
    for text in (*texts.values(), front):
        console.print(text, markup=False, soft_wrap=True)
    if args.write:
        for name, text in texts.items():
            tables.write(name, text)
        tables.write("search_front", front, tables.FRONT_PAGE)


def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, context, initializer=_start)


def _start() -> None:
    measuring._import_tensorflow()
    warnings.simplefilter("ignore")  # of scikit-learn, about the surrogate of the Bayesian oracle


def _report(volumes: dict, seeds) -> str:
    rows, regrets, needed = [], {}, {}
    for task in search_trials.TASKS:
        best = _table(task).best
        for name in ORACLES:
            reached = np.array([volumes[task, name, seed] for seed in seeds]) / best
            regrets[task, name] = 1 - reached[:, TRIALS - 1]
            needed[task, name] = [_first_at(row) for row in reached]  # one more than there were: not reached
            row = (Estimate.of(regrets[task, name]), Estimate.of(needed[task, name]))
            rows.append((f"{task}: {name}", row[0].text(4), row[1].text(0) if name in LONG else "-"))
    header = ("oracle", f"regret after {TRIALS} trials [95 %]", f"trials to {ENOUGH:.0%} of the best [95 %]")
    counts = ", ".join(f"{len(_table(task).metrics)} of {task}" for task in search_trials.TASKS)
    about = (
        f"{len(seeds)} seeds; recorded trials: {counts}; hypervolume of accuracy and the logarithm of the packed "
        f"bytes, from the float model's size and {100 * POINTS_BELOW:.0f} points below its accuracy. "
        f"{tables.machine('keras-tuner', 'optuna')}"
    )
    return "\n\n".join([tables.markdown(header, rows), measuring.bars_table(_bars(regrets, needed)), about])


def _first_at(row: np.ndarray) -> float:
    """The number of trials after which enough was reached; one more than there were where it was not."""
    return float(np.argmax(row >= ENOUGH) + 1) if (row >= ENOUGH).any() else float(len(row) + 1)


def _techniques(seen: dict, seeds) -> str:
    """For every result of one technique alone: the most accurate one of a search that is no larger."""
    rows, lost = [], []
    for task in search_trials.TASKS:
        table = _table(task)
        for technique, chosen in _SINGLE.items():
            for key in filter(chosen, table.metrics):
                alone = table.metrics[key]
                if alone[ACCURACY] < table.float[ACCURACY] - POINTS_BELOW:
                    continue  # worse than the reference point
                best = [_within(seen[task, SEEDED, seed][:TRIALS], alone[SIZE]) for seed in seeds]
                gain = Estimate.of([100 * (each - alone[ACCURACY]) for each in best])
                lost.append(-gain.median)
                cells = (f"{alone[SIZE]:,.0f}", f"{alone[ACCURACY]:.1%}", f"{np.median(best):.1%}", gain.text(2))
                rows.append((f"{task}: {technique}, {_amount(technique, key)}", *cells))
    header = ("one technique alone", "packed bytes", "accuracy", "found by a search, no larger", "points more [95 %]")
    least = f"the least gain of all rows is {-max(lost):.2f} points"
    worst = f"{len(seeds)} searches of {TRIALS} trials with seeding; {least}."
    return "\n\n".join([tables.markdown(header, rows), worst])


def _front_page(seen: dict, seeds) -> str:
    rows = []
    for task in search_trials.TASKS:
        table = _table(task)
        cells = [f"{table.float[ACCURACY]:.1%}, {table.float[SIZE]:,.0f}"]
        for part in _BUDGETS:
            best = [_within(seen[task, SEEDED, seed][:TRIALS], table.float[SIZE] / part) for seed in seeds]
            cells.append(f"{np.median(best):.1%}, {table.float[SIZE] / part:,.0f}")
        rows.append((task, *cells))
    header = ("accuracy and packed bytes", "before", *(f"1/{part} of the bytes" for part in _BUDGETS))
    about = f"Median of {len(seeds)} searches of {TRIALS} trials each; the bytes are the budget."
    return f"{tables.markdown(header, rows)}\n\n{about} {tables.machine('keras-tuner', 'optuna')}"


_BUDGETS = (10, 20, 40)

_SINGLE = {
    "neurons": lambda key: key[0] == 32 and key[1] > 0 and key[2] == 0,
    "pruning": lambda key: key[0] == 32 and key[1] == 0 and key[2] > 0,
    "int8": lambda key: key == (8, 0.0, 0.0),
}


def _amount(technique: str, key: tuple) -> str:
    return {"neurons": f"{key[1]:.0%}", "pruning": f"{key[2] or 0:.0%}", "int8": "8 bits"}[technique]


def _within(metrics: list[dict], size: float) -> float:
    return max((each[ACCURACY] for each in metrics if each[SIZE] <= size), default=0.0)


def _bars(regrets: dict, needed: dict) -> list[Bar]:
    bars = []
    for task in search_trials.TASKS:
        random = float(np.median(regrets[task, RANDOM]))
        bayesian = min(float(np.median(regrets[task, name])) for name in ORACLES if name.startswith("Bayesian"))
        seeded, plain = (Estimate.of(regrets[task, name]) for name in (SEEDED, UNSEEDED))
        trials = Estimate.of(needed[task, SEEDED])
        bars += [
            Bar(f"{task}: regret with seeding, half of random's", random / 2, seeded, 4),
            Bar(f"{task}: regret without it, random's", random, plain, 4),
            Bar(f"{task}: regret with seeding, that of Bayesian optimization", bayesian, seeded, 4),
            Bar(f"{task}: trials needed, half of random's", float(np.median(needed[task, RANDOM])) / 2, trials, 0),
        ]
    return bars


if __name__ == "__main__":
    main()
