"""Every family of `keras.applications`: quantized to int8, trained for a step, finalized, and shipped as files."""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tables
from measuring import advance, own_process, progress_bar
from rich.console import Console

FAMILIES = {  # the smallest input that each takes, or 64
    "VGG16": 32,
    "ResNet50": 64,
    "ResNet50V2": 64,
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "EfficientNetB0": 64,
    "EfficientNetV2B0": 64,
    "DenseNet121": 64,
    "InceptionV3": 75,
    "Xception": 71,
    "InceptionResNetV2": 75,
    "NASNetMobile": 64,
    "ConvNeXtTiny": 64,
}
QUICK = ("MobileNet", "MobileNetV3Small")


@dataclass(frozen=True)
class Row:
    family: str
    wrapped: int
    finalized: float
    ratio: float
    float_difference: float
    difference: float
    agreement: float
    float_ops: list[str]


def convert(family: str, size: int) -> Row:
    """Does all of it; the weights are random, so what the file is compared by are its numbers, not its answers."""
    import keras

    import keras_squeeze as ks

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, family)(weights=None, input_shape=(size, size, 3), classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stays in float is in the table
        q = ks.quantize_aware(model)
    q.compile("sgd", "sparse_categorical_crossentropy")
    images = np.random.default_rng(0).uniform(0, 255, (8, size, size, 3)).astype("float32")
    q.train_on_batch(images, np.arange(8))
    finalized = ks.finalize(q)
    change = float(np.max(np.abs(finalized(images, training=False) - q(images, training=False))))
    with tempfile.TemporaryDirectory() as folder:
        whole = ks.export(model, Path(folder, "float.tflite"), calibration_data=images)
        small = ks.export(q, Path(folder, "int8.tflite"), calibration_data=images, allow_float=True)
    wrapped = sum(isinstance(layer, ks.QuantizeAware) for layer in q._flatten_layers())
    names = [name.split(" ")[0] for name in small.float_ops]
    ratio = small.num_bytes / whole.num_bytes
    return Row(family, wrapped, change, ratio, whole.max_abs_error, small.max_abs_error, small.agreement, names)


def main() -> None:
    args = tables.parse(tables.make_parser(__doc__))
    console = Console()
    families = QUICK if args.quick else FAMILIES
    rows = []
    with own_process() as process, progress_bar(console) as progress:
        task = progress.add_task("families", total=len(families))
        for family in families:
            row = process.submit(convert, family, FAMILIES[family]).result()
            left = ", ".join(f"{row.float_ops.count(name)} {name}" for name in dict.fromkeys(row.float_ops)) or "none"
            differences = (f"{row.float_difference:.1g}", f"{row.difference:.2g}", f"{row.agreement:.0%}")
            rows.append((family, f"{row.wrapped}", f"{row.finalized:.1g}", f"{row.ratio:.2f}", *differences, left))
            advance(progress, task)
    header = (
        "network",
        "layers quantized",
        "finalized, difference",
        "bytes, int8 over float",
        "float file, difference",
        "int8 file, difference",
        "same answer",
        "operations in float",
    )
    note = f"Ten classes, eight random pictures; probabilities are compared. {tables.machine('ai-edge-litert')}"
    text = f"{tables.markdown(header, rows)}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("quantized_applications", text)


if __name__ == "__main__":
    main()
