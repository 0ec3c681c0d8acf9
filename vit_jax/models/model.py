"""Backbone, pooling and head together: what evaluation, export and notebooks see."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Functional(NamedTuple):
    """A model as compiled functions take it: taking a module apart costs milliseconds each time.

    Attributes:
      build: variables -> `Model`; static (it can be hashed), and called while compiling.
      variables: a tree of arrays.
    """

    build: Callable[[Any], Model]
    variables: Any

    @classmethod
    def of(cls, model: Model) -> "Functional":
        """A module, taken apart."""
        graphdef, state = nnx.split(model)
        return cls(Merge(graphdef), nnx.to_pure_dict(state))

    def module(self) -> Model:
        """Its opposite."""
        return self.build(self.variables)


@dataclasses.dataclass(frozen=True)
class Merge:
    """What `Functional` builds a split module by; equal for equal graphdefs."""

    graphdef: nnx.GraphDef

    def __call__(self, variables: Any) -> Model:
        """Puts the module together again."""
        return nnx.merge(self.graphdef, variables)
