"""Trains every configuration of a grid once, so that searches can be compared without training: `search_replay.py`.

Two tasks: scikit-learn's digits, and rendered characters. The trials go to `search_trials_<task>.json`, one after the
other; what is there is not trained again. About an hour and a half for both.
"""

import argparse
import itertools
import json
import multiprocessing
import pathlib
import tempfile
from concurrent.futures import ProcessPoolExecutor

import measuring
from rich.console import Console

FOLDER = pathlib.Path(__file__).parent
TASKS = ("digits", "characters")
NEURONS = {"digits": (0.0, 0.3, 0.45, 0.6, 0.8), "characters": (0.0, 0.3, 0.5, 0.65, 0.8)}
SPARSITY = (0.0, 0.5, 0.75, 0.85, 0.95)
BITS = (32, 8, 4, 2, 1)
METRICS = ("val_accuracy", "packed_bytes", "tflite_bytes", "macs", "energy_pj")
_TRIALS_OF_A_PROCESS = 20


def path_of(task: str) -> pathlib.Path:
    return FOLDER / f"search_trials_{task}.json"


def load(task: str) -> dict:
    """`{"float": metrics, "sensitivity": profile, "trials": [{"values": ..., "metrics": ...}]}`."""
    return json.loads(path_of(task).read_text())


def space(task: str):
    """The space whose configurations are trained, each once."""
    from keras_squeeze.search.space import CompressionSpace

    return CompressionSpace(neurons={"values": NEURONS[task]}, sparsity={"values": SPARSITY}, bits=BITS)


def grid(task: str) -> list[dict]:
    """Every configuration; with weights of one bit no sparsity."""
    several = itertools.product(BITS, NEURONS[task], SPARSITY)
    found = [{"bits": bits, "neurons": neurons, "sparsity": sparsity} for bits, neurons, sparsity in several]
    return [values for values in found if values["bits"] != 1] + [
        {"bits": 1, "neurons": neurons} for neurons in NEURONS[task] if 1 in BITS
    ]


def _data(task: str):
    if task == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = (digits.images[..., None] / 16).astype("float32"), digits.target.astype("int32")
        return (images[:1000], labels[:1000]), (images[1000:], labels[1000:])
    from characters import characters

    return characters(6_000, seed=1), characters(3_000, seed=2)


def _network(task: str):
    import keras

    size, classes = (8, 10) if task == "digits" else (28, 36)
    layers = keras.layers
    pools = [layers.MaxPooling2D()] if task == "digits" else [layers.MaxPooling2D(), layers.MaxPooling2D()]
    model = keras.Sequential(
        [
            keras.Input((size, size, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv_1"),
            layers.BatchNormalization(name="norm_1"),
            layers.ReLU(name="relu_1"),
            *pools[1:],
            layers.Conv2D(32, 3, padding="same", use_bias=False, name="conv_2"),
            layers.BatchNormalization(name="norm_2"),
            layers.ReLU(name="relu_2"),
            pools[0],
            layers.Flatten(name="flatten"),
            layers.Dense(64, activation="relu", name="hidden"),
            layers.Dense(classes, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.002), loss, metrics=["accuracy"])
    return model


def _epochs(task: str) -> tuple[int, int]:
    """Of the float model, and of a trial."""
    return (30, 12) if task == "digits" else (25, 6)


def _train_float(task: str, folder: str) -> dict:
    """Trains the network that all trials begin with; what it measures."""
    import keras

    from keras_squeeze.recipes.recipe import Recipe
    from keras_squeeze.search.artifacts import write_result

    keras.utils.set_random_seed(0)
    train, test = _data(task)
    model = _network(task)
    model.fit(*train, epochs=_epochs(task)[0], batch_size=64, verbose=0)
    model.save(pathlib.Path(folder, "float.keras"))
    result = write_result(model, Recipe(), folder, metric="accuracy", validation_data=test, calibration_data=train[0])
    return {name: result.metrics[name] for name in METRICS}


def _profile(task: str, folder: str) -> dict:
    """The sensitivity of the float network, from which the first trials of a search come."""
    import keras

    from keras_squeeze.evaluation.layer_sensitivity import sensitivity

    _, test = _data(task)
    return sensitivity(keras.models.load_model(pathlib.Path(folder, "float.keras")), test).to_dict()


def _run(task: str, folder: str, values: dict) -> dict:
    """Trains one configuration; what it measures."""
    import keras
    import keras_tuner

    from keras_squeeze.search.artifacts import write_result

    train, test = _data(task)
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    hp = keras_tuner.HyperParameters()
    hp.values = dict(values)
    recipe = space(task).recipe(hp)
    model = keras.models.load_model(pathlib.Path(folder, "float.keras"))
    trained = recipe.fit(model, *train, epochs=_epochs(task)[1], batch_size=64, verbose=0)
    with tempfile.TemporaryDirectory() as results:
        result = write_result(
            trained, recipe, results, metric="accuracy", validation_data=test, calibration_data=train[0]
        )
    return {name: result.metrics[name] for name in METRICS}


def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        1, context, initializer=measuring._import_tensorflow, max_tasks_per_child=_TRIALS_OF_A_PROCESS
    )


def record(task: str, quick: bool, console: Console) -> None:
    """Trains what is not there yet."""
    path = path_of(task)
    found = {"trials": []} if quick or not path.exists() else load(task)
    done = [trial["values"] for trial in found["trials"]]
    todo = [values for values in grid(task) if values not in done]
    todo = todo[:: len(todo) // 3] if quick else todo
    with tempfile.TemporaryDirectory() as folder, _pool() as pool, measuring.progress_bar(console) as progress:
        bar = progress.add_task(task, total=len(todo))
        found["float"] = pool.submit(_train_float, task, folder).result()
        found["sensitivity"] = pool.submit(_profile, task, folder).result()
        for values in todo:
            found["trials"].append({"values": values, "metrics": pool.submit(_run, task, folder, values).result()})
            if not quick:
                path.write_text(json.dumps(found, indent=1) + "\n")
            measuring.advance(progress, bar)
    if quick:
        console.print(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two trials of each task, which are not kept")
    parser.add_argument("--task", choices=TASKS, help="one of them (default: both)")
    args = parser.parse_args()
    for task in [args.task] if args.task else TASKS:
        record(task, args.quick, Console())


if __name__ == "__main__":
    main()
