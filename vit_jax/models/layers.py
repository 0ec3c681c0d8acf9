"""The parts of a Vision Transformer: patch embedding, attention, MLP and the block.

All matrix products run in `dtype`; parameters, norms and softmax stay in float32. No module holds
a random state: what is random takes `keys`, one key an example, so that neither the mesh nor the
order of the batch changes a draw.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vit_jax.axes import named, num_parts
from vit_jax.kernels.attention import KERNELS, Segments, attention, choose, with_bias
from vit_jax.kernels.devices import device_kind
from vit_jax.models.pos_embed import Rope, rotate

NORM_EPS = 1e-6  # the ViT paper's code; torch's default is 1e-5

NORMS = {
    "layernorm": nnx.LayerNorm,
    "rmsnorm": nnx.RMSNorm,  # neither centred nor with a bias (Zhang & Sennrich 2019)
}

ACTIVATIONS = {
    "gelu_tanh": jax.nn.gelu,  # what JAX calls GELU
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # what torch does
}

WIDE_TPUS = ("TPU v6 lite", "TPU v6e", "TPU7x")
"""Those whose matrix units are 256 wide, by JAX's `device_kind`."""


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


def draw_kept(keys: jax.Array, count: int, total: int) -> jax.Array:
    """[batch, count] int32: for each example another random `count` of `total`, in order."""
    order = jax.vmap(lambda key: jax.random.permutation(key, total))(keys)
    return jnp.sort(order[:, :count], axis=1)


def take(x: jax.Array | None, kept: jax.Array) -> jax.Array | None:
    """[batch, tokens, …] and [batch, kept] -> [batch, kept, …]; None stays None."""
    if x is None:
        return None
    return jnp.take_along_axis(x, kept.reshape(*kept.shape, *[1] * (x.ndim - 2)), axis=1)


def make_norm(
    dim: int, *, norm: str = "layernorm", eps: float = NORM_EPS, rngs: nnx.Rngs
) -> nnx.Module:
    """The one of NORMS called `norm`, in float32, whatever comes in."""
    return NORMS[norm](dim, epsilon=eps, dtype=jnp.float32, rngs=rngs)


