"""Packed files: what is loaded predicts what was saved, in a small file; damaged and hostile files are refused."""

import hashlib
import io
import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest
from damaged_files import mutated
from keras import layers
from networks import small_convnet

import keras_squeeze as ks
from keras_squeeze.deployment import archives

RNG = np.random.default_rng(0)


def convnet():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    norm = model.layers[1]
    norm.moving_mean.assign(RNG.normal(size=16))
    norm.moving_variance.assign(RNG.uniform(0.5, 2, 16))
    return model


def images(count=32):
    return RNG.random((count, 8, 8, 1), dtype="float32")


def quantized(weights, **options):
    q = ks.quantize_aware(convnet(), weights, **options)
    q.compile("adam", "sparse_categorical_crossentropy")
    q.fit(images(), RNG.integers(10, size=32), verbose=0)
    return q


def with_normalization():
    normalization = layers.Normalization()
    normalization.adapt(RNG.normal(3, 2, (100, 8, 8, 1)))
    return keras.Sequential([keras.Input((8, 8, 1)), normalization, layers.Flatten(), layers.Dense(3)])


def recurrent():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8)(inputs)
    x = layers.Bidirectional(layers.LSTM(5, return_sequences=True))(x)
    x = layers.LayerNormalization()(layers.MultiHeadAttention(2, 4)(x, x))
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(layers.GlobalAveragePooling1D()(x)))


def nested():
    inner = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(4, 3), layers.Flatten()], name="inner")
    shared = layers.Dense(3)
    one, two = keras.Input((8, 8, 1), name="one"), keras.Input((8, 8, 1), name="two")
    return keras.Model([one, two], [shared(inner(one)), layers.Add()([shared(inner(two)), shared(inner(one))])])


def words():
    lookup = layers.TextVectorization(output_sequence_length=4)
    lookup.adapt(["a small file", "a large file", "a very small model"])
    inputs = keras.Input((), dtype="string")
    return keras.Model(inputs, layers.Embedding(lookup.vocabulary_size(), 3)(lookup(inputs)))


def in_half_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        return convnet()
    finally:
        keras.config.set_dtype_policy(before)


def quantized_by_keras():
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(16), layers.Dense(3)])
    for layer in model.layers[1:]:
        layer.quantize("int8")
    return model


def pruned():
    model = convnet()
    ks.prune_weights(model, 0.9)
    return model


def compiled_inside():
    inner = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(4, 3), layers.Flatten()])
    inner.compile("adam", "mse")
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, layers.Dense(2)(inner(inputs)))


def stateful():
    return keras.Sequential([keras.Input(batch_shape=(4, 5, 3)), layers.LSTM(6, stateful=True), layers.Dense(2)])


MODELS = {
    "compiled inside": (compiled_inside, images),
    "stateful": (stateful, lambda: RNG.normal(size=(4, 5, 3)).astype("float32")),
    "convnet": (convnet, images),
    "pruned": (pruned, images),
    "shrunk": (lambda: ks.shrink(_without_neurons()), images),
    "int8": (lambda: quantized("int8"), images),
    "int4": (lambda: quantized("int4"), images),
    "learned step": (lambda: quantized(ks.quantizers.LearnedStep(4)), images),
    "fixed point": (lambda: quantized("fixed8", activations=None), images),
    "ternary": (lambda: quantized("ternary"), images),
    "binary": (lambda: quantized("binary"), images),
    "finalized": (lambda: ks.finalize(quantized("int4"), activations="drop"), images),
    "normalization": (with_normalization, images),
    "recurrent": (recurrent, lambda: RNG.integers(20, size=(9, 6))),
    "nested, two inputs and outputs": (nested, lambda: [images(5), images(5)]),
    "words": (words, lambda: keras.ops.convert_to_tensor(["a small model", "very large"])),
    "bfloat16": (in_half_precision, images),
    "quantized by Keras": (quantized_by_keras, images),
}


def _without_neurons():
    model = convnet()
    ks.prune_neurons(model, 0.5)
    return model


