"""Ten thousand damaged packed files: each is refused, or loads a model that predicts the same; the tests try 300."""

import importlib
import pathlib
import resource
import sys
import tempfile
import time
from collections import Counter

import numpy as np
import tables
from measuring import own_process, progress_bar
from rich.console import Console

TESTS = pathlib.Path(__file__).resolve().parent.parent / "tests"
CHUNK = 250


def load_mutated(first: int, count: int) -> tuple[Counter, float, int]:
    """What became of so many files; the longest load in seconds; the largest memory so far, in bytes."""
    sys.path.append(str(TESTS))
    import keras

    import keras_squeeze as ks

    mutated = importlib.import_module("damaged_files").mutated
    outcomes: Counter = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.squeeze")
        whole, x = _packed(keras, ks, path)
        expected = np.asarray(ks.load_packed(path)(x))
        for seed in range(first, first + count):
            path.write_bytes(mutated(whole, np.random.default_rng(seed)))
            start = time.perf_counter()
            try:
                model = ks.load_packed(path)
            except ValueError:
                outcomes["refused"] += 1
            except BaseException as problem:  # what must not happen is what is counted
                outcomes[f"raised {type(problem).__name__}"] += 1
            else:
                same = np.array_equal(model(x), expected)
                outcomes["loaded, the same predictions" if same else "loaded, other predictions"] += 1
            longest = max(longest, time.perf_counter() - start)
    return outcomes, longest, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _packed(keras, ks, path):
    layers = keras.layers
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    convolutions = [layers.Conv2D(16, 3, activation="relu"), layers.BatchNormalization(), layers.Flatten()]
    model = keras.Sequential([keras.Input((8, 8, 1)), *convolutions, layers.Dense(32), layers.Dense(10)])
    ks.prune_weights(model, 0.8, layers="dense")
    q = ks.quantize_aware(model, "int4")
    x = np.random.default_rng(0).random((8, 8, 8, 1), dtype="float32")
    q(x, training=True)
    ks.save_packed(q, path)
    return path.read_bytes(), x


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--files", type=int, default=10_000, help="how many (10,000)")
    args = tables.parse(parser)
    files = 2 * CHUNK if args.quick else args.files
    console = Console()
    outcomes: Counter = Counter()
    longest, peaks = 0.0, []
    with progress_bar(console) as progress, own_process() as process:
        task = progress.add_task("files", total=files)
        for first in range(0, files, CHUNK):
            found, seconds, peak = process.submit(load_mutated, first, min(CHUNK, files - first)).result()
            outcomes += found
            longest, peaks = max(longest, seconds), [*peaks, peak]
            progress.advance(task, CHUNK)
            progress.refresh()
    rows = [(name, f"{count:,}") for name, count in outcomes.most_common()]
    rows.append(("longest load", f"{longest:.2f} s"))
    rows.append(("memory of the process beyond that after the first files", f"{(peaks[-1] - peaks[0]) / 1e6:.0f} MB"))
    text = f"{tables.markdown((f'{files:,} damaged files', ''), rows)}\n\n{tables.machine()}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("mutated_files", text)


if __name__ == "__main__":
    main()
