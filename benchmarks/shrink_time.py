"""How long `shrink` takes: over the time of `keras.models.clone_model` and `set_weights` on the same model."""

import functools
import time

import tables
from measuring import Bar, Estimate, advance, bars_table, in_turn, own_process, progress_bar, warn_if_busy
from rich.console import Console

LIMIT = 3.0
NETWORKS = ("ResNet50", "EfficientNetB0")


@functools.lru_cache(maxsize=1)
def _pruned(network: str):
    import keras

    import keras_squeeze as ks

    model = getattr(keras.applications, network)(weights=None)
    ks.prune_neurons(model, 0.5)
    return model


def time_shrink(network: str) -> float:
    import keras_squeeze as ks

    model = _pruned(network)
    start = time.perf_counter()
    small = ks.shrink(model)
    seconds = time.perf_counter() - start
    if not small.count_params() < 0.6 * model.count_params():
        raise RuntimeError(f"{network} has hardly become smaller.")
    return seconds


def time_clone(network: str) -> float:
    import keras

    model = _pruned(network)
    start = time.perf_counter()
    keras.models.clone_model(model).set_weights(model.get_weights())
    return time.perf_counter() - start


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=9, help="timed repetitions of each (9)")
    args = tables.parse(parser)
    repetitions = 1 if args.quick else args.repetitions
    console = Console()
    warn_if_busy(console)
    rows, bars = [], []
    with progress_bar(console) as progress:
        task = progress.add_task("repetitions", total=len(NETWORKS) * (repetitions + 1))
        for network in NETWORKS:
            times = []
            with own_process() as process:
                for repetition in range(-1, repetitions):
                    times.append(
                        in_turn(
                            repetition,
                            lambda process=process, network=network: process.submit(time_shrink, network).result(),
                            lambda process=process, network=network: process.submit(time_clone, network).result(),
                        )
                    )
                    advance(progress, task)
            shrink, clone = (Estimate.of(each) for each in zip(*times[1:], strict=True))
            ratio = Estimate.of([ours / theirs for ours, theirs in times[1:]])
            rows.append((network, f"{shrink.median:.2f}", f"{clone.median:.2f}", ratio.text(2)))
            bars.append(Bar(f"{network}: shrink over clone_model and set_weights", LIMIT, ratio))
    table = tables.markdown(("network", "shrink, s", "clone_model and set_weights, s", "ratio [95 %]"), rows)
    text = f"{table}\n\n{bars_table(bars)}\n\n{repetitions} repetitions of each. {tables.machine()}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("shrink_time", text)


if __name__ == "__main__":
    main()
