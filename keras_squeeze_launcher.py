"""Starts the `keras-squeeze` command, with TensorFlow quiet.

It stands beside the package, since importing the package imports TensorFlow, which reads its log level once and says
its first lines before it has.
"""

import faulthandler
import importlib
import os
import sys


def main() -> int:
    """Runs the command; returns its exit code. Who sets TF_CPP_MIN_LOG_LEVEL hears all that TensorFlow says."""
    if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        _hear_python_alone()
    return importlib.import_module("keras_squeeze.cli.main").main()


def _hear_python_alone() -> None:
    """From here on, what C++ code writes on standard error goes nowhere; Python still writes there, also in a crash."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    faulthandler.enable(sys.stderr)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
