"""Weights and inputs of one bit."""

from dataclasses import dataclass, replace

import keras

from keras_squeeze import checks
from keras_squeeze.quantizers import ops
from keras_squeeze.quantizers.quantizer import Quantizer


@keras.saving.register_keras_serializable(package="keras_squeeze")
@dataclass(frozen=True)
class Binary(Quantizer):
    """One bit: the sign, +1 for zero, with or without a scale.

    | published form | here | as a string |
    |---|---|---|
    | XNOR-Net weights (Binary-Weight-Networks) | `Binary()` | `"binary"` |
    | XNOR-Net, weights and inputs | `Binary(inputs="straight_through")` | `"xnor"` |
    | BinaryConnect, deterministic | `Binary(scaled=False, clip=True)` | `"binary_connect"` |
    | BinaryConnect, stochastic | `Binary(scaled=False, clip=True, stochastic=True)` | |

    Args:
        scaled: Weights: multiply by `mean|W|` of each output channel. Inputs: multiply the outputs by K, the mean of
            `|x|` over the channels and over the window of the kernel.
        stochastic: While training, +1 with probability `clip((w + 1) / 2, 0, 1)`; otherwise the sign. Weights only.
        gradient: `"straight_through"`, `"approx_sign"` or `"swish_sign"`; see `keras_squeeze.quantizers.ops.sign`.
        clip: Clip the real weights to [-1, 1] after every update, so that they do not drift to where the gradient is
            zero.
        inputs: The gradient by which the inputs of the layer are binarized as well, or None: they stay as they are.
            Dense layers and convolutions; other layers have only binary weights.

    A network of binary inputs puts them after a batch normalization: batch norm, sign, convolution, pooling. The sign
    of what follows a ReLU would be a constant.

    Reference: Courbariaux et al. 2015, https://arxiv.org/abs/1511.00363; Rastegari et al. 2016,
        https://arxiv.org/abs/1603.05279
    """

    scaled: bool = True
    stochastic: bool = False
    gradient: str = "straight_through"
    clip: bool = False
    inputs: str | None = None

    def __post_init__(self):
        for name in ("scaled", "stochastic", "clip"):
            checks.boolean(name, getattr(self, name))
        for name in ("gradient", "inputs"):
            value = getattr(self, name)
            if name != "inputs" or value is not None:
                checks.one_of(name, value, ops.GRADIENTS)
        if self.stochastic and self.gradient != "straight_through":
            raise ValueError(
                f'A stochastic sign has the gradient "straight_through". Received: gradient={self.gradient!r}'
            )

    @property
    def bits(self):
        return 1

    @property
    def has_zero(self):
        return False

    @property
    def keeps_state(self):
        return False

    @property
    def random(self):
        return self.stochastic

    def __call__(self, x, state=None, channels=(-1,), *, uniform=None):
        """`uniform`: random numbers in [0, 1) of the shape of `x`, for a stochastic sign; without them, the sign."""
        if uniform is not None:
            signs = ops.stochastic_sign(x, uniform)
            return ops.mean_magnitude(x, channels) * signs if self.scaled else signs
        if self.scaled:
            return ops.scaled_sign(x, ops.mean_magnitude(x, channels), self.gradient)
        return ops.sign(x, self.gradient)

    def integers(self, x, state=None, channels=(-1,)):
        scale = ops.mean_magnitude(x, channels) if self.scaled else keras.ops.ones(())
        return ops.sign(x), scale, keras.ops.zeros(())

    def for_activations(self, *, signed=True):
        if self.stochastic or self.clip or self.inputs:
            raise ValueError(
                "`stochastic`, `clip` and `inputs` are for weights. Received for activations: "
                f"{self}. Pass Binary(scaled=False) for the sign of the activations."
            )
        return replace(self, scaled=False)
