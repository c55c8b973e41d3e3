"""Weights in few bytes, and back without a loss: dense, from a table, on a grid or sparse, then entropy-coded.

Every form is a choice of two: which places are stored (all; those of a bit mask; those after counted gaps of zeros)
and how the values are stored (as they are, byte plane by byte plane; as numbers into a table of at most 256 values; as
the integers of a grid, with its scales). The smallest is taken. Each stream is then coded with deflate's Huffman codes
where that helps, so that a code costs about its entropy.

What is decoded equals what was encoded value for value; only a negative zero may come back as zero.
"""

import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from keras_squeeze.analysis.grids import find_integers

PLACES = ("all", "mask", "gaps")
VALUES = ("raw", "table", "grid")

_MOST_IN_A_TABLE = 256
_MOST_CODES = 1 << 16
_SAMPLE = 1 << 16
_GAIN = 0.99  # what coding must save to be worth the time of decoding
_RAW, _DEFLATED = b"\0", b"\1"
_STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY)


@dataclass(frozen=True)
class Encoded:
    """An array as streams of bytes.

    Attributes:
        places: Which places are stored: one of `PLACES`.
        values: How their values are stored: one of `VALUES`.
        count: How many values are stored.
        low, step: Of a grid: code c stands for the integer `low + step * c`.
        base: How many different codes there can be: entries of the table, or integers of the grid.
        axes: The axes along which every entry has a scale of its own.
        streams: What is stored: the mask or the gaps, then the table or the scales, then the values or their codes.
    """

    places: str
    values: str
    count: int
    low: int
    step: int
    base: int
    axes: tuple[int, ...]
    streams: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.streams))


@dataclass(frozen=True)
class _Values:
    """One way to store the values of an array; `codes` are what is stored for each of them."""

    kind: str
    codes: np.ndarray
    low: int = 0
    step: int = 1
    base: int = 0
    axes: tuple[int, ...] = ()
    head: tuple[bytes, ...] = ()


def encode(array: np.ndarray) -> Encoded:
    """The smallest form of an array of any number type and shape."""
    flat = array.reshape(-1)
    nonzero = flat != 0
    sparse = np.count_nonzero(nonzero) < flat.size
    ways = itertools.product(_ways(array), PLACES if sparse else PLACES[:1])
    return min((_stored(values, places, nonzero) for values, places in ways), key=lambda encoded: encoded.num_bytes)


def decode(encoded: Encoded, shape: tuple[int, ...], dtype) -> np.ndarray:
    """The array of this shape and type that was encoded.

    No more memory is taken than the shape says, whatever the streams hold.

    Raises:
        ValueError: the streams do not fit the shape, the type or each other.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape)
    streams = iter(encoded.streams)
    where = _places(encoded, size, streams)
    if encoded.values == "raw":
        stored = _from_planes(streams, encoded.count, dtype)
    elif encoded.values == "table":
        table = _from_planes(streams, encoded.base, dtype)
        stored = table[_unpacked(streams, encoded.count, encoded.base)]
    else:
        stored = _from_grid(encoded, shape, dtype, where, streams)
    if next(streams, None) is not None:
        raise ValueError("there are more streams than were expected")
    if where is None:
        return stored.reshape(shape)
    flat = np.zeros(size, dtype)
    flat[where] = stored
    return flat.reshape(shape)


def _ways(array: np.ndarray) -> Iterator[_Values]:
    """The kinds of values that an array's can be stored as."""
    flat = array.reshape(-1)
    grid = find_integers(array) if array.dtype == np.float32 else None
    if grid is not None:
        integers, scales, axes = grid
        low = int(integers.min())
        step = int(np.gcd.reduce((integers - low).reshape(-1))) or 1
        codes = (integers - low).reshape(-1) // step
        yield _Values("grid", codes, low, step, int(codes.max()) + 1, axes, _planes(scales.reshape(-1)))
        return
    table = _table(flat)
    if table is not None:
        yield _Values("table", np.searchsorted(table, flat), base=len(table), head=_planes(table))
    yield _Values("raw", flat)


