"""What the subcommands that train share: the compiled model, the data, and the training itself."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_squeeze.cli.arguments import working
from keras_squeeze.deployment.loading import load_examples, load_model
from keras_squeeze.progress import progress_bar
from keras_squeeze.recipes.recipe import Recipe
from keras_squeeze.recipes.steps import finished
from keras_squeeze.search.artifacts import evaluate

_DATA = "a .npz file with x (or the names of several inputs) and y"


@dataclass(frozen=True)
class Examples:
    """What the files hold; all but `x` may be None."""

    x: Any = None
    y: Any = None
    validation: tuple | None = None

    @property
    def sample(self) -> tuple | None:
        """For what looks at data without training on it."""
        if self.x is None:
            return None
        return (self.x,) if self.y is None else (self.x, self.y)


def add_data(parser: argparse.ArgumentParser, *, needed: bool, split: float = 0.0) -> None:
    """Adds the data; `split` is the part of it that is for validation by default."""
    parser.add_argument("--data", metavar="FILE", required=needed, help=f"to train on: {_DATA}")
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument("--validation-data", metavar="FILE", help="to measure the model on: a file of that kind")
    default = "default: %(default)s" if split else "default: none"
    validation.add_argument(
        "--validation-split",
        type=float,
        default=split,
        metavar="FRACTION",
        help=f"or the last part of the data, which is not trained on then ({default})",
    )


def add_training(parser: argparse.ArgumentParser, *, epochs: int | None, default: str = "%(default)s") -> None:
    """Adds how a model is trained, and how it is compiled where its file does not say so."""
    parser.add_argument("--epochs", type=int, default=epochs, metavar="N", help=f"(default: {default})")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="N", help="for the same result again")
    parser.add_argument("--verbose", action="store_true", help="show what Keras says while it trains")
    group = parser.add_argument_group("compiling", "for a model that was not compiled, or to compile it in another way")
    group.add_argument("--loss", metavar="NAME", help="as Keras calls it, such as sparse_categorical_crossentropy")
    group.add_argument("--from-logits", action="store_true", help="the loss takes logits: the model has no softmax")
    group.add_argument("--optimizer", metavar="NAME", help="as Keras calls it (default: adam)")
    group.add_argument("--learning-rate", type=float, metavar="X", help="(default: that of the optimizer)")
    group.add_argument("--metrics", nargs="+", metavar="NAME", help="as Keras calls them, such as accuracy")


def read_examples(options) -> Examples:
    """The data, as far as there is some."""
    if options.data is None:
        if options.validation_split:
            raise ValueError("--validation-split takes a part of --data. Received: no --data")
        own_validation = None if options.validation_data is None else _with_targets(options.validation_data)
        return Examples(validation=own_validation)
    x, y = load_examples(options.data)
    sizes = {len(array) for array in keras.tree.flatten((x, y)) if array is not None}
    if len(sizes) > 1:
        raise ValueError(f"{options.data} has arrays of different lengths. Received: {sorted(sizes)}")
    if options.validation_data is not None:
        return Examples(x, y, _with_targets(options.validation_data))
    if not options.validation_split:
        return Examples(x, y)
    begin = int(max(sizes) * (1 - options.validation_split))
    if not 0 < begin < max(sizes):
        raise ValueError(
            f"--validation-split must leave examples on both sides, in (0, 1). Received: {options.validation_split}"
        )
    _check_targets(options.data, y)
    (x_train, y_train), validation = (_part(x, y, part) for part in (slice(None, begin), slice(begin, None)))
    return Examples(x_train, y_train, validation)


def load_trainable(options, examples: Examples, *, needed: bool = True) -> keras.Model:
    """The model, compiled as its file and the options say.

    Args:
        options: Of the command line.
        examples: Data that the model has to fit.
        needed: Whether a model that nothing says how to compile is an error.
    """
    if options.seed is not None:
        keras.utils.set_random_seed(options.seed)
    with working("loading"):
        model = load_model(options.model, safe_mode=not options.unsafe, compiled=True)
        _compile(model, options, needed)
    for path, part in ((options.data, examples.sample), (options.validation_data, examples.validation)):
        if path is not None and part is not None:
            _check_fit(model, path, *part)
    return model


def check_trainable(options, examples: Examples) -> None:
    """Raises what is missing for a training."""
    if options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1. Received: {options.epochs}")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1. Received: {options.batch_size}")
    if examples.x is None:
        raise ValueError(f"Training needs data: pass --data FILE, {_DATA}. Received: --epochs without --data")
    _check_targets(options.data, examples.y)


def fit(recipe: Recipe, model: keras.Model, examples: Examples, options, directory=None) -> keras.Model:
    """Runs a recipe, with a bar for its epochs."""
    kwargs: dict[str, Any] = {"epochs": options.epochs, "batch_size": options.batch_size, "directory": directory}
    kwargs |= {"validation_data": examples.validation, "verbose": 1 if options.verbose else 0}
    with contextlib.nullcontext() if options.verbose else progress_bar("training", options.epochs) as advance:
        callbacks = [] if advance is None else [_Bar(advance, options.epochs)]
        with stumbling():
            return recipe.fit(model, examples.x, examples.y, callbacks=callbacks, **kwargs)


@contextlib.contextmanager
def stumbling() -> Iterator[None]:
    """Makes what TensorFlow stumbles over in the middle of a training an error of one line."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        about = ("Graph execution error", "Detected at node", "File ")  # where it happened, before what happened
        told = next((line for line in lines if not line.startswith(about)), lines[0])
        raise ValueError(f"The model cannot be trained on this data: {told}") from None


