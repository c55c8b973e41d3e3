"""How much longer `fit` takes with `MagnitudePruning`, and how much longer tfmot makes it.

Each ratio is the median over pairs of epochs, one plain and one pruned, one right after the other: two `fit`s take
turns. See `training_fits.py` for what is trained and how.
"""

import functools
from dataclasses import dataclass, replace

import tables
from measuring import Bar, Estimate, advance, bars_table, own_process, progress_bar, warn_if_busy
from rich.console import Console
from training_fits import Cell, Pair, fit_keras, fit_tfmot

CELLS = (Cell("mlp", 128, 80), Cell("resnet8", 128, 24), Cell("mlp", 32, 40), Cell("resnet8", 32, 12))
NAMES = {"mlp": "MLP 784-1024-1024-10", "resnet8": "ResNet-8, 32x32x3"}
LIMIT = 1.03  # at batch 128


@dataclass(frozen=True)
class Overhead:
    """What the pairs (plain, pruned) of one library say."""

    plain_step: float
    ratio: Estimate

    @classmethod
    def of(cls, pairs: list[Pair], steps: int) -> "Overhead":
        plain_step = Estimate.of([plain / steps for plain, _ in pairs]).median
        return cls(plain_step, Estimate.of([pruned / plain for plain, pruned in pairs]))


@dataclass(frozen=True)
class Result:
    cell: Cell
    ours: Overhead
    tfmot: Overhead

    @property
    def name(self) -> str:
        return f"{NAMES[self.cell.network]}, batch {self.cell.batch}"


def measure(cell: Cell, workers, on_done) -> Result:
    """Measures a cell in both libraries, half of it in turn and then the other half."""
    half = replace(cell, updates=max(1, cell.updates // 2))
    found: dict[str, list[Pair]] = {"ours": [], "tfmot": []}
    for _ in range(2):
        for name, (worker, fit) in workers.items():
            found[name] += worker.submit(fit, half).result()
            on_done()
    return Result(cell, **{name: Overhead.of(pairs, cell.frequency) for name, pairs in found.items()})


def full_table(results: list[Result]) -> str:
    header = ("network, batch", "library", "steps timed", "mask updates", "plain step, ms", "ratio [95 %]")
    rows = []
    for result in results:
        for library, overhead in (("keras_squeeze", result.ours), ("tfmot", result.tfmot)):
            cell = result.cell
            counts = (f"{cell.updates * cell.frequency:,}", f"{cell.updates}")
            rows.append((result.name, library, *counts, f"{overhead.plain_step * 1e3:.1f}", overhead.ratio.text()))
    return tables.markdown(header, rows)


def bars(results: list[Result]) -> list[Bar]:
    """What was promised: 1.03 at batch 128, and not above tfmot's own ratio anywhere."""
    promised = [Bar(f"{r.name}: ratio", LIMIT, r.ours.ratio) for r in results if r.cell.batch == 128]
    return promised + [Bar(f"{r.name}: not above tfmot's ratio", r.tfmot.ratio.median, r.ours.ratio) for r in results]


def front_page_table(results: list[Result]) -> str:
    rows = [(r.name, r.ours.ratio.text(), r.tfmot.ratio.text()) for r in results]
    return tables.markdown(("time of `fit`, pruned over plain", "keras_squeeze, Keras 3", "tfmot, tf_keras"), rows)


def parse_arguments():
    parser = tables.make_parser(__doc__)
    parser.add_argument("--updates", type=int, help="epochs that are timed, and mask updates; 12 to 80 by default")
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES), help="all")
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 32], help="128 and 32")
    args = tables.parse(parser)
    if args.quick:
        args.updates = 2
    return args


def main() -> None:
    args = parse_arguments()
    cells = [cell for cell in CELLS if cell.network in args.networks and cell.batch in args.batches]
    if args.updates:
        cells = [replace(cell, updates=args.updates) for cell in cells]
    console = Console()
    warn_if_busy(console)
    results = []
    with own_process() as keras, own_process() as tf_keras, progress_bar(console) as progress:
        workers = {"ours": (keras, fit_keras), "tfmot": (tf_keras, fit_tfmot)}
        for cell in cells:
            title = f"{NAMES[cell.network]}, batch {cell.batch}: {cell.updates} times {cell.frequency} steps"
            task = progress.add_task(title, total=4)
            results.append(measure(cell, workers, functools.partial(advance, progress, task)))
            console.print(full_table(results[-1:]), soft_wrap=True)
    note = f"Pairs of epochs with one mask update each. {tables.machine('tensorflow-model-optimization', 'tf_keras')}"
    text = f"{full_table(results)}\n\n{bars_table(bars(results))}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("training_overhead", text)
        tables.write("overhead", f"{front_page_table(results)}\n\n{note}", tables.FRONT_PAGE)


if __name__ == "__main__":
    main()
