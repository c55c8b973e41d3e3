"""Encodings of weights: nothing is lost, and a code costs about its entropy."""

import dataclasses
import math
import zlib

import keras
import ml_dtypes
import numpy as np
import pytest

import keras_squeeze as ks
from keras_squeeze.analysis.encodings import PLACES, VALUES, Encoded, decode, encode
from keras_squeeze.analysis.grids import find_integers

RNG = np.random.default_rng


def sparse(values, sparsity, seed=0):
    return np.where(RNG(seed).random(values.shape) < sparsity, 0, values).astype(values.dtype)


def normal(*shape, seed=0):
    return RNG(seed).standard_normal(shape).astype("float32")


def on_grid(high, *shape, axes=(-1,), seed=0):
    kept = [axis % len(shape) for axis in axes]
    scales = RNG(seed).uniform(0.001, 3, [n if axis in kept else 1 for axis, n in enumerate(shape)]).astype("float32")
    return RNG(seed).integers(-high, high + 1, shape).astype("float32") * scales


def few_values(count, *shape):
    return RNG(0).choice(normal(count, seed=1), shape)


ARRAYS = {
    "scalar": np.float32(3.5) * np.ones((), "float32"),
    "empty": np.zeros((0, 4), "float32"),
    "one zero": np.zeros(1, "float32"),
    "zeros": np.zeros((70, 9), "float32"),
    "ones": np.ones(300, "float32"),
    "dense": normal(3, 3, 16, 8),
    "with nan and infinity": np.array([[np.nan, 1, -np.inf], [0, 2.5, np.inf]], "float32"),
    "subnormal": (1e-42 * RNG(0).integers(-9, 9, (40, 5))).astype("float32"),
    "tiny": normal(40, 5) * np.float32(1e-36),
    "huge": normal(40, 5) * np.float32(1e37),
    "negative zeros": -np.zeros((9, 9), "float32"),
    "float64": normal(30, 7).astype("float64"),
    "float16": sparse(normal(30, 7).astype("float16"), 0.8),
    "bfloat16": normal(30, 7).astype(ml_dtypes.bfloat16),
    "int8": RNG(0).integers(-128, 128, (30, 7)).astype("int8"),
    "int64": RNG(0).integers(-(2**60), 2**60, (30, 7)),
    "bool": RNG(0).random((30, 7)) < 0.3,
    **{f"{part:.0%} zeros": sparse(normal(200, 30), part) for part in (0.1, 0.5, 0.9, 0.99, 0.999)},
    **{
        f"grid of {high} by {axes}": on_grid(high, 5, 24, 12, axes=axes)
        for high in (1, 3, 7, 127, 2**15 - 1)
        for axes in ((), (-1,), (-2,), (-2, -1))
    },
    **{f"sparse grid of {high}": sparse(on_grid(high, 200, 30), 0.9) for high in (1, 7, 127)},
    "signs": np.sign(normal(100, 8)) * np.abs(normal(8)),
    "a long gap": sparse(normal(5000), 0.9999),
    **{f"{count} values": few_values(count, 60, 50) for count in (2, 3, 16, 200)},
    "sparse, few values": sparse(few_values(16, 60, 50), 0.7),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_nothing_is_lost(array):
    encoded = encode(array)
    again = decode(encoded, array.shape, array.dtype)
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    np.testing.assert_array_equal(again, array)
    assert encoded.num_bytes <= array.nbytes + 8 * array.itemsize + 8


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 257, 511, 512, 513, 767, 768, 5000])
def test_gaps_of_every_length(gap, places):
    values = np.zeros(6000, "float32")
    values[[3, gap + 4]] = [1.5, -0.3]
    from keras_squeeze.analysis import encodings

    found = encodings._stored(next(w for w in encodings._ways(normal(9)) if w.kind == "raw"), "all", values != 0)
    assert found.values == "raw"
    raw = encodings._Values("raw", values)
    encoded = encodings._stored(raw, places, values != 0)
    assert encoded.places == places
    np.testing.assert_array_equal(decode(encoded, values.shape, "float32"), values)
    if places == "gaps":
        assert encoded.count == 2 + gap // 256


