"""Small backbones of KerasHub with random weights: pruned to half, shrunk and compared; what stays is named.

KerasHub is no dependency of this package: `pip install keras-hub` first.
"""

import collections
import importlib.metadata
from collections.abc import Callable

import numpy as np
import tables
from measuring import advance, progress_bar
from rich.console import Console
from shrunk_applications import TOLERANCE


def _resnet(hub):
    return hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[2, 2],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )


def _densenet(hub):
    return hub.models.DenseNetBackbone(
        stackwise_num_repeats=[2, 2], compression_ratio=0.5, growth_rate=16, image_shape=(64, 64, 3)
    )


def _mobilenet(hub):
    return hub.models.MobileNetBackbone(
        stackwise_expansion=[[40, 56], [64, 144, 144]],
        stackwise_num_blocks=[2, 3],
        stackwise_num_filters=[[16, 16], [24, 24, 24]],
        stackwise_kernel_size=[[3, 3], [5, 5, 5]],
        stackwise_num_strides=[[2, 1], [2, 1, 1]],
        stackwise_se_ratio=[[None, None], [0.25, 0.25, 0.25]],
        stackwise_activation=[["relu", "relu"], ["hard_swish"] * 3],
        stackwise_padding=[[1, 1], [2, 2, 2]],
        output_num_filters=64,
        input_num_filters=16,
        input_activation="hard_swish",
        output_activation="hard_swish",
        image_shape=(32, 32, 3),
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=False,
        last_layer_filter=64,
    )


def _vit(hub):
    return hub.models.ViTBackbone(
        image_shape=(28, 28, 3),
        patch_size=4,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
    )


def _bert(hub):
    return hub.models.BertBackbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32, intermediate_dim=64, max_sequence_length=16
    )


BACKBONES: dict[str, Callable] = {
    "ResNet": _resnet,
    "DenseNet": _densenet,
    "MobileNet": _mobilenet,
    "ViT": _vit,
    "BERT": _bert,
}


def inputs_of(model) -> dict | np.ndarray:
    rng = np.random.default_rng(0)
    arrays = {}
    for tensor in model.inputs:
        shape = (2, *(size or 12 for size in tensor.shape[1:]))
        whole = "int" in str(tensor.dtype)
        name = tensor._keras_history.operation.name
        arrays[name] = rng.integers(0, 2, shape) if whole else rng.uniform(0, 1, shape).astype("float32")
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def shrink_one(name: str) -> tuple[str, ...]:
    """A row of the table."""
    import keras
    import keras_hub

    import keras_squeeze as ks

    keras.utils.set_random_seed(0)
    model = BACKBONES[name](keras_hub)
    rng = np.random.default_rng(1)
    for variable in model.weights:
        if "gamma" in variable.name or "variance" in variable.name:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif len(variable.shape) == 1:
            variable.assign(rng.normal(0, 0.1, variable.shape))
    overview = ks.prunable_neurons(model)
    if overview.free:
        ks.prune_neurons(model, 0.5, round_to=4)
    small = ks.shrink(model)
    x = inputs_of(model)
    pairs = zip(*(keras.tree.flatten(each(x, training=False)) for each in (model, small)), strict=True)
    difference = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    kept: collections.Counter = collections.Counter()
    for layer in overview.layers:
        kept.update(layer.kept)
    kept.update(overview.opaque.values())
    reasons = "; ".join(f"{reason} ({count})" for reason, count in kept.most_common(3)) or "none"
    verdict = "holds" if difference <= TOLERANCE else "**does not hold**"
    sizes = f"{1e-3 * model.count_params():.1f} -> {1e-3 * small.count_params():.1f}"
    return name, f"{overview.free} of {overview.neurons}", sizes, f"{difference:.0e}", verdict, reasons


def main() -> None:
    args = tables.parse(tables.make_parser(__doc__))
    console = Console()
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("backbones", total=len(BACKBONES))
        for name in BACKBONES:
            rows.append(shrink_one(name))
            advance(progress, task)
    header = ("backbone", "neurons free", "parameters, thousands", "difference", "", "what keeps most of the others")
    note = f"KerasHub {importlib.metadata.version('keras-hub')}. {tables.machine()}"
    text = f"{tables.markdown(header, rows)}\n\n{note}"
    console.print(text, soft_wrap=True, markup=False)
    if args.write:
        tables.write("shrunk_backbones", text)


if __name__ == "__main__":
    main()
