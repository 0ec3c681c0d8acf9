"""Poolings that other frameworks' models have beside those of `models.heads`."""

import jax
import jax.numpy as jnp
from flax import nnx

from vit_jax.models.heads import ClsPool, GlobalAveragePool, MapPool, make_pool
from vit_jax.models.vit import VisionTransformer


class AllTokens(nnx.Module):
    """No pooling: what a ViT without a head answers elsewhere (ViTMAE)."""

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> the same."""
        return tokens

    def flops(self, num_tokens: int) -> int:
        """No matrix products."""
        return 0


class ClsGapPool(nnx.Module):
    """Class token and mean of the patches side by side: what DINOv2's linear heads read."""

    def __init__(self, num_prefix_tokens: int):
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> [batch, 2 * dim]."""
        mean = tokens[:, self.num_prefix_tokens :].mean(axis=1, dtype=jnp.float32)
        return jnp.concatenate([tokens[:, 0], mean.astype(tokens.dtype)], axis=-1)

    def flops(self, num_tokens: int) -> int:
        """No matrix products."""
        return 0


class ClsTanhPool(nnx.Module):
    """tanh of a linear layer on the class token: Hugging Face's pooler, after BERT's."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> [batch, dim]."""
        return jnp.tanh(self.dense(tokens[:, 0].astype(jnp.float32)))

    def flops(self, num_tokens: int) -> int:
        """Matrix-product FLOPs on one image."""
        return 2 * self.dense.kernel.shape[0] ** 2


def make_any_pool(name: str, backbone: VisionTransformer, *, rngs: nnx.Rngs) -> nnx.Module:
    """`make_pool`, and what imported models need: 'none', 'cls_gap', 'cls_tanh'."""
    if name == "none":
        return AllTokens()
    if name == "cls_gap":
        return ClsGapPool(backbone.num_prefix_tokens)
    if name == "cls_tanh":
        return ClsTanhPool(backbone.dim, rngs=rngs)
    return make_pool(name, backbone, rngs=rngs)


def pool_name(pool: nnx.Module) -> str:
    """The inverse.

    Raises:
      ValueError: a pooling that an objective brought along.
    """
    if isinstance(pool, ClsPool):
        return "cls" if pool.num_tokens == 1 else "cls_dist"
    if isinstance(pool, GlobalAveragePool):
        return "gap" if pool.norm is None else "gap_norm"
    names = {MapPool: "map", AllTokens: "none", ClsGapPool: "cls_gap", ClsTanhPool: "cls_tanh"}
    if type(pool) not in names:
        raise ValueError(f"pooling by {type(pool).__name__} cannot be written to a file.")
    return names[type(pool)]
