"""`compare`: every figure is that of the file that ships, found out here by other means."""

import gzip
import io
import json
import warnings
import zipfile

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras import layers

import keras_squeeze as ks
from keras_squeeze.deployment.loading import load_examples, load_model
from keras_squeeze.evaluation.scoring import find_judge


def answers(path, *inputs) -> np.ndarray:
    """The file's only output for a batch, example by example; several inputs told apart by their size."""
    file = Interpreter(str(path))
    file.allocate_tensors()
    rows = []
    for index in range(len(inputs[0])):
        for detail in file.get_input_details():
            (batch,) = (x for x in inputs if x.shape[1:] == tuple(detail["shape"][1:]))
            file.set_tensor(detail["index"], batch[index : index + 1])
        file.invoke()
        rows.append(file.get_tensor(file.get_output_details()[0]["index"])[0])
    return np.stack(rows)


def two_inputs(named: bool) -> keras.Model:
    """Inputs of different size, whose order the converter may change."""
    z, a = keras.Input((4,), name="z"), keras.Input((6,), name="a")
    outputs = layers.Dense(3)(layers.Concatenate()([z, a]))
    return keras.Model({"z": z, "a": a} if named else [z, a], outputs)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A float model, a narrower one, one in int8, and files of them."""
    x, y = digits
    folder = tmp_path_factory.mktemp("models")
    model = networks.residual_convnet()
    model.fit(x[:1000], y[:1000], epochs=5, batch_size=16, verbose=0)
    narrow = keras.models.clone_model(model)
    narrow.set_weights(model.get_weights())
    ks.prune_neurons(narrow, 0.5)
    narrow = ks.shrink(narrow)
    q = ks.quantize_aware(model)
    q.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    q.fit(x[:1000], y[:1000], verbose=0)
    narrow.save(folder / "narrow.keras")
    ks.export(q, folder / "int8.tflite")
    ks.export(model, folder / "float.tflite")
    ks.export(narrow, folder / "narrow.tflite")
    return {"model": model, "narrow": narrow, "q": q, "folder": folder}


@pytest.fixture(scope="module")
def compared(trained, digits):
    x, y = digits
    folder = trained["folder"]
    entries = {"whole": trained["model"], "int8": trained["q"], "file": str(folder / "narrow.keras")}
    return ks.compare({**entries, "lite": folder / "int8.tflite"}, data=(x[1000:1300], y[1000:1300]), runs=10)


def test_bytes_are_those_of_the_file_that_ships(compared, trained):
    folder = trained["folder"]
    files = {"whole": "float.tflite", "int8": "int8.tflite", "file": "narrow.keras", "lite": "int8.tflite"}
    for row in compared:
        content = (folder / files[row.name]).read_bytes()
        assert row.num_bytes == pytest.approx(len(content), rel=0.01)  # of a model, the file is another one as large
        assert row.gzip_bytes == pytest.approx(len(gzip.compress(content)), rel=0.01)
    assert compared["file"].num_bytes == (folder / "narrow.keras").stat().st_size
    assert compared["lite"].num_bytes == (folder / "int8.tflite").stat().st_size
    assert compared["int8"].num_bytes < 0.5 * compared["whole"].num_bytes


def test_what_is_known_of_the_model(compared, trained):
    assert [(row.name, row.kind, row.precision) for row in compared] == [
        ("whole", "model", "float32"),
        ("int8", "model", "int8"),
        ("file", ".keras", "float32"),
        ("lite", ".tflite", None),
    ]
    assert compared["whole"].parameters == trained["model"].count_params()
    assert compared["file"].parameters == trained["narrow"].count_params()
    assert compared["file"].macs == ks.summarize(trained["narrow"]).total.macs
    assert compared["lite"].parameters is None
    assert compared["lite"].macs is None


def test_answers_are_those_of_litert(compared, trained, digits):
    x, y = digits
    assert compared.metric == "accuracy"
    assert compared.examples == 300
    files = {"whole": "float.tflite", "int8": "int8.tflite", "file": "narrow.tflite", "lite": "int8.tflite"}
    for row in compared:
        right = answers(trained["folder"] / files[row.name], x[1000:1300]).argmax(-1) == y[1000:1300]
        assert row.score == pytest.approx(right.mean(), abs=0.004), row.name
    assert compared["whole"].score > 0.5


def test_latencies_are_side_by_side(compared):
    assert compared["whole"].latency.ratio == 1
    for row in compared:
        assert 0 < row.latency.p10_ms <= row.latency.median_ms <= row.latency.p90_ms
        assert row.latency.runs == 10
    assert len(compared) == 4
    with pytest.raises(KeyError, match="there are whole, int8, file, lite"):
        compared["none"]


def test_it_can_be_shown(compared, tmp_path):
    text = str(compared)
    for row in compared:
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [row.name])
        assert f"{row.score:.1%}" in line
        assert f"{row.latency.ratio:.2f}" in line
    assert f"{compared['whole'].parameters:,}" in text
    assert "300 examples" in text
    assert max(map(len, text.splitlines())) <= 120
    assert text.isascii()
    assert compared._repr_html_().count("<tr>") == 5

    flat = json.loads(compared.to_json())
    assert flat == compared.to_dict()
    assert flat["rows"][3]["num_bytes"] == compared["lite"].num_bytes
    assert flat["rows"][1]["latency_ratio"] == compared["int8"].latency.ratio
    frame = compared.to_dataframe().set_index("name")
    assert frame.loc["file", "score"] == compared["file"].score
    assert list(frame.index) == ["whole", "int8", "file", "lite"]


def test_a_narrow_terminal_gets_fewer_columns(compared):
    from rich.console import Console

    console = Console(width=70, record=True, file=io.StringIO())
    console.print(compared)
    text = console.export_text()
    assert "parameters" not in text
    assert "accuracy" in text
    assert all(row.name in text for row in compared)


def test_the_picture(compared, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = compared.plot(tmp_path / "compared.svg").read_text()
    assert all(f">{title}<" in svg for title in ("size of the file", "latency", "MACs", "accuracy"))
    assert all(f">{row.name}<" in svg for row in compared)
    assert f"{compared['int8'].num_bytes / compared['whole'].num_bytes:.2f} x" in svg
    assert "unknown" in svg  # the MACs of a .tflite file


def test_without_data_no_metric(trained, tmp_path):
    found = ks.compare({"one": trained["folder"] / "int8.tflite"}, runs=2)
    assert found.metric is None
    assert found["one"].score is None
    assert "accuracy" not in str(found)
    assert "parameters" not in str(found)  # no row knows any
    assert found.plot(tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_dataset_arrays_and_lists_give_the_same(trained, digits):
    x, y = digits[0][:100], digits[1][:100]
    path = {"one": trained["folder"] / "float.tflite"}
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(33)
    found = [ks.compare(path, data, runs=1) for data in ((x, y), dataset, [x.tolist(), y.tolist()])]
    assert {comparison["one"].score for comparison in found} == {found[0]["one"].score}
    assert {comparison.examples for comparison in found} == {100}


@pytest.mark.parametrize("named", [True, False], ids=["dict", "list"])
def test_several_inputs_in_whatever_order(named, tmp_path):
    rng = np.random.default_rng(0)
    z, a = rng.normal(size=(20, 4)).astype("float32"), rng.normal(size=(20, 6)).astype("float32")
    model = two_inputs(named)
    ks.export(model, tmp_path / "model.tflite")
    y = answers(tmp_path / "model.tflite", z, a).argmax(-1)
    data = [{"a": a, "z": z}, {"z": z, "a": a}] if named else [[z, a], {"a": a, "z": z}]
    for x in data:
        found = ks.compare({"model": model, "file": tmp_path / "model.tflite"}, data=(x, y), runs=1)
        assert [row.score for row in found] == [1, 1]
    with pytest.raises(ValueError, match=r"^model: .*2 inputs: .*Received: 1"):
        ks.compare({"model": model}, data=(a, y), runs=1)


def test_several_outputs_with_a_function(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(3)(inputs)])
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    expected = [part.numpy() for part in model(x)]
    found = ks.compare({"m": model}, data=(x, np.zeros(8)), metric=lambda y, outputs: outputs[1].sum(), runs=1)
    assert found["m"].score == pytest.approx(expected[1].sum(), rel=1e-4)
    with pytest.raises(ValueError, match=r"^m: For several outputs"):
        ks.compare({"m": model}, data=(x, np.zeros(8)), runs=1)


LOGITS = np.array([[2.0, 1, -3], [0, 1, 5], [1, 0, 0]], "float32")
SINGLE = np.array([[0.2], [0.7], [0.9]], "float32")


@pytest.mark.parametrize(
    ("y_true", "y_pred", "name", "value"),
    [
        ([0, 2, 1], LOGITS, "accuracy", 2 / 3),
        ([[0], [2], [1]], LOGITS, "accuracy", 2 / 3),
        ([0.0, 2.0, 1.0], LOGITS, "accuracy", 2 / 3),
        (np.eye(3)[[0, 2, 1]], LOGITS, "accuracy", 2 / 3),
        ([[0, 2], [0, 0]], np.stack([LOGITS[:2], LOGITS[1:]]), "accuracy", 3 / 4),
        ([0, 1, 1], SINGLE, "accuracy", 1),
        ([[1.0], [1.0], [0.0]], SINGLE, "accuracy", 1 / 3),
        ([True, True, False], SINGLE, "accuracy", 1 / 3),
        ([0, 1, 1], 4 * SINGLE - 2, "accuracy", 1),  # logits
        ([0, 1, 1], (4 * SINGLE - 2)[:, 0], "accuracy", 1),
        ([0.5, 0.7, 1.0], SINGLE, "mean absolute error", 0.4 / 3),
        ([3, 7, 5], SINGLE + 3, "mean absolute error", (0.2 + 3.3 + 1.1) / 3),
        (np.full((3, 3), 0.25), LOGITS, "mean absolute error", np.abs(LOGITS - 0.25).mean()),
    ],
)
def test_the_metric_by_the_kind_of_target(y_true, y_pred, name, value):
    found = find_judge()(np.asarray(y_true), y_pred)
    assert found == (name, pytest.approx(value, abs=1e-6))
    if name == "accuracy":
        assert find_judge("accuracy")(np.asarray(y_true), y_pred) == found


def test_metrics_of_keras_and_functions():
    y_true, y_pred = np.array([1.0, 2.0, 3.0]), np.array([[1.5], [2.0], [5.0]], "float32")
    expected = np.mean((y_true - y_pred[:, 0]) ** 2)
    metric = keras.metrics.MeanSquaredError()
    for given in ("mean_squared_error", "mse", metric, metric, keras.losses.MeanSquaredError()):
        name, value = find_judge(given)(y_true, y_pred)
        assert value == pytest.approx(expected)
        assert "squared" in name
    assert find_judge("huber")(y_true, y_pred)[1] == pytest.approx(keras.losses.Huber()(y_true, y_pred).numpy())
    per_example = keras.losses.mean_absolute_error
    assert find_judge(per_example)(y_true[:, None], y_pred) == ("mean_absolute_error", pytest.approx(2.5 / 3))
    assert find_judge(lambda y, p: p.max())(y_true, y_pred) == ("metric", 5)


def test_bad_metrics(trained, digits):
    for bad in ("acuracy", 3):
        with pytest.raises(ValueError, match=f"Received: metric={bad!r}"):
            ks.compare({"one": trained["model"]}, data=digits, metric=bad)
    y = np.array([0.3, 0.7, 0.1])
    with pytest.raises(ValueError, match="no classes, so there is no accuracy"):
        find_judge("accuracy")(y, SINGLE)
    with pytest.raises(ValueError, match=r"shape \(3,\) are no classes"):
        find_judge()(y, LOGITS)
    with pytest.raises(ValueError, match=r"shape \(3, 2\) do not fit outputs of shape \(3, 3\)"):
        find_judge()(np.zeros((3, 2)), LOGITS)
    with pytest.raises(ValueError, match="must give a number"):
        find_judge(lambda y, p: "good")(y, SINGLE)


def test_bad_data(trained, digits):
    x, y = digits
    path = {"lite": trained["folder"] / "float.tflite"}
    with pytest.raises(ValueError, match=r"^lite: `data` must be inputs and targets.*Received: inputs alone"):
        ks.compare(path, data=x[:10], runs=1)
    with pytest.raises(ValueError, match=r"^lite: `data` must be inputs and targets.*sample weights"):
        ks.compare(path, data=(x[:10], y[:10], y[:10]), runs=1)
    with pytest.raises(ValueError, match=r"^lite: The inputs do not fit.*\(10, 4, 4, 1\)"):
        ks.compare(path, data=(x[:10, :4, :4], y[:10]), runs=1)
    with pytest.raises(TypeError, match="empty after the first"):
        ks.compare(path, data=iter([(x[:10], y[:10])]), runs=1)
    with pytest.raises(ValueError, match="different lengths"):
        ks.compare(path, data=(x[:10], y[:9]), runs=1)


def test_a_file_that_takes_integers_gets_them_by_its_scale(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    function = tf.function(model).get_concrete_function(tf.TensorSpec((1, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([np.full((1, 4), i / 8, "float32")] for i in range(8))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
        (tmp_path / "ints.tflite").write_bytes(converter.convert())
    x = np.random.default_rng(0).random((100, 4)).astype("float32")
    y = model(x).numpy().argmax(-1)
    found = ks.compare({"model": model, "ints": tmp_path / "ints.tflite"}, data=(x, y), runs=1)
    assert found["model"].score == 1
    assert found["ints"].score > 0.9


def test_bad_models(trained, tmp_path):
    with pytest.raises(TypeError, match="must be a dict"):
        ks.compare([trained["model"]])
    with pytest.raises(ValueError, match="is empty"):
        ks.compare({})
    with pytest.raises(TypeError, match="names in `models` must be strings"):
        ks.compare({3: trained["model"]})
    with pytest.raises(TypeError, match=r"^three: expected a `keras\.Model` or the path"):
        ks.compare({"three": 3})
    with pytest.raises(ValueError, match=r"^gone: there is no file"):
        ks.compare({"gone": tmp_path / "gone.tflite"})
    with pytest.raises(ValueError, match=r"^fresh: .*has seen no data"):
        ks.compare({"fresh": ks.quantize_aware(networks.small_convnet())})
    with pytest.raises(ValueError, match="`runs` must be an int"):
        ks.compare({"lite": trained["folder"] / "float.tflite"}, runs=0)


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "text.keras").write_text("no model")
    with pytest.raises(ValueError, match=r"text\.keras is no model that Keras can load"):
        load_model(tmp_path / "text.keras")
    with zipfile.ZipFile(tmp_path / "zip.keras", "w") as file:
        file.writestr("something", "else")
    with pytest.raises(ValueError, match=r"zip\.keras is no model that Keras can load"):
        load_model(tmp_path / "zip.keras")
    (tmp_path / "model.tflite").write_bytes(b"")
    with pytest.raises(ValueError, match="does not become a Keras model again"):
        load_model(tmp_path / "model.tflite")
    with pytest.raises(ValueError, match="There is no file"):
        load_model(tmp_path / "gone.keras")


def test_a_class_that_keras_does_not_know(tmp_path):
    class Doubled(layers.Layer):
        def call(self, inputs):
            return 2 * inputs

    keras.Sequential([keras.Input((3,)), Doubled()]).save(tmp_path / "own.keras")
    with pytest.raises(ValueError, match=r"own\.keras is no model that Keras can load: .*Doubled"):
        load_model(tmp_path / "own.keras")


def test_code_in_a_file_runs_only_on_request(tmp_path):
    path = tmp_path / "lambda.keras"
    keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: x * 2), layers.Dense(2)]).save(path)
    with pytest.raises(ValueError, match=r"^own: .* brings Python code.*safe_mode=False, which is --unsafe"):
        ks.compare({"own": path}, runs=1)
    assert ks.compare({"own": path}, runs=1, safe_mode=False)["own"].parameters == 8


def test_examples_in_files(tmp_path):
    x, y = np.arange(6.0).reshape(3, 2), np.arange(3)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "both.npz", x=x, y=y)
    np.savez(tmp_path / "several.npz", a=x, b=2 * x, y=y)
    found, nothing = load_examples(tmp_path / "x.npy")
    np.testing.assert_array_equal(found, x)
    assert nothing is None
    found = load_examples(tmp_path / "both.npz")
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_array_equal(found[1], y)
    found, labels = load_examples(tmp_path / "several.npz")
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"], 2 * x)
    np.testing.assert_array_equal(labels, y)

    np.savez(tmp_path / "targets.npz", y=y)
    np.save(tmp_path / "objects.npy", np.array([{}, 1]), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", x=np.array([{}, 1]))
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "empty.npy").write_text("")
    for name, problem in {
        "targets.npz": "has no inputs",
        "objects.npy": "no .npy or .npz file of numbers",
        "objects.npz": "something else than numbers",
        "text.npz": "no .npy or .npz file",
        "empty.npy": "no .npy or .npz file",
        "gone.npy": "There is no file",
    }.items():
        with pytest.raises(ValueError, match=problem):
            load_examples(tmp_path / name)


def test_a_metric_that_does_not_fit(trained, digits):
    x, y = digits[0][:20], digits[1][:20]
    with pytest.raises(ValueError, match=r"cannot be computed.*Received.*\(20,\) and \(20, 10\)"):
        ks.compare({"model": trained["narrow"]}, data=(x, y), metric="mae", runs=1)


def test_packed_files(trained, digits, tmp_path):
    x, y = digits[0][:50], digits[1][:50]
    size = ks.save_packed(trained["narrow"], tmp_path / "narrow.packed")
    models = {"model": trained["narrow"], "packed": tmp_path / "narrow.packed"}
    found = ks.compare(models, data=(x, y), runs=1)
    assert found["packed"].kind == "packed"
    assert found["packed"].num_bytes == size == (tmp_path / "narrow.packed").stat().st_size
    assert found["packed"].parameters == found["model"].parameters
    assert found["packed"].score == found["model"].score
