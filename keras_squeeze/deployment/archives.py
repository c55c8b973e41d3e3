"""What a packed file holds, and what is refused.

A packed file is a zip archive:

| member | content |
|---|---|
| `manifest.json` | format, version, SHA-256 of the other members, and how each weight is stored |
| `model.json` | the model's configuration, as Keras serializes it |
| `weights.bin` | the streams of all weights, one after the other; see `keras_squeeze.analysis.encodings` |
| `assets/<layer>/<name>` | what layers keep in files, such as vocabularies |

Nothing in it is executed here, nothing is written to where it says, and no more is unpacked than it may hold.
"""

import hashlib
import io
import itertools
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np

from keras_squeeze.analysis.encodings import PLACES, VALUES, Encoded, decode, encode

FORMAT = "keras_squeeze packed model"
VERSION = 1

_MANIFEST, _MODEL, _WEIGHTS = "manifest.json", "model.json", "weights.bin"
_ASSET = re.compile(r"assets/(\d{1,6})/([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})")
_DTYPES = (
    *(f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)),
    *("bool", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
)
_MOST_TEXT = 16 << 20  # bytes of a member that is unpacked whole; the largest of keras.applications has half of one


def is_packed(path) -> bool:
    """Whether a file looks like one that `save_packed` wrote."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {_MANIFEST, _MODEL, _WEIGHTS} <= set(archive.namelist())


def asset_name(place: int, name: str) -> str:
    """The member that a file of a layer becomes; `place` is that of the layer among the model's."""
    member = f"assets/{place}/{name}"
    if not _ASSET.fullmatch(member):
        raise ValueError(f"A layer keeps a file whose name is not a plain one, which cannot be packed: {name!r}")
    return member


def first_line(problem: Exception) -> str:
    """An error's message, in one line that is not too long; of Keras's the cause, which comes after a whole config."""
    cause = str(problem).rpartition("Exception encountered:")[2].strip()
    return " ".join((cause or type(problem).__name__).split())[:600]


def size_of(dtype: str) -> int:
    """Bytes of a value of a Keras type."""
    return _dtype(dtype).itemsize if dtype in _DTYPES else 8


