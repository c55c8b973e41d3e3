"""The subcommands that compress a model in one way, in one shot or while it trains: `prune`, `quantize` and `run`."""

import functools
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping

import keras

from keras_squeeze.analysis.report import summarize
from keras_squeeze.cli.arguments import (
    changes,
    check_model_output,
    columns,
    command,
    number,
    takes_models,
    working,
    write_model,
    writes,
)
from keras_squeeze.cli.fitting import (
    Examples,
    add_data,
    add_training,
    check_trainable,
    fit,
    load_trainable,
    measured,
    read_examples,
)
from keras_squeeze.introspection.functional import compile_like
from keras_squeeze.quantization.conversion import quantize_aware
from keras_squeeze.recipes.recipe import Recipe
from keras_squeeze.recipes.steps import PruneNeurons, PruneWeights, Quantize, Step, Task, needs_ranges
from keras_squeeze.search.artifacts import ARTIFACTS, Result, write_result
from keras_squeeze.weight_pruning import weight_allocation

_OUTPUT = ".keras, .tflite or, with any other suffix, packed file"
RESULT = ("model.keras", *ARTIFACTS.values(), "recipe.json", "report.json", "metrics.json")
EXPORTS = "exports"


def add_prune(commands) -> None:
    summary = "remove neurons or single weights, in one shot or, with --epochs, gradually while the model trains"
    parser = command(commands, "prune", _prune, summary)
    takes_models(parser)
    writes(parser, _OUTPUT)
    parser.add_argument("--sparsity", type=float, metavar="S", help="fraction of the weights to make zero, in [0, 1)")
    whole = parser.add_mutually_exclusive_group()
    whole.add_argument("--neurons", type=float, metavar="F", help="fraction of the neurons to remove, in [0, 1)")
    whole.add_argument("--macs", type=float, metavar="F", help="or the fraction of the MACs to keep, in (0, 1]")
    parser.add_argument("--pattern", default="unstructured", help="of the zeros: 2:4, or a block such as 1x4")
    allocations = ", ".join(weight_allocation.ALLOCATIONS)
    for name, what in (
        ("allocation", f"how it is spread: {allocations}"),
        ("criterion", "by what the least is chosen"),
    ):
        more = "; for weights and for neurons, whichever know the name: may be there twice"
        parser.add_argument(f"--{name}", action="append", metavar="NAME", help=f"{what}{more}")
    parser.add_argument("--round-to", type=int, default=8, metavar="N", help="widths end at multiples of this (8)")
    _add_layers(parser)
    add_data(parser, needed=False)
    add_training(parser, epochs=None, default="none, in one shot")


def _prune(options) -> tuple[str, dict]:
    return _compress(options, Recipe(_pruning(options)))


def add_quantize(commands) -> None:
    summary = "quantize a model, after training or, with --epochs, while it trains on"
    parser = command(commands, "quantize", _quantize, summary)
    takes_models(parser)
    writes(parser, _OUTPUT)
    quantizers = "int8, int4 (2 to 16 bits), fixed8, ternary, binary, binary_connect, xnor"
    parser.add_argument("--weights", default="int8", metavar="NAME", help=f"{quantizers} (default: %(default)s)")
    parser.add_argument(
        "--activations", default="default", metavar="NAME", help="the same, or none (default: int8, but none with xnor)"
    )
    parser.add_argument("--allow-float", action="store_true", help="let layers of a .tflite file compute in float")
    _add_layers(parser)
    add_data(parser, needed=False)
    add_training(parser, epochs=None, default="none, after training")


def _quantize(options) -> tuple[str, dict]:
    activations = None if options.activations.lower() == "none" else options.activations
    return _compress(options, Recipe([Quantize(options.weights, activations, options.layers)]))