def measured(model: keras.Model, validation: tuple | None) -> tuple[str, float] | None:
    """The first metric of a model on validation data, finished as it ships; None without data or compilation."""
    if validation is None or not model.compiled:
        return None
    with working("measuring"):
        plain = finished(model)
        metrics = evaluate(plain, validation)
    names = [*plain.get_metrics_result(), *metrics]  # those of `evaluate` are sorted
    name = next((name for name in names if name in metrics and not name.endswith("loss")), "loss")
    return name, metrics[name]


class _Bar(keras.callbacks.Callback):
    """Moves a bar that is as long as all epochs."""

    def __init__(self, advance: Callable[..., None], epochs: int):
        super().__init__()
        self._advance, self._epochs = advance, epochs

    def on_epoch_begin(self, epoch, logs=None):
        self._advance(0, title=f"epoch {epoch + 1} of {self._epochs}")

    def on_train_batch_end(self, batch, logs=None):
        self._advance(1 / self.params["steps"])


def _compile(model: keras.Model, options, needed: bool) -> None:
    """Whatever is given replaces what the file says."""
    if options.loss is None and not model.compiled:
        if needed:
            raise ValueError(
                f"Nothing in {options.model} says how the model is trained: it was not compiled when it was saved, or "
                "with a loss or metric that is not Keras's own. Pass --loss, and if you like --optimizer, "
                "--learning-rate and --metrics."
            )
        return
    if options.from_logits and options.loss is None:
        raise ValueError("--from-logits belongs to a loss. Received: no --loss")
    compile_options = (options.loss, options.optimizer, options.learning_rate, options.metrics)
    if all(value is None for value in compile_options):
        return
    config = dict(model._compile_config.config) if model.compiled else {}
    if options.loss is not None:
        config |= {"loss": _loss(options.loss, options.from_logits), "loss_weights": None}
    if options.metrics is not None:
        config["metrics"] = [_known(keras.metrics.get, name, "--metrics") and name for name in options.metrics]
    config["optimizer"] = _optimizer(model.optimizer if model.compiled else None, options)
    model.compile(**config)


def _optimizer(present, options):
    wanted = options.optimizer or present or "adam"
    optimizer = _known(keras.optimizers.get, wanted, "--optimizer")
    rate = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
    if rate and not options.learning_rate > 0:
        raise ValueError(f"--learning-rate must be above 0. Received: {options.learning_rate}")
    return type(optimizer).from_config({**optimizer.get_config(), **rate})


def _loss(name: str, from_logits: bool):
    """An object, so that it is saved with the model as it is."""
    loss = _known(keras.losses.get, name, "--loss")
    whole = "".join(word.capitalize() for word in getattr(loss, "__name__", "").split("_"))
    loss_class = type(loss) if isinstance(loss, keras.losses.Loss) else getattr(keras.losses, whole, None)
    if not from_logits:
        return loss
    try:
        return loss_class(from_logits=True)  # type: ignore[misc]
    except TypeError:
        raise ValueError(f"--from-logits is for losses that take probabilities. Received: --loss {name}") from None


def _known(get, name, argument: str):
    try:
        return get(name)
    except (ValueError, TypeError):
        raise ValueError(f"{argument} must be a name that Keras knows. Received: {name}") from None


def _check_fit(model: keras.Model, path, x, y=None) -> None:
    """Runs two examples, since what a training says of data that does not fit is hard to read."""
    x, y = _part(x, y, slice(None, 2))
    try:
        predictions = model(x, training=False)
        if model.compiled and y is not None:
            model.compute_loss(x, y, predictions)
            model.compute_metrics(x, y, predictions)
            model.reset_metrics()
    except Exception as error:  # of whatever kind, the data is why
        told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{path} does not fit the model: {told}") from None


def _part(x, y, bounds: slice) -> tuple:
    return keras.tree.map_structure(lambda array: array[bounds], x), None if y is None else y[bounds]


def _with_targets(path) -> tuple:
    x, y = load_examples(path)
    _check_targets(path, y)
    return x, y


def _check_targets(path, y: np.ndarray | None) -> None:
    if y is None:
        raise ValueError(f"{path} has no targets: expected an array y. Received: inputs alone")
