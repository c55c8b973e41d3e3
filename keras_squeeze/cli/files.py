"""The subcommands that train nothing: they look at a model, or write it in another form; and the demo."""

import collections
import dataclasses
import pathlib
from typing import Any

from keras_squeeze.analysis.report import summarize
from keras_squeeze.cli.arguments import changes, check_output, command, load, takes_models, working, write_model, writes
from keras_squeeze.cli.demo import run_demo
from keras_squeeze.deployment.litert import PRECISIONS, export
from keras_squeeze.deployment.loading import load_examples
from keras_squeeze.deployment.packing import save_packed
from keras_squeeze.evaluation.comparison import compare
from keras_squeeze.neuron_pruning.neuron_overview import prunable_neurons
from keras_squeeze.neuron_pruning.shrinking import shrink


def add_demo(commands) -> None:
    parser = command(commands, "demo", _demo, "train and compress a small network on real data, offline")
    parser.add_argument(
        "--output", default="squeeze-demo", help="folder for models and pictures (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def _demo(options) -> tuple[None, dict]:
    run_demo(options.output, seed=options.seed)
    return None, {}


def add_report(commands) -> None:
    parser = command(commands, "report", _report, "show parameters, zeros, bits, bytes and MACs of every layer")
    takes_models(parser)
    what = "instead, show how many neurons of each layer can be removed, and what keeps the others"
    parser.add_argument("--neurons", action="store_true", help=what)


def _report(options) -> tuple[Any, dict]:
    model = load(options)
    report = prunable_neurons(model) if options.neurons else summarize(model)
    return report, report.to_dict()


def add_shrink(commands) -> None:
    summary = "write a model without its dead neurons, smaller and with the same predictions; it is not compiled"
    parser = command(commands, "shrink", _shrink, summary)
    takes_models(parser)
    writes(parser, ".keras file")


def _shrink(options) -> tuple[str, dict]:
    check_output(options.output, options.force, ".keras")
    model = load(options)
    with working("shrinking"):
        small = shrink(model)
    num_bytes = write_model(small, options.output)
    return changes(options.output, num_bytes, summarize(model).total, summarize(small).total)


def add_export(commands) -> None:
    summary = "write a .tflite file for LiteRT, run it, and compare it with the model"
    parser = command(commands, "export", _export, summary)
    takes_models(parser)
    writes(parser, ".tflite file")
    parser.add_argument("--precision", choices=PRECISIONS, help="what it computes with (default: as it was trained)")
    parser.add_argument(
        "--calibration-data", metavar="FILE", help="inputs, for the ranges of activations: .npy, or .npz with x"
    )
    parser.add_argument("--integer-io", action="store_true", help="let integers of 8 bits go in and come out")
    parser.add_argument("--any-batch", action="store_true", help="leave the number of examples at a time open")
    parser.add_argument("--allow-float", action="store_true", help="let quantized layers compute in float if they must")


def _export(options) -> tuple[Any, dict]:
    check_output(options.output, options.force, ".tflite")
    inputs = None if options.calibration_data is None else load_examples(options.calibration_data)[0]
    model = load(options)
    kwargs = {"precision": options.precision, "calibration_data": inputs, "allow_float": options.allow_float}
    kwargs |= {"integer_io": options.integer_io, "batch_size": None if options.any_batch else 1}
    with working("exporting"):
        result = export(model, options.output, **kwargs)
    return result, {**dataclasses.asdict(result), "path": str(result.path)}


def add_pack(commands) -> None:
    summary = "write a file in which quantized and sparse weights take their real size"
    parser = command(commands, "pack", _pack, summary)
    takes_models(parser)
    writes(parser, "packed file")


def _pack(options) -> tuple[str, dict]:
    check_output(options.output, options.force)
    model = load(options)
    with working("packing"):
        num_bytes = save_packed(model, options.output)
    return f"{options.output}: {num_bytes:,} bytes", {"path": str(options.output), "num_bytes": num_bytes}


def add_benchmark(commands) -> None:
    summary = "put models side by side: bytes, MACs, latency in LiteRT and, with data, how good their answers are"
    parser = command(commands, "benchmark", _benchmark, summary)
    takes_models(parser, "models", ", or a .tflite file; the others are compared with the first", nargs="+")
    parser.add_argument("--data", metavar="FILE", help=".npz with x (or the names of several inputs) and y")
    parser.add_argument("--metric", metavar="NAME", help="a Keras metric or loss (default: accuracy or absolute error)")
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="inferences of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="for LiteRT (default: %(default)s)")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw it, too: .png, .svg or .pdf")
    parser.add_argument("--force", action="store_true", help="overwrite the picture if it exists")


def _benchmark(options) -> tuple[Any, dict]:
    if options.plot is not None:
        check_output(options.plot, options.force, ".png", ".svg", ".pdf")
    data = None if options.data is None else load_examples(options.data)
    kwargs = {"num_threads": options.threads, "runs": options.runs, "safe_mode": not options.unsafe}
    comparison = compare(_by_name(options.models), data, metric=options.metric, **kwargs)
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


SUBCOMMANDS = (add_demo, add_report, add_shrink, add_export, add_pack, add_benchmark)