def xavier_qkv(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """Xavier-uniform for each of the three square matrices, not for the fused one."""
    return _xavier_side_by_side(key, shape, dtype, 3)


def xavier_gated(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """Xavier-uniform for each of SwiGLU's gate and value, not for the packed matrix."""
    return _xavier_side_by_side(key, shape, dtype, 2)


def _xavier_side_by_side(key, shape, dtype, count):
    limit = (6 / (shape[0] + shape[1] // count)) ** 0.5
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
        with jax.named_scope("patch_embed"):
            return self._embed(images)

    def _embed(self, images):
        # A convolution, not a product of rearranged pixels: the TPU compiler then writes no
        # transposed copy of the images, forward or for the kernel's gradient.
        x = jax.lax.conv_general_dilated(
            images.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=self.patch_size,
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # [batch, rows, columns, dim]
        batch, rows, columns, dim = x.shape  # an exported batch is a symbol
        return x.reshape(batch, rows * columns, dim) + self.bias[...].astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    With `qk_norm` each head's queries and keys are normalised first (Dehghani et al. 2023, section
    2.2); all heads share a scale of [head_dim].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm: str = "layernorm",
        norm_eps: float = NORM_EPS,
        attention: str = "auto",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.implementation = attention
        self.dtype = dtype
        options = {"dtype": dtype, "rngs": rngs}
        self.qkv = nnx.Linear(dim, 3 * dim, use_bias=qkv_bias, kernel_init=xavier_qkv, **options)
        self.proj = nnx.Linear(dim, dim, kernel_init=nnx.initializers.xavier_uniform(), **options)
        options = {"norm": norm, "eps": norm_eps, "rngs": rngs}
        self.q_norm = make_norm(dim // num_heads, **options) if qk_norm else None
        self.k_norm = make_norm(dim // num_heads, **options) if qk_norm else None

    def __call__(
        self, x: jax.Array, mask: jax.Array | Segments | None = None, rope: Rope | None = None
    ) -> jax.Array:
        """[batch, tokens, dim] -> the same; `mask` as in `kernels.attention`."""
        parts = num_parts("heads")
        if parts > 1 and self.num_heads % parts == 0:
            return self.proj(self._attend_in_parts(x, mask, rope, parts))
        qkv = jax.ShapeDtypeStruct((*x.shape[:2], self.qkv.out_features), self.dtype)
        name = choose(self.implementation, qkv, self.num_heads, masked=mask is not None)
        plain = self.qkv.bias is None or self.q_norm is not None or rope is not None
        if plain or name not in KERNELS:
            return self.proj(self._attend(self.qkv(x), mask, rope, name))
        bias = self.qkv.bias[...]  # the kernel sums its gradient on the way
        qkv = with_bias(x.astype(self.dtype) @ self.qkv.kernel[...].astype(self.dtype), bias)
        options = {"num_heads": self.num_heads, "mask": mask, "implementation": name}
        return self.proj(attention(qkv, bias=bias, **options))

    def weights(self, x: jax.Array, rope: Rope | None = None) -> jax.Array:
        """[batch, tokens, dim] -> [batch, heads, queries, keys] float32: who attends to whom."""
        qkv = self._prepare(self.qkv(x), rope, self.num_heads)
        heads = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1).astype(jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", heads[:, :, 0], heads[:, :, 1])
        return jax.nn.softmax(scores * heads.shape[-1] ** -0.5, axis=-1)

    def _attend(self, qkv, mask, rope, name):
        if self.q_norm is not None or rope is not None:
            qkv = self._prepare(qkv, rope, self.num_heads)
        return attention(qkv, num_heads=self.num_heads, mask=mask, implementation=name)

    def _attend_in_parts(self, x, mask, rope, parts):
        """The same with the heads in groups, each projected from columns of its own.

        Split over devices, the side-by-side columns of the fused projection would not lie with
        their heads.
        """

        def grouped(x):  # [..., 3 * dim] -> [parts, ..., 3 * dim / parts]
            x = jnp.moveaxis(x.reshape(*x.shape[:-1], 3, parts, -1), -2, 0)
            return named(x.reshape(*x.shape[:-2], -1), "heads")

        num_heads = self.num_heads // parts
        kernel = grouped(self.qkv.kernel[...].astype(self.dtype))
        qkv = jnp.einsum("bnd,gdc->gbnc", x.astype(self.dtype), kernel)
        bias = None if self.qkv.bias is None else grouped(self.qkv.bias[...])
        if self.q_norm is None and rope is None:
            qkv = qkv if bias is None else with_bias(qkv, bias)
        else:
            if bias is not None:
                qkv, bias = qkv + bias[:, None, None].astype(qkv.dtype), None
            qkv = jax.vmap(lambda qkv: self._prepare(qkv, rope, num_heads))(qkv)
        qkv = named(qkv, "heads", "batch")
        options = {"num_heads": num_heads, "mask": mask, "bias": bias}
        x = attention(qkv, implementation=self.implementation, **options)
        x = jnp.moveaxis(named(x, "heads", "batch"), 0, 2)  # [batch, tokens, parts, dim / parts]
        return x.reshape(*x.shape[:2], -1)

    def _prepare(self, qkv, rope, num_heads):
        heads = qkv.reshape(*qkv.shape[:2], 3, num_heads, -1)
        query, key, value = (heads[:, :, i] for i in range(3))  # [batch, tokens, heads, head_dim]
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        parts = [x.astype(qkv.dtype) for x in (query, key, value)]
        return jnp.stack(parts, axis=2).reshape(qkv.shape)


def activate(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """function(x) of each number, with what the backward pass needs of it.

    XLA keeps x alone, and computes a GELU anew inside each product that wants it or its derivative,
    three times a step. On most chips the product takes as long as that, or memory is slower. Chips
    of WIDE_TPUS multiply four times as fast and do nothing else faster: there the function and its
    derivative are computed once, and kept in x's type.
    """
    return _activate_once(function, x) if device_kind() in WIDE_TPUS else function(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activate_once(function, x):
    return function(x)


def _with_derivative(function, x):
    # Behind a barrier XLA cannot tell that it might compute them from x again.
    return jax.lax.optimization_barrier(jax.jvp(function, (x,), (jnp.ones_like(x),)))


_activate_once.defvjp(_with_derivative, lambda _, derivative, grad: (grad * derivative,))


class Mlp(nnx.Module):
    """Two linear layers with an activation between, dropout after the first."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "gelu_tanh",
        dropout: float = 0.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.activation, self.dropout = activation, dropout
        xavier, small = nnx.initializers.xavier_uniform(), nnx.initializers.normal(1e-6)
        options = {"dtype": dtype, "kernel_init": xavier, "bias_init": small, "rngs": rngs}
        self.fc1 = nnx.Linear(dim, hidden_dim, **options)
        self.fc2 = nnx.Linear(hidden_dim, dim, **options)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """[batch, …, dim] -> the same."""
        x = activate(ACTIVATIONS[self.activation], _hidden(self.fc1(x)))
        if self.dropout:
            x = drop(x, self.dropout, keys)
        return self.fc2(x)


def _hidden(x: jax.Array) -> jax.Array:
    return named(x, "batch", *[None] * (x.ndim - 2), "hidden")


class SwiGlu(nnx.Module):
    """fc2(silu(gate) · value), dropout before fc2 (Shazeer 2020, section 2, with biases).

    `fc1` is [dim, 2 * hidden_dim]: the gate's columns, then the value's.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, dropout: float = 0.0, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.dropout = dropout
        xavier, small = nnx.initializers.xavier_uniform(), nnx.initializers.normal(1e-6)
        options = {"dtype": dtype, "bias_init": small, "rngs": rngs}
        self.fc1 = nnx.Linear(dim, 2 * hidden_dim, kernel_init=xavier_gated, **options)
        self.fc2 = nnx.Linear(hidden_dim, dim, kernel_init=xavier, **options)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """[batch, …, dim] -> the same."""
        gate, value = jnp.split(self.fc1(x), 2, axis=-1)
        x = jax.nn.silu(_hidden(gate)) * _hidden(value)
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
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)).

    Args:
      dim, num_heads, mlp_dim: its shape.
      mlp: 'mlp' (with `activation`, one of ACTIVATIONS) or 'swiglu' (whose own is SiLU).
      norm, norm_eps: one of NORMS, and its epsilon.
      qk_norm, qkv_bias: see `Attention`.
      dropout: rate inside the MLP and after each branch.
      layer_scale: initial value of LayerScale, 0.0 for none.
      attention: one of `kernels.attention.IMPLEMENTATIONS`.
      dtype: of the matrix products.
    """

    num_norms = 2

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        mlp: str = "mlp",
        activation: str = "gelu_tanh",
        norm: str = "layernorm",
        norm_eps: float = NORM_EPS,
        qk_norm: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        layer_scale: float = 0.0,
        attention: str = "auto",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        common = {"dtype": dtype, "rngs": rngs}
        norms = {"norm": norm, "norm_eps": norm_eps}
        self.norm1 = make_norm(dim, norm=norm, eps=norm_eps, rngs=rngs)
        options = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "attention": attention}
        self.attn = Attention(dim, num_heads, **options, **norms, **common)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else None
        second = self.num_norms == 2
        self.norm2 = make_norm(dim, norm=norm, eps=norm_eps, rngs=rngs) if second else None
        if mlp == "swiglu":
            self.mlp = SwiGlu(dim, mlp_dim, dropout=dropout, **common)
        else:
            self.mlp = Mlp(dim, mlp_dim, activation=activation, dropout=dropout, **common)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else None

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | Segments | None = None,
        rope: Rope | None = None,
        drop_path: float | jax.Array = 0.0,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """[batch, tokens, dim] -> the same; `drop_path` is this layer's rate, perhaps traced."""
        with jax.named_scope("norm1"):  # names that a profile shows
            normed = self.norm1(x).astype(x.dtype)
        with jax.named_scope("attn"):
            branch = self.attn(normed, mask, rope)
            x = x + self._residual(branch, self.ls1, drop_path, fold_in(keys, 0))
        with jax.named_scope("norm2"):
            normed = self.norm2(x).astype(x.dtype)
        with jax.named_scope("mlp"):
            branch = self.mlp(normed, fold_in(keys, 1))
            return x + self._residual(branch, self.ls2, drop_path, fold_in(keys, 2))

    def _residual(self, branch, layer_scale, drop_path, keys):
        if self.dropout:
            branch = drop(branch, self.dropout, fold_in(keys, 0))
        if layer_scale is not None:
            branch = layer_scale(branch)
        if not isinstance(drop_path, float) or drop_path:  # a Python 0.0 draws nothing
            branch = drop(branch, drop_path, fold_in(keys, 1), shape=(1, 1))
        return branch


class ParallelBlock(Block):
    """x + attn(norm1(x)) + mlp(norm1(x)), both at once (Dehghani et al. 2023, section 2.1)."""

    num_norms = 1

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | Segments | None = None,
        rope: Rope | None = None,
        drop_path: float | jax.Array = 0.0,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """See `Block`."""
        normed = self.norm1(x).astype(x.dtype)
        branch = self.attn(normed, mask, rope)
        attended = self._residual(branch, self.ls1, drop_path, fold_in(keys, 0))
        branch = self.mlp(normed, fold_in(keys, 1))
        return x + attended + self._residual(branch, self.ls2, drop_path, fold_in(keys, 2))
