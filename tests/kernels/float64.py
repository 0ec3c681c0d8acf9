"""Attention in float64, and what a kernel is held to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.kernels.attention import Segments, attention

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
TOKENS = (16, 17, 49, 196, 197, 201, 256, 257, 261, 576, 577, 1025, 1100)
HEADS = ((4, 32), (6, 64), (2, 72), (16, 72), (16, 80), (3, 88), (16, 88), (4, 96), (1, 128))
"""(num_heads, head_dim): some fill whole tiles, some do not."""


def draw(batch, tokens, num_heads, head_dim, dtype, masked=False):
    """qkv, the bias in it, the output's gradient, and segments, of which the last has no key."""
    seed = np.random.SeedSequence().entropy
    print(f"drawn with seed {seed}")  # shown if a test fails
    rng = np.random.default_rng(seed)
    dim = num_heads * head_dim
    qkv = jnp.asarray(1.5 * rng.standard_normal((batch, tokens, 3 * dim)), dtype)
    bias = jnp.asarray(rng.standard_normal(3 * dim), jnp.float32)
    grad = jnp.asarray(rng.standard_normal((batch, tokens, dim)), dtype)
    if not masked:
        return qkv, bias, grad, None
    segments = rng.integers(0, 4, (batch, tokens)).astype(np.int32)
    segments[:, :4] = range(4)
    keep = (rng.random((batch, tokens)) < 0.8) & (segments < 3)
    keep[:, :3] = True
    return qkv, bias, grad, Segments(segments, np.where(keep, segments, -1))


def exact(qkv, grad, num_heads, mask):
    """Output and gradient of qkv in float64."""
    qkv, grad = (np.asarray(x, np.float64) for x in (qkv, grad))
    batch, tokens = qkv.shape[:2]
    heads = qkv.reshape(batch, tokens, 3, num_heads, -1)
    query, key, value = heads.transpose(2, 0, 3, 1, 4)
    scale = query.shape[-1] ** -0.5
    scores = query @ key.mT * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    if mask is not None:  # a query that sees no key answers zeros
        weights *= mask.queries[:, None, :, None] == mask.keys[:, None, None, :]
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=weights, where=total > 0)
    upstream = grad.reshape(batch, tokens, num_heads, -1).swapaxes(1, 2)
    weights_grad = upstream @ value.mT
    inner = (weights * weights_grad).sum(-1, keepdims=True)
    scores_grad = weights * (weights_grad - inner) * scale
    grads = scores_grad @ key, scores_grad.mT @ query, weights.mT @ upstream
    out = (weights @ value).swapaxes(1, 2).reshape(grad.shape)
    return out, np.stack([g.swapaxes(1, 2) for g in grads], axis=2).reshape(qkv.shape)


def relative(found, wanted):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@functools.partial(jax.jit, static_argnames=("num_heads", "implementation"))
def run(qkv, bias, grad, mask, num_heads, implementation="interpret"):
    """Output, and the gradients of qkv and bias."""
    options = {"num_heads": num_heads, "mask": mask, "implementation": implementation}
    out, vjp = jax.vjp(lambda qkv, bias: attention(qkv, bias=bias, **options), qkv, bias)
    return out, *vjp(grad)


def check(batch, tokens, num_heads, head_dim, dtype, masked, implementation):
    """Forward and gradients of an implementation are those of float64."""
    qkv, bias, grad, mask = draw(batch, tokens, num_heads, head_dim, dtype, masked)
    found = run(qkv, bias, grad, mask, num_heads, implementation)
    out, qkv_grad = exact(qkv, grad, num_heads, mask)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == jnp.float32
    for one, wanted in zip(found, (out, qkv_grad, qkv_grad.sum(axis=(0, 1))), strict=True):
        assert relative(one, wanted) < TOLERANCES[dtype]
