"""The `keras-squeeze` command.

A subcommand is one function that adds it with its arguments, and one that runs it and returns what to show: something
to print, and the same as a dict for `--json`.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
import warnings
from typing import Any

from keras_squeeze.deployment.litert import PRECISIONS

_EPILOG = "exit codes: 0 fine; 1 an error in what was asked, told in one line on standard error; 2 wrong usage"
_MODEL = "a .keras file, or a packed one"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: What stands after `keras-squeeze`; by default that of this process.

    Returns:
        The exit code: 0, 1 after an error in what was asked, or 130 where it was interrupted.

    Raises:
        SystemExit: help was asked for (0), or usage is wrong (2).
    """
    options = _parser().parse_args(arguments)
    try:
        # Where JSON is asked for, whatever else is printed goes elsewhere.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
            warnings.showwarning = _show_warning
            text, facts = options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"keras-squeeze: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell says of what was interrupted
    if options.json:
        print(json.dumps(_finite(facts), indent=2))
    elif text is not None:
        _print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-squeeze", description="Make Keras models smaller and faster.", epilog=_EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_report, _add_shrink, _add_export, _add_pack, _add_benchmark):
        add(commands)
    return parser


def _command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=description, epilog=_EPILOG)
    parser.set_defaults(run=run, json=False)
    return parser


def _takes_models(parser: argparse.ArgumentParser, name: str = "model", also: str = "", **several) -> None:
    parser.add_argument(name, metavar="MODEL", help=_MODEL + also, **several)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")
    parser.add_argument("--unsafe", action="store_true", help="let a file that you trust run code of its own")


