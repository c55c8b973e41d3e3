"""`Recipe`: a plan of compression steps that is written down, run, and kept with what came out."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.data import check_reusable
from keras_squeeze.introspection.functional import compile_like, functional_of
from keras_squeeze.introspection.variables import require_tensorflow
from keras_squeeze.quantizers import Quantizer
from keras_squeeze.recipes.steps import KINDS, PruneNeurons, Quantize, Step, Task, TrainingStep
from keras_squeeze.schedules import Schedule
from keras_squeeze.training.after_target import AfterTarget

_SAMPLE = 512  # examples for criteria that need data, and for ranges
_SAMPLE_BATCHES = 8


class Recipe:
    """A plan of steps: which neurons and weights go, how many bits stay, and how long the model trains meanwhile.

    Steps come in the order in which they are given; each gets a part of the epochs, and its schedule runs over that
    part. They are objects of `keras_squeeze.steps` or the dicts that JSON has for them:

    * `PruneNeurons` (`"prune_neurons"`): neurons go and the model is rebuilt without them.
    * `PruneWeights` (`"prune_weights"`): single weights become zero, and stay so in later steps.
    * `Quantize` (`"quantize"`): training with few bits.
    * `FineTune` (`"fine_tune"`): training on, with the uncompressed model as a teacher where `distillation` says so.
    * `Export` (`"export"`): a `.tflite`, `.keras` or packed file.

    Args:
        steps: The steps. None at all: `fit` trains nothing and copies the model.

    Raises:
        TypeError, ValueError: a step that is none, or steps in an order that cannot be.

    Example:

    ```python
    recipe = ks.Recipe([steps.PruneNeurons(0.5), steps.PruneWeights(0.8), steps.Quantize("int8")])
    small = recipe.fit(model, x, y, epochs=10, validation_data=(x_val, y_val))
    ks.export(small, "small.tflite")
    recipe.save("recipe.json")
    ```
    """

    def __init__(self, steps: Iterable[Step | Mapping[str, Any]] = ()):
        if isinstance(steps, (Step, Mapping, str)):
            raise TypeError(f"`steps` must be a list of steps. Received: {steps!r}. Put it into a list: [step].")
        self.steps: tuple[Step, ...] = tuple(map(_step, steps))
        _check_order(self.steps)

    def fit(
        self,
        model: keras.Model,
        x=None,
        y=None,
        *,
        epochs: int = 1,
        directory=None,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        **options,
    ) -> keras.Model:
        """Runs the recipe on a copy of a model.

        Args:
            model: A built Functional or Sequential model, compiled. It stays as it is.
            x, y: Training data as for `keras.Model.fit`.
            epochs: Altogether. They are shared out by `share`; where there are fewer than steps that train, the last
                ones get one each, and the others are done in one shot.
            directory: Where `Export` steps write; made if it is missing. None: the working directory.
            callbacks: Ordinary Keras callbacks. They see a `fit` for each step that trains, with epochs counted on.
                Early stopping and the picking of a best model see a step only from its target on, as in `AfterTarget`.
            options: The rest of what `keras.Model.fit` takes, such as `batch_size`, `validation_data`, `verbose`.

        Returns:
            The compressed model, compiled like `model`, with its quantizers where it has some: `export`, `save_packed`
            and `finalize` take it. Its `history` is that of all epochs.

        Raises:
            TypeError, ValueError: a model that is not compiled or not built, data that can be read only once, an option
                that a recipe cannot run with, or what a step raises; the message begins with the step then.
        """
        require_tensorflow()
        _check_fit(model, x, epochs, options)
        trainings = sum(isinstance(step, TrainingStep) and step.share > 0 for step in self.steps)
        beside = _check_callbacks(callbacks, trainings)
        if directory is not None:
            directory = pathlib.Path(directory)
            directory.mkdir(parents=True, exist_ok=True)
        run = _Run(model, (x, y), {"x": x, "y": y, **options}, beside)
        current = _copy(model)
        shares = share_out(epochs, [getattr(step, "share", 0.0) for step in self.steps])
        for number, (step, count) in enumerate(zip(self.steps, shares, strict=True), start=1):
            run.announce(f"step {number} of {len(self.steps)}, {step.kind}", count)
            try:
                fit = run.trainer(step, count) if count else None
                current = step.run(Task(current, model, run.sample, fit, directory))
            except (ValueError, TypeError) as error:
                error_class = TypeError if isinstance(error, TypeError) else ValueError
                raise error_class(f"Step {number} of the recipe, {step.kind}: {error}") from error
        compile_like(model, current)
        current.history = run.history
        return current

    def plan(self) -> dict[str, Any]:
        """What the recipe does to a model, as the dict that `advise` takes."""
        intents: dict[str, Any] = {}
        for step in self.steps:
            intents |= step.intent()
        return intents

    def to_dict(self) -> dict[str, Any]:
        """The recipe as dicts, lists, strings and numbers."""
        return {"steps": [step.to_dict() for step in self.steps]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_dict` made.

        Raises:
            TypeError, ValueError: it is none; the message says where.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("steps"), list):
            raise TypeError(f'A recipe is a dict with a list of "steps". Received: {values!r}')
        unknown = [name for name in values if name != "steps"]
        if unknown:
            raise ValueError(f'A recipe has "steps" and nothing else. Received: {", ".join(map(repr, unknown))}')
        return cls(values["steps"])

    def to_json(self, **kwargs) -> str:
        """The recipe as JSON; the arguments are those of `json.dumps`, such as `indent=2`."""
        return json.dumps(self.to_dict(), **kwargs)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The recipe that `to_json` made.

        Raises:
            TypeError, ValueError: it is none, or no JSON.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"This is no JSON: {error}. Received: {text[:80]!r}") from None

    def save(self, path) -> pathlib.Path:
        """Writes a `.json`, `.yaml` or `.yml` file."""
        path = pathlib.Path(path)
        if _is_yaml(path):
            import yaml

            path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))
        else:
            path.write_text(f"{self.to_json(indent=2)}\n")
        return path

    @classmethod
    def load(cls, path) -> "Recipe":
        """Reads what `save` wrote, or what you wrote.

        Raises:
            TypeError, ValueError: there is no such file, or no recipe in it.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(f"There is no file {path}. Pass a .json or .yaml file with a recipe.")
        try:
            return cls.from_dict(read_mapping(path))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    def __eq__(self, other) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"Recipe([{', '.join(map(repr, self.steps))}])"

    def __str__(self) -> str:
        return " -> ".join(map(_in_words, self.steps)) or "nothing"


