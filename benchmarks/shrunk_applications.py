"""All models of `keras.applications`, with and without their top: pruned to half, shrunk, compared, saved, reloaded.

Every model has its random initial kernels, and random scales, shifts and statistics in its normalizations: the fresh
ones hide mistakes. Each runs in a process of its own, so that the largest one needs memory alone. Rows are printed as
they come; what was done before is taken from the file of `--progress`, if there is one.
"""

import inspect
import json
import pathlib
import tempfile
import time
from dataclasses import asdict, dataclass

import numpy as np
import tables
from measuring import advance, own_process, progress_bar
from rich.console import Console

TOLERANCE = 1e-4
SMALLEST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}  # pixels; the others take 32
QUICK = ("MobileNet", "MobileNetV3Small")


@dataclass(frozen=True)
class Row:
    """What came of one model; `difference` and `reloaded` are relative to the largest prediction."""

    network: str
    top: bool
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    neurons: int = 0
    difference: float = 0.0
    reloaded: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def holds(self) -> bool:
        smaller = self.parameters[1] < 0.75 * self.parameters[0] and self.macs[1] < 0.75 * self.macs[0]
        return not self.error and smaller and max(self.difference, self.reloaded) <= TOLERANCE

    def cells(self) -> tuple[str, ...]:
        name = (self.network, "yes" if self.top else "no")
        if self.error:
            return (*name, *["-"] * 5, self.error)
        sizes = (f"{before / 1e6:.1f} -> {after / 1e6:.1f}" for before, after in (self.parameters, self.macs))
        differences = (f"{self.difference:.0e}", f"{self.reloaded:.0e}")
        return (*name, f"{self.neurons:,}", *sizes, *differences, "holds" if self.holds else "**does not hold**")


def networks() -> list[str]:
    import keras

    return sorted(name for name, value in vars(keras.applications).items() if inspect.isfunction(value))


def shrink_one(network: str, top: bool) -> Row:
    """Does all of it."""
    import keras

    import keras_squeeze as ks

    start = time.perf_counter()
    keras.utils.set_random_seed(0)
    size = SMALLEST.get(network, 32)
    options = {"classes": 10, "classifier_activation": None} if top else {}
    model = getattr(keras.applications, network)(weights=None, include_top=top, input_shape=(size, size, 3), **options)
    _randomize_statistics(model)
    report = ks.prune_neurons(model, 0.5)
    small = ks.shrink(model)
    images = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype("float32")
    expected, actual = (np.asarray(each(images, training=False)) for each in (model, small))
    before, after = ks.summarize(model).total, ks.summarize(small).total
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "small.keras")
        small.save(path)
        again = np.asarray(keras.models.load_model(path)(images, training=False))
    return Row(
        network,
        top,
        (before.parameters, after.parameters),
        (before.macs, after.macs),
        sum(width - left for width, left in report.widths.values()),
        _relative(actual, expected),
        _relative(again, actual),
        time.perf_counter() - start,
    )


def _randomize_statistics(model) -> None:
    """Keeps the scale of the initial kernels, which the depth of these models needs."""
    rng = np.random.default_rng(1)
    for variable in model.weights:
        name = variable.name.rpartition("/")[2]
        if name in ("gamma", "moving_variance") and len(variable.shape) == 1:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif name in ("beta", "bias", "moving_mean"):
            variable.assign(rng.normal(0, 0.1, variable.shape))


def _relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.max(np.abs(one - other)) / np.max(np.abs(other)))


def _known(path: pathlib.Path | None) -> dict[tuple[str, bool], Row]:
    if path is None or not path.is_file():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    return {(row.network, row.top): row for row in rows if not row.error}


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="only these; all of them by default")
    parser.add_argument("--progress", type=pathlib.Path, metavar="FILE", help="of finished rows, to go on from")
    args = tables.parse(parser)
    console = Console()
    chosen = args.networks or (QUICK if args.quick else networks())
    known = _known(args.progress)
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("models", total=2 * len(chosen))
        for network in chosen:
            for top in (True, False):
                row = known.get((network, top))
                if row is None:
                    with own_process() as process:
                        try:
                            row = process.submit(shrink_one, network, top).result()
                        except Exception as error:  # one that fails is a row, too
                            row = Row(network, top, error=f"{type(error).__name__}: {error}"[:200])
                    if args.progress is not None:
                        with args.progress.open("a") as file:
                            file.write(f"{json.dumps(asdict(row))}\n")
                rows.append(row)
                console.print(" | ".join(row.cells()), f"{row.seconds:.0f} s", markup=False)
                advance(progress, task)
    header = ("network", "top", "channels removed", "parameters, M", "MACs, M", "difference", "reloaded", "")
    table = tables.markdown(header, [row.cells() for row in rows])
    holding = sum(all(row.holds for row in rows if row.network == network) for network in chosen)
    note = (
        f"It holds for {holding} of {len(chosen)} models: the predictions of the shrunk model are within "
        f"{TOLERANCE:.0e} of those of the masked one, relative to the largest, and less than three quarters of the "
        f"parameters and of the MACs are left. {tables.machine()}"
    )
    text = f"{note}\n\n{table}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("shrunk_applications", text)


if __name__ == "__main__":
    main()
