"""Backbone, pooling and head together: what evaluation, export and notebooks see."""

from collections.abc import Callable

import jax
from flax import nnx

from vit_jax.models.vit import VisionTransformer


class Model(nnx.Module):
    """A trained or trainable model, from pixels to logits.

    Args:
      backbone: images -> [batch, tokens, dim].
      pool: tokens -> [batch, features].
      head: features -> [batch, num_classes], or None.
      preprocess: uint8 images -> normalised float ones; float ones stay as they are.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        pool: nnx.Module,
        head: nnx.Module | None,
        preprocess: Callable[[jax.Array], jax.Array],
    ):
        self.backbone, self.pool, self.head, self.preprocess = backbone, pool, head, preprocess

    def __call__(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> logits, or pooled features without a head; float32.

        uint8 images are preprocessed; float ones are taken as already normalised.
        """
        x = self._pooled(images)
        return (x if self.head is None else self.head(x)).astype("float32")

    def features(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> pooled features [batch, features] float32.

        They are the head's input; `backbone.features` answers maps of intermediate layers.
        """
        return self._pooled(images).astype("float32")

    def _pooled(self, images):
        return self.pool(self.backbone(self.preprocess(images)))