def share_out(epochs: int, shares: Sequence[float]) -> list[int]:
    """Whole epochs for each share.

    A share above zero gets at least one epoch, the rest go by largest remainder; where there are too few for that, the
    last ones get one each.
    """
    counts = [0] * len(shares)
    takers = [index for index, share in enumerate(shares) if share > 0]
    if epochs <= len(takers) or not takers:
        for index in takers[len(takers) - epochs :]:
            counts[index] = 1
        return counts
    whole = sum(shares)
    exact = {index: epochs * shares[index] / whole for index in takers}
    for index in takers:
        counts[index] = max(1, int(exact[index]))
    while sum(counts) < epochs:
        counts[max(takers, key=lambda index: (exact[index] - counts[index], index))] += 1
    while sum(counts) > epochs:
        counts[max((i for i in takers if counts[i] > 1), key=lambda index: counts[index] - exact[index])] -= 1
    return counts


def read_mapping(path: pathlib.Path) -> Any:
    """What a `.json`, `.yaml` or `.yml` file holds.

    Raises:
        ValueError: it is neither.
    """
    text = path.read_text()
    if _is_yaml(path):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"This is no YAML: {' '.join(str(error).split())}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"This is no JSON: {error}") from None


class _Run:
    """One run of a recipe: the epochs so far, and the callbacks that go along."""

    def __init__(self, model: keras.Model, data: tuple, options: dict[str, Any], beside: list):
        self.history = keras.callbacks.History()
        self.history.set_model(model)
        self.history.epoch, self.history.history = [], {}
        self._model, self._data, self._options, self._beside = model, data, options, beside
        self._sample: Any = None
        self._done = 0

    @property
    def sample(self):
        """The first examples, as arrays or batches."""
        if self._sample is None:
            self._sample = _first(*self._data)
        return self._sample

    def announce(self, text: str, epochs: int) -> None:
        if self._options.get("verbose", "auto"):
            duration = "without training" if not epochs else "1 epoch" if epochs == 1 else f"{epochs} epochs"
            print(f"keras_squeeze: {text}: {duration}")

    def trainer(self, step: Step, epochs: int):
        """What trains a model for a step."""

        def fit(model: keras.Model, *callbacks: keras.callbacks.Callback) -> None:
            compile_like(self._model, model, _optimizer(self._model, getattr(step, "learning_rate", None)))
            beside = [_Continued(callback, self._done) if self._done else callback for callback in self._beside]
            history = model.fit(**self._options, epochs=epochs, callbacks=[*callbacks, *beside])
            self._add(history)
            self._done += epochs

        return fit

    def _add(self, history: keras.callbacks.History) -> None:
        """Quantities that some steps lack are NaN there."""
        before, ran = len(self.history.epoch), len(history.epoch)
        self.history.epoch += [self._done + epoch for epoch in history.epoch]
        for name in dict.fromkeys([*self.history.history, *history.history]):
            values = self.history.history.setdefault(name, [float("nan")] * before)
            values += history.history.get(name, [float("nan")] * ran)


