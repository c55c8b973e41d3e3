"""What subcommands share: their arguments, the model that they read, and what they write."""

import argparse
import pathlib
import tempfile
from typing import Any

import keras

from keras_squeeze.analysis.report import LayerReport
from keras_squeeze.atomic_write import write_file
from keras_squeeze.deployment.loading import load_model
from keras_squeeze.deployment.packing import save_packed
from keras_squeeze.progress import progress_bar
from keras_squeeze.search.artifacts import export_smallest

EPILOG = "exit codes: 0 fine; 1 an error in what was asked, told in one line on standard error; 2 wrong usage"

_MODEL = "a .keras file, or a packed one"
_NO_PACKED_FILES = (".h5", ".hdf5", ".npz", ".npy", ".json", ".yaml", ".onnx")  # what someone means who writes them


def command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    """Adds a subcommand."""
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=description, epilog=EPILOG)
    parser.set_defaults(run=run, json=False)
    return parser


def takes_models(parser: argparse.ArgumentParser, name: str = "model", also: str = "", **several) -> None:
    """Adds the model, and what all subcommands with one have."""
    parser.add_argument(name, metavar="MODEL", help=_MODEL + also, **several)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")
    parser.add_argument("--unsafe", action="store_true", help="let a file that you trust run code of its own")


def writes(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the file that is written."""
    parser.add_argument("output", metavar="OUTPUT", type=pathlib.Path, help=f"the {what} to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT if it exists")


def load(options) -> keras.Model:
    """The model, not compiled."""
    with working("loading"):
        return load_model(options.model, safe_mode=not options.unsafe)


def working(title: str):
    """A bar for what takes a while."""
    return progress_bar(title)


def check_output(path: pathlib.Path, force: bool, *suffixes: str) -> None:
    """Raises what is wrong with the name of an output, before anything takes time."""
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"The name of the output must end in {' or '.join(suffixes)}. Received: {path}")
    if path.is_dir():
        raise ValueError(f"The output must be a file. Received a folder: {path}")
    if path.exists() and not force:
        raise ValueError(f"{path} exists. Pass --force to overwrite it.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} for the output. Make it first.")


def check_model_output(path: pathlib.Path, force: bool) -> None:
    """The same for a model, whose form is chosen by the suffix."""
    if path.suffix.lower() in _NO_PACKED_FILES:
        raise ValueError(
            f"The name of the output must end in .keras, .tflite or, for a packed file, something of its own such as "
            f".squeeze. Received: {path}"
        )
    check_output(path, force)


def write_model(model: keras.Model, path: pathlib.Path, calibration_data=None, allow_float: bool = False) -> int:
    """Writes a model: `.keras` with its quantizers, `.tflite` as it was trained, anything else packed.

    Args:
        model: The model.
        path: The file; what was there is replaced once the new one is whole.
        calibration_data: Inputs, for a `.tflite` file.
        allow_float: Whether quantized layers of a `.tflite` file may compute in float.

    Returns:
        The size in bytes.
    """
    if path.suffix == ".tflite":
        return export_smallest(model, path, calibration_data=calibration_data, allow_float=allow_float).num_bytes
    if path.suffix != ".keras":
        return save_packed(model, path)
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder, "model.keras")
        model.save(whole)
        write_file(path, whole.read_bytes())
    return path.stat().st_size


def changes(path: pathlib.Path, num_bytes: int, before: LayerReport, after: LayerReport) -> tuple[str, dict[str, Any]]:
    """What has become of a model, in words and as a dict; both take the totals of its reports."""
    facts: dict[str, Any] = {"path": str(path), "num_bytes": num_bytes}
    facts |= {name: [getattr(before, name), getattr(after, name)] for name in ("parameters", "zeros", "bits", "macs")}
    parts = [f"{num_bytes:,} bytes", f"parameters {before.parameters:,} -> {after.parameters:,}"]
    if before.macs is not None and after.macs is not None:
        parts.append(f"MACs {before.macs:,} -> {after.macs:,}")
    if after.zeros:
        parts.append(f"{after.sparsity:.1%} zeros")
    if after.bits != before.bits:
        parts.append(f"{after.bits:g} bits a weight")
    return f"{path}: {', '.join(parts)}", facts


def columns(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([f"{row[0]:<{first}}", *map(str.rjust, row[1:], widths)] for row in rows)
    return ["  ".join(line).rstrip() for line in cells]


def number(value: float | None) -> str:
    """A metric or a size in a table."""
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:,.0f}"