@dataclass(frozen=True)
class Archive:
    """A packed file whose members are what its manifest says.

    Attributes:
        config: The model's configuration, JSON.
        entries: What the manifest says of every array.
        weights: The streams of all arrays.
        assets: Files of layers, by the names of their members.
    """

    config: str
    entries: list[list]
    weights: bytes
    assets: dict[str, bytes]

    @classmethod
    def of(cls, config: str, arrays: Iterable[tuple[int, str, np.ndarray]], assets: dict[str, bytes]) -> "Archive":
        """Encodes arrays, each with the place of its layer and a key, and decodes them again to make sure."""
        entries: list[list] = []
        streams: list[bytes] = []
        for index, key, values in arrays:
            encoded = encode(values)
            again = decode(encoded, values.shape, values.dtype)
            if not np.array_equal(values, again, equal_nan=values.dtype.kind in "fV"):  # V: the types of ml_dtypes
                raise RuntimeError(f"Weight {key!r} of layer {index} would not come back as it was.")
            entries.append(list(_Entry.of(index, key, values, encoded)))
            streams.extend(encoded.streams)
        return cls(config, entries, b"".join(streams), assets)

    def to_bytes(self) -> bytes:
        members = {_MODEL: self.config.encode(), _WEIGHTS: self.weights, **self.assets}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "keras": keras.__version__,
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in members.items()},
            "weights": self.entries,
        }
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            archive.writestr(_MANIFEST, json.dumps(manifest, separators=(",", ":")))
            for name, content in members.items():  # the streams of weights are coded already
                archive.writestr(name, content, zipfile.ZIP_STORED if name == _WEIGHTS else None)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Archive":
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return cls._of(archive)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as problem:
            raise ValueError(f"it is damaged, or no packed model at all ({first_line(problem)})") from None
        except (KeyError, TypeError, RecursionError, AttributeError) as problem:
            raise ValueError(f"its manifest is not understood ({first_line(problem)})") from None

    @classmethod
    def _of(cls, archive: zipfile.ZipFile) -> "Archive":
        names = archive.namelist()
        if not {_MANIFEST, _MODEL, _WEIGHTS} <= set(names):
            raise ValueError("it is no packed model")
        strange = [name for name in names if name not in (_MANIFEST, _MODEL, _WEIGHTS) and not _ASSET.fullmatch(name)]
        if strange or len(set(names)) != len(names):
            raise ValueError(f"it has members that do not belong there: {', '.join(map(repr, strange[:3])) or 'twins'}")
        manifest = json.loads(_member(archive, _MANIFEST))
        if manifest["format"] != FORMAT:
            raise ValueError("it is no packed model")
        if manifest["version"] != VERSION:
            raise ValueError(
                f"it has version {manifest['version']!r} of the format, and this release of keras_squeeze reads "
                f"version {VERSION}"
            )
        members = {name: _member(archive, name) for name in names if name != _MANIFEST}
        sums = {name: hashlib.sha256(member).hexdigest() for name, member in members.items()}
        if sums != manifest["sha256"]:
            raise ValueError("it is damaged: a checksum is wrong")
        config, weights = members.pop(_MODEL).decode(), members.pop(_WEIGHTS)
        return cls(config, list(manifest["weights"]), weights, members)

    def arrays(self, count: int, max_bytes: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The arrays of each of `count` layers, by their keys; none of more than `max_bytes`."""
        position = 0
        for index, entries in itertools.groupby(map(_Entry.read, self.entries), key=lambda entry: entry.place):
            if not 0 <= index < count:
                raise ValueError(f"it has weights for layer {index}, and the model has {count} layers")
            arrays = {}
            for entry in entries:
                streams, position = self._streams(entry.lengths, position)
                arrays[entry.key] = entry.decode(streams, max_bytes)
            yield index, arrays
        if position != len(self.weights):
            raise ValueError("there are more weights than the manifest says")

    def _streams(self, lengths: list[int], position: int) -> tuple[tuple[bytes, ...], int]:
        *starts, end = itertools.accumulate(lengths, initial=position)
        if end > len(self.weights):
            raise ValueError("there are fewer weights than the manifest says")
        spans = zip(starts, lengths, strict=True)
        return tuple(self.weights[start : start + length] for start, length in spans), end

    def files(self, count: int) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The files of each layer, by their names."""
        for index, names in itertools.groupby(sorted(self.assets), key=lambda name: int(name.split("/")[1])):
            if index >= count:
                raise ValueError(f"it has a file for layer {index}, and the model has {count} layers")
            yield index, {name.split("/")[2]: self.assets[name] for name in names}


class _Entry(NamedTuple):
    """What the manifest says of one array; a list in JSON."""

    place: int
    key: str
    shape: list[int]
    dtype: str
    places: str
    values: str
    stored: int
    low: int
    step: int
    base: int
    axes: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, place: int, key: str, array: np.ndarray, encoded: Encoded) -> "_Entry":
        form = (encoded.places, encoded.values, encoded.count, encoded.low, encoded.step, encoded.base)
        lengths = [len(stream) for stream in encoded.streams]
        return cls(place, key, list(array.shape), str(array.dtype), *form, list(encoded.axes), lengths)

    @classmethod
    def read(cls, values: list) -> "_Entry":
        try:
            entry = cls(*values)
            numbers = (entry.place, *entry[6:10], *entry.shape, *entry.axes, *entry.lengths)
            sound = all(type(number) is int for number in numbers) and min(*entry.shape, *entry.lengths, 0) >= 0
            sound = sound and entry.places in PLACES and entry.values in VALUES and isinstance(entry.key, str)
        except TypeError:
            sound = False
        if not sound:
            raise ValueError(f"its manifest is not understood: an entry reads {values!r:.80}")
        return entry

    def decode(self, streams: tuple[bytes, ...], max_bytes: int) -> np.ndarray:
        dtype = _dtype(self.dtype)
        if math.prod(self.shape) * dtype.itemsize > max_bytes:
            raise ValueError(f"one of its weights has shape {self.shape}, more than max_bytes={max_bytes:,}")
        form = (self.places, self.values, self.stored, self.low, self.step, self.base)
        return decode(Encoded(*form, tuple(self.axes), streams), tuple(self.shape), dtype)


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"its manifest is not understood: there is no type {name!r}")
    return np.dtype(getattr(ml_dtypes, name, name))


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member, unpacked no further than its size may be."""
    info = archive.getinfo(name)
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored and info.file_size > _MOST_TEXT:
        raise ValueError(f"its member {name} has {info.file_size:,} bytes, more than {_MOST_TEXT:,}")
    with archive.open(info) as file:
        content = file.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise ValueError(f"its member {name} is not as long as it says")
    return content