def predictions(model, x):
    return [keras.ops.convert_to_numpy(part) for part in keras.tree.flatten(model(x, training=False))]


@pytest.mark.parametrize(("make", "inputs"), MODELS.values(), ids=MODELS)
def test_what_is_loaded_predicts_what_was_saved(make, inputs, tmp_path):
    model, x = make(), inputs()
    path = tmp_path / "model.squeeze"
    assert ks.save_packed(model, path) == path.stat().st_size
    loaded = ks.load_packed(path)
    for one, other in zip(predictions(model, x), predictions(loaded, x), strict=True):
        np.testing.assert_array_equal(one, other)
    saved = ks.finalize(model) if any(isinstance(x, ks.QuantizeAware) for x in model._flatten_layers()) else model
    for one, other in zip(saved.weights, loaded.weights, strict=True):
        assert one.path.split("/")[-1] == other.path.split("/")[-1]
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in saved.layers]
    assert archives.is_packed(path)


@pytest.mark.parametrize("name", ["convnet", "pruned", "int8", "int4", "ternary", "binary", "recurrent"])
def test_the_report_counts_what_is_written(name, tmp_path):
    model = MODELS[name][0]()
    if name in ("int8", "int4", "ternary", "binary"):
        model = ks.finalize(model, activations="drop")
    path = tmp_path / "model.squeeze"
    whole = ks.save_packed(model, path)
    with zipfile.ZipFile(path) as archive:
        weights = archive.getinfo("weights.bin").file_size
    assert weights == ks.summarize(model).total.compressed_bytes
    assert weights < whole < weights + 8000


def test_quantized_weights_take_their_bits(tmp_path):
    """Of float32's bytes."""
    inputs = keras.Input((256,))
    x = layers.Dense(512, activation="relu")(inputs)
    x = layers.Dense(512, activation="relu")(x)
    model = keras.Model(inputs, layers.Dense(512)(x))
    whole = 4 * model.count_params()
    x = RNG.normal(size=(64, 256)).astype("float32")
    size = {}
    for name in ("int8", "int4", "ternary", "binary"):
        q = ks.quantize_aware(model, {"": name})
        q(x, training=True)
        size[name] = ks.save_packed(q, tmp_path / "model.squeeze") / whole
    assert size["int8"] < 0.26
    assert size["int4"] < 0.13 + 0.01
    assert size["ternary"] < 1.6 / 32 + 0.01
    assert size["binary"] < 1 / 32 + 0.01
    sparse = keras.models.clone_model(model)
    sparse.set_weights(model.get_weights())
    ks.prune_weights(sparse, 0.9)
    assert ks.save_packed(sparse, tmp_path / "model.squeeze") / whole < 0.12


def test_training_goes_on_after_loading(tmp_path, digits):
    x, y = digits
    model = small_convnet()
    model.fit(x[:64], y[:64], verbose=0)
    ks.save_packed(model, tmp_path / "model.squeeze")
    loaded = ks.load_packed(tmp_path / "model.squeeze")
    assert not loaded.compiled
    loaded.compile("sgd", "sparse_categorical_crossentropy")
    before = [w.numpy() for w in loaded.trainable_weights]
    loaded.fit(x[:64], y[:64], verbose=0)
    assert any((one != w.numpy()).any() for one, w in zip(before, loaded.trainable_weights, strict=True))


class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x


def test_layers_of_ones_own(tmp_path):
    model = keras.Sequential([keras.Input((3,)), Doubled(), layers.Dense(2)])
    path = tmp_path / "model.squeeze"
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=r"cannot be rebuilt.*register_keras_serializable"):
        ks.save_packed(model, path)
    assert path.read_bytes() == b"earlier"
    with keras.saving.custom_object_scope({"Doubled": Doubled}):
        ks.save_packed(model, path)
    with pytest.raises(ValueError, match="Doubled"):
        ks.load_packed(path)
    x = RNG.normal(size=(4, 3))
    loaded = ks.load_packed(path, custom_objects={"Doubled": Doubled})
    np.testing.assert_array_equal(loaded(x), model(x))