def _table(flat: np.ndarray) -> np.ndarray | None:
    """The distinct values, where they are few."""
    if flat.size < 2 or flat.dtype.itemsize < 2 or not np.issubdtype(flat.dtype, np.floating):
        return None
    if len(np.unique(flat[:_SAMPLE])) > _MOST_IN_A_TABLE or not np.isfinite(flat).all():
        return None
    table = np.unique(flat)
    return table if len(table) <= min(_MOST_IN_A_TABLE, flat.size // 2) else None


def _stored(values: _Values, places: str, nonzero: np.ndarray) -> Encoded:
    head: tuple[bytes, ...] = ()
    codes = values.codes
    if places == "mask":
        head, codes = (_coded(np.packbits(nonzero).tobytes()),), codes[nonzero]
    elif places == "gaps":
        where, gaps = _gaps(nonzero)
        head, codes = (_coded(gaps.tobytes()),), codes[where]
    body = _planes(codes) if values.kind == "raw" else _packed(codes, values.base)
    streams = (*head, *values.head, *body)
    return Encoded(places, values.kind, len(codes), values.low, values.step, values.base, values.axes, streams)


def _gaps(nonzero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places to store and the zeros before each, at most 255: of longer gaps some zeros are stored as well."""
    where = np.flatnonzero(nonzero)
    skipped = np.diff(where, prepend=-1) - 1
    fillers = skipped // 256
    ends = np.cumsum(fillers + 1)
    places = np.empty(ends[-1] if len(ends) else 0, "int64")
    gaps = np.full(len(places), 255, "uint8")
    if len(places):
        places[ends - 1], gaps[ends - 1] = where, skipped % 256
        filler = np.ones(len(places), bool)
        filler[ends - 1] = False
        places[filler] = (np.cumsum(gaps.astype("int64") + 1) - 1)[filler]
    return places, gaps


def _places(encoded: Encoded, size: int, streams: Iterator[bytes]) -> np.ndarray | None:
    """Where the stored values go; None: everywhere, in order."""
    if not 0 <= encoded.count <= size:
        raise ValueError(f"{encoded.count} values are stored for {size} places")
    if encoded.places == "all":
        if encoded.count != size:
            raise ValueError(f"{encoded.count} values are stored for {size} places")
        return None
    if encoded.places == "mask":
        mask = np.unpackbits(np.frombuffer(_plain(streams, -(-size // 8)), "uint8"), count=size)
        where = np.flatnonzero(mask)
    else:
        gaps = np.frombuffer(_plain(streams, encoded.count), "uint8")
        where = np.cumsum(gaps.astype("int64") + 1) - 1
    if len(where) != encoded.count or (len(where) and where[-1] >= size):
        raise ValueError("the places of the nonzero values are not within the array")
    return where


def _from_grid(encoded: Encoded, shape, dtype, where, streams: Iterator[bytes]) -> np.ndarray:
    axes = encoded.axes
    if dtype != np.float32 or not 1 <= encoded.step <= _MOST_CODES or abs(encoded.low) > _MOST_CODES:
        raise ValueError("a grid is not one of float32 values and integers of 16 bits")
    if len(set(axes)) != len(axes) or any(not -len(shape) <= axis < 0 for axis in axes):
        raise ValueError(f"an array of shape {shape} has no axes {axes}")
    kept = [length if axis - len(shape) in axes else 1 for axis, length in enumerate(shape)]
    scales = _from_planes(streams, math.prod(kept), dtype).reshape(kept)
    codes = _unpacked(streams, encoded.count, encoded.base)
    scale_of_value = np.broadcast_to(scales, shape).reshape(-1) if axes else scales.reshape(-1)
    if axes and where is not None:
        scale_of_value = scale_of_value[where]
    with np.errstate(over="ignore"):  # of damaged scales
        return (codes.astype("int64") * encoded.step + encoded.low).astype(dtype) * scale_of_value


def _planes(values: np.ndarray) -> tuple[bytes, ...]:
    """The first bytes of all values, then the second ones, and so on: exponents are alike, fractions are not."""
    rows = np.ascontiguousarray(values).view("uint8").reshape(-1, values.dtype.itemsize)
    return tuple(_coded(rows[:, place].tobytes()) for place in range(values.dtype.itemsize))


def _from_planes(streams: Iterator[bytes], count: int, dtype: np.dtype) -> np.ndarray:
    rows = np.empty((count, dtype.itemsize), "uint8")
    for byte in range(dtype.itemsize):
        rows[:, byte] = np.frombuffer(_plain(streams, count), "uint8")
    return rows.reshape(-1).view(dtype)


def _packed(codes: np.ndarray, base: int) -> tuple[bytes, ...]:
    """As many codes to a byte as fit; beyond 256 in two planes."""
    if base > 256:
        return _planes(codes.astype("<u2"))
    together = _codes_per_byte(base)
    rows = np.zeros(-(-len(codes) // together) * together, "uint8")
    rows[: len(codes)] = codes
    weights = base ** np.arange(together)
    return (_coded((rows.reshape(-1, together) @ weights).astype("uint8").tobytes()),)


def _unpacked(streams: Iterator[bytes], count: int, base: int) -> np.ndarray:
    if not 1 <= base <= _MOST_CODES:
        raise ValueError(f"a code cannot have {base} values")
    if base > 256:
        codes = _from_planes(streams, count, np.dtype("<u2"))
    else:
        together = _codes_per_byte(base)
        packed = np.frombuffer(_plain(streams, -(-count // together)), "uint8")
        codes = (packed[:, np.newaxis] // (base ** np.arange(together)) % base).reshape(-1)[:count]
    if count and codes.max() >= base:
        raise ValueError(f"a code is not below {base}")
    return codes


def _codes_per_byte(base: int) -> int:
    together = 1
    while together < 8 and base ** (together + 1) <= 256:
        together += 1
    return together


def _coded(stream: bytes) -> bytes:
    """A stream after a byte that says how it is coded, in whichever way is shortest."""
    sample = stream[len(stream) // 2 :][:_SAMPLE]
    lengths = [len(_deflated(sample, strategy)) for strategy in _STRATEGIES]
    if min(lengths) < _GAIN * len(sample):
        deflated = _deflated(stream, _STRATEGIES[int(np.argmin(lengths))])
        if len(deflated) < len(stream):
            return _DEFLATED + deflated
    return _RAW + stream


def _deflated(stream: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(stream) + coder.flush()


def _plain(streams: Iterator[bytes], length: int) -> bytes:
    """The next stream as it was before coding; it must be that long, and is not unpacked any further."""
    stream = next(streams, None)
    if not stream:
        raise ValueError("a stream is missing")
    plain = stream[1:]
    if stream[:1] == _DEFLATED:
        coder = zlib.decompressobj(-15)
        try:
            plain = coder.decompress(plain, length + 1)
        except zlib.error as problem:
            raise ValueError(f"a stream is damaged: {problem}") from None
        if not coder.eof or coder.unused_data:
            raise ValueError("a stream does not end where it should")
    elif stream[:1] != _RAW:
        raise ValueError("a stream is coded in an unknown way")
    if len(plain) != length:
        raise ValueError(f"a stream has {len(plain)} bytes in place of {length}")
    return plain
