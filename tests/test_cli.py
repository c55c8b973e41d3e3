"""The command line: what it writes, what it prints where, and with which exit code it ends."""

import json
import os
import subprocess
import sys
import warnings

import keras
import networks
import numpy as np
import pytest

import keras_squeeze as ks
from keras_squeeze.cli import main as cli


@pytest.fixture
def files(digits, tmp_path):
    """A model with some dead neurons, in a file, and examples."""
    model = networks.residual_convnet()
    ks.prune_neurons(model, 0.5)
    model.save(tmp_path / "model.keras")
    x, y = digits
    np.savez(tmp_path / "data.npz", x=x[:60], y=y[:60])
    np.save(tmp_path / "inputs.npy", x[:60])
    return tmp_path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def run_json(capsys, *arguments) -> dict:
    """What is on standard output has to be JSON, and nothing else."""
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


def error(capsys, *arguments) -> str:
    """The one line on standard error, without what it begins with."""
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("keras-squeeze: error: ")
    return line.removeprefix("keras-squeeze: error: ")


def quietly(*arguments) -> subprocess.CompletedProcess:
    """The command in a process of its own, where nobody has set TensorFlow's log level."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-m", "keras_squeeze_launcher", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_report(files, capsys):
    report = ks.summarize(keras.models.load_model(files / "model.keras", compile=False))
    code, out, err = run(capsys, "report", files / "model.keras")
    assert code == 0
    assert out.strip() == str(report).strip()
    assert err == ""
    assert run_json(capsys, "report", files / "model.keras") == json.loads(report.to_json())


def test_report_of_neurons(files, capsys):
    overview = ks.prunable_neurons(keras.models.load_model(files / "model.keras", compile=False))
    code, out, _ = run(capsys, "report", files / "model.keras", "--neurons")
    assert code == 0
    assert out.strip() == str(overview).strip()
    assert f"{overview.free:,} of {overview.neurons:,} neurons can be removed" in out
    assert run_json(capsys, "report", files / "model.keras", "--neurons") == overview.to_dict()


def test_shrink(files, capsys, digits):
    code, out, _ = run(capsys, "shrink", files / "model.keras", files / "small.keras")
    assert code == 0
    model = keras.models.load_model(files / "model.keras", compile=False)
    small = keras.models.load_model(files / "small.keras", compile=False)
    assert small.count_params() < 0.7 * model.count_params()
    assert f"{model.count_params():,} -> {small.count_params():,}" in out
    np.testing.assert_allclose(small(digits[0][:9]), model(digits[0][:9]), atol=1e-5)
    facts = run_json(capsys, "shrink", files / "model.keras", files / "small.keras", "--force")
    assert facts["parameters"] == [model.count_params(), small.count_params()]
    assert facts["num_bytes"] == (files / "small.keras").stat().st_size
    assert facts["path"] == str(files / "small.keras")


def test_export(files, capsys):
    model, path = files / "whole.keras", files / "model.tflite"
    networks.residual_convnet().save(model)
    code, out, _ = run(capsys, "export", model, path)
    assert code == 0
    assert f"{path.stat().st_size:,} bytes, float32" in out
    whole = path.stat().st_size
    for data in ("inputs.npy", "data.npz"):
        options = ("--precision", "int8", "--calibration-data", files / data, "--force")
        facts = run_json(capsys, "export", model, path, *options)
        assert facts["precision"] == "int8"
        assert facts["path"] == str(path)
        assert facts["num_bytes"] == path.stat().st_size < 0.6 * whole
        assert facts["agreement"] > 0.8
    assert "calibration_data" in error(capsys, "export", model, path, "--precision", "int8", "--force")
    assert path.stat().st_size == facts["num_bytes"]


def test_benchmark(files, capsys):
    ks.export(keras.models.load_model(files / "model.keras", compile=False), files / "model.tflite")
    paths = files / "model.keras", files / "model.tflite"
    options = ("--data", files / "data.npz", "--runs", 3, "--threads", 2, "--plot", files / "picture.png")
    facts = run_json(capsys, "benchmark", *paths, *options)
    assert [row["name"] for row in facts["rows"]] == ["model.keras", "model.tflite"]
    assert facts["metric"] == "accuracy"
    assert facts["num_threads"] == 2
    assert facts["examples"] == 60
    assert facts["rows"][0]["latency_runs"] == 3
    assert facts["rows"][0]["score"] == facts["rows"][1]["score"]
    assert facts["rows"][1]["num_bytes"] == (files / "model.tflite").stat().st_size
    assert (files / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "--force" in error(capsys, "benchmark", *paths, *options)
    assert "must end in .png or" in error(capsys, "benchmark", *paths, "--plot", files / "picture.gif")

    code, out, _ = run(capsys, "benchmark", files / "model.tflite", "--runs", 2)
    assert code == 0
    assert "model.tflite" in out


def test_models_of_the_same_name_are_told_apart_by_their_folders(files, capsys):
    ks.export(keras.models.load_model(files / "model.keras", compile=False), files / "model.tflite")
    (files / "other").mkdir()
    (files / "other" / "model.tflite").write_bytes((files / "model.tflite").read_bytes())
    paths = files / "model.tflite", files / "other" / "model.tflite"
    facts = run_json(capsys, "benchmark", *paths, "--runs", 1)
    assert [row["name"] for row in facts["rows"]] == list(map(str, paths))
    assert "Received twice" in error(capsys, "benchmark", paths[0], paths[0])


def test_a_metric_that_is_not_finite_is_null_in_json(files, capsys):
    np.savez(files / "nan.npz", x=np.full((3, 8, 8, 1), np.nan, "float32"), y=np.full((3, 10), np.nan, "float32"))
    options = ("--data", files / "nan.npz", "--runs", 1, "--metric", "mean_squared_error")
    assert run_json(capsys, "benchmark", files / "model.keras", *options)["rows"][0]["score"] is None


@pytest.mark.parametrize(("command", "suffix"), [("shrink", "keras"), ("export", "tflite"), ("pack", "packed")])
def test_an_output_is_not_overwritten(files, capsys, command, suffix):
    output = files / f"there.{suffix}"
    output.write_text("mine")
    assert "exists. Pass --force" in error(capsys, command, files / "model.keras", output)
    assert output.read_text() == "mine"
    assert run(capsys, command, files / "model.keras", output, "--force")[0] == 0
    assert output.stat().st_size > 1000
    assert "There is no folder" in error(capsys, command, files / "model.keras", files / "none" / f"a.{suffix}")
    (files / f"folder.{suffix}").mkdir()
    assert "Received a folder" in error(capsys, command, files / "model.keras", files / f"folder.{suffix}", "--force")


def test_pack(files, capsys):
    facts = run_json(capsys, "pack", files / "model.keras", files / "model.packed")
    assert facts["num_bytes"] == (files / "model.packed").stat().st_size
    model = keras.models.load_model(files / "model.keras", compile=False)
    for loaded, weight in zip(ks.load_packed(files / "model.packed").weights, model.weights, strict=True):
        np.testing.assert_array_equal(loaded, weight)
    assert run_json(capsys, "report", files / "model.packed")["total"] == ks.summarize(model).to_dict()["total"]


def test_errors_are_one_line(files, capsys):
    assert "There is no file" in error(capsys, "report", files / "gone.keras")
    assert "must end in .keras" in error(capsys, "shrink", files / "model.keras", files / "small.h5")
    assert "must end in .tflite" in error(capsys, "export", files / "model.keras", files / "model")
    assert "There is no file" in error(capsys, "benchmark", files / "model.keras", "--data", files / "gone.npz")
    assert "`runs` must be an int" in error(capsys, "benchmark", files / "model.keras", "--runs", 0)
    (files / "text.keras").write_text("no model")
    assert "no model that Keras can load" in error(capsys, "report", files / "text.keras", "--json")


def test_warnings_are_one_line(files, capsys):
    norm = keras.layers.LayerNormalization(name="left")
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4), norm, keras.layers.Dense(2)])
    model.save(files / "normed.keras")
    np.save(files / "normed.npy", np.random.default_rng(0).random((8, 6)).astype("float32"))
    options = ("--precision", "int8", "--calibration-data", files / "normed.npy", "--allow-float")
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        code, _, err = run(capsys, "export", files / "normed.keras", files / "normed.tflite", *options)
    assert code == 0
    (line,) = (line for line in err.splitlines() if line.startswith("keras-squeeze: "))
    assert line.startswith("keras-squeeze: warning: ")
    assert "left in float: left" in line


def test_code_in_a_file_runs_only_on_request(files, capsys):
    path = files / "lambda.keras"
    keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x * 2), keras.layers.Dense(2)]).save(path)
    assert "--unsafe" in error(capsys, "report", path)
    assert run_json(capsys, "report", path, "--unsafe")["total"]["parameters"] == 8
    assert "--unsafe" in error(capsys, "benchmark", path)
    assert run_json(capsys, "benchmark", path, "--unsafe", "--runs", 1)["rows"][0]["parameters"] == 8


@pytest.mark.parametrize(
    "arguments",
    [[], ["report"], ["export", "a.keras", "b.tflite", "--precision", "float3"], ["benchmark", "a", "--runs", "many"]],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: keras-squeeze" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["demo"], ["report"], ["shrink"], ["export"], ["benchmark"]])
def test_help_tells_the_exit_codes(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    assert stopped.value.code == 0
    assert "exit codes: 0 fine; 1 an error" in " ".join(capsys.readouterr().out.split())


def test_a_process_prints_json_and_nothing_else(files):
    done = quietly("benchmark", files / "model.keras", "--data", files / "data.npz", "--runs", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["name"] == "model.keras"
    assert done.stderr == ""


def test_a_process_that_fails_says_why_in_one_line(tmp_path):
    done = quietly("report", tmp_path / "gone.keras")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("keras-squeeze: error: There is no file")


def test_the_noise_of_libraries_goes_nowhere_but_a_crash_is_heard():
    code = (
        "import os, sys, keras_squeeze_launcher as launcher\n"
        "launcher._hear_python_alone()\n"
        "os.write(2, b'noise')\n"
        "print('said', file=sys.stderr)\n"
        "os.abort()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.startswith("said\nFatal Python error: Aborted")
    assert "noise" not in done.stderr
    assert done.returncode < 0
