"""How a sparsity is spread over weights, its floors, and what `allocation="auto"` leaves dense."""

import math
import re

import keras
import numpy as np
import pytest
from networks import count_zeros, kernels, small_convnet

import keras_squeeze as ks
from keras_squeeze.weight_pruning.masks import select_masks
from keras_squeeze.weight_pruning.weight_allocation import (
    FLOOR,
    erk_sparsities,
    floor_count,
    highest_share,
    round_to_sum,
)

layers = keras.layers


def depthwise_network():
    """A separable network for the digits, compiled."""
    keras.utils.set_random_seed(6)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, use_bias=False, name="stem"),
            layers.DepthwiseConv2D(3, padding="same", name="deep"),
            layers.ReLU(),
            layers.SeparableConv2D(24, 3, activation="relu", name="separable"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, name="logits"),
        ],
        name="net",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


DEPTHWISE = {"net/deep/kernel", "net/separable/depthwise_kernel"}


# Pure functions.


def test_floor_by_hand():
    assert floor_count(1000, 0, 0.9) == 20  # a fifth of a tenth
    assert floor_count(1000, 64, 0.9) == 64
    assert floor_count(50, 64, 0.9) == 50
    assert floor_count(3, 0, 0.9) == 1  # 0.06 of a value is one
    assert floor_count(10, 0, 1.0) == 0


def test_highest_share_by_hand():
    """Of 100 and 900 values the second keeps a tenth as one of every output, the first a fifth of the density d:
    20 d + 90 = 1000 d, d = 0.0918."""
    assert highest_share([100, 900], [0, 90]) == pytest.approx(1 - 90 / 980, abs=2e-3)


@pytest.mark.parametrize("covers", [(0, 0, 0), (10, 64, 3), (1, 300, 5)])
def test_the_highest_share_is_reachable_and_more_is_not(covers):
    sizes = (100, 3000, 40)

    def kept(share):
        return sum(floor_count(size, cover, share) for size, cover in zip(sizes, covers, strict=True))

    share = highest_share(sizes, covers)
    assert kept(share) <= math.ceil(sum(sizes) * (1 - share) + 1)
    if share < 0.999:
        assert kept(share + 0.01) > sum(sizes) * (1 - share - 0.01)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.97])
def test_erk_with_floors_meets_the_target_between_floor_and_dense(sparsity):
    shapes = [(3, 3, 1, 16), (3, 3, 16, 64), (512, 256), (256, 10)]
    floors = [FLOOR * (1 - sparsity), 0.004, 0.02, 0.1]
    densities = 1 - np.array(erk_sparsities(shapes, sparsity, floors))
    sizes = np.array([math.prod(shape) for shape in shapes])
    assert densities @ sizes == pytest.approx((1 - sparsity) * sizes.sum())
    assert (densities >= np.array(floors) - 1e-9).all()
    assert (densities <= 1).all()
    raw = np.array([sum(shape) for shape in shapes]) / sizes
    between = (densities > np.array(floors) + 1e-9) & (densities < 1 - 1e-9)
    assert len(set(np.round(densities[between] / raw[between], 6))) <= 1  # one scale for all that are free


def test_round_to_sum_by_hand():
    assert round_to_sum([1.5, 2.5, 3.0], 7) == [2, 2, 3]
    assert round_to_sum([0.4, 0.4, 0.4, 0.8], 2) == [1, 0, 0, 1]
    assert round_to_sum([5.0, 6.0], 3) == [5, 6]


# Masks.


