"""Distillation: a compressed model learns from what the uncompressed one answers, beside the targets."""

import keras

from keras_squeeze.introspection.functional import compile_like, functional_of


@keras.saving.register_keras_serializable(package="keras_squeeze")
class Distillation(keras.layers.Layer):
    """Passes a student's output on, and adds a loss: how far it is from the teacher's.

    For classes `weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))`, else `weight` times the mean squared
    difference.

    Args:
        weight: Of this loss beside the one that the model was compiled with, above 0.
        temperature: T, above 0: the higher, the more the answers that are not the largest count.
        kind: `"logits"` or `"probabilities"`, of classes along the last axis, or `"values"`.

    Reference: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531
    """

    def __init__(self, weight: float, temperature: float, kind: str, **kwargs):
        super().__init__(**kwargs)
        self.weight, self.temperature, self.kind = weight, temperature, kind

    def call(self, student, teacher, training=None):
        if training:
            self.add_loss(self.weight * self._distance(student, teacher))
        return student

    def compute_output_shape(self, student_shape, teacher_shape):
        return student_shape

    def _distance(self, student, teacher):
        ops = keras.ops
        student, teacher = ops.cast(student, "float32"), ops.cast(teacher, "float32")
        if self.kind == "values":
            return ops.mean(ops.square(student - teacher))
        if self.kind == "probabilities":
            tiny = keras.config.epsilon()
            student, teacher = ops.log(student + tiny), ops.log(teacher + tiny)
        wanted = ops.log_softmax(teacher / self.temperature)
        log_probabilities = ops.log_softmax(student / self.temperature)
        return self.temperature**2 * ops.mean(ops.sum(ops.exp(wanted) * (wanted - log_probabilities), axis=-1))

    def get_config(self):
        return {**super().get_config(), "weight": self.weight, "temperature": self.temperature, "kind": self.kind}


def distilled(student: keras.Model, teacher: keras.Model, weight: float, temperature: float) -> keras.Model:
    """A model that trains a student, whose weights it shares, on a loss with a teacher in it.

    Args:
        student: A Functional or Sequential model with one output, compiled.
        teacher: Another one with the same inputs and output shape; it is not trained.
        weight: Of the distance to the teacher, above 0.
        temperature: See `Distillation`.

    Returns:
        A model with the student's inputs and output, compiled like it.

    Raises:
        ValueError: either model has several outputs or is subclassed.
    """
    if any(functional_of(model) is None for model in (student, teacher)):
        raise ValueError(
            f"Distillation needs Functional or Sequential models. Received: '{student.name}' from '{teacher.name}'"
        )
    if len(student.outputs) != 1 or len(teacher.outputs) != 1:
        raise ValueError(
            f"Distillation is for models with one output. Received: model '{student.name}' with "
            f"{len(student.outputs)} outputs. Set distillation=0."
        )
    output_kind = _kind(teacher)
    teacher = _frozen(teacher)
    inputs = keras.tree.map_structure(_like, functional_of(student)._inputs_struct)
    output = Distillation(weight, temperature, output_kind, name="distillation")(
        student(inputs), teacher(inputs, training=False)
    )
    model = keras.Model(inputs, output, name=f"distilled_{student.name}")
    compile_like(student, model)
    return model


def _frozen(model: keras.Model) -> keras.Model:
    """A copy that is not trained, under a name of its own."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    copy.name = f"teacher_{model.name}"
    copy.trainable = False
    return copy


def _like(tensor):
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)


def _kind(model: keras.Model) -> str:
    """What the loss takes the outputs for."""
    loss = model.loss
    name = loss if isinstance(loss, str) else getattr(loss, "name", None) or getattr(loss, "__name__", "")
    if "crossentropy" not in str(name) or model.outputs[0].shape[-1] == 1 or "binary" in str(name):
        return "values"
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    return "logits" if config.get("from_logits") else "probabilities"
