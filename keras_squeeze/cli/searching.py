"""The subcommand that compresses a model in many ways: `search`."""

import json
import pathlib
from typing import Any

from keras_squeeze.atomic_write import write_file
from keras_squeeze.cli.arguments import columns, command, number, takes_models
from keras_squeeze.cli.fitting import (
    Examples,
    add_data,
    add_training,
    check_trainable,
    load_trainable,
    read_examples,
    stumbling,
)
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


def _search(options) -> tuple[str | None, dict]:
    budgets = _budgets(options.budget)
    examples = read_examples(options)
    check_trainable(options, examples)
    tuner = _tuner(options, examples, budgets)
    kwargs = {"epochs": options.epochs, "batch_size": options.batch_size, "validation_data": examples.validation}
    try:
        with stumbling():
            tuner.search(examples.x, examples.y, **kwargs, verbose=2 if options.verbose else 1)
    except RuntimeError as error:  # of Keras Tuner, where nothing but failures is left
        raise ValueError(f"The search cannot go on: {error}") from error
    if _is_worker():  # the chief has the results
        return None, {}
    front = tuner.pareto_front()
    if not front:
        raise ValueError(
            f"No trial of this search came to an end: see what was said of each. Received: {tuner.project_dir}"
        )
    facts = _write_front(tuner, front, options.directory)
    lines = _table(tuner, front)
    if not budgets:
        return "\n".join(lines), {**facts, "best": None}
    try:
        best = tuner.best(**budgets)
    except ValueError:  # nothing is within them; what there is, is of use all the same
        print("\n".join(lines))
        raise
    lines.append(f"The best with {Budgets.of(**budgets).text()} is in {best.directory}.")
    return "\n".join(lines), {**facts, "best": _facts(best)}


def _is_worker() -> bool:
    from keras_tuner.src.distribute import utils as distributed

    return distributed.has_chief_oracle() and not distributed.is_chief_oracle()


def _tuner(options, examples: Examples, budgets: dict[str, float]):
    from keras_squeeze.search.hypermodel import CompressionHyperModel
    from keras_squeeze.search.oracle import ParetoOracle
    from keras_squeeze.search.tuner import CompressionTuner

    space = None if options.recipe_space is None else CompressionSpace.load(options.recipe_space)
    model = load_trainable(options, examples)
    kwargs = {"metric": options.metric, "artifact": options.artifact, "latency": options.latency}
    hyper = CompressionHyperModel(model, space, **kwargs)
    objectives = options.objectives or [f"val_{hyper.metric}", "size_bytes"]
    oracle = ParetoOracle(
        objectives, options.max_trials, sampler=options.sampler, seed=options.seed, budgets=Budgets.of(**budgets)
    )
    return CompressionTuner(hyper, oracle, directory=options.directory, overwrite=options.overwrite)


def _write_front(tuner, front: list[Result], folder: pathlib.Path) -> dict[str, Any]:
    """The front as a picture and as numbers."""
    facts = [_facts(result) for result in front]
    tuner.plot_pareto(folder / "front.png")
    write_file(folder / "front.json", json.dumps(facts, indent=2).encode())
    return {"directory": str(folder), "picture": str(folder / "front.png"), "front": facts}


def _table(tuner, front: list[Result]) -> list[str]:
    """What is traded off and what has a budget; the recipe comes last, since it may be long."""
    names = list(dict.fromkeys([objective.name for objective in tuner.oracle.objectives]))
    names += [name for name, _, _ in tuner.oracle.budgets.limits if name not in names]
    before = Result.read(pathlib.Path(tuner.project_dir, "before"))
    rows = [["", *names], ["before", *(number(before.metrics.get(name)) for name in names)]]
    rows += [[r.directory.name, *(number(r.metrics.get(name)) for name in names)] for r in front]
    recipes = ["recipe", "", *(str(result.recipe) for result in front)]
    lines = [f"{line}  {recipe}".rstrip() for line, recipe in zip(columns(rows), recipes, strict=True)]
    return [*lines, f"The front, best first; each trial is a folder in {tuner.project_dir}."]


def _facts(result: Result) -> dict[str, Any]:
    return {"metrics": result.metrics, "recipe": result.recipe.to_dict(), "directory": str(result.directory)}


def _budgets(given: list[str]) -> dict[str, float]:
    budgets: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            value = float(number)  # Python's own form of a number, which may have underscores
            budgets[name] = int(value) if value.is_integer() else value
        except ValueError:
            raise ValueError(
                f"--budget must be a name and a number, such as max_size_bytes=50000. Received: {text}"
            ) from None
    Budgets.of(**budgets)  # raises where they contradict each other
    return budgets


SUBCOMMANDS = (add_search,)