@pytest.mark.parametrize("allocation", ["auto", "erk", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", (1, 2)])
def test_every_output_keeps_a_value_and_every_weight_its_floor(allocation, pattern):
    rng = np.random.default_rng(7)
    scales = (1e-4, 1.0, 10.0)  # plain competition would empty the first
    shapes = ((3, 3, 8, 16), (400, 30), (64, 64))
    scores = [
        scale * np.abs(rng.standard_normal(shape)).astype("float32")
        for scale, shape in zip(scales, shapes, strict=True)
    ]
    scores[1][:, 3] *= 1e-6
    masks = select_masks(scores, 0.9, allocation=allocation, pattern=pattern)
    for mask in masks:
        assert mask.any(axis=tuple(range(mask.ndim - 1))).all()
        assert mask.mean() >= FLOOR * 0.1 - 1e-9
    assert np.mean(np.concatenate([mask.ravel() for mask in masks])) == pytest.approx(0.1, abs=1e-3)


def test_outputs_lie_along_the_axes_that_are_given():
    """A transposed convolution has its outputs along the last axis but one, a depthwise one along two."""
    rng = np.random.default_rng(8)
    scores = np.abs(rng.standard_normal((3, 3, 5, 40))).astype("float32")
    scores[:, :, 2] *= 1e-6
    (mask,) = select_masks([scores], 0.9, allocation="erk", output_axes=[(-2,)])
    assert mask.any(axis=(0, 1, 3)).all()
    (mask,) = select_masks([scores], 0.85, allocation="erk", output_axes=[(-2, -1)])
    assert mask.any(axis=(0, 1)).all()
    (mask,) = select_masks([scores], 0.9, allocation="erk", output_axes=[(-1,)])
    assert not mask[:, :, 2].any()


def test_an_output_that_is_zero_already_stays_so():
    scores = np.abs(np.random.default_rng(9).standard_normal((50, 6))).astype("float32")
    scores[:, 4] = 0
    (mask,) = select_masks([scores], 0.9, allocation="erk")
    assert not mask[:, 4].any()
    assert mask.sum() == 30


# Models.


@pytest.mark.parametrize("layer_choice", [None, "logits|stem|deep|separable"], ids=["default", "named"])
def test_depthwise_kernels_stay_dense_unless_layers_are_named(layer_choice):
    model = depthwise_network()
    report = ks.prune_weights(model, 0.8, layers=layer_choice)
    for path, kernel in kernels(model).items():
        assert (kernel == 0).any() == (layer_choice is not None or path not in DEPTHWISE), path
    pruned = {path: kernel for path, kernel in kernels(model).items() if layer_choice or path not in DEPTHWISE}
    size = sum(kernel.size for kernel in pruned.values())
    assert sum(int((kernel == 0).sum()) for kernel in pruned.values()) == size - round(size * 0.2)
    said = [note for note in report.notes if "left dense by allocation='auto': 2 depthwise kernels" in note]
    assert bool(said) == (layer_choice is None)


@pytest.mark.parametrize(
    "arguments", [{"allocation": "erk"}, {"allocation": "global"}, {"allocation": "uniform"}, {"sparsity": {".": 0.8}}]
)
def test_what_is_asked_for_by_name_prunes_all(arguments):
    model = depthwise_network()
    ks.prune_weights(model, **{"sparsity": 0.8, **arguments})
    assert all((kernel == 0).any() for kernel in kernels(model).values())


def test_logs_and_the_lines_at_the_end_give_both_shares(digits, capsys):
    x, y = digits
    model = depthwise_network()
    options = {"epochs": 2, "verbose": 2, "validation_data": (x[:200], y[:200])}
    history = model.fit(x, y, callbacks=[ks.MagnitudePruning(0.75)], **options).history
    size = sum(kernel.size for kernel in kernels(model).values())
    dense = sum(kernel.size for path, kernel in kernels(model).items() if path in DEPTHWISE)
    assert history["sparsity"][-1] == pytest.approx(count_zeros(model) / (size - dense))
    assert history["overall_sparsity"][-1] == pytest.approx(count_zeros(model) / size)
    printed = capsys.readouterr().out
    assert "(75.0%)" in printed
    assert f"so that {count_zeros(model) / size:.1%} of all prunable weights are zero" in printed
    first, last = history["val_accuracy"]
    assert f"val_accuracy {first:.4g} after epoch 1, {last:.4g} at the end" in printed


def test_validation_before_compression_where_the_schedule_begins_later(digits, capsys):
    x, y = digits
    model = small_convnet()
    pruning = ks.MagnitudePruning(ks.schedules.PolynomialDecay(0.75, begin=0.5, end=0.9))
    options = {"epochs": 4, "verbose": 2, "validation_data": (x[:200], y[:200])}
    history = model.fit(x, y, batch_size=128, callbacks=[pruning], **options).history
    before, last = history["val_accuracy"][1], history["val_accuracy"][-1]
    assert f"val_accuracy {before:.4g} before compression, {last:.4g} at the end" in capsys.readouterr().out


def test_a_model_of_depthwise_kernels_alone_says_what_takes_them_in():
    model = keras.Sequential([keras.Input((8, 8, 2)), layers.DepthwiseConv2D(3, name="deep")])
    with pytest.raises(ValueError, match=r"leaves depthwise kernels dense.*layers=keras.layers.DepthwiseConv2D"):
        ks.prune_weights(model, 0.5)
    ks.prune_weights(model, 0.5, layers=layers.DepthwiseConv2D)
    assert count_zeros(model) == 9


@pytest.mark.parametrize("allocation", ["auto", "global", "erk"])
def test_a_target_that_floors_do_not_allow_is_refused_with_the_highest_that_they_do(digits, allocation):
    x, y = digits
    model = small_convnet()
    before = model.get_weights()
    with pytest.raises(ValueError, match="out of reach") as refusal:
        model.fit(x, y, verbose=0, callbacks=[ks.MagnitudePruning(0.999, allocation=allocation)])
    for weight, same in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, same)
    highest = float(re.search(r"at most ([0-9.]+)\.", str(refusal.value))[1])
    ks.prune_weights(model, highest, allocation=allocation)
    size = sum(kernel.size for kernel in kernels(model).values())
    assert count_zeros(model) == pytest.approx(highest * size, abs=1.5)
    for kernel in kernels(model).values():
        assert (kernel != 0).any(axis=tuple(range(kernel.ndim - 1))).all()
    model = small_convnet()
    ks.prune_weights(model, 0.999, allocation="uniform")  # the other advice
    assert count_zeros(model) > highest * size


@pytest.mark.parametrize("allocation", ["auto", "erk", "global", "uniform"])
def test_a_weight_of_which_a_pattern_leaves_nothing_to_prune(allocation):
    """One input channel: of every group of one, two stay. The report says that the target is out of reach."""
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(32, 3), layers.Conv2D(2, 6), layers.Flatten()])
    report = ks.prune_weights(model, 0.5, pattern="2:4", allocation=allocation)
    first, second = kernels(model).values()
    assert (first != 0).all()
    assert (second == 0).mean() == 0.5
    assert any(note.startswith("the target was 50.0%") for note in report.notes)
    assert not any("the target was" in note for note in ks.prune_weights(small_convnet(), 0.5).notes)


def test_the_report_names_weights_at_their_floor():
    model = small_convnet()
    logits = model.get_layer("logits").kernel
    logits.assign(logits * 1e-6)
    report = ks.prune_weights(model, 0.9, allocation="global")
    (note,) = [note for note in report.notes if note.startswith("at the floor of their density")]
    assert "logits/kernel" in note
    assert "hidden/kernel" not in note
    assert (logits.numpy() != 0).sum() == 10  # a fifth of 320 times a tenth is seven; every output has one
