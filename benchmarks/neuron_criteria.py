"""What half of the neurons cost in accuracy, for every criterion, on rendered characters.

For every seed one network is trained; then, from the same weights, one copy is trained on as it is and one for every
criterion is pruned to half its neurons, shrunk and trained on, for as many epochs altogether. The points lost are those
against the copy that was not pruned, on the same test characters.
"""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import tables
from characters import characters
from measuring import Bar, advance, bars_table, progress_bar, warn_if_busy
from networks import build_characters, compile_network, use_one_thread
from rich.console import Console

LIMIT = 0.5  # points
CRITERIA = ("l2", "l1", "batch_norm_scale", "geometric_median", "taylor", "apoz", "mean_activation", "random")


@dataclass(frozen=True)
class Plan:
    train: int = 15_000
    test: int = 10_000
    dense_epochs: int = 6
    pruning_epochs: int = 3
    tuning_epochs: int = 3


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its 95 % interval by Student's t, with the names that a `Bar` asks for."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples) -> "Mean":
        from scipy import stats

        mean, error = np.mean(samples), stats.sem(samples) if len(samples) > 1 else 0.0
        margin = error * stats.t.ppf(0.975, max(len(samples) - 1, 1))
        return cls(float(mean), float(mean - margin), float(mean + margin))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@functools.lru_cache(maxsize=1)
def load_data(plan: Plan):
    return characters(plan.train, seed=1), characters(plan.test, seed=2)


def train_dense(plan: Plan, seed: int) -> list[np.ndarray]:
    """The weights of the network that all copies begin with."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = compile_network(keras, build_characters(keras), 2e-3)
    model.fit(*load_data(plan)[0], batch_size=128, epochs=plan.dense_epochs, verbose=0)
    return model.get_weights()


def train_on(plan: Plan, seed: int, weights: list[np.ndarray], criterion: str | None) -> tuple[float, int]:
    """Accuracy in percent and the number of parameters after the rest of the training."""
    import keras

    import keras_squeeze as ks

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    train, test = load_data(plan)
    model = compile_network(keras, build_characters(keras), 1e-3)
    model.set_weights(weights)
    callbacks = []
    if criterion:
        schedule = ks.schedules.PolynomialDecay(0.5, end=1.0, frequency=train[0].shape[0] // 128 // 2)
        data = tuple(array[:1024] for array in train)
        callbacks = [ks.NeuronPruning(schedule, criterion=criterion, allocation="uniform", data=data)]
    model.fit(*train, batch_size=128, epochs=plan.pruning_epochs, verbose=0, callbacks=callbacks)
    if criterion:
        model = ks.shrink(model)
    model = compile_network(keras, model, 1e-3)
    decay = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 1e-3 * (1 - epoch / plan.tuning_epochs))
    model.fit(*train, batch_size=128, epochs=plan.tuning_epochs, verbose=0, callbacks=[decay])
    return 100 * model.evaluate(*test, batch_size=512, verbose=0)[1], model.count_params()


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="networks to train (5)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at the same time (2)")
    args = tables.parse(parser)
    args.plan = Plan(1000, 500, 1, 1, 1) if args.quick else Plan()
    args.seeds = 1 if args.quick else args.seeds
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    names = (None, *CRITERIA)
    accuracy: dict = {name: [] for name in names}
    parameters = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.processes, mp_context=context, initializer=use_one_thread)
    with pool, progress_bar(console) as progress:
        task = progress.add_task("trainings", total=args.seeds * (1 + len(names)))
        dense = [pool.submit(train_dense, args.plan, seed) for seed in range(args.seeds)]
        jobs = []
        for seed, future in enumerate(dense):
            weights = future.result()
            advance(progress, task)
            jobs += [(name, pool.submit(train_on, args.plan, seed, weights, name)) for name in names]
        for name, job in jobs:
            percent, parameters[name] = job.result()
            accuracy[name].append(percent)
            advance(progress, task)
    lost = {name: Mean.of(np.subtract(accuracy[None], accuracy[name])) for name in CRITERIA}
    rows = [("not pruned", f"{parameters[None]:,}", f"{np.mean(accuracy[None]):.2f} %", "")]
    rows += [
        (name, f"{parameters[name]:,}", f"{np.mean(accuracy[name]):.2f} %", lost[name].text())
        for name in sorted(CRITERIA, key=lambda name: lost[name].median)
    ]
    table = tables.markdown(("criterion", "parameters", "accuracy", "points lost [95 %]"), rows)
    bars = [Bar(f"{name}: points lost", LIMIT, lost[name], digits=2) for name in CRITERIA if name != "random"]
    plan = args.plan
    note = (
        f"{args.seeds} seeds, {plan.train:,} characters to train and {plan.test:,} to test, half of the neurons of "
        f"every layer gone. {tables.machine()}"
    )
    text = f"{table}\n\n{bars_table(bars)}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("neuron_criteria", text)


if __name__ == "__main__":
    main()
