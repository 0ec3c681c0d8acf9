"""Classification with labels."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from vit_jax.losses import sigmoid_cross_entropy, softmax_cross_entropy
from vit_jax.models.heads import make_head, make_pool
from vit_jax.models.layers import fold_in
from vit_jax.objectives.base import Model, Objective, Output
from vit_jax.preprocess import Preprocess

LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}


class Supervised(Objective):
    """Softmax or sigmoid cross-entropy, with label smoothing and mixup's soft labels.

    Args:
      backbone: the model that will be trained, for its shape.
      num_classes: of the dataset.
      preprocess: normalising and mixup.
      loss: 'softmax' or 'sigmoid' (whose head starts at a bias of -log num_classes, Beyer et al.
        2020, section 4.1).
      label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016,
        section 7).
      pool: see `make_pool`; 'cls_dist' trains DeiT's two heads by their mean.
      hidden_dim: width of the head's hidden layer; 0 for one linear layer.
    """

    def __init__(
        self,
        *,
        backbone,
        num_classes: int,
        preprocess: Preprocess,
        loss: str = "softmax",
        label_smoothing: float = 0.0,
        pool: str = "gap",
        hidden_dim: int = 0,
        rngs: nnx.Rngs,
    ):
        if loss not in LOSSES:
            names = ", ".join(repr(name) for name in LOSSES)
            raise ValueError(f"loss={loss!r} is unknown; choose one of {names}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1).")
        self.num_classes, self.preprocess = num_classes, preprocess
        self.loss, self.label_smoothing = loss, label_smoothing
        self.pool = make_pool(pool, backbone, rngs=rngs)
        bias = -math.log(num_classes) if loss == "sigmoid" else 0.0
        options = {"hidden_dim": hidden_dim, "bias_init": bias, "rngs": rngs}
        self.head = make_head(pool, backbone.dim, num_classes, **options)

    def __call__(self, backbone, batch, *, step, key, train):
        """See `Objective`; metrics: loss, accuracy (of the first of mixed labels)."""
        images, mask = self.preprocess(batch["image"]), batch["mask"]
        targets = jax.nn.one_hot(batch["label"], self.num_classes)
        if self.label_smoothing:
            targets += self.label_smoothing * (1 / self.num_classes - targets)
        if train:
            images, targets = self.preprocess.mix(images, targets, mask, fold_in(key, 0))
        tokens = backbone(images, key=fold_in(key, 1) if train else None)
        logits = self.head(self.pool(tokens))  # [batch, num_classes]
        count = mask.sum().astype(jnp.float32)
        losses = jnp.where(mask, LOSSES[self.loss](logits, targets), 0.0)
        correct = (logits.argmax(-1) == batch["label"]) & mask
        metrics = {
            "loss": (losses.sum(), count),
            "accuracy": (correct.sum().astype(jnp.float32), count),
        }
        return losses.sum() / jnp.maximum(count, 1), Output(metrics)

    def flops_per_image(self, backbone) -> int:
        """3 × the forward pass of backbone, pooling and head on the tokens that training keeps."""
        tokens = backbone.num_train_tokens
        return 3 * (backbone.flops(tokens) + self.pool.flops(tokens) + self.head.flops())

    def model(self, backbone) -> Model:
        """Backbone, pooling, head and preprocessing."""
        return Model(backbone, self.pool, self.head, self.preprocess)
