"""Compares the defaults of `MagnitudePruning` with those of tfmot on tf_keras: accuracy at 90 % zeros.

Every network is pruned from the same dense weights, on the same examples in the same order, for as many steps and with
the same optimizer: by `MagnitudePruning(0.9)` in Keras 3, and by `prune_low_magnitude` in tf_keras with mask updates
every 100 steps, tfmot's default, and every 10. A row is written as soon as a training ends, and a run that was stopped
goes on where it was.
"""

import concurrent.futures
import functools
import gc
import itertools
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tables
from defaults_rows import Rows
from defaults_training import DEFAULTS, RATE, Cell, Job, Settings, package_digest, plan_epochs, prepare_dense
from measuring import Bar, advance, bars_table, own_process, progress_bar, warn_if_busy
from networks import NETWORKS, compile_network, measure_accuracy, use_one_thread
from neuron_criteria import Mean
from rich.console import Console

ROWS = pathlib.Path(__file__).with_name("tfmot_defaults_rows.jsonl")
SPARSITY = 0.9
EPOCHS = {  # of every network that both can prune, the cheap ones first
    "mlp": 3,
    "recurrent": 3,
    "characters_biases": 3,
    "characters_batch_norm": 3,
    "transformer": 3,
    "ds_cnn": 8,
    "resnet8": 3,
}
TOLERANCE = 0.1  # points by which the dense accuracy may differ between the two versions of Keras

OURS = DEFAULTS["weights"]
FREQUENCIES = {  # steps between mask updates; the settings name what tfmot does, to tell its rows apart
    Settings("tfmot", "uniform", "magnitude", f"frequency {frequency}", "depthwise"): frequency
    for frequency in (100, 10)
}


@dataclass(frozen=True)
class Plan:
    """What is trained: networks, seeds, and the epochs of the dense trainings (None for the networks' own)."""

    networks: Sequence[str] = tuple(EPOCHS)
    seeds: int = 5
    dense_epochs: int | None = None

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """Returns the cell of every network."""
        return [Cell(name, SPARSITY, EPOCHS[name] * NETWORKS[name].steps_per_epoch) for name in self.networks]

    def groups(self) -> list[list[Job]]:
        """Returns the trainings that share dense weights, in the order in which they run."""
        order = itertools.product(range(self.seeds), self.cells)
        return [[Job(settings, cell, seed) for settings in (OURS, *FREQUENCIES)] for seed, cell in order]


def train_row(job: Job, dense_weights: list[np.ndarray], dense: float) -> dict:
    """Returns the row of one network that is pruned in Keras 3 or, with tfmot, in tf_keras.

    Args:
        job: The training.
        dense_weights: Weights to begin with.
        dense: Their accuracy in percent in Keras 3. Another one in tf_keras says that they were copied wrongly.
    """
    begin = time.perf_counter()
    gc.collect()
    keras = _import_keras(job)
    keras.backend.clear_session()
    keras.utils.set_random_seed(job.seed)
    network = NETWORKS[job.cell.network]
    model = compile_network(keras, network.build(keras), RATE)
    model.set_weights(dense_weights)
    copied = measure_accuracy(network, model)
    if abs(copied - dense) > TOLERANCE:
        raise RuntimeError(f"{network.name}: dense accuracy must be {dense:.2f} %. Received: {copied:.2f} %.")
    (x, y), _ = network.data()
    epochs, steps = plan_epochs(network, job.cell.steps)
    order = np.random.default_rng(job.seed).permutation(len(y))
    options = {"batch_size": network.batch, "epochs": epochs, "shuffle": False, "verbose": 0}
    model = _fit_pruned(keras, model, job, (x[order], y[order]), options)
    return {
        **job.fields,
        "code": package_digest() if job.settings == OURS else "tfmot",
        "error": None,
        "dense": dense,
        "accuracy": measure_accuracy(network, model),
        "overall_sparsity": _measure_sparsity(model),
        "steps_trained": epochs * steps,
        "seconds": round(time.perf_counter() - begin, 2),
    }


def find_end_step(steps: int, frequency: int) -> int:
    """Returns the step at which tfmot's schedule ends: three quarters of the training.

    tfmot updates the masks at multiples of the frequency only. If the end is not one of them, the last update comes
    before it and the target is never reached; so the end is rounded down.
    """
    end_step = round(0.75 * steps) // frequency * frequency
    if end_step == 0:
        raise ValueError(f"`steps` must allow an update every {frequency} steps. Received: steps={steps}.")
    return end_step


def _import_keras(job: Job):
    if job.settings == OURS:
        import keras

        return keras
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tf_keras

    return tf_keras


def _fit_pruned(keras, model, job: Job, examples: tuple, options: dict):
    """Prunes a compiled model while it trains and returns it, compiled and without wrappers."""
    if job.settings == OURS:
        import keras_squeeze as ks

        model.fit(*examples, callbacks=[ks.MagnitudePruning(SPARSITY)], **options)
        return model
    import tensorflow_model_optimization as tfmot

    sparsity, frequency = tfmot.sparsity.keras, FREQUENCIES[job.settings]
    schedule = sparsity.PolynomialDecay(
        initial_sparsity=0.0,
        final_sparsity=SPARSITY,
        begin_step=0,
        end_step=find_end_step(job.cell.steps, frequency),
        power=3,
        frequency=frequency,
    )
    # tfmot leaves depthwise kernels dense by itself
    pruned = compile_network(keras, sparsity.prune_low_magnitude(model, pruning_schedule=schedule), RATE)
    pruned.fit(*examples, callbacks=[sparsity.UpdatePruningStep()], **options)
    return compile_network(keras, sparsity.strip_pruning(pruned), RATE)


