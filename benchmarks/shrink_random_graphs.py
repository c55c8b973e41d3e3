"""The law that `shrink(m)` predicts what `m` predicts, on a thousand random graphs; the tests try fifty."""

import importlib
import multiprocessing
import pathlib
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import tables
from measuring import advance, progress_bar
from rich.console import Console

TESTS = pathlib.Path(__file__).resolve().parent.parent / "tests"
LIMIT = 1e-4


def try_graph(seed: int) -> tuple[float, float]:
    """The largest difference, relative to the largest output, and the fraction of the parameters that is left."""
    sys.path.append(str(TESTS))
    import keras

    import keras_squeeze as ks

    graphs = importlib.import_module("random_graphs")
    keras.utils.clear_session()
    model = graphs.random_model(seed)
    rng = np.random.default_rng(seed)
    ks.prune_neurons(model, rng.uniform(0.1, 0.9), criterion="random", round_to=1)
    small = ks.shrink(model)
    inputs = graphs.random_inputs(model)
    pairs = zip(graphs.predictions(model, inputs), graphs.predictions(small, inputs), strict=True)
    error = max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)
    return float(error), small.count_params() / model.count_params()


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--graphs", type=int, default=1000, help="random graphs (1000)")
    parser.add_argument("--processes", type=int, default=2, help="at the same time (2)")
    args = tables.parse(parser)
    count = 20 if args.quick else args.graphs
    console = Console()
    context = multiprocessing.get_context("spawn")
    errors, left, failed = [], [], []
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool, progress_bar(console) as progress:
        task = progress.add_task("graphs", total=count)
        futures = [pool.submit(try_graph, seed) for seed in range(1_000, 1_000 + count)]  # not those of the tests
        for seed, future in enumerate(futures, start=1_000):
            try:
                error, share = future.result()
            except Exception as problem:
                failed.append(f"{seed}: {type(problem).__name__}: {problem}")
            else:
                errors.append(error)
                left.append(share)
                if not error <= LIMIT:
                    failed.append(f"{seed}: differs by {error:.1e}")
            advance(progress, task)
    rows = [
        ("graphs", f"{count:,}"),
        ("failed", f"{len(failed)}"),
        ("largest difference, relative", f"{max(errors, default=0.0):.1e}"),
        ("became smaller", f"{sum(share < 1 for share in left):,}"),
        ("parameters left, median", f"{np.median(left):.0%}"),
    ]
    text = f"{tables.markdown(('', ''), rows)}\n\n{tables.machine()}"
    console.print("\n".join([*failed, text]), soft_wrap=True, markup=False)
    if args.write:
        tables.write("random_graphs", text)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
