"""The parts of a Vision Transformer: patch embedding, attention, MLP and the block.

All matrix products run in `dtype`; parameters, norms and softmax stay in float32. No module holds
a random state: what is random takes `keys`, one key an example, so that neither the mesh nor the
order of the batch changes a draw.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vit_jax.kernels.attention import attention

LAYER_NORM_EPS = 1e-6  # the ViT paper's code; torch's default is 1e-5


def fold_in(keys: jax.Array | None, data: jax.Array | int) -> jax.Array | None:
    """`jax.random.fold_in` for [batch] keys; None (deterministic) stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def drop(x: jax.Array, rate: float | jax.Array, keys: jax.Array | None, *, shape=None) -> jax.Array:
    """Zeroes entries of each example with probability `rate` and rescales the others.

    Args:
      x: [batch, …].
      rate: probability, below 1; may be traced.
      keys: [batch] keys, or None to answer x unchanged.
      shape: an example's mask, broadcast against x[0]; x[0].shape by default (dropout). With
        all ones it drops whole examples: stochastic depth (Huang et al. 2016, section 3).
    """
    if keys is None:
        return x
    shape = x.shape[1:] if shape is None else shape
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape))(keys)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def layer_norm(dim: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32, whatever comes in."""
    return nnx.LayerNorm(dim, epsilon=LAYER_NORM_EPS, dtype=jnp.float32, rngs=rngs)


def xavier_qkv(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """Xavier-uniform for each of the three square matrices, not for the fused one."""
    limit = (6 / (shape[0] + shape[1] // 3)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, one linear embedding (Dosovitskiy et al. 2021, section 3.1)."""

    def __init__(
        self,
        patch_size: tuple[int, int],
        dim: int,
        *,
        channels: int = 3,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.dtype = dtype
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(rngs.params(), (*patch_size, channels, dim), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> [batch, patches, dim], row by row."""
        batch, height, width, channels = images.shape
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        x = images.reshape(
            batch, rows, self.patch_size[0], columns, self.patch_size[1], channels
        ).astype(self.dtype)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        kernel = self.kernel[...].astype(self.dtype).reshape(x.shape[-1], -1)
        return x @ kernel + self.bias[...].astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, kernel_init=xavier_qkv, rngs=rngs)
        xavier = nnx.initializers.xavier_uniform()
        self.proj = nnx.Linear(dim, dim, dtype=dtype, kernel_init=xavier, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[batch, tokens, dim] -> the same; `mask` as in `kernels.attention`."""
        return self.proj(attention(self.qkv(x), num_heads=self.num_heads, mask=mask))


class Mlp(nnx.Module):
    """Two linear layers with GELU (tanh form) between, dropout after the first."""

    def __init__(
        self, dim: int, hidden_dim: int, *, dropout: float = 0.0, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.dropout = dropout
        xavier, small = nnx.initializers.xavier_uniform(), nnx.initializers.normal(1e-6)
        options = {"dtype": dtype, "kernel_init": xavier, "bias_init": small, "rngs": rngs}
        self.fc1 = nnx.Linear(dim, hidden_dim, **options)
        self.fc2 = nnx.Linear(hidden_dim, dim, **options)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """[batch, …, dim] -> the same."""
        x = jax.nn.gelu(self.fc1(x))
        if self.dropout:
            x = drop(x, self.dropout, keys)
        return self.fc2(x)


class LayerScale(nnx.Module):
    """A learned factor a channel on a residual branch (Touvron et al. 2021, CaiT, section 2)."""

    def __init__(self, dim: int, init: float):
        self.gamma = nnx.Param(jnp.full(dim, init))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[…, dim] -> the same."""
        return x * self.gamma[...].astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        dropout: float = 0.0,
        layer_scale: float = 0.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.norm1 = layer_norm(dim, rngs)
        self.attn = Attention(dim, num_heads, dtype=dtype, rngs=rngs)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else None
        self.norm2 = layer_norm(dim, rngs)
        self.mlp = Mlp(dim, mlp_dim, dropout=dropout, dtype=dtype, rngs=rngs)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else None

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        drop_path: float | jax.Array = 0.0,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """[batch, tokens, dim] -> the same; `drop_path` is this layer's rate, perhaps traced."""
        branch = self.attn(self.norm1(x).astype(x.dtype), mask)
        x = x + self._residual(branch, self.ls1, drop_path, fold_in(keys, 0))
        branch = self.mlp(self.norm2(x).astype(x.dtype), fold_in(keys, 1))
        return x + self._residual(branch, self.ls2, drop_path, fold_in(keys, 2))

    def _residual(self, branch, layer_scale, drop_path, keys):
        if self.dropout:
            branch = drop(branch, self.dropout, fold_in(keys, 0))
        if layer_scale is not None:
            branch = layer_scale(branch)
        if not isinstance(drop_path, float) or drop_path:  # a Python 0.0 draws nothing
            branch = drop(branch, drop_path, fold_in(keys, 1), shape=(1, 1))
        return branch
