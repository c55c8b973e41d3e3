"""What a trial leaves behind: a directory with the model, the files made of it, the recipe, and what was measured."""

import contextlib
import json
import pathlib
import warnings
from dataclasses import dataclass
from typing import Any

import keras

from keras_squeeze.analysis.report import summarize
from keras_squeeze.atomic_write import write_file
from keras_squeeze.deployment.litert import ExportResult, export
from keras_squeeze.deployment.packing import save_packed
from keras_squeeze.evaluation.latency import measure_latency
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.recipes.recipe import Recipe
from keras_squeeze.recipes.steps import finished

ARTIFACTS = {"tflite": "model.tflite", "packed": "model.squeeze"}
"""The files whose size can be `size_bytes`."""

_FEW_BITS = 4  # which a .tflite file can store as they are


@dataclass(frozen=True)
class Result:
    """One finished trial.

    Attributes:
        metrics: What was measured, by name: `val_<metric>`, `size_bytes`, `tflite_bytes`, `packed_bytes`, `macs`,
            `energy_pj`, and `latency_ms` where it was asked for.
        recipe: What was done to the model.
        directory: Where `model.keras`, `model.tflite`, `model.squeeze`, `recipe.json`, `report.json` and
            `metrics.json` are.
    """

    metrics: dict[str, float]
    recipe: Recipe
    directory: pathlib.Path

    @property
    def trial(self) -> str:
        """The number of the trial, as in the name of its directory."""
        return self.directory.name.removeprefix("trial_")

    def load_model(self) -> keras.Model:
        """The finished model, not compiled; it predicts as it was measured."""
        return keras.models.load_model(self.directory / "model.keras", compile=False)

    @classmethod
    def read(cls, directory) -> "Result":
        """What `write_result` wrote.

        Raises:
            ValueError: there is no result in the directory.
        """
        directory = pathlib.Path(directory)
        path = directory / "metrics.json"
        if not path.is_file():
            raise ValueError(f"There is no finished trial in {directory}: it has no metrics.json.")
        return cls(json.loads(path.read_text()), Recipe.load(directory / "recipe.json"), directory)

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:,.4g}" for name, value in self.metrics.items())
        return f"{self.recipe}: {numbers}; {self.directory}"


def write_result(
    model: keras.Model,
    recipe: Recipe,
    directory,
    *,
    metric: str | None,
    validation_data: Any = None,
    calibration_data: Any = None,
    artifact: str = "tflite",
    latency: bool = False,
) -> Result:
    """Finishes a trained model, writes all its files, and measures it.

    Args:
        model: What `Recipe.fit` returned.
        recipe: The recipe.
        directory: Where the files go; made if it is missing.
        metric: The name of a compiled metric, or `"loss"`. None measures none.
        validation_data: `(x, y)`, `(x, y, sample_weight)` or a dataset of batches; the finished model is evaluated on
            all of it.
        calibration_data: Inputs for the comparison of the `.tflite` file with the model.
        artifact: The file whose size is `size_bytes`: `"tflite"` or `"packed"`.
        latency: Whether to measure the latency of the `.tflite` file.

    Raises:
        ValueError: the converter cannot make a `.tflite` file of the model, and one is needed.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plain = finished(model)
    metrics = {} if metric is None else {f"val_{metric}": evaluate(plain, validation_data)[metric]}
    sizes, about_file = write_files(model, directory, calibration_data, artifact=artifact, needs_file=latency)
    metrics |= sizes
    if latency:
        metrics["latency_ms"] = measure_latency(directory / ARTIFACTS["tflite"]).median_ms
    plain.save(directory / "model.keras")
    recipe.save(directory / "recipe.json")
    report = {"recipe": recipe.to_dict(), "export": about_file, "report": summarize(model).to_dict()}
    _write(directory / "report.json", report)
    _write(directory / "metrics.json", metrics)  # the last one: with it the trial is finished
    return Result(metrics, recipe, directory)


def write_files(
    model: keras.Model, directory: pathlib.Path, calibration_data, *, artifact: str, needs_file: bool = False
) -> tuple[dict[str, float], dict[str, Any]]:
    """Writes the `.tflite` and the packed file of a model.

    Args:
        model: With quantizers or without.
        directory: Where they go.
        calibration_data: Inputs.
        artifact: The file whose size is `size_bytes`.
        needs_file: Whether a `.tflite` file is needed although it is not the artifact.

    Returns:
        The sizes and the operations by name, and what is to be said about the `.tflite` file.

    Raises:
        ValueError: the converter cannot make a `.tflite` file of the model, and one is needed.
    """
    packed = save_packed(model, directory / ARTIFACTS["packed"])
    needs_file = needs_file or artifact == "tflite"
    shipped, problem = _export(model, directory / ARTIFACTS["tflite"], calibration_data, needs_file)
    total = summarize(model).total
    sizes: dict[str, float | None] = {"packed": packed, "tflite": None if shipped is None else shipped.num_bytes}
    metrics = {"size_bytes": sizes[artifact], "tflite_bytes": sizes["tflite"], "packed_bytes": packed}
    metrics |= {"macs": total.macs, "energy_pj": total.energy_pj}
    about_file = {"problem": problem} if shipped is None else {**vars(shipped), "path": shipped.path.name}
    return {name: float(value) for name, value in metrics.items() if value is not None}, about_file


def evaluate(model: keras.Model, validation_data) -> dict[str, float]:
    """The metrics of a compiled model by name, on all the data."""
    parts = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
    metrics = model.evaluate(
        *parts[:2], sample_weight=parts[2] if len(parts) > 2 else None, verbose=0, return_dict=True
    )
    return {name: float(value) for name, value in metrics.items()}


def export_smallest(model: keras.Model, path, *, calibration_data=None, allow_float: bool = False) -> ExportResult:
    """`export` in as few bits as were trained and LiteRT can store.

    Raises:
        ValueError: as `export`.
    """
    wrappers = [layer for layer in model._flatten_layers() if isinstance(layer, QuantizeAware)]
    bits = [layer.weight_quantizer.bits for layer in wrappers if layer.weight_quantizer is not None]
    kwargs = {"calibration_data": calibration_data, "allow_float": allow_float}
    if bits and min(bits) <= _FEW_BITS:
        with contextlib.suppress(ValueError):
            return export(model, path, precision="int4", **kwargs)
    return export(model, path, **kwargs)


def _export(model, path, calibration_data, needed: bool) -> tuple[ExportResult | None, str]:
    """Whatever has no kernel is left in float; that is in the report, and not said for every trial."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return export_smallest(model, path, calibration_data=calibration_data, allow_float=True), ""
    except ValueError as error:
        if needed:
            raise
        return None, str(error)


def _write(path: pathlib.Path, values: dict) -> None:
    write_file(path, json.dumps(values, indent=2, default=str).encode())
