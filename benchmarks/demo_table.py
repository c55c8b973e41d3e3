"""The table of `keras-squeeze demo`, for the front page."""

import tempfile

import tables

from keras_squeeze.cli import demo


def main() -> None:
    parser = tables.make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    args = tables.parse(parser)
    if args.quick:
        demo.DENSE_EPOCHS, demo.PRUNING_EPOCHS, demo.QUANTIZED_EPOCHS, demo.BINARY_EPOCHS = 1, 2, 1, 1
        demo.SEARCH_TRIALS, demo.SEARCH_EPOCHS = 2, 1
    with tempfile.TemporaryDirectory() as directory:
        rows = demo.run_demo(directory, seed=args.seed)
    header, *body = demo.table_cells(rows)
    text = f"{tables.markdown(header, body)}\n\n{tables.machine()}"
    if args.write:
        tables.write("demo", text, tables.FRONT_PAGE)
    else:
        print(text)


if __name__ == "__main__":
    main()
