"""The same pipeline through tfmot on tf_keras and through `tfmot_compat` on Keras 3: masks, accuracy, time, files.

Both get the same network, starting weights, batches in the same order, optimizer and schedule: pruned to 80 % zeros
with `prune_low_magnitude`, stripped, then trained on in 8 bits with `quantize_apply` and the scheme that preserves
zeros. Each library runs in a process of its own. Masks are compared twice: with those that tfmot chooses from the very
weights of the other run, and with those of tfmot's own run, whose weights differ in their last bits.
"""

import gzip
import os
import pathlib
import tempfile
from dataclasses import dataclass

import numpy as np
import tables
from measuring import Bar, Estimate, advance, bars_table, own_process, progress_bar, warn_if_busy
from networks import compile_network, use_one_thread
from neuron_criteria import Mean, Plan, load_data
from quantization_overhead import LIBRARIES, small_model, train_first
from rich.console import Console
from training_fits import FIT_NETWORKS, SPARSITY, Cell, Pair, fit_in_turn, fit_tfmot
from training_overhead import NAMES, Overhead

BATCH = 128
FINAL = 0.8
FILES = {"pruned": "pruned, float32", "quantized": "pruned, int8"}


@dataclass(frozen=True)
class Update:
    """One change of the masks: before which step, the weights that it saw (of our runs only), and the masks."""

    step: int
    weights: list[np.ndarray]
    masks: list[np.ndarray]


@dataclass(frozen=True)
class Run:
    """What came of one pipeline; accuracies in percent, zeros of every kernel, paths of files."""

    accuracy: dict[str, float]
    zeros: dict[str, int]
    updates: list[Update]
    files: dict[str, pathlib.Path]


def _libraries(library: str):
    """Its Keras, and tfmot or what takes its place."""
    if library == "ours":
        import keras

        from keras_squeeze import tfmot_compat

        return keras, tfmot_compat
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tensorflow_model_optimization as tfmot
    import tf_keras

    return tf_keras, tfmot


