"""When quantization starts, how its bits anneal, and when ranges and statistics freeze."""

import warnings
from collections.abc import Sequence

import keras

from keras_squeeze import checks
from keras_squeeze.introspection.functional import functional_of
from keras_squeeze.introspection.selection import compile_patterns
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantization.placement import LOW_BITS, find_ends
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.quantizers import UniformQuantizer
from keras_squeeze.schedules import UPDATES_BY_DEFAULT, check_time, to_steps
from keras_squeeze.training.batch_norm import freeze_statistics
from keras_squeeze.training.fit_run import CompressionCallback
from keras_squeeze.training.moving_statistics import Change

_MIX_UNITS = 1000  # `progress` counts in whole parts


class QuantizationSchedule(CompressionCallback):
    """Says when a model made by `quantize_aware` (or with `QuantizeAware` layers) begins to quantize.

    Without this callback such a model is quantized from the first step to the last, which is a good way, too. Times are
    an int, optimizer steps of this `fit`, or a float in [0, 1], a fraction of them. `logs` gets `quantized`, from 0
    (float) to 1, and `num_bits`, the mean over the quantized weights.

    Args:
        delay: Until then the model trains in float; ranges of activations are measured meanwhile.
        freeze: From then on, ranges of activations stay as they are, and batch normalization uses its moving statistics
            and leaves them as they are, so that training ends with what inference computes. 1.0: never. Until then they
            follow the network, from `delay` on: see `keras_squeeze.training.moving_statistics`.
        num_bits: How the bits of weights with a grid of 2 to 16 bits change: a list such as `[8, 4, 2]`, spread evenly
            from `delay` to `freeze`, the last one from `freeze` on at the latest; or `{regular expression: list}`, by
            the path of a layer inside the model. None: they stay. Where a list goes below 4 bits, the first and the
            last layer keep theirs, unless a dict says otherwise.
        ramp: How long, after `delay`, the model takes to go from float to quantized, mixing the two. 0: at once.

    Raises:
        ValueError, TypeError: an argument outside its range, at once; a model without quantizers, before the first
            batch.

    A training step is traced anew where bits change and where `freeze` begins; in a custom loop, call the step through
    a new `tf.function` after these steps.

    Example:

    ```python
    q.fit(x, y, epochs=10, callbacks=[ks.QuantizationSchedule(delay=0.1, freeze=0.8)])
    ```
    """

    def __init__(self, delay=0.0, freeze=0.9, num_bits=None, *, ramp=0.0):
        super().__init__()
        self.delay, self.freeze, self.ramp = (
            check_time(name, value) for name, value in {"delay": delay, "freeze": freeze, "ramp": ramp}.items()
        )
        by_path = num_bits if isinstance(num_bits, dict) else {"": num_bits} if num_bits is not None else {}
        self.num_bits = {path: _check_bits(bits) for path, bits in by_path.items()}
        patterns = compile_patterns(self.num_bits)
        self._stages = list(zip(patterns, self.num_bits.values(), strict=True))
        self._model: keras.Model | None = None
        self._quantizers: list[FakeQuantize] = []
        self._annealed: list[tuple[FakeQuantize, Sequence[int]]] = []
        self._norms: list[keras.layers.Layer] = []
        self._times: tuple[int, int, int | None] = (0, 0, None)  # quantization begins, is complete, freezes
        self._last = 0  # the last change of bits
        self._step = 0
        self._mix = 1.0
        self._frozen = False

    def attach(self, model, optimizer, total_steps=None):
        quantizers = [layer for layer in model._flatten_layers() if isinstance(layer, FakeQuantize)]
        if not quantizers:
            raise ValueError(
                f"Model '{model.name}' has no quantizers. Make one that has: keras_squeeze.quantize_aware(model)."
            )
        if not all(quantizer.built for quantizer in quantizers):
            raise ValueError(
                f"Model '{model.name}' is not built, so its quantizers have nothing to schedule yet. Call it on a "
                "batch of data before `fit`, or begin it with `keras.Input(shape)`."
            )
        delay, ramp = (to_steps(time, total_steps) for time in (self.delay, self.ramp))
        never = isinstance(self.freeze, float) and self.freeze == 1.0
        freeze = None if never else to_steps(self.freeze, total_steps)
        if freeze is not None and freeze < delay + ramp:
            raise ValueError(
                f"Ranges would freeze before the model is quantized. Received: delay={self.delay!r} (step {delay}), "
                f"ramp={self.ramp!r} ({ramp} steps), freeze={self.freeze!r} (step {freeze})."
            )
        annealed = self._find_annealed(model)
        if self._run is not None and sum(isinstance(each, QuantizationSchedule) for each in self._run.callbacks) > 1:
            raise ValueError("Two quantization schedules cannot drive the same model: pass one QuantizationSchedule.")
        self.detach()
        self._model, self._quantizers, self._annealed = model, quantizers, annealed
        self._norms = [
            layer
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization) and layer._call_has_training_arg
        ]
        self._set_frozen(False)  # an interrupted `fit` may have left the model frozen
        self._times = delay, delay + ramp, freeze
        self._last = to_steps(self.freeze, total_steps) if annealed else 0
        stages = [self._stage_begin(len(bits) - 1, len(bits)) for _, bits in annealed]
        self.follow_statistics(model, optimizer, [Change(delay, max([delay + ramp, *stages]))])
        if self._run is None:  # `fit` says at which step it begins
            self.update(0)

    def update(self, step):
        if self._model is None:
            return
        self._step = step
        changed = self._set_mix(self._mix_at(step))
        for quantize, bits in self._annealed:
            changed |= quantize.set_bits(bits[self._stage_at(step, len(bits))])
        freeze = self._times[2]
        if (freeze is not None and step >= freeze) != self._frozen:
            self._set_frozen(not self._frozen)
            changed = True
        if changed:
            self._trace_anew()

    def detach(self):
        if self._frozen:
            self._set_frozen(False)
            self._trace_anew()
        self.release_statistics()
        self._model = None

    @property
    def next_update(self):
        begin, complete, freeze = self._times
        steps = [begin, complete, *([] if freeze is None else [freeze])]
        for _, bits in self._annealed:
            steps += [self._stage_begin(stage, len(bits)) for stage in range(1, len(bits))]
        if begin <= self._step < complete:
            steps.append(min(self._step + self._every, complete))
        return min((step for step in steps if step > self._step), default=None)

    @property
    def reached(self):
        return self._mix == 1 and all(quantize.quantizer.bits == bits[-1] for quantize, bits in self._annealed)

    def progress(self):
        parts = {"quantized": {id(self): (round(self._mix * _MIX_UNITS), _MIX_UNITS)}}
        bits = {id(each): (each.quantizer.bits, 1) for each in self._quantizers if each.channels is not None}
        return {**parts, "num_bits": bits} if bits else parts

    def finish(self, step, verbose):
        unseen = [quantizer.name for quantizer in self._quantizers if not quantizer.is_known]
        if unseen:
            warnings.warn(
                f"{len(unseen)} quantizers of activations have seen no training step, so that their ranges are not "
                "known. A model with a `call` of its own must take `training` and pass it to its layers.",
                stacklevel=2,
            )
        if not self.reached:
            warnings.warn(
                f"Training ended at step {step}, before the quantization schedule: the model is quantized to "
                f"{self._mix:.0%}. Train longer, or let the schedule end earlier.",
                stacklevel=2,
            )

    @property
    def _every(self) -> int:
        begin, complete, _ = self._times
        return max(1, -(-(complete - begin) // UPDATES_BY_DEFAULT))

    def _mix_at(self, step: int) -> float:
        begin, complete, _ = self._times
        if step >= complete:
            return 1.0
        return max(0.0, (step - begin) / (complete - begin)) if complete > begin else 0.0

    def _set_mix(self, mix: float) -> bool:
        """True where steps must be traced anew: the mixing costs time, so it is traced only where it is needed."""
        changed = False
        self._mix = mix
        for quantize in self._quantizers:
            quantize.mix.assign(mix)
            if quantize.mixing != (mix < 1):
                quantize.mixing = mix < 1
                changed = True
        return changed

    def _stage_begin(self, stage: int, stages: int) -> int:
        begin = self._times[0]
        return begin + round((self._last - begin) * stage / stages)

    def _stage_at(self, step: int, stages: int) -> int:
        return max(stage for stage in range(stages) if stage == 0 or step >= self._stage_begin(stage, stages))

    def _find_annealed(self, model) -> list[tuple[FakeQuantize, Sequence[int]]]:
        if not self._stages:
            return []
        annealed: list[tuple[FakeQuantize, Sequence[int]]] = []
        kept = self._kept_ends(model)
        for path, wrapper in _wrappers(model, ""):
            if id(wrapper) in kept:
                continue
            bits = next((bits for pattern, bits in self._stages if pattern.search(path)), [])
            for quantize in wrapper.weight_quantizers if bits else ():
                if isinstance(quantize.quantizer, UniformQuantizer):
                    annealed.append((quantize, bits))
        if not annealed:
            raise ValueError(
                f"Model '{model.name}' has no weights whose bits could anneal: no layer matches, or grids are binary "
                "or ternary. "
                f"Received: num_bits={self.num_bits}"
            )
        return annealed

    def _kept_ends(self, model) -> set[int]:
        """The first and the last layer, which keep their bits where others fall below four and no dict says more."""
        few = [bits for path, bits in self.num_bits.items() if path == "" and min(bits) < LOW_BITS]
        if not few or functional_of(model) is None:
            return set()
        wrappers = [wrapper for _, wrapper in _wrappers(model, "")]
        ends = find_ends(model, wrappers)
        return ends if any(id(wrapper) not in ends for wrapper in wrappers) else set()

    def _set_frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        for quantize in self._quantizers:
            quantize.frozen = frozen
        freeze_statistics(self._norms, frozen)

    def _trace_anew(self) -> None:
        if self._model is not None:
            self._model.test_function = self._model.predict_function = None
        if self._run is not None:
            self._run.trace_anew()


def _wrappers(layer, path: str):
    """Every `QuantizeAware` with the path of the layer that it wraps."""
    for part in layer._layers:
        if isinstance(part, QuantizeAware):
            yield f"{path}{part.layer.name}", part
        else:
            yield from _wrappers(part, f"{path}{part.name}/")


def _check_bits(bits) -> list[int]:
    if not isinstance(bits, (list, tuple)) or not bits:
        raise TypeError(f"`num_bits` must be a list such as [8, 4, 2]. Received: {bits!r}")
    for value in bits:
        if not checks.is_int(value) or not 2 <= value <= 16:
            raise ValueError(f"`num_bits` must list ints in [2, 16]. Received: {bits!r}")
    return list(bits)
