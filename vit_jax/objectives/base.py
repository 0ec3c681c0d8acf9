"""The seam between the training step and a method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from vit_jax.models.model import Model
from vit_jax.models.vit import VisionTransformer

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


class Output(NamedTuple):
    """What an objective tells beside its loss.

    Attributes:
      metrics: (sum, count) pairs of scalars, so that they add over devices and batches.
      aux: a tree of arrays that `after_update` wants, reduced over the whole batch.
    """

    metrics: Metrics
    aux: Any = ()


class Objective(nnx.Module):
    """A method: the variables it adds to the backbone, its loss, and what it updates itself.

    Class attributes:
      trainable: NNX filter over the objective's own variables: those that get gradients.
      couples_examples: whether the loss of a batch differs from the mean of its parts' losses.
    """

    trainable: Any = nnx.Param
    couples_examples: bool = False

    def __call__(
        self,
        backbone: VisionTransformer,
        batch: Mapping[str, jax.Array],
        *,
        step: jax.Array,
        key: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, Output]:
        """Forward pass and loss; changes no variable.

        Args:
          backbone: the model that is trained.
          batch: 'image' uint8 [batch, height, width, 3], 'label' int32 [batch], 'mask' bool
            [batch] (False: padding), and what the augmentation recipe adds.
          step: int32 scalar, the number of updates done.
          key: [batch] random keys, one an example.
          train: whether to draw dropout, drop path and mixing.

        Returns:
          The loss, a float32 scalar: the mean over the valid examples; and an `Output`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss.")

    def after_update(self, backbone: VisionTransformer, aux: Any, step: jax.Array) -> None:
        """Changes what is not trained by gradients, in place (EMA teachers, centers, queues).

        Args:
          backbone: after the optimiser's update.
          aux: what `__call__` answered.
          step: int32 scalar, the number of updates done before this one.
        """

    def flops_per_image(self, backbone: VisionTransformer) -> int:
        """Useful matrix-product FLOPs of a training step on one image, for MFU.

        By default 3 × the backbone's forward pass on the tokens that training keeps (the backward
        pass does each product twice); the recomputing of rematerialisation counts nothing.
        """
        return 3 * backbone.flops(backbone.num_train_tokens)

    def model(self, backbone: VisionTransformer) -> Model:
        """What evaluation, export and transfer see."""
        raise NotImplementedError(f"{type(self).__name__} defines no model.")
