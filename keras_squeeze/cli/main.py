"""The `keras-squeeze` command.

Subcommands on finished models are in `files`, those that train in `training` and `searching`. Each is one function that
adds it with its arguments, and one that runs it and returns what to show: something to print, and the same as a dict
for `--json`.
"""

import argparse
import contextlib
import json
import math
import sys
import warnings

from keras_squeeze.cli import files, searching, training
from keras_squeeze.cli.arguments import EPILOG


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: What stands after `keras-squeeze`; by default that of this process.

    Returns:
        The exit code: 0, 1 after an error in what was asked, or 130 where it was interrupted.

    Raises:
        SystemExit: help was asked for (0), or usage is wrong (2).
    """
    options = _parser().parse_args(arguments)
    try:
        # Where JSON is asked for, whatever else is printed goes elsewhere.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
            warnings.showwarning = _show_warning
            text, facts = options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"keras-squeeze: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell says of what was interrupted
    if options.json:
        print(json.dumps(_finite(facts), indent=2))
    elif text is not None:
        _print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-squeeze", description="Make Keras models smaller and faster.", epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for part in (files, training, searching):
        for add in part.SUBCOMMANDS:
            add(commands)
    return parser


def _print(result) -> None:
    """In the width and colors of a terminal; for a file or a pipe as plain text."""
    if not sys.stdout.isatty():
        print(result)
        return
    from rich.console import Console

    Console().print(result, soft_wrap=isinstance(result, str), markup=False, highlight=False)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"keras-squeeze: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(text) -> str:
    return " ".join(str(text).split())


def _finite(value):
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
