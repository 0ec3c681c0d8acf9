"""From tokens to one vector an image, and from there to logits."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vit_jax.models.layers import NORM_EPS, Mlp, make_norm


class MapPool(nnx.Module):
    """Multi-head attention pooling with one learned query (Zhai et al. 2022, section 3.2)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        activation: str = "gelu_tanh",
        norm: str = "layernorm",
        norm_eps: float = NORM_EPS,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        xavier = nnx.initializers.xavier_uniform()
        options = {"dtype": dtype, "kernel_init": xavier, "rngs": rngs}
        self.probe = nnx.Param(xavier(rngs.params(), (1, dim), jnp.float32))
        self.query = nnx.Linear(dim, dim, **options)
        self.key = nnx.Linear(dim, dim, **options)
        self.value = nnx.Linear(dim, dim, **options)
        self.proj = nnx.Linear(dim, dim, **options)
        self.norm = make_norm(dim, norm=norm, eps=norm_eps, rngs=rngs)
        self.mlp = Mlp(dim, mlp_dim, activation=activation, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> [batch, dim]."""
        split = (*tokens.shape[:2], self.num_heads, -1)
        query = self.query(self.probe[...].astype(tokens.dtype)).reshape(self.num_heads, -1)
        key, value = self.key(tokens).reshape(split), self.value(tokens).reshape(split)
        scores = jnp.einsum("hd,bkhd->bhk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(tokens.dtype)
        x = self.proj(jnp.einsum("bhk,bkhd->bhd", weights, value).reshape(tokens.shape[0], -1))
        return x + self.mlp(self.norm(x).astype(x.dtype))

    def flops(self, num_tokens: int) -> int:
        """Matrix-product FLOPs on one image; the query, the same for all, counts nothing."""
        d, mlp_dim = self.proj.kernel.shape[0], self.mlp.fc1.kernel.shape[1]
        return 4 * num_tokens * d * d + 4 * num_tokens * d + 2 * d * d + 4 * d * mlp_dim


class ClsPool(nnx.Module):
    """The first prefix tokens side by side: the class token, or it and the distillation token."""

    def __init__(self, num_tokens: int = 1):
        self.num_tokens = num_tokens

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> [batch, num_tokens * dim]."""
        return tokens[:, : self.num_tokens].reshape(tokens.shape[0], -1)

    def flops(self, num_tokens: int) -> int:
        """No matrix products."""
        return 0


class GlobalAveragePool(nnx.Module):
    """The mean of the patch tokens, prefix tokens left out, and perhaps a norm of it."""

    def __init__(self, num_prefix_tokens: int, norm: nnx.Module | None = None):
        self.num_prefix_tokens, self.norm = num_prefix_tokens, norm

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, dim] -> [batch, dim]; mean and norm are taken in float32."""
        x = tokens[:, self.num_prefix_tokens :].mean(axis=1, dtype=jnp.float32)
        return (x if self.norm is None else self.norm(x)).astype(tokens.dtype)

    def flops(self, num_tokens: int) -> int:
        """No matrix products."""
        return 0


POOLS = ("cls", "cls_dist", "gap", "gap_norm", "map")


def make_pool(name: str, backbone, *, rngs: nnx.Rngs) -> nnx.Module:
    """The pooling called `name` for a `VisionTransformer`.

    Args:
      name: 'cls' (the class token), 'cls_dist' (it and the distillation token side by side, for
        `DistilledHead`), 'gap' (the mean of the patches), 'gap_norm' (then a norm, which stands in
        for the backbone's final one: He et al. 2022, MAE, appendix A.1) or 'map' (attention).
      backbone: gives the shape, the norm and the activation.
      rngs: for what the pooling learns.

    Raises:
      ValueError: an unknown name, or a token that the backbone lacks.
    """
    norm = {"norm": backbone.norm_kind, "rngs": rngs}
    if name not in POOLS:
        names = ", ".join(repr(pool) for pool in POOLS)
        raise ValueError(f"pool={name!r} is unknown; choose one of {names}.")
    if name == "cls_dist" and backbone.dist_token is None:
        raise ValueError("pool='cls_dist' needs model.dist_token=True, or use pool='cls'.")
    if name == "cls" and backbone.cls_token is None:
        raise ValueError("pool='cls' needs model.cls_token=True, or use pool='gap'.")
    if name == "gap":
        return GlobalAveragePool(backbone.num_prefix_tokens)
    if name == "gap_norm":
        pool_norm = make_norm(backbone.dim, eps=backbone.norm_eps, **norm)
        return GlobalAveragePool(backbone.num_prefix_tokens, pool_norm)
    if name == "map":
        shape = backbone.dim, backbone.num_heads, backbone.mlp_dim
        options = {"activation": backbone.activation, "norm_eps": backbone.norm_eps}
        return MapPool(*shape, **options, **norm, dtype=backbone.dtype)
    return ClsPool(2 if name == "cls_dist" else 1)


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


class DistilledHead(nnx.Module):
    """DeiT's two linear heads, logits averaged (Touvron et al. 2021, section 4).

    `fc` reads the class token and `fc_dist` the distillation token: the halves of what
    pool='cls_dist' answers. Both start at zero, their biases at `bias_init`.
    """

    def __init__(self, dim: int, num_classes: int, *, bias_init: float = 0.0, rngs: nnx.Rngs):
        zeros, bias = nnx.initializers.zeros, nnx.initializers.constant(bias_init)
        options = {"kernel_init": zeros, "bias_init": bias, "rngs": rngs}
        self.fc = nnx.Linear(dim, num_classes, **options)
        self.fc_dist = nnx.Linear(dim, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, 2 * dim] -> [batch, num_classes] float32."""
        cls, dist = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return (self.fc(cls) + self.fc_dist(dist)) / 2

    def flops(self) -> int:
        """Matrix-product FLOPs on one image."""
        dim, num_classes = self.fc.kernel.shape
        return 4 * dim * num_classes


def make_head(
    pool: str,
    dim: int,
    num_classes: int,
    *,
    hidden_dim: int = 0,
    bias_init: float = 0.0,
    rngs: nnx.Rngs,
) -> Head | DistilledHead:
    """The head that reads what the pooling called `pool` answers.

    Args:
      pool: see `make_pool`.
      dim: of the backbone.
      num_classes: of the logits.
      hidden_dim: width of a hidden layer, 0 for none.
      bias_init: see `Head`.
      rngs: for its weights.

    Raises:
      ValueError: a hidden layer wanted of a `DistilledHead`.
    """
    if pool != "cls_dist":
        options = {"hidden_dim": hidden_dim or None, "bias_init": bias_init}
        return Head(dim, num_classes, **options, rngs=rngs)
    if hidden_dim:
        raise ValueError(f"hidden_dim={hidden_dim} does not go with pool='cls_dist'; use 0.")
    return DistilledHead(dim, num_classes, bias_init=bias_init, rngs=rngs)