class _Continued(keras.callbacks.Callback):
    """A user's callback in a later step: epochs are counted on."""

    def __init__(self, callback: keras.callbacks.Callback, offset: int):
        super().__init__()
        for name in dir(keras.callbacks.Callback):
            if name.startswith(("on_", "set_")) and name not in ("on_epoch_begin", "on_epoch_end"):
                if name.startswith("on_") and getattr(getattr(callback, name), "_is_default", False):
                    continue  # Keras runs batches faster where no one listens
                setattr(self, name, getattr(callback, name))
        self.on_epoch_begin = lambda epoch, logs=None: callback.on_epoch_begin(epoch + offset, logs)
        self.on_epoch_end = lambda epoch, logs=None: callback.on_epoch_end(epoch + offset, logs)


def _step(value) -> Step:
    if isinstance(value, Step):
        return value
    if not isinstance(value, Mapping) or "step" not in value:
        raise TypeError(
            'A step is an object of `keras_squeeze.steps`, or a dict such as {"step": "prune_weights", "schedule": '
            f"0.8}}. Received: {value!r}"
        )
    fields = dict(value)
    name = fields.pop("step")
    if name not in KINDS:
        raise ValueError(f"There is no step {name!r}; there are {', '.join(KINDS)}. Received: {dict(value)!r}")
    return KINDS[name].from_dict(fields)


def _check_order(steps: Sequence[Step]) -> None:
    quantized = False
    for step in steps:
        if quantized and isinstance(step, PruneNeurons):
            raise ValueError("Neurons cannot be removed from a quantized model: put `prune_neurons` before `quantize`.")
        if quantized and isinstance(step, Quantize):
            raise ValueError("A model can be quantized once: a recipe takes one `quantize`, with a dict for `weights`.")
        quantized = quantized or isinstance(step, Quantize)


def _check_fit(model, x, epochs, options) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {model!r}")
    if not model.built or functional_of(model) is None:
        raise ValueError(f"A recipe needs a built Functional or Sequential model. Received: '{model.name}'")
    if not model.compiled:
        raise ValueError(
            f"Model '{model.name}' is not compiled, so that it cannot be trained. Call model.compile(optimizer, loss, "
            "metrics=[...]) first."
        )
    checks.non_negative_int("epochs", epochs)
    if x is None:
        raise ValueError("A recipe needs data: pass x and y, or a dataset. Received: x=None")
    check_reusable(x)
    if options.get("initial_epoch"):
        raise ValueError(f"A recipe begins at epoch 0. Received: initial_epoch={options['initial_epoch']}")


def _check_callbacks(callbacks, trainings: int) -> list[keras.callbacks.Callback]:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    beside = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else list(callbacks or ())
    if trainings > 1 and any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in beside):
        raise ValueError(
            "BackupAndRestore resumes one `fit`, and this recipe has several. Leave it out, or run one step at a time."
        )
    return [AfterTarget(callback) if _picks(callback) else callback for callback in beside]


def _picks(callback: keras.callbacks.Callback) -> bool:
    """Whether it may end a step, or keep its model, before the step has done what it is to do."""
    return isinstance(callback, keras.callbacks.EarlyStopping) or getattr(callback, "save_best_only", False)


def _copy(model: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    compile_like(model, copy)
    return copy


def _optimizer(model: keras.Model, learning_rate: float | None):
    """A fresh one like that of a model; by default with the same learning rate or schedule."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    config = optimizer.get_config()
    return type(optimizer).from_config(config if learning_rate is None else {**config, "learning_rate": learning_rate})


def _first(x, y):
    """Some examples of the training data, `(x, y)` or batches."""
    import tensorflow as tf

    if isinstance(x, tf.data.Dataset):
        return x.take(_SAMPLE_BATCHES).cache()
    if isinstance(x, keras.utils.PyDataset):
        return [x[index] for index in range(min(len(x), _SAMPLE_BATCHES))]
    parts = (x,) if y is None else (x, y)
    return keras.tree.map_structure(lambda array: np.asarray(array[:_SAMPLE]), parts)


def _in_words(step: Step) -> str:
    """Without what has its default."""
    arguments = {name: _word(getattr(step, name)) for name in step.to_dict() if name != "step"}
    details = [text if name in ("schedule", "weights") else f"{name}={text}" for name, text in arguments.items()]
    return f"{step.kind}({', '.join(details)})"


def _word(value) -> str:
    if isinstance(value, Schedule):
        return f"{value.final:.3g}"
    if isinstance(value, Quantizer):
        return f"{type(value).__name__}, {value.bits} bits"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_word(part)}" for name, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_yaml(path: pathlib.Path) -> bool:
    return path.suffix in (".yaml", ".yml")
