"""Training that is killed and started again ends where an uninterrupted run ends."""

import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from resumable_training import BATCHES_PER_EPOCH, EPOCHS, TARGET

SCRIPT = pathlib.Path(__file__).with_name("resumable_training.py")


def train(folder, save_freq, kill_after=0, kind="weights"):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(folder), save_freq, str(kill_after), kind]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def finish(folder, save_freq, kind="weights"):
    done = train(folder, save_freq, kind=kind)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "final.npz") as arrays:
        return dict(arrays)


def kill(folder, save_freq, after, kind="weights"):
    assert train(folder, save_freq, after, kind).returncode == -signal.SIGKILL
    assert not (folder / "final.npz").exists()


@pytest.mark.parametrize("kind", ["weights", "neurons", "snip", "budget"])
def test_saved_every_epoch_the_masks_equal_those_of_an_uninterrupted_run(tmp_path, kind):
    whole = finish(tmp_path / "whole", "epoch", kind)
    kill(tmp_path / "killed", "epoch", after=2 * BATCHES_PER_EPOCH + 4, kind=kind)
    resumed = finish(tmp_path / "killed", "epoch", kind)

    assert len(resumed["zeros"]) == (EPOCHS - 2) * BATCHES_PER_EPOCH
    np.testing.assert_array_equal(resumed["zeros"], whole["zeros"][2 * BATCHES_PER_EPOCH :])
    for name in set(whole) - {"zeros"}:
        np.testing.assert_array_equal(resumed[name] != 0, whole[name] != 0, err_msg=name)
        np.testing.assert_allclose(resumed[name], whole[name], rtol=1e-5, atol=1e-7)


def test_killed_twice_nothing_that_was_pruned_comes_back(tmp_path):
    """After the first kill Keras replays an epoch, so that its own counts no longer tell where the run began."""
    folder = tmp_path / "killed"
    kill(folder, "5", after=12)
    kill(folder, "5", after=2 * BATCHES_PER_EPOCH + 7)
    resumed = finish(folder, "5")
    steps_at_backup = 10 + 2 * BATCHES_PER_EPOCH + 5
    done = min(steps_at_backup / (0.75 * EPOCHS * BATCHES_PER_EPOCH), 1)
    size = sum(kernel.size for name, kernel in resumed.items() if name.endswith("kernel"))
    assert resumed["zeros"][0] / size >= TARGET * (1 - (1 - done) ** 3) - 0.05
    np.testing.assert_array_equal(resumed["zeros"], np.sort(resumed["zeros"]))


@pytest.mark.parametrize("killed_in_epoch", [0, 2])
def test_saved_every_few_batches_the_zeros_are_kept_and_the_target_is_reached(tmp_path, killed_in_epoch):
    kill(tmp_path / "killed", "5", after=killed_in_epoch * BATCHES_PER_EPOCH + 12)
    resumed = finish(tmp_path / "killed", "5")

    whole = finish(tmp_path / "whole", "5")
    at_backup = whole["zeros"][killed_in_epoch * BATCHES_PER_EPOCH + 9]
    assert resumed["zeros"][0] >= at_backup
    np.testing.assert_array_equal(resumed["zeros"], np.sort(resumed["zeros"]))
    for name in [name for name in resumed if name.endswith("kernel")]:
        kernel = resumed[name]
        assert (kernel == 0).sum() == kernel.size - round(kernel.size * (1 - TARGET)), name
