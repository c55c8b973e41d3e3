"""Files that version 0.1 saved still load, and what is loaded computes the same.

`saved_files/` holds a network for digits with a binary convolution, batch normalization, and pruned Dense layers of 4
bits and ternary: while it trains, finalized, and packed; what both gave for eight inputs; and a recipe.
"""

import pathlib

import keras
import numpy as np
import pytest

import keras_squeeze as ks

FOLDER = pathlib.Path(__file__).parent / "saved_files"
LOADERS = {
    "quantize_aware.keras": keras.saving.load_model,
    "finalized.keras": keras.saving.load_model,
    "finalized.squeeze": ks.load_packed,
}


@pytest.fixture(scope="module")
def outputs():
    with np.load(FOLDER / "outputs.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", LOADERS)
def test_models(name, outputs):
    model = LOADERS[name](FOLDER / name)
    np.testing.assert_allclose(
        model.predict(outputs["inputs"], verbose=0), outputs[name.partition(".")[0]], rtol=1e-5, atol=1e-5
    )


def test_the_model_in_training_is_finalized_and_trains_on(outputs):
    model = keras.saving.load_model(FOLDER / "quantize_aware.keras")
    final, saved = ks.finalize(model), keras.saving.load_model(FOLDER / "finalized.keras")
    for weight, expected in zip(final.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    before = model.get_weights()
    model.fit(outputs["inputs"], np.arange(8), verbose=0, callbacks=[ks.KeepSparsity()])
    assert any(not np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))


def test_recipe():
    wanted = ks.Recipe(
        [ks.steps.PruneNeurons(0.5), ks.steps.PruneWeights(0.5), ks.steps.Quantize(), ks.steps.FineTune()]
    )
    assert ks.Recipe.load(FOLDER / "recipe.json") == wanted
