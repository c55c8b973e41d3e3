"""The subcommand that compresses a model in many ways: `search`."""

import json
import pathlib
from typing import Any

from keras_squeeze.commands.arguments import command, takes_models
from keras_squeeze.commands.fitting import (
    Examples,
    add_data,
    add_training,
    check_trainable,
    load_trainable,
    read_examples,
    stumbling,
)
from keras_squeeze.deployment.writing import write_file
from keras_squeeze.search.artifacts import ARTIFACTS, Result
from keras_squeeze.search.objectives import Budgets
from keras_squeeze.search.space import CompressionSpace

_SAMPLERS = ("tpe", "nsga2", "random")


def add_search(commands) -> None:
    summary = "look for the best trade-offs between a metric and sizes; run again, it goes on where it was"
    parser = command(commands, "search", _search, summary)
    takes_models(parser)
    folder = "for the trials, front.png and front.json"
    parser.add_argument("--directory", type=pathlib.Path, required=True, metavar="FOLDER", help=folder)
    parser.add_argument("--overwrite", action="store_true", help="throw away what an earlier search left there")
    parser.add_argument("--recipe-space", metavar="FILE", help="what may vary: a .yaml or .json file")
    parser.add_argument("--max-trials", type=int, default=40, metavar="N", help="(default: %(default)s)")
    metric = "that the model was compiled with, or loss (default: the first one)"
    parser.add_argument("--metric", metavar="NAME", help=metric)
    size = "the file whose size is size_bytes (default: %(default)s)"
    parser.add_argument("--artifact", choices=tuple(ARTIFACTS), default="tflite", help=size)
    parser.add_argument("--latency", action="store_true", help="measure latency_ms as well")
    default = "(default: val_METRIC size_bytes)"
    parser.add_argument("--objectives", nargs="+", metavar="NAME", help=f"what is traded off {default}")
    budget = "max_NAME=NUMBER or min_NAME=NUMBER, such as max_size_bytes=50000; may be there again"
    parser.add_argument("--budget", action="append", default=[], metavar="LIMIT", help=budget)
    parser.add_argument("--sampler", choices=_SAMPLERS, default="tpe", help="(default: %(default)s)")
    add_data(parser, needed=True, split=0.2)
    add_training(parser, epochs=5)


def _search(options) -> tuple[None, dict]:
    budgets = _budgets(options.budget)
    examples = read_examples(options)
    check_trainable(options, examples)
    tuner = _tuner(options, examples, budgets)
    how = {"epochs": options.epochs, "batch_size": options.batch_size, "validation_data": examples.validation}
    try:
        with stumbling():
            tuner.search(examples.x, examples.y, **how, verbose=2 if options.verbose else 1)
    except RuntimeError as error:  # of Keras Tuner, where nothing but failures is left
        raise ValueError(f"The search cannot go on: {error}") from error
    if _is_worker():  # the chief has the results
        return None, {}
    facts = _show(tuner, options.directory)
    best = tuner.best(**budgets) if budgets else None  # raises where nothing is within them
    if best is not None:
        print(f"The best within {Budgets.of(**budgets).text()} is in {best.directory}.")
    return None, {**facts, "best": best and _facts(best)}


def _is_worker() -> bool:
    from keras_tuner.src.distribute import utils as distributed

    return distributed.has_chief_oracle() and not distributed.is_chief_oracle()


def _tuner(options, examples: Examples, budgets: dict[str, float]):
    from keras_squeeze.search.hypermodel import CompressionHyperModel
    from keras_squeeze.search.oracle import ParetoOracle
    from keras_squeeze.search.tuner import CompressionTuner

    space = None if options.recipe_space is None else CompressionSpace.load(options.recipe_space)
    model = load_trainable(options, examples)
    how = {"metric": options.metric, "artifact": options.artifact, "latency": options.latency}
    hyper = CompressionHyperModel(model, space, **how)
    objectives = options.objectives or [f"val_{hyper.metric}", "size_bytes"]
    oracle = ParetoOracle(
        objectives, options.max_trials, sampler=options.sampler, seed=options.seed, budgets=Budgets.of(**budgets)
    )
    return CompressionTuner(hyper, oracle, directory=options.directory, overwrite=options.overwrite)


def _show(tuner, folder: pathlib.Path) -> dict[str, Any]:
    """Prints the front, and writes it as a picture and as numbers."""
    front = [_facts(result) for result in tuner.pareto_front()]
    if not front:
        raise ValueError(f"No trial of this search came to an end: see the lines above. Received: {folder}")
    tuner.results_summary(len(front))
    tuner.plot_pareto(folder / "front.png")
    write_file(folder / "front.json", json.dumps(front, indent=2).encode())
    return {"directory": str(folder), "picture": str(folder / "front.png"), "front": front}


def _facts(result: Result) -> dict[str, Any]:
    return {"metrics": result.metrics, "recipe": result.recipe.to_dict(), "directory": str(result.directory)}


def _budgets(given: list[str]) -> dict[str, float]:
    budgets: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            budgets[name] = float(number.replace("_", ""))
        except ValueError:
            raise ValueError(
                f"--budget must be a name and a number, such as max_size_bytes=50000. Received: {text}"
            ) from None
    Budgets.of(**budgets)  # raises where they contradict each other
    return budgets


SUBCOMMANDS = (add_search,)