def _measure_sparsity(model) -> float:
    """Returns the fraction of zeros over all kernels, whether they take part or not."""
    weights = [weight for weight in model.trainable_weights if len(weight.shape) > 1 and "bias" not in weight.name]
    kernels = [weight.numpy() for weight in weights]  # an attention's biases are matrices
    return 1.0 - sum(map(np.count_nonzero, kernels)) / sum(kernel.size for kernel in kernels)


def run(plan: Plan, rows: Rows, console: Console, hours: float | None) -> None:
    """Trains the rows that are missing; after some hours nothing new is begun."""
    pending = [[job for job in group if not rows.is_finished(job)] for group in plan.groups()]
    pending = [group for group in pending if group]
    deadline = math.inf if hours is None else time.monotonic() + 3600 * hours
    if not pending or time.monotonic() >= deadline:
        return
    with own_process() as ours, own_process() as legacy, progress_bar(console) as progress:
        for worker in (ours, legacy):
            worker.submit(use_one_thread).result()
        task = progress.add_task("trainings", total=sum(map(len, pending)))
        for row in _train_groups(pending, plan.dense_epochs, ours, legacy, deadline):
            rows.append(row)
            advance(progress, task)


def _train_groups(groups: list[list[Job]], dense_epochs: int | None, ours, legacy, deadline: float) -> Iterator[dict]:
    """Yields rows as they come. Keras 3 trains the dense weights of the next group while tf_keras is still busy."""

    def submit_dense(group: list[Job]):
        return ours.submit(prepare_dense, group[0].cell.network, group[0].seed, dense_epochs)

    dense = submit_dense(groups[0])
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        if time.monotonic() >= deadline:
            return
        arguments = dense.result()
        running = [(ours if job.settings == OURS else legacy).submit(train_row, job, *arguments) for job in group]
        if following and time.monotonic() < deadline:
            dense = submit_dense(following)
        for future in concurrent.futures.as_completed(running):
            yield future.result()


def describe(plan: Plan, rows: Rows) -> str:
    """Returns the tables of all networks that have a seed with all rows."""
    lines, bars = [], []
    for cell in plan.cells:
        measured = [[rows.get(settings, cell, seed) for settings in (OURS, *FREQUENCIES)] for seed in range(plan.seeds)]
        complete = [group for group in measured if None not in group]
        if complete:
            line, behind = _compare(complete)
            lines.append((cell.network, f"{cell.steps}", f"{len(complete)}", *line))
            bars.append(Bar(f"{cell.network}: points below tfmot's better one", 0, behind, digits=2))
    rivals = [f"tfmot, every {frequency} steps" for frequency in FREQUENCIES.values()]
    accuracies = [f"{name}, %" for name in ("dense", "ours", *rivals)]
    zeros = [f"zeros, {name}" for name in ("ours", *rivals)]
    header = ("network", "steps", "seeds", *accuracies, "ours - better tfmot [95 %]", *zeros)
    versions = [version for version in rows.versions() if version != "tfmot"]
    note = (
        f"Means over seeds; zeros over all kernels, those of depthwise convolutions included. "
        f"{tables.machine('tensorflow-model-optimization', 'tf_keras')}"
    )
    if len(versions) > 1:
        note = f"Rows of {len(versions)} versions of the package ({', '.join(versions)}). {note}"
    return "\n\n".join((tables.markdown(header, lines), bars_table(bars), note))


def _compare(groups: list[list[dict]]) -> tuple[list[str], Mean]:
    """Returns cells of the table, and the points by which ours is below the tfmot that is better on average."""
    accuracy = np.array([[row["accuracy"] for row in group] for group in groups])
    zeros = np.mean([[row["overall_sparsity"] for row in group] for group in groups], axis=0)
    means = (np.mean([group[0]["dense"] for group in groups]), *accuracy.mean(axis=0))
    better = accuracy[:, 1 + int(np.argmax(means[2:]))]
    above, behind = (Mean.of(list(points)) for points in (accuracy[:, 0] - better, better - accuracy[:, 0]))
    return [*(f"{mean:.2f}" for mean in means), above.text(), *(f"{100 * share:.1f} %" for share in zeros)], behind


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each network (5)")
    parser.add_argument("--networks", nargs="+", choices=EPOCHS, default=list(EPOCHS), help="all")
    parser.add_argument("--hours", type=float, help="begin nothing after so many hours; 0 prints the tables only")
    parser.add_argument("--rows", type=pathlib.Path, help=f"file of finished trainings ({ROWS.name})")
    args = tables.parse(parser)
    args.plan = Plan([name for name in EPOCHS if name in args.networks], args.seeds)
    folder = ROWS.parent
    if args.quick:
        names = [name for name in ("mlp", "ds_cnn") if name in args.networks] or args.networks[:1]
        args.plan = Plan(names, seeds=1, dense_epochs=1)
        folder = pathlib.Path(tempfile.mkdtemp(prefix="tfmot_defaults_"))
    args.rows = Rows(args.rows or folder / ROWS.name)
    return args


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    run(args.plan, args.rows, console, args.hours)
    text = describe(args.plan, args.rows)
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("tfmot_defaults", text)


if __name__ == "__main__":
    main()
