"""Files that are there whole or not at all."""

import os
import pathlib
import tempfile


def write_file(path: pathlib.Path, content: bytes) -> None:
    """Writes all or nothing: what was at `path` stays until the new content is on the disk."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise
