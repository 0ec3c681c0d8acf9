"""From tokens to one vector an image, and from there to logits."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vit_jax.models.layers import Mlp, layer_norm


class MapPool(nnx.Module):
    """Multi-head attention pooling with one learned query (Zhai et al. 2022, section 3.2)."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads = num_heads
        xavier = nnx.initializers.xavier_uniform()
        options = {"dtype": dtype, "kernel_init": xavier, "rngs": rngs}
        self.probe = nnx.Param(xavier(rngs.params(), (1, dim), jnp.float32))
        self.query = nnx.Linear(dim, dim, **options)
        self.key = nnx.Linear(dim, dim, **options)
        self.value = nnx.Linear(dim, dim, **options)
        self.proj = nnx.Linear(dim, dim, **options)
        self.norm = layer_norm(dim, rngs)
        self.mlp = Mlp(dim, mlp_dim, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> [batch, dim]."""
        split = (*tokens.shape[:2], self.num_heads, -1)
        query = self.query(self.probe[...].astype(tokens.dtype)).reshape(self.num_heads, -1)
        key, value = self.key(tokens).reshape(split), self.value(tokens).reshape(split)
        scores = jnp.einsum("hd,bkhd->bhk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(tokens.dtype)
        x = self.proj(jnp.einsum("bhk,bkhd->bhd", weights, value).reshape(len(tokens), -1))
        return x + self.mlp(self.norm(x).astype(x.dtype))

    def flops(self, num_tokens: int) -> int:
        """Matrix-product FLOPs on one image; the query, the same for all, counts nothing."""
        d, mlp_dim = self.proj.kernel.shape[0], self.mlp.fc1.kernel.shape[1]
        return 4 * num_tokens * d * d + 4 * num_tokens * d + 2 * d * d + 4 * d * mlp_dim


class ClsPool(nnx.Module):
    """The class token."""

    def __init__(self, num_prefix_tokens: int):
        if not num_prefix_tokens:
            raise ValueError("pool='cls' needs model.cls_token=True, or use pool='gap'.")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> [batch, dim]."""
        return tokens[:, 0]

    def flops(self, num_tokens: int) -> int:
        """No matrix products."""
        return 0


class GlobalAveragePool(nnx.Module):
    """The mean of the patch tokens, prefix tokens left out."""

    def __init__(self, num_prefix_tokens: int):
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> [batch, dim]; the mean is taken in float32."""
        patches = tokens[:, self.num_prefix_tokens :]
        return patches.mean(axis=1, dtype=jnp.float32).astype(tokens.dtype)

    def flops(self, num_tokens: int) -> int:
        """No matrix products."""
        return 0


def make_pool(name: str, backbone, *, rngs: nnx.Rngs) -> nnx.Module:
    """The pooling called `name`: 'cls', 'gap' or 'map', for a `VisionTransformer`."""
    if name == "cls":
        return ClsPool(backbone.num_prefix_tokens)
    if name == "gap":
        return GlobalAveragePool(backbone.num_prefix_tokens)
    if name == "map":
        shape = backbone.dim, backbone.num_heads, backbone.mlp_dim
        return MapPool(*shape, dtype=backbone.dtype, rngs=rngs)
    raise ValueError(f"pool={name!r} is unknown; choose one of 'cls', 'gap', 'map'.")


class Head(nnx.Module):
    """Logits by one linear layer, or by two with tanh between (Dosovitskiy et al., section 3.1).

    The last layer starts at zero, its bias at `bias_init` (-log(num_classes) suits a sigmoid loss).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        hidden_dim: int | None = None,
        bias_init: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.pre_logits = nnx.Linear(dim, hidden_dim, rngs=rngs) if hidden_dim else None
        zeros, bias = nnx.initializers.zeros, nnx.initializers.constant(bias_init)
        width = hidden_dim or dim
        self.fc = nnx.Linear(width, num_classes, kernel_init=zeros, bias_init=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, dim] -> [batch, num_classes] float32."""
        x = x.astype(jnp.float32)
        if self.pre_logits is not None:
            x = jnp.tanh(self.pre_logits(x))
        return self.fc(x)

    def flops(self) -> int:
        """Matrix-product FLOPs on one image."""
        layers = [self.fc] if self.pre_logits is None else [self.pre_logits, self.fc]
        return sum(2 * layer.kernel.shape[0] * layer.kernel.shape[1] for layer in layers)