def entropy_bits(symbols) -> float:
    """Of all symbols together, at their own frequencies: what no code of one symbol after the other can beat."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("spread", ["uniform", "bell"])
def test_a_code_costs_about_its_entropy(bits, spread):
    shape, high = (400, 250), max(1, 2 ** (bits - 1) - 1)
    if spread == "uniform":
        integers = RNG(0).integers(-high, high + 1, shape)
    else:
        integers = np.clip(np.rint(RNG(0).normal(0, high / 2.5, shape)), -high, high)
    if bits == 1:
        integers = np.where(integers >= 0, 1, -1)
    scales = RNG(1).uniform(0.1, 1, shape[1]).astype("float32")
    encoded = encode(integers.astype("float32") * scales)
    assert encoded.values == "grid"
    assert 8 * encoded.num_bytes <= 1.03 * entropy_bits(integers) + 32 * len(scales) + 8 * 400


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_zeros_cost_about_their_entropy(sparsity):
    values = sparse(on_grid(7, 1000, 100, axes=()), sparsity)
    integers = find_integers(values)[0]
    encoded = encode(values)
    assert encoded.places != "all" or sparsity < 0.8
    bound = entropy_bits(values != 0) + entropy_bits(integers[integers != 0])
    assert 8 * encoded.num_bytes <= 1.08 * bound + 8 * 100


def test_floats_are_stored_in_fewer_bytes_than_they_are():
    assert encode(normal(300, 300)).num_bytes < 0.95 * 4 * 300 * 300


QUANTIZERS = {
    **{f"affine {bits}": ks.quantizers.Affine(bits).for_weights() for bits in (2, 3, 4, 8)},
    "affine, one scale": ks.quantizers.Affine(8, per_channel=False).for_weights(),
    "affine, asymmetric": ks.quantizers.Affine(8, symmetric=False).for_weights(),
    "mse": ks.quantizers.Affine(4, range="mse").for_weights(),
    **{f"fixed {bits}": ks.quantizers.FixedPoint(bits) for bits in (2, 8, 12, 16)},
    "learned": ks.quantizers.LearnedStep(4).for_weights(),
    "learned by channel": ks.quantizers.LearnedStep(4, per_channel=True).for_weights(),
    "ternary": ks.quantizers.Ternary(),
    "binary": ks.quantizers.Binary(),
    "binary_connect": ks.quantizers.Binary(scaled=False, clip=True),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_every_quantizer_is_recognized(quantizer):
    weight = normal(60, 24, 10)
    values = keras.ops.convert_to_numpy(quantizer(keras.ops.convert_to_tensor(weight), None, (-1,)))
    integers, scales, _ = find_integers(values)
    np.testing.assert_array_equal(integers.astype("float32") * scales, values)
    assert np.ptp(integers, axis=(0, 1)).max() < 2**quantizer.bits or quantizer.bits == 1
    trained, scale, zero_point = quantizer.to_integers(weight)
    np.testing.assert_allclose(scale * (trained - zero_point), values, rtol=1e-6)
    assert encode(values).num_bytes < (quantizer.bits + 0.5) / 8 * values.size + 4 * 10 + 50


@pytest.mark.parametrize("shape", [(50, 40), (7,), (3, 3, 8, 16)])
def test_other_floats_are_on_no_grid(shape):
    assert find_integers(normal(*shape)) is None
    almost = on_grid(7, 50, 40)
    almost[31, 17] = np.nextafter(almost[31, 17], np.float32(9))
    assert find_integers(almost) is None


@pytest.mark.parametrize("name", ["dense", "90% zeros", "grid of 7 by (-1,)", "sparse grid of 7", "16 values"])
def test_damaged_streams_are_refused_or_decoded_to_the_same_shape(name):
    array, rng = ARRAYS[name], RNG(0)
    encoded = encode(array)
    refused = 0
    for _ in range(300):
        streams = [bytearray(stream) for stream in encoded.streams]
        stream = streams[rng.integers(len(streams))]
        change = rng.integers(3)
        if change == 0 and len(stream) > 1:
            del stream[int(rng.integers(len(stream))) :]
        elif change == 1:
            stream.extend(bytes(int(rng.integers(1, 9))))
        else:
            stream[int(rng.integers(len(stream)))] ^= 1 << int(rng.integers(8))
        try:
            again = decode(dataclasses.replace(encoded, streams=tuple(map(bytes, streams))), array.shape, array.dtype)
        except ValueError:
            refused += 1
        else:
            assert (again.shape, again.dtype) == (array.shape, array.dtype)
    assert refused >= 100


CHANGES = {
    "places": {"places": "gaps"},
    "kind": {"values": "table"},
    "count": {"count": 3},
    "negative count": {"count": -1},
    "huge count": {"count": 10**15},
    "base": {"base": 1 << 40},
    "no base": {"base": 0},
    "axes": {"axes": (-9,)},
    "twice the same axis": {"axes": (-1, -1)},
    "low": {"low": 1 << 60},
    "step": {"step": 0},
    "too many streams": {"streams": (b"\0",) * 9},
    "no streams": {"streams": ()},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_numbers_that_do_not_fit_are_refused(change):
    array = on_grid(7, 50, 40)
    encoded = encode(array)
    assert encoded.places == "all"
    with pytest.raises(ValueError, match=r"stream|values|axes|code|grid"):
        decode(dataclasses.replace(encoded, **change), array.shape, array.dtype)


def test_a_stream_is_unpacked_no_further_than_it_should_be():
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"\1" + coder.compress(bytes(200 << 20)) + coder.flush()
    assert len(bomb) < 1 << 20
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ValueError, match="stream"):
        decode(Encoded("all", "raw", 10, 0, 1, 0, (), (bomb,) * 4), (10,), "float32")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_the_forms_have_different_names():
    assert len({*PLACES, *VALUES}) == len(PLACES) + len(VALUES)
    assert math.prod(encode(np.ones((3, 4), "float32")).axes) in (1,)
