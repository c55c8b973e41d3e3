"""Scores against their definitions, and gradients against those of a linear regression solved by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_squeeze.weight_pruning import criteria
from keras_squeeze.weight_pruning.criteria import LAMP, SNIP, Magnitude, Movement, Random, loss_gradients

# Scores.


def few_values(shape=(7, 5)):
    return np.random.default_rng(0).integers(-3, 4, shape).astype("float32") / 2


def test_magnitude_is_the_absolute_value():
    np.testing.assert_array_equal(
        Magnitude().scores(np.float32([[-2, 0], [-0.0, 3]])), np.float32([[2, 0], [0, 3]]), strict=True
    )


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("criterion", [Magnitude(), LAMP()], ids=repr)
def test_scores_are_float32_whatever_the_weight_is(criterion, dtype):
    weight = few_values().astype(dtype)
    scores = criterion.scores(weight)
    assert scores.dtype == "float32"
    np.testing.assert_array_equal(scores, criterion.scores(weight.astype("float32")))


def lamp_by_definition(weight):
    """`w_u^2 / sum of w_v^2 over all v with |w_v| >= |w_u|`; 0 for a weight that is 0."""
    values = weight.astype("float64").ravel()
    scores = [u**2 / sum(v**2 for v in values if abs(v) >= abs(u)) if u else 0.0 for u in values]
    return np.reshape(scores, weight.shape)


@pytest.mark.parametrize(
    "weight",
    [
        np.random.default_rng(1).standard_normal((6, 4, 3)).astype("float32"),
        few_values(),
        np.ones((2, 3), "float32"),
        np.float32([[0, 0, 1e-12]]),
        np.float32([[0, -5]]),
    ],
    ids=["random", "ties", "all equal", "tiny", "one"],
)
def test_lamp_by_its_definition(weight):
    np.testing.assert_allclose(LAMP().scores(weight), lamp_by_definition(weight), rtol=1e-6)


def test_lamp_of_zeros_is_zero():
    np.testing.assert_array_equal(LAMP().scores(np.zeros((2, 3), "float32")), np.zeros((2, 3), "float32"), strict=True)


def test_the_largest_weight_of_every_layer_has_lamp_score_one():
    for scale in (1e-3, 1, 1e3):
        assert LAMP().scores(scale * np.float32([1, -3, 2])).argmax() == 1
        assert LAMP().scores(scale * np.float32([1, -3, 2])).max() == 1


def test_random_is_uniform_noise_that_depends_on_path_and_seed_only():
    scores = Random(1).scores(np.zeros((300, 40)), path="a/kernel")
    assert scores.dtype == "float32"
    assert scores.shape == (300, 40)
    np.testing.assert_array_equal(scores, Random(1).scores(np.ones((300, 40)), path="a/kernel"))
    in_tenths, _ = np.histogram(scores, bins=10, range=(0, 1))
    np.testing.assert_allclose(in_tenths / scores.size, 0.1, atol=0.02)  # 7 standard deviations
    for other in (Random(2).scores(scores, path="a/kernel"), Random(1).scores(scores, path="b/kernel")):
        assert abs(np.corrcoef(scores.ravel(), other.ravel())[0, 1]) < 0.06  # 6 standard deviations


def test_movement_is_minus_weight_times_gradient():
    scores = Movement().scores(np.float32([2, 2, -2, -2, 0]), np.float32([3, -3, 3, -3, 3]))
    np.testing.assert_array_equal(scores, np.float32([-6, 6, 6, -6, 0]))


def test_snip_is_the_size_of_weight_times_gradient():
    scores = SNIP().scores(np.float32([2, 2, -2, -2, 0]), np.float32([3, -3, 3, -3, 3]))
    np.testing.assert_array_equal(scores, np.float32([6, 6, 6, 6, 0]))


@pytest.mark.parametrize("criterion", [Movement(), SNIP()], ids=repr)
def test_products_of_low_precision_weights_are_float32(criterion):
    scores = criterion.scores(np.float16([300]), np.float32([-300]))
    assert scores.dtype == "float32"
    assert scores == 90000  # more than a float16 can hold


# What `criterion=` may be.


@pytest.mark.parametrize(
    ("name", "expected"),
    [("magnitude", Magnitude), ("lamp", LAMP), ("random", Random), ("movement", Movement), ("snip", SNIP)],
)
def test_criteria_by_name(name, expected):
    assert type(criteria.get(name)) is expected


def test_a_criterion_stays_itself():
    criterion = Random(7)
    assert criteria.get(criterion) is criterion


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'magnitude', 'lamp', .*, 'snip'.*Received: criterion='l1'"):
        criteria.get("l1")


@pytest.mark.parametrize("identifier", [None, 3, Magnitude, abs])
def test_what_is_no_criterion(identifier):
    with pytest.raises(TypeError, match=r"`criterion` must be.*Received: "):
        criteria.get(identifier)


def test_the_config_of_something_else_is_no_criterion():
    with pytest.raises(TypeError, match=r"`criterion` must be.*Received: "):
        criteria.get(keras.saving.serialize_keras_object(keras.losses.MeanSquaredError()))


@pytest.mark.parametrize("seed", [-1, 0.5, True, "1", None])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r"`seed` must be an int, at least 0. Received: "):
        Random(seed)


@pytest.mark.parametrize("num_batches", [0, -1, 2.0, "all", True])
def test_bad_numbers_of_batches(num_batches):
    with pytest.raises(ValueError, match=r"`num_batches` must be None or an int, at least 1. Received: "):
        SNIP(num_batches)


@pytest.mark.parametrize("num_batches", [1, 100, None])
def test_numbers_of_batches(num_batches):
    assert SNIP(num_batches).num_batches == num_batches


# Gradients. For `y = x W` and the mean squared error over n samples and k outputs,
# L = sum (x W - y)^2 / (n k), so that dL/dW = 2 x^T (x W - y) / (n k).


@pytest.fixture
def regression():
    """A linear regression: model, x, y, and its weight."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, use_bias=False, name="linear")])
    model.compile("sgd", "mse")
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((24, 4)).astype("float32"), rng.standard_normal((24, 3)).astype("float32")
    return model, x, y, model.get_layer("linear").kernel


