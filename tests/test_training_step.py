"""A training step that other callbacks have made anew in the middle of `fit` still prunes and logs."""

import keras
import pytest
from networks import ZerosAtEveryStep, count_zeros, expected_zeros, kernels

import keras_squeeze as ks

TARGET = 0.8
STEPS = 8  # of an epoch


def network(kind=keras.Sequential, optimizer="adam", **compile_options) -> keras.Model:
    """As few layers as can be, since every trace takes time; the same initial weights every time."""
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(),
        keras.layers.Dense(16, activation="relu", name="hidden"),
        keras.layers.Dense(10, name="logits"),
    ]
    model = kind(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False, **compile_options)
    return model


class Anew(keras.callbacks.Callback):
    """Makes the training step anew at an event, as a callback does that unfreezes layers."""

    def __init__(self, event: str, at: int | None = 3):
        super().__init__()
        self.count = 0
        if event == "on_train_begin":
            self.on_train_begin = lambda logs=None: self.make()
        else:
            setattr(self, event, lambda index, logs=None: self.make() if at is None or index == at else None)

    def make(self):
        self.count += 1
        self.model.make_train_function(force=True)


def run(digits, *others, pruning=None, first=False, **options):
    """Prunes with others before or after, and what was zero and logged at every step."""
    x, y = (part[: 32 * STEPS] for part in digits)
    model, zeros = network(**options), ZerosAtEveryStep()
    pruning = pruning or ks.MagnitudePruning(ks.schedules.PolynomialDecay(TARGET, begin=1, end=12, frequency=2))
    ordered = [*others, pruning] if first else [pruning, *others]
    options = {"epochs": 4, "batch_size": 32, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, callbacks=[*ordered, zeros], **options).history
    return model, zeros, history


@pytest.fixture(scope="module")
def undisturbed(digits):
    keras.utils.set_random_seed(0)
    _, zeros, history = run(digits)
    assert len(set(zeros.at_batch[:STEPS])) > 3  # masks move inside epochs
    return zeros, history


EVENTS = {
    "on_train_begin": {},
    "on_epoch_begin": {"at": 1},
    "on_epoch_end": {"at": 0},
    "on_train_batch_begin": {"at": 3},
    "on_train_batch_end": {"at": 3},
    "at the last batch": {"event": "on_train_batch_end", "at": STEPS - 1},
    "at every epoch": {"event": "on_epoch_begin", "at": None},
}


@pytest.mark.parametrize("first", [False, True], ids=["after pruning", "before pruning"])
@pytest.mark.parametrize("event", EVENTS)
def test_pruning_goes_on_after_another_callback_made_the_training_step_anew(digits, undisturbed, event, first):
    expected, history = undisturbed
    anew = Anew(**{"event": event, **EVENTS[event]})
    model, zeros, actual = run(digits, anew, first=first)
    assert anew.count in (1, 4)
    assert zeros.at_batch == expected.at_batch
    assert zeros.at_epoch == expected.at_epoch
    size = sum(kernel.size for kernel in kernels(model).values())
    assert zeros.in_logs == pytest.approx([count / size for count in zeros.at_batch])
    assert actual["sparsity"] == pytest.approx(history["sparsity"])
    assert actual["loss"] == pytest.approx(history["loss"], rel=1e-4)
    assert count_zeros(model) == expected_zeros(model, TARGET)
    assert "make_train_function" not in vars(model)
    assert model.train_function is None
    assert all(variable.constraint is None for variable in model.trainable_variables)


def test_a_model_with_its_own_make_train_function_is_asked_once_for_each_new_step(digits):
    made = []

    class Counting(keras.Sequential):
        def make_train_function(self, force=False):
            made.append(force)
            return super().make_train_function(force)

    model = network(Counting)
    x, y = (part[: 32 * STEPS] for part in digits)
    pruning = ks.MagnitudePruning(ks.schedules.Constant(TARGET))
    own = type(model).make_train_function
    model.fit(x, y, epochs=3, batch_size=32, verbose=0, callbacks=[pruning, Anew("on_epoch_begin", 1)])
    assert made.count(True) == 2  # when pruning began, and by the other callback
    assert model.make_train_function.__func__ is own
    assert "make_train_function" not in vars(model)


@pytest.mark.parametrize("compile_options", [{"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_under_the_conditions_of_compile(digits, compile_options):
    _, expected, history = run(digits, **compile_options)
    _, zeros, actual = run(digits, Anew("on_train_batch_end"), **compile_options)
    assert zeros.at_batch == expected.at_batch
    assert actual["sparsity"] == history["sparsity"]


def test_two_compression_callbacks_share_the_new_step(digits):
    def both():
        schedule = ks.schedules.PolynomialDecay(TARGET, begin=1, end=12, frequency=2)
        return ks.MagnitudePruning(schedule, layers="hidden"), ks.MagnitudePruning(schedule, layers="logits")

    found = []
    for others in ([], [Anew("on_train_batch_end")]):
        one, other = both()
        model, zeros, history = run(digits, *others, other, pruning=one)
        found.append((zeros.at_batch, history["sparsity"]))
        assert "make_train_function" not in vars(model)
    assert found[0] == found[1]
    assert found[0][0][0] < found[0][0][STEPS] < found[0][0][-1]


def test_a_layer_that_is_unfrozen_in_the_middle_of_fit_trains(digits):
    class Unfreeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                self.model.get_layer("hidden").trainable = True
                self.model.optimizer.build(self.model.trainable_variables)
                self.model.make_train_function(force=True)

    x, y = (part[: 32 * STEPS] for part in digits)
    model = network(optimizer="sgd")
    model.optimizer.build(model.trainable_variables)
    hidden = model.get_layer("hidden")
    hidden.trainable = False
    before, seen = hidden.kernel.numpy(), []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(hidden.kernel.numpy()))
    pruning = ks.MagnitudePruning(ks.schedules.PolynomialDecay(TARGET, begin=1, end=28), layers="logits")
    history = model.fit(x, y, epochs=4, batch_size=32, verbose=0, callbacks=[Unfreeze(), pruning, watch]).history
    assert [(kernel != before).any() for kernel in seen] == [False, False, True, True]
    assert history["sparsity"][0] < history["sparsity"][1] < history["sparsity"][-1]
    assert history["sparsity"][-1] == pytest.approx(TARGET, abs=0.01)