def _times(plan: Plan) -> dict[str, int]:
    """The schedule in steps: from the start to about three quarters of the pruning epochs, some twenty updates.

    The frequency divides the span: where it does not, tfmot never reaches the final sparsity, and `tfmot_compat` does.
    """
    steps = 3 * plan.pruning_epochs * -(-plan.train // BATCH) // 4
    frequency = max(1, steps // 20)
    return {"begin_step": 0, "end_step": steps // frequency * frequency, "frequency": frequency}


def run_pipeline(library: str, plan: Plan, seed: int, weights: list[np.ndarray], folder: str) -> Run:
    """Prunes, strips, quantizes and exports."""
    keras, tfmot = _libraries(library)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    train, test = load_data(plan)
    model = small_model(keras)
    model.set_weights(weights)
    sparsity, quantization = tfmot.sparsity.keras, tfmot.quantization.keras
    schedule = sparsity.PolynomialDecay(0.0, FINAL, **_times(plan))
    pruned = compile_network(keras, sparsity.prune_low_magnitude(model, pruning_schedule=schedule), 1e-3)
    updates: list[Update] = []
    recorder = (_record_ours if library == "ours" else _record_tfmot)(keras, sparsity, schedule, updates)
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    pruned.fit(*train, epochs=plan.pruning_epochs, callbacks=recorder, **options)
    final = compile_network(keras, sparsity.strip_pruning(pruned), 1e-3)
    accuracy = {"pruned": 100 * final.evaluate(*test, batch_size=512, verbose=0)[1]}
    zeros = {layer.name: int(np.sum(layer.kernel.numpy() == 0)) for layer in final.layers if hasattr(layer, "kernel")}
    files = {"pruned": _export(library, final, pathlib.Path(folder, f"{library}.tflite"))}
    scheme = tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
    quantized = compile_network(
        keras, quantization.quantize_apply(quantization.quantize_annotate_model(final), scheme), 3e-4
    )
    quantized.fit(*train, epochs=plan.tuning_epochs, **options)
    accuracy["quantized"] = 100 * quantized.evaluate(*test, batch_size=512, verbose=0)[1]
    files["quantized"] = _export(library, quantized, pathlib.Path(folder, f"{library}_int8.tflite"), train[0][:256])
    return Run(accuracy, zeros, updates, files)


def _record_ours(keras, sparsity, schedule, updates: list[Update]) -> list:
    """The callback that prunes, with notes of what it does."""

    class Recorder(sparsity.UpdatePruningStep):
        def update(self, step):
            kernels = [layer.layer.kernel for layer in self.prunable_layers]
            before = [kernel.numpy() for kernel in kernels] if bool(schedule(step + 1)[0]) else None
            super().update(step)
            known = updates and updates[-1].step == step + 1
            if before is not None and not known and step < schedule.end_step:
                masks = [layer.pruning_vars[0][1] for layer in self.prunable_layers]
                updates.append(Update(step + 1, before, masks))

    return [Recorder()]


def _record_tfmot(keras, sparsity, schedule, updates: list[Update]) -> list:
    class Recorder(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            layers = [layer for layer in self.model.layers if getattr(layer, "pruning_vars", None)]
            step = int(layers[0].pruning_step)
            if bool(schedule(step)[0]):
                updates.append(Update(step, [], [layer.pruning_vars[0][1].numpy().astype(bool) for layer in layers]))

    return [sparsity.UpdatePruningStep(), Recorder()]


def _export(library: str, model, path: pathlib.Path, calibration_data=None) -> pathlib.Path:
    """As each library's guide does it."""
    if library == "ours":
        import keras_squeeze as ks

        ks.export(model, path, calibration_data=calibration_data)
        return path
    import warnings

    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if calibration_data is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.write_bytes(converter.convert())
    return path


def count_differences(updates: list[Update], times: dict[str, int]) -> int:
    """Entries of masks that the real tfmot chooses otherwise from the same weights. Runs in its process."""
    _, tfmot = _libraries("tfmot")
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning

    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, FINAL, **times)
    different = 0
    for update in updates:
        triples = [(tf.Variable(w), tf.Variable(tf.ones(w.shape)), tf.Variable(0.0)) for w in update.weights]
        Pruning(lambda now=update.step: tf.constant(now), triples, schedule, (1, 1), "AVG").conditional_mask_update()
        for (_, mask, _), ours in zip(triples, update.masks, strict=True):
            different += int(np.sum(mask.numpy().astype(bool) != ours))
    return different


def fit_compat(cell: Cell) -> list[Pair]:
    """Trains in Keras 3, with and without `tfmot_compat`; the counterpart of `fit_tfmot`."""
    keras, tfmot = _libraries("ours")
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    plain, pruned = FIT_NETWORKS[cell.network](keras), FIT_NETWORKS[cell.network](keras)
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, SPARSITY, *cell.span, power=3, frequency=cell.frequency)
    pruned = tfmot.sparsity.keras.prune_low_magnitude(pruned, pruning_schedule=schedule)
    return fit_in_turn(keras, plain, pruned, tfmot.sparsity.keras.UpdatePruningStep(), cell)


def measure_latency_ratio(theirs: pathlib.Path, ours: pathlib.Path, runs: int):
    """Milliseconds of both files, which take turns, and the median ratio of ours to theirs."""
    import keras_squeeze as ks

    found = ks.measure_latencies({"tfmot": theirs, "ours": ours}, runs=runs)
    return found["tfmot"].median_ms, found["ours"].median_ms, found["ours"].ratio


def run_pipelines(plan: Plan, seeds: int, folder: str, progress) -> list[tuple[Run, Run, int]]:
    """For every seed both runs, and how many entries of masks differ given the same weights."""
    results = []
    task = progress.add_task("pipelines", total=3 * seeds)
    with own_process() as ours, own_process() as tfmot:
        for worker in (ours, tfmot):
            worker.submit(use_one_thread).result()
        for seed in range(seeds):
            weights = ours.submit(train_first, plan, seed).result()
            advance(progress, task)
            jobs = [
                worker.submit(run_pipeline, library, plan, seed, weights, folder)
                for library, worker in (("ours", ours), ("tfmot", tfmot))
            ]
            mine, theirs = (job.result() for job in jobs)
            advance(progress, task)
            results.append((mine, theirs, tfmot.submit(count_differences, mine.updates, _times(plan)).result()))
            advance(progress, task)
    return results


def measure_times(cells: list[Cell], progress) -> dict[Cell, dict[str, Overhead]]:
    """Pruned over plain `fit` in both libraries, half of a cell in turn and then the other half."""
    results = {}
    with own_process() as ours, own_process() as tfmot:
        for cell in cells:
            pairs: dict[str, list[Pair]] = {"ours": [], "tfmot": []}
            half = Cell(cell.network, cell.batch, max(1, cell.updates // 2))
            task = progress.add_task(f"{NAMES[cell.network]}: fits", total=4)
            for _ in range(2):
                for library, worker, fit in (("ours", ours, fit_compat), ("tfmot", tfmot, fit_tfmot)):
                    pairs[library] += worker.submit(fit, half).result()
                    advance(progress, task)
            results[cell] = {library: Overhead.of(found, cell.frequency) for library, found in pairs.items()}
    return results


def mask_table(results) -> tuple[str, int]:
    """Per seed; and the differences given the same weights, over all of them."""
    rows = []
    for seed, (ours, theirs, different) in enumerate(results):
        steps = [update.step for update in theirs.updates]
        if [update.step for update in ours.updates] != steps:
            raise RuntimeError("The two libraries changed their masks at different steps.")
        entries = sum(mask.size for update in ours.updates for mask in update.masks)
        apart = sum(
            int(np.sum(mine != other))
            for one, two in zip(ours.updates, theirs.updates, strict=True)
            for mine, other in zip(one.masks, two.masks, strict=True)
        )
        same = "yes" if list(ours.zeros.values()) == list(theirs.zeros.values()) else "**no**"
        rows.append((f"{seed}", f"{len(steps)}", f"{entries:,}", f"{different:,}", f"{apart / entries:.2%}", same))
    header = ("seed", "updates", "mask entries", "differ, same weights", "differ, runs apart", "same zeros per layer")
    return tables.markdown(header, rows), sum(different for *_, different in results)


def accuracy_table(results) -> str:
    rows = []
    for library, index in (("ours", 0), ("tfmot", 1)):
        means = [Mean.of([pair[index].accuracy[kind] for pair in results]).text() for kind in FILES]
        rows.append((LIBRARIES[library], *means))
    return tables.markdown(("library", f"{FINAL:.0%} zeros, % [95 %]", "and int8, % [95 %]"), rows)


def file_table(results, latencies) -> str:
    ours, theirs, _ = results[-1]
    rows = []
    for kind, title in FILES.items():
        sizes = [path.stat().st_size for path in (theirs.files[kind], ours.files[kind])]
        packed = [len(gzip.compress(path.read_bytes())) for path in (theirs.files[kind], ours.files[kind])]
        times = (f"{value:.3f}" for value in latencies[kind])
        rows.append((title, *(f"{size:,}" for size in (*sizes, *packed)), *times))
    header = (
        "file",
        "tfmot, bytes",
        "ours, bytes",
        "tfmot, gzip",
        "ours, gzip",
        "tfmot, ms",
        "ours, ms",
        "ratio",
    )
    return tables.markdown(header, rows)


def time_table(times: dict[Cell, dict[str, Overhead]]) -> str:
    rows = [
        (f"{NAMES[cell.network]}, batch {cell.batch}", found["ours"].ratio.text(), found["tfmot"].ratio.text())
        for cell, found in times.items()
    ]
    return tables.markdown(("`fit`, pruned over plain", *LIBRARIES.values()), rows)


def bars(results, different: int, times) -> list[Bar]:
    accuracies = {
        kind: Mean.of([theirs.accuracy[kind] - ours.accuracy[kind] for ours, theirs, _ in results]) for kind in FILES
    }
    return [
        Bar("mask entries that differ, same weights", 0, Estimate(different, different, different), digits=0),
        *(Bar(f"{FILES[kind]}: points below tfmot's accuracy", 0, mean, digits=2) for kind, mean in accuracies.items()),
        *(
            Bar(f"{NAMES[cell.network]}: not above tfmot's ratio", found["tfmot"].ratio.median, found["ours"].ratio)
            for cell, found in times.items()
        ),
    ]


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="pipelines of each library (5)")
    parser.add_argument("--updates", type=int, default=40, help="mask updates that are timed for each network (40)")
    parser.add_argument("--runs", type=int, default=300, help="inferences of each file (300)")
    args = tables.parse(parser)
    args.plan = Plan(dense_epochs=4, pruning_epochs=4, tuning_epochs=2)
    if args.quick:
        args.seeds, args.updates, args.runs, args.plan = 1, 2, 5, Plan(1000, 500, 1, 2, 1)
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    warn_if_busy(console)
    cells = [Cell("mlp", BATCH, args.updates), Cell("resnet8", BATCH, args.updates // 4)][: 1 if args.quick else 2]
    with tempfile.TemporaryDirectory() as folder, progress_bar(console) as progress:
        results = run_pipelines(args.plan, args.seeds, folder, progress)
        times = measure_times(cells, progress)
        with own_process() as worker:
            ours, theirs = results[-1][0].files, results[-1][1].files
            latencies = {
                kind: worker.submit(measure_latency_ratio, theirs[kind], ours[kind], args.runs).result()
                for kind in FILES
            }
        files = file_table(results, latencies)
    masks, different = mask_table(results)
    plan = args.plan
    note = (
        f"Two convolutions with batch normalization and a Dense layer, {args.seeds} seeds, {plan.train:,} characters "
        f"to train and {plan.test:,} to test, {plan.dense_epochs} epochs dense, {plan.pruning_epochs} with pruning, "
        f"{plan.tuning_epochs} in 8 bits. Files: of the last seed, {args.runs} inferences of each in turn, one thread. "
        f"{tables.machine('tensorflow-model-optimization', 'tf_keras', 'ai-edge-litert')}"
    )
    found = (
        masks,
        accuracy_table(results),
        files,
        time_table(times),
        bars_table(bars(results, different, times)),
        note,
    )
    text = "\n\n".join(found)
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("tfmot_parity", text)


if __name__ == "__main__":
    main()