def gradient_by_hand(weight, x, y, sample_weight=None):
    residual = x @ weight.numpy() - y
    if sample_weight is not None:
        residual *= sample_weight[:, None]
    return 2 * x.T @ residual / y.size


class Batches(keras.utils.PyDataset):
    """Batches of 8."""

    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return tuple(array[8 * index : 8 * index + 8] for array in self.arrays)


FORMS = {
    "arrays": lambda *arrays: arrays,
    "list of arrays": lambda *arrays: list(arrays),
    "tf.data": lambda *arrays: tf.data.Dataset.from_tensor_slices(arrays).batch(8),
    "PyDataset": Batches,
    "iterator": lambda *arrays: iter([tuple(a[i : i + 8] for a in arrays) for i in (0, 8, 16)]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "sample weights"])
def test_the_gradient_over_equal_batches_is_that_over_all_data(regression, form, weighted):
    model, x, y, weight = regression
    data = (x, y, np.linspace(0, 2, 24, dtype="float32")) if weighted else (x, y)
    (gradient,) = loss_gradients(model, [weight], form(*data), batch_size=8)
    assert gradient.dtype == "float32"
    np.testing.assert_allclose(gradient, gradient_by_hand(weight, *data), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_batches", "samples"), [(1, 8), (2, 16), (3, 24), (8, 24), (None, 24)])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_only_so_many_batches_are_used(regression, form, num_batches, samples):
    model, x, y, weight = regression
    (gradient,) = loss_gradients(model, [weight], form(x, y), num_batches=num_batches, batch_size=8)
    np.testing.assert_allclose(gradient, gradient_by_hand(weight, x[:samples], y[:samples]), rtol=1e-5, atol=1e-6)


def test_movement_and_snip_of_the_regression(regression):
    model, x, y, weight = regression
    (gradient,) = loss_gradients(model, [weight], (x, y))
    product = weight.numpy() * gradient_by_hand(weight, x, y)
    np.testing.assert_allclose(Movement().scores(weight.numpy(), gradient), -product, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(SNIP().scores(weight.numpy(), gradient), abs(product), rtol=1e-5, atol=1e-6)


def test_frozen_weights_have_gradients_too(regression):
    model, x, y, weight = regression
    model.trainable = False
    (gradient,) = loss_gradients(model, [weight], (x, y))
    np.testing.assert_allclose(gradient, gradient_by_hand(weight, x, y), rtol=1e-5, atol=1e-6)


def test_weights_that_were_made_frozen_have_gradients_too(regression):
    _, x, y, _ = regression
    layer = keras.layers.Dense(3, use_bias=False, trainable=False)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile("sgd", "mse")
    (gradient,) = loss_gradients(model, [layer.kernel], (x, y))
    np.testing.assert_allclose(gradient, gradient_by_hand(layer.kernel, x, y), rtol=1e-5, atol=1e-6)


def test_gradients_come_in_the_order_of_the_weights(regression):
    """For `x A B` with residual r: dL/dA = 2 x^T r B^T / (n k), dL/dB = 2 (x A)^T r / (n k)."""
    _, x, y, _ = regression
    first, second = (keras.layers.Dense(units, use_bias=False) for units in (5, 3))
    model = keras.Sequential([keras.Input((4,)), first, second])
    model.compile("sgd", "mse")
    gradients = loss_gradients(model, [second.kernel, first.kernel], (x, y))
    a, b = first.kernel.numpy(), second.kernel.numpy()
    residual = x @ a @ b - y
    np.testing.assert_allclose(gradients[0], 2 * (x @ a).T @ residual / y.size, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[1], 2 * x.T @ residual @ b.T / y.size, rtol=1e-4, atol=1e-6)


def test_an_embedding_has_a_dense_gradient():
    """For the mean squared error of rows e_t of the table: dL/de_t = 2 / (n k) sum over where t occurs (e_t - y)."""
    table = keras.layers.Embedding(5, 2)
    model = keras.Sequential([keras.Input((3,)), table])
    model.compile("sgd", "mse")
    tokens = np.array([[0, 2, 2], [4, 2, 0]])
    y = np.random.default_rng(3).random((2, 3, 2)).astype("float32")
    (gradient,) = loss_gradients(model, [table.embeddings], (tokens, y))
    expected = np.zeros((5, 2))
    for position in np.ndindex(2, 3):
        expected[tokens[position]] += 2 * (table.embeddings.numpy()[tokens[position]] - y[position]) / y.size
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_inputs_and_outputs_may_be_nested(regression):
    _, x, y, _ = regression
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    layer = keras.layers.Dense(3, use_bias=False)
    model = keras.Model({"a": a, "b": b}, {"sum": layer(a + b), "b": layer(b)})
    model.compile("sgd", {"sum": "mse", "b": "mse"})
    (gradient,) = loss_gradients(model, [layer.kernel], ({"a": x, "b": 2 * x}, {"sum": y, "b": -y}))
    expected = gradient_by_hand(layer.kernel, 3 * x, y) + gradient_by_hand(layer.kernel, 2 * x, -y)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


# What must stay as it was.


def test_the_model_runs_in_inference_mode_and_stays_as_it_was(regression):
    """Dropout passes everything and batch normalization, new, scales by `1 / sqrt(1 + epsilon)`."""
    _, x, y, _ = regression
    layer, norm = keras.layers.Dense(3, use_bias=False), keras.layers.BatchNormalization(epsilon=3.0)
    model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dropout(0.9), layer])
    model.compile("sgd", "mse")
    before = [np.array(v.numpy()) for v in (*model.variables, *model.optimizer.variables)]
    (gradient,) = loss_gradients(model, [layer.kernel], (x, y))
    np.testing.assert_allclose(gradient, gradient_by_hand(layer.kernel, x / 2, y), rtol=1e-4, atol=1e-6)
    for variable, value in zip((*model.variables, *model.optimizer.variables), before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.fixture
def two_outputs():
    """Of such a model, Keras counts the loss of every output in a metric."""
    x = keras.Input((4,))
    model = keras.Model(x, [keras.layers.Dense(1, name="a")(x), keras.layers.Dense(2, name="b")(x)])
    model.compile("sgd", ["mse", "mae"], metrics=[["mae"], ["mse"]])
    rng = np.random.default_rng(4)
    return model, (rng.random((8, 4)), (rng.random((8, 1)), rng.random((8, 2))))


def test_metrics_of_several_outputs_stay_as_they_were(two_outputs):
    model, data = two_outputs
    before = model.train_on_batch(*data, return_dict=True)
    weight = model.get_layer("a").kernel
    loss_gradients(model, [weight], data)
    assert model.get_metrics_result() == before


def test_metrics_that_did_not_exist_before_are_empty(two_outputs):
    model, data = two_outputs
    loss_gradients(model, [model.get_layer("a").kernel], data)
    assert [v.path for v in model.metrics_variables if np.any(v.numpy() != 0)] == []


def test_metrics_stay_as_they_were_where_there_is_an_error(two_outputs):
    model, data = two_outputs
    before = model.train_on_batch(*data, return_dict=True)
    with pytest.raises(ValueError, match="do not affect the loss"):
        loss_gradients(model, [keras.Variable(1.0)], data)
    assert model.get_metrics_result() == before


# What is refused.


def test_a_model_that_is_not_compiled(regression):
    _, x, y, _ = regression
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="regressor")
    with pytest.raises(ValueError, match=r"'regressor' is not compiled.*model\.compile"):
        loss_gradients(model, [model.layers[0].kernel], (x, y))


def test_no_data(regression):
    model, _, _, weight = regression
    with pytest.raises(ValueError, match=r"needs `data`.*data=\(x, y\).*Received: data=None"):
        loss_gradients(model, [weight], None)


@pytest.mark.parametrize(
    "data", [(np.zeros((0, 4)), np.zeros((0, 3))), tf.data.Dataset.range(0), iter([])], ids=["arrays", "tf", "iterator"]
)
def test_empty_data(regression, data):
    model, _, _, weight = regression
    with pytest.raises(ValueError, match="`data` is empty"):
        loss_gradients(model, [weight], data)


def test_what_is_no_data(regression):
    model, _, _, weight = regression
    with pytest.raises(TypeError, match=r"arrays \(x, y\) or a dataset.*Received: 5"):
        loss_gradients(model, [weight], 5)


def test_weights_that_do_not_affect_the_loss_are_all_named(regression):
    model, x, y, weight = regression
    unused = [keras.Variable(1.0, name="first_unused"), keras.Variable(1.0, name="second_unused")]
    with pytest.raises(ValueError, match=r"do not affect the loss.*: first_unused, second_unused"):
        loss_gradients(model, [unused[0], weight, unused[1]], (x, y))