def add_run(commands) -> None:
    summary = "run a recipe file on a model, and write all that comes out into a folder"
    parser = command(commands, "run", _run, summary)
    parser.add_argument("recipe", metavar="RECIPE", help="a .json or .yaml file, as `Recipe.save` writes it")
    takes_models(parser)
    parser.add_argument(
        "--directory",
        type=pathlib.Path,
        required=True,
        metavar="FOLDER",
        help=f"for {', '.join(RESULT)}, and {EXPORTS}/ for the files of export steps",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what an earlier run left in the folder")
    add_data(parser, needed=True)
    add_training(parser, epochs=10)


def _run(options) -> tuple[str, dict]:
    recipe = Recipe.load(options.recipe)
    _check_folder(options.directory, options.force)
    examples = read_examples(options)
    check_trainable(options, examples)
    model = load_trainable(options, examples)
    metric = (measured(model, examples.validation) or (None,))[0]
    with tempfile.TemporaryDirectory() as folder:
        before = _result(model, Recipe(), pathlib.Path(folder), metric, examples)
    _clear(options.directory)
    trained = fit(recipe, model, examples, options, options.directory / EXPORTS)
    after = _result(trained, recipe, options.directory, metric, examples)
    exports = sorted(str(path) for path in (options.directory / EXPORTS).iterdir())
    if not exports:
        (options.directory / EXPORTS).rmdir()
    facts = {"directory": str(options.directory), "recipe": recipe.to_dict(), "exports": exports}
    facts |= {"before": before.metrics, "after": after.metrics}
    return "\n".join([*_before_and_after(before.metrics, after.metrics), f"{options.directory}: {recipe}"]), facts


def _compress(options, recipe: Recipe) -> tuple[str, dict]:
    """Runs a recipe and writes one file."""
    check_model_output(options.output, options.force)
    examples = read_examples(options)
    if options.epochs is not None:
        check_trainable(options, examples)
    model = load_trainable(options, examples, needed=options.epochs is not None)
    before, metric_before = summarize(model).total, measured(model, examples.validation)
    trained = _at_once(recipe, model, examples) if options.epochs is None else fit(recipe, model, examples, options)
    with working("writing"):
        num_bytes = write_model(trained, options.output, examples.x, getattr(options, "allow_float", False))
    text, facts = changes(options.output, num_bytes, before, summarize(trained).total)
    metric_after = measured(trained, examples.validation)
    if metric_before and metric_after:
        name, values = metric_before[0], [metric_before[1], metric_after[1]]
        facts[f"val_{name}"] = values
        text += f", {name} {values[0]:.4g} -> {values[1]:.4g}"
    return text, facts


def _at_once(recipe: Recipe, model: keras.Model, examples: Examples) -> keras.Model:
    """The steps of a recipe without training, on the model itself; all the data is looked at."""
    current = model
    for step in recipe.steps:
        with working(step.kind.replace("_", " ")):
            if isinstance(step, Quantize) and examples.x is None:
                _check_ranges(current, step)
            current = step.run(Task(current, model, examples.sample, None, None))
    if current is not model:
        compile_like(model, current)
    return current


def _check_ranges(model: keras.Model, step: Quantize) -> None:
    if needs_ranges(quantize_aware(model, step.weights, step.activations, layers=step.layers)):
        raise ValueError(
            "The ranges of activations are measured on data: pass --data FILE with inputs, or --activations none to "
            "quantize the weights only. Received: no --data"
        )


def _pruning(options) -> list[Step]:
    """Neurons first: of the weights that are left, single ones go then."""
    makers: list[Callable[..., Step]] = []
    if options.neurons is not None or options.macs is not None:
        kwargs = {"target_macs": options.macs, "layers": options.layers, "round_to": options.round_to}
        makers.append(functools.partial(PruneNeurons, options.neurons, **kwargs))
    if options.sparsity is not None:
        pattern = _pattern(options.pattern)
        makers.append(functools.partial(PruneWeights, options.sparsity, pattern=pattern, layers=options.layers))
    if not makers:
        raise ValueError("Say what is to go: --sparsity, --neurons or --macs. Received: none of them")
    for argument in ("allocation", "criterion"):
        for name in getattr(options, argument) or ():
            makers = _passed_on(makers, argument, name)
    return [make() for make in makers]


def _passed_on(makers: list[Callable[..., Step]], argument: str, name: str) -> list[Callable[..., Step]]:
    """Gives a name to the steps that know it, at least one."""
    steps: list[Callable[..., Step]] = []
    errors = []
    for make in makers:
        try:
            make(**{argument: name})
            steps.append(functools.partial(make, **{argument: name}))
        except ValueError as error:
            steps.append(make)
            errors.append(error)
    if len(errors) == len(makers):
        raise errors[-1]
    return steps


def _pattern(text: str):
    """A block is written with an x, such as 1x4."""
    block = re.fullmatch(r"\d+(x\d+)+", text)
    return tuple(map(int, text.split("x"))) if block else text


def _add_layers(parser) -> None:
    parser.add_argument(
        "--layers", action="append", metavar="REGEX", help="only layers in whose path it is found; may be there again"
    )


def _result(model: keras.Model, recipe: Recipe, folder: pathlib.Path, metric, examples: Examples) -> Result:
    with working("measuring"):
        kwargs = {"validation_data": examples.validation, "calibration_data": examples.x, "artifact": "packed"}
        return write_result(model, recipe, folder, metric=metric, **kwargs)


def _check_folder(folder: pathlib.Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--directory must be a folder. Received a file: {folder}")
    there = [name for name in (*RESULT, EXPORTS) if (folder / name).exists()]
    if there and not force:
        raise ValueError(f"{folder} has {', '.join(there)} already. Pass --force to overwrite what is there.")


def _clear(folder: pathlib.Path) -> None:
    """A file of an earlier run must not stand for one that this run cannot write."""
    for name in RESULT:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / EXPORTS, ignore_errors=True)


def _before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """A row for each metric."""
    names = [name for name in {**before, **after} if name != "size_bytes"]  # which is one of the others
    return columns(
        [["", "before", "after"], *([name, *(number(x.get(name)) for x in (before, after))] for name in names)]
    )


SUBCOMMANDS = (add_prune, add_quantize, add_run)
