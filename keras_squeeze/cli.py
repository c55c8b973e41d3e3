"""The `keras-squeeze` command."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="keras-squeeze", description="Make Keras models smaller and faster.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train and compress a small network on real data, offline")
    demo.add_argument("--output", default="squeeze-demo", help="folder for models and pictures (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    options = parser.parse_args(arguments)

    from keras_squeeze.demo import run_demo

    run_demo(options.output, seed=options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
