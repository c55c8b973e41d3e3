"""Variants that are saved as their arguments: names, configs and objects become the same object."""

import json

import keras
import pytest

from keras_squeeze.configurable import Configurable, resolve


@keras.saving.register_keras_serializable("test_configurable")
class Scaled(Configurable):
    def __init__(self, factor=1.0, name="plain"):
        self.factor, self.name = factor, name

    def get_config(self):
        return {"factor": self.factor, "name": self.name}


@keras.saving.register_keras_serializable("test_configurable")
class Empty(Configurable):
    pass


def get(identifier):
    return resolve("scale", identifier, Scaled, {"plain": Scaled, "double": lambda: Scaled(2.0)}, "a name or a Scaled")


def test_the_text_of_an_object_makes_it_again():
    assert repr(Empty()) == "Empty()"
    again = eval(repr(Scaled(0.5, "half")), {"Scaled": Scaled})
    assert again.get_config() == {"factor": 0.5, "name": "half"}


def test_an_object_survives_json():
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(Scaled(0.5, "half"))))
    again = get(config)
    assert type(again) is Scaled
    assert again.get_config() == Scaled(0.5, "half").get_config()
    assert Empty.from_config(Empty().get_config()).get_config() == {}


def test_names_and_objects():
    scaled = Scaled(3.0)
    assert get(scaled) is scaled
    assert get("double").factor == 2.0
    assert get("plain") is not get("plain")


def test_anything_else():
    with pytest.raises(ValueError, match=r"`scale` must be one of 'plain', 'double'. Received: scale='triple'"):
        get("triple")
    for other in (3, None, Scaled, Empty(), keras.saving.serialize_keras_object(Empty())):
        with pytest.raises(TypeError, match=r"`scale` must be a name or a Scaled. Received: "):
            get(other)