def _writes(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("output", metavar="OUTPUT", type=pathlib.Path, help=f"the {what} to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT if it exists")


def _add_demo(commands) -> None:
    parser = _command(commands, "demo", _demo, "train and compress a small network on real data, offline")
    parser.add_argument(
        "--output", default="squeeze-demo", help="folder for models and pictures (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def _demo(options) -> tuple[None, dict]:
    from keras_squeeze.demo import run_demo

    run_demo(options.output, seed=options.seed)
    return None, {}


def _add_report(commands) -> None:
    parser = _command(commands, "report", _report, "show parameters, zeros, bits, bytes and MACs of every layer")
    _takes_models(parser)


def _report(options) -> tuple[Any, dict]:
    from keras_squeeze.report import summarize

    report = summarize(_load(options))
    return report, report.to_dict()


def _add_shrink(commands) -> None:
    summary = "write a model without its dead neurons, smaller and with the same predictions; it is not compiled"
    parser = _command(commands, "shrink", _shrink, summary)
    _takes_models(parser)
    _writes(parser, ".keras file")


def _shrink(options) -> tuple[str, dict]:
    from keras_squeeze.deployment.writing import write_file
    from keras_squeeze.pruning.shrinking import shrink
    from keras_squeeze.report import summarize

    _check_output(options.output, options.force, ".keras")
    model = _load(options)
    with _working("shrinking"):
        small = shrink(model)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.keras")
            small.save(path)
            write_file(options.output, path.read_bytes())
    before, after = summarize(model).total, summarize(small).total
    facts = {
        "path": str(options.output),
        "num_bytes": options.output.stat().st_size,
        "parameters": [before.parameters, after.parameters],
        "macs": [before.macs, after.macs],
    }
    text = f"{options.output}: {facts['num_bytes']:,} bytes, parameters {before.parameters:,} -> {after.parameters:,}"
    if before.macs is not None and after.macs is not None:
        text += f", MACs {before.macs:,} -> {after.macs:,}"
    return text, facts


def _add_export(commands) -> None:
    summary = "write a .tflite file for LiteRT, run it, and compare it with the model"
    parser = _command(commands, "export", _export, summary)
    _takes_models(parser)
    _writes(parser, ".tflite file")
    parser.add_argument("--precision", choices=PRECISIONS, help="what it computes with (default: as it was trained)")
    parser.add_argument(
        "--calibration-data", metavar="FILE", help="inputs, for the ranges of activations: .npy, or .npz with x"
    )
    parser.add_argument("--integer-io", action="store_true", help="let integers of 8 bits go in and come out")
    parser.add_argument("--any-batch", action="store_true", help="leave the number of examples at a time open")
    parser.add_argument("--allow-float", action="store_true", help="let quantized layers compute in float if they must")


def _export(options) -> tuple[Any, dict]:
    from keras_squeeze.deployment.litert import export
    from keras_squeeze.deployment.loading import load_examples

    _check_output(options.output, options.force, ".tflite")
    inputs = None if options.calibration_data is None else load_examples(options.calibration_data)[0]
    model = _load(options)
    how = {"precision": options.precision, "calibration_data": inputs, "allow_float": options.allow_float}
    how |= {"integer_io": options.integer_io, "batch_size": None if options.any_batch else 1}
    with _working("exporting"):
        result = export(model, options.output, **how)
    return result, {**dataclasses.asdict(result), "path": str(result.path)}


def _add_pack(commands) -> None:
    summary = "write a file in which quantized and sparse weights take their real size"
    parser = _command(commands, "pack", _pack, summary)
    _takes_models(parser)
    _writes(parser, "packed file")


def _pack(options) -> tuple[str, dict]:
    from keras_squeeze.deployment.packing import save_packed

    _check_output(options.output, options.force)
    model = _load(options)
    with _working("packing"):
        num_bytes = save_packed(model, options.output)
    return f"{options.output}: {num_bytes:,} bytes", {"path": str(options.output), "num_bytes": num_bytes}


def _add_benchmark(commands) -> None:
    summary = "put models side by side: bytes, MACs, latency in LiteRT and, with data, how good their answers are"
    parser = _command(commands, "benchmark", _benchmark, summary)
    _takes_models(parser, "models", ", or a .tflite file; the others are compared with the first", nargs="+")
    parser.add_argument("--data", metavar="FILE", help=".npz with x (or the names of several inputs) and y")
    parser.add_argument("--metric", metavar="NAME", help="a Keras metric or loss (default: accuracy or absolute error)")
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="inferences of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="for LiteRT (default: %(default)s)")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw it, too: .png, .svg or .pdf")
    parser.add_argument("--force", action="store_true", help="overwrite the picture if it exists")


def _benchmark(options) -> tuple[Any, dict]:
    from keras_squeeze.deployment.comparison import compare
    from keras_squeeze.deployment.loading import load_examples

    if options.plot is not None:
        _check_output(options.plot, options.force, ".png", ".svg", ".pdf")
    data = None if options.data is None else load_examples(options.data)
    how = {"num_threads": options.threads, "runs": options.runs, "safe_mode": not options.unsafe}
    comparison = compare(_by_name(options.models), data, metric=options.metric, **how)
    if options.plot is not None:
        comparison.plot(options.plot)
    return comparison, comparison.to_dict()


def _by_name(paths: list[str]) -> dict[str, str]:
    """Files by their names, or as they were given where that is not enough."""
    names = collections.Counter(pathlib.Path(path).name for path in paths)
    twice = [path for path, times in collections.Counter(paths).items() if times > 1]
    if twice:
        raise ValueError(f"A file can be compared only once. Received twice: {', '.join(twice)}")
    return {path if names[pathlib.Path(path).name] > 1 else pathlib.Path(path).name: path for path in paths}


def _load(options):
    from keras_squeeze.deployment.loading import load_model

    with _working("loading"):
        return load_model(options.model, safe_mode=not options.unsafe)


def _working(title: str):
    from keras_squeeze.progress import progress_bar

    return progress_bar(title)


def _check_output(path: pathlib.Path, force: bool, *suffixes: str) -> None:
    """Before anything takes time."""
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"The name of the output must end in {' or '.join(suffixes)}. Received: {path}")
    if path.is_dir():
        raise ValueError(f"The output must be a file. Received a folder: {path}")
    if path.exists() and not force:
        raise ValueError(f"{path} exists. Pass --force to overwrite it.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} for the output. Make it first.")


def _print(result) -> None:
    """In the width and colours of a terminal; for a file or a pipe as plain text."""
    if not sys.stdout.isatty():
        print(result)
        return
    from rich.console import Console

    Console().print(result, soft_wrap=isinstance(result, str), markup=False, highlight=False)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"keras-squeeze: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(text) -> str:
    return " ".join(str(text).split())


def _finite(value):
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
