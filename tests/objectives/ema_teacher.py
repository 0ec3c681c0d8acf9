"""A self-distilling objective, smaller than any that trains well: what the seam must carry."""

import jax
import jax.numpy as jnp
from flax import nnx

from vit_jax.models.heads import make_pool
from vit_jax.models.layers import fold_in
from vit_jax.objectives import Model, Objective, Output
from vit_jax.preprocess import Preprocess


class Center(nnx.Variable):
    """A running mean of the teacher's answers."""


class EmaTeacher(Objective):
    """The student learns its teacher's centered answers; the teacher is the student's average."""

    trainable = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("teacher")))

    def __init__(
        self,
        *,
        backbone,
        preprocess: Preprocess,
        decay: float = 0.9,
        center_decay: float = 0.5,
        warmup_steps: int = 4,
        rngs: nnx.Rngs,
    ):
        self.preprocess, self.decay, self.center_decay = preprocess, decay, center_decay
        self.warmup_steps = warmup_steps
        self.teacher = nnx.clone(backbone)
        self.pool = make_pool("gap", backbone, rngs=rngs)
        self.proj = nnx.Linear(backbone.dim, backbone.dim, rngs=rngs)
        self.center = Center(jnp.zeros(backbone.dim))

    def temperature(self, step):
        """From 1 down to 1/2 over the warmup."""
        return 1 - 0.5 * jnp.minimum(step / self.warmup_steps, 1.0)

    def __call__(self, backbone, batch, *, step, key, train):
        images, mask = self.preprocess(batch["image"]), batch["mask"]
        student = self.proj(self.pool(backbone(images, key=fold_in(key, 0) if train else None)))
        teacher = jax.lax.stop_gradient(self.pool(self.teacher(images)))
        targets = jax.nn.softmax((teacher - self.center[...]) / self.temperature(step))
        losses = jnp.where(mask, -(targets * jax.nn.log_softmax(student)).sum(-1), 0.0)
        count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
        metrics = {
            "loss": (losses.sum(), count),
            "temperature": (self.temperature(step), jnp.float32(1)),
        }
        mean = jnp.where(mask[:, None], teacher, 0.0).sum(0) / count
        return losses.sum() / count, Output(metrics, {"center": mean})

    def after_update(self, backbone, aux, step):
        center = self.center_decay
        self.center[...] = center * self.center[...] + (1 - center) * aux["center"]
        average = jax.tree.map(
            lambda old, new: self.decay * old + (1 - self.decay) * new,
            nnx.state(self.teacher),
            nnx.state(backbone),
        )
        nnx.update(self.teacher, average)

    def model(self, backbone):
        return Model(backbone, self.pool, None, self.preprocess)