class Forgetful(keras.Model):
    def __init__(self, units=3):
        super().__init__()
        self.dense = layers.Dense(units)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {}


def test_a_config_that_leaves_something_out(tmp_path):
    model = Forgetful(5)
    model(np.ones((1, 4)))
    with keras.saving.custom_object_scope({"Forgetful": Forgetful}):
        with pytest.raises(ValueError, match=r"other weights.*get_config"):
            ks.save_packed(model, tmp_path / "model.squeeze")
        model = Forgetful(3)
        model(np.ones((1, 4)))
        ks.save_packed(model, tmp_path / "model.squeeze")
        np.testing.assert_array_equal(
            ks.load_packed(tmp_path / "model.squeeze")(np.ones((2, 4))), model(np.ones((2, 4)))
        )


def test_code_is_refused_unless_it_is_trusted(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: 2 * x)])
    ks.save_packed(model, tmp_path / "model.squeeze")
    with pytest.raises(ValueError, match=r"(?i)lambda"):
        ks.load_packed(tmp_path / "model.squeeze")
    loaded = ks.load_packed(tmp_path / "model.squeeze", safe_mode=False)
    np.testing.assert_array_equal(loaded(np.ones((1, 3))), 2 * np.ones((1, 3)))


BAD = {
    "no model": (lambda folder: ks.save_packed("model", folder / "m.squeeze"), TypeError, "keras.Model"),
    "not built": (
        lambda folder: ks.save_packed(keras.Sequential([layers.Dense(2)]), folder / "m.squeeze"),
        ValueError,
        "no weights yet",
    ),
    "suffix": (lambda folder: ks.save_packed(convnet(), folder / "m.keras"), ValueError, "must not end in .keras"),
    "directory": (lambda folder: ks.save_packed(convnet(), folder), ValueError, "must be a file"),
    "no directory": (lambda folder: ks.save_packed(convnet(), folder / "none" / "m"), ValueError, "directory"),
    "no file": (lambda folder: ks.load_packed(folder / "none.squeeze"), ValueError, "no file"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        call(tmp_path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model.squeeze"
    model = pruned()
    ks.save_packed(model, path)
    return path.read_bytes()


def rewritten(content: bytes, change) -> bytes:
    """A file whose checksums are right and whose members are changed: `change(members)`, the manifest parsed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["manifest.json"] = json.loads(members["manifest.json"])
    members["model.json"] = json.loads(members["model.json"])
    change(members)
    members["model.json"] = json.dumps(members["model.json"]).encode()
    manifest = members.pop("manifest.json")
    if isinstance(manifest, dict) and "sha256" in manifest:
        manifest["sha256"] = {name: hashlib.sha256(member).hexdigest() for name, member in members.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        for name, member in members.items():
            archive.writestr(name, member, zipfile.ZIP_STORED if name == "weights.bin" else None)
    return buffer.getvalue()


def load(content: bytes, folder: pathlib.Path, **options):
    path = folder / "changed.squeeze"
    path.write_bytes(content)
    return ks.load_packed(path, **options)


def test_an_unchanged_file_rewritten_loads(packed, tmp_path):
    load(rewritten(packed, lambda members: None), tmp_path)


def _set(*path, to):
    def change(members):
        place = members
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


def _bigger_layer(members):
    config = members["model.json"]
    dense = config["config"]["layers"][-1]
    dense["config"]["units"] = 10**9
    if "build_config" in dense:
        dense["build_config"]["input_shape"] = [None, 256]


HOSTILE = {
    "a later version": (_set("manifest.json", "version", to=2), "version 2"),
    "another format": (_set("manifest.json", "format", to="cake"), "no packed model"),
    "no manifest to speak of": (_set("manifest.json", to=[1, 2]), "manifest is not understood"),
    "no weights listed": (lambda members: members["manifest.json"].pop("weights"), "manifest is not understood"),
    "too few weights": (lambda members: members["manifest.json"]["weights"].pop(), "more weights|variables"),
    "weights for no layer": (_set("manifest.json", "weights", 0, 0, to=99), "layer 99"),
    "a weight called otherwise": (_set("manifest.json", "weights", 0, 1, to="x"), "does not take|variables"),
    "another shape": (_set("manifest.json", "weights", 0, 2, to=[3, 3, 1, 15]), "values|stream|shape"),
    "a negative shape": (_set("manifest.json", "weights", 0, 2, to=[-3, -3, 1, 16]), "not understood"),
    "a huge shape": (_set("manifest.json", "weights", 0, 2, to=[1 << 40, 9]), "values|stream|bytes"),
    "a shape of text": (_set("manifest.json", "weights", 0, 2, to="abc"), "not understood"),
    "an unknown type": (_set("manifest.json", "weights", 0, 3, to="object"), "no type"),
    "a path upwards": (lambda members: members.update({"../evil.py": b"1"}), "do not belong"),
    "an absolute path": (lambda members: members.update({"/tmp/evil.py": b"1"}), "do not belong"),
    "an asset upwards": (lambda members: members.update({"assets/0/../../evil": b"1"}), "do not belong"),
    "an asset for no layer": (lambda members: members.update({"assets/99/a.txt": b"1"}), "layer"),
    "no model in it": (_set("model.json", to={"a": 1}), "in place of a model"),
    "a layer in place of a model": (
        lambda members: members.update({"model.json": keras.saving.serialize_keras_object(layers.Dense(3))}),
        "in place of a model",
    ),
    "a config of text": (_set("model.json", to="text"), "rebuild|in place of a model"),
    "an unknown class": (_set("model.json", "class_name", to="Popen"), "rebuild"),
    "a module that is not Keras's": (
        lambda members: members["model.json"].update(
            module="subprocess", class_name="Popen", config={"args": ["true"]}
        ),
        "rebuild|in place of a model",
    ),
    "a model of terabytes": (_bigger_layer, "max_bytes"),
    "a manifest of 20 MB": (_set("manifest.json", "more", to=" " * (20 << 20)), "more than"),
    "a config of 20 MB": (_set("model.json", "more", to=" " * (20 << 20)), "more than"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(change, message, packed, tmp_path):
    with pytest.raises(ValueError, match=rf"changed\.squeeze cannot be loaded.*({message})"):
        load(rewritten(packed, change), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.squeeze"]


def test_too_large_a_model_needs_permission(packed, tmp_path):
    with pytest.raises(ValueError, match=r"max_bytes=100\b"):
        load(packed, tmp_path, max_bytes=100)
    load(packed, tmp_path, max_bytes=1 << 20)


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip at all" * 100], ids=["empty", "two bytes", "text"])
def test_other_files_are_refused(content, tmp_path):
    with pytest.raises(ValueError, match="no packed model"):
        load(content, tmp_path)
    (tmp_path / "file").write_bytes(content)
    assert not archives.is_packed(tmp_path / "file")


def test_other_archives_are_refused(tmp_path):
    convnet().save(tmp_path / "model.keras")
    assert not archives.is_packed(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="no packed model"):
        ks.load_packed(tmp_path / "model.keras")


def test_every_truncation_is_refused(packed, tmp_path):
    for length in np.linspace(0, len(packed) - 1, 60).astype(int):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load(packed[:length], tmp_path)


def test_mutated_files_are_refused_or_loaded_whole(packed, tmp_path):
    rng, x = np.random.default_rng(0), images()
    expected = predictions(load(packed, tmp_path), x)
    refused = 0
    for _ in range(300):
        try:
            model = load(mutated(packed, rng), tmp_path)
        except ValueError:
            refused += 1
        else:
            for one, other in zip(predictions(model, x), expected, strict=True):
                np.testing.assert_array_equal(one, other)
    assert refused > 200
