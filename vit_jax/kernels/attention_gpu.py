"""Attention for short sequences on GPU: a Pallas kernel (Triton) that reads the fused projection.

Queries, keys and values are read where the projection left them, and the gradients written where it
wants them: nothing is split, padded or joined in memory, as it is around cuDNN's, and there may be
masks and segments. A program takes BLOCK queries of one head and goes over the keys with a running
softmax; backwards it takes BLOCK keys for their and the values' gradients, then the queries of the
same places (Dao 2023, FlashAttention-2, section 3.1).

No GPU has run it: it was interpreted, and compiled for H200.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # JAX 0.12 says that it will go
    plgpu = None

from vit_jax.kernels.attention_tpu import LEAST, LOG2E, MASKED

BLOCK = 64
"""Queries, and keys, of a tile: the least number of rows that Hopper's tensor cores multiply."""


def forward(qkv, query_ids, key_ids, *, num_heads, interpret=False):
    """`attention_tpu.forward`: the same arguments, the same results."""
    batch, tokens, width = qkv.shape
    out = jax.ShapeDtypeStruct((batch, tokens, width // 3), qkv.dtype)
    lse = jax.ShapeDtypeStruct((batch, num_heads, tokens), jnp.float32)
    return _call(_forward, (qkv,), query_ids, key_ids, [out, lse], num_heads, interpret)


def backward(qkv, query_ids, key_ids, out, lse, grad, *, num_heads, interpret=False):
    """`attention_tpu.backward`, with the same arguments.

    Returns:
      The gradient of qkv, twice: the second one is to be summed for the projection's bias.
    """
    batch, tokens, _ = out.shape
    inner = out.astype(jnp.float32) * grad.astype(jnp.float32)
    inner = inner.reshape(batch, tokens, num_heads, -1).sum(-1).swapaxes(1, 2)
    qkv_grad = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)
    operands = (qkv, grad, lse, inner)
    (qkv_grad,) = _call(_backward, operands, query_ids, key_ids, [qkv_grad], num_heads, interpret)
    return qkv_grad, qkv_grad


def _call(body, operands, query_ids, key_ids, results, num_heads, interpret):
    batch, tokens, width = operands[0].shape
    masks = () if query_ids is None else (query_ids[:, 0], key_ids[:, :, 0])
    padded = pl.next_power_of_2(width // (3 * num_heads))

    def kernel(*refs):
        masks, rest = (refs[:2], refs[2:]) if query_ids is not None else (None, refs)
        body(_Head(num_heads, operands[0].shape, masks), *rest)

    return pl.pallas_call(
        kernel,
        name=f"attention{body.__name__}",
        grid=(pl.cdiv(tokens, BLOCK), num_heads, batch),
        out_shape=results,
        compiler_params=plgpu.CompilerParams(num_warps=4 if padded <= 64 else 8, num_stages=2),
        interpret=interpret,
    )(*masks, *operands)


class _Head:
    """What the program at hand reads and writes: tiles of rows, of one head of one image.

    Tiles are BLOCK rows by head_dim columns, both rounded up to what the unit takes: what is beyond
    reads as zero and is not written.
    """

    def __init__(self, num_heads, shape, masks):
        self.tokens, self.dim = shape[1], shape[2] // 3
        self.head_dim = self.dim // num_heads
        self.num_blocks = pl.cdiv(self.tokens, BLOCK)
        self.own, self.head, self.image = (pl.program_id(axis) for axis in range(3))
        self._masks = masks

    def _inside(self, block):
        return block * BLOCK + jnp.arange(BLOCK) < self.tokens

    def _tile(self, ref, block, part):
        columns = pl.next_power_of_2(self.head_dim)
        rows = pl.ds(block * BLOCK, BLOCK)
        at = ref.at[self.image, rows, pl.ds(part * self.dim + self.head * self.head_dim, columns)]
        mask = self._inside(block)[:, None] & (jnp.arange(columns) < self.head_dim)[None]
        return at, mask

    def read(self, ref, block, part=0):
        """[BLOCK, columns]; `part` is 0, 1 or 2 for queries, keys or values of qkv."""
        at, mask = self._tile(ref, block, part)
        return plgpu.load(at, mask=mask, other=0.0)

    def write(self, ref, block, value, part=0):
        """The other way."""
        at, mask = self._tile(ref, block, part)
        plgpu.store(at, value.astype(ref.dtype), mask=mask)

    def read_row(self, ref, block):
        """[BLOCK] of an array [batch, heads, tokens]."""
        at = ref.at[self.image, self.head, pl.ds(block * BLOCK, BLOCK)]
        return plgpu.load(at, mask=self._inside(block), other=0.0)

    def write_row(self, ref, block, value):
        """The other way."""
        at = ref.at[self.image, self.head, pl.ds(block * BLOCK, BLOCK)]
        plgpu.store(at, value, mask=self._inside(block))

    def scores(self, query, key, queries, keys):
        """[BLOCK, BLOCK] float32, to base 2; queries and keys are numbers of blocks."""
        scores = _dot(query, key.T) * (self.head_dim**-0.5 * LOG2E)
        inside = self._inside(keys)
        if self._masks is not None:
            query_ids, key_ids = self._masks
            rows, columns = (pl.ds(n * BLOCK, BLOCK) for n in (queries, keys))
            seeking = plgpu.load(
                query_ids.at[self.image, rows], mask=self._inside(queries), other=-1
            )
            found = plgpu.load(key_ids.at[self.image, columns], mask=inside, other=-1)
            scores = jnp.where(seeking[:, None] == found[None], scores, MASKED)
        return jnp.where(inside[None], scores, -jnp.inf)


def _forward(head, qkv, out, lse):
    query = head.read(qkv, head.own, 0)

    def add(block, carry):
        largest, total, weighted = carry
        scores = head.scores(query, head.read(qkv, block, 1), head.own, block)
        higher = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.exp2(scores - higher[:, None])
        shrink = jnp.exp2(largest - higher)
        value = head.read(qkv, block, 2)
        weighted = weighted * shrink[:, None] + _dot(weights.astype(value.dtype), value)
        return higher, total * shrink + weights.sum(axis=1), weighted

    least = jnp.full(BLOCK, LEAST, jnp.float32)
    start = least, jnp.zeros(BLOCK, jnp.float32), jnp.zeros(query.shape, jnp.float32)
    largest, total, weighted = jax.lax.fori_loop(0, head.num_blocks, add, start)
    total = jnp.maximum(total, 1.0)  # less only where no key is seen
    head.write(out, head.own, weighted / total[:, None])
    head.write_row(lse, head.own, largest + jnp.log2(total))


def _backward(head, qkv, grad, lse, inner, qkv_grad):
    scale = head.head_dim**-0.5

    def weights_and_grad(query, key, value, upstream, queries, keys):
        """[queries, keys] of a tile: the softmax's output, and the gradient of its input."""
        scores = head.scores(query, key, queries, keys)
        weights = jnp.exp2(scores - head.read_row(lse, queries)[:, None])
        weights_grad = _dot(upstream, value.T)
        return weights, weights * (weights_grad - head.read_row(inner, queries)[:, None]) * scale

    key, value = head.read(qkv, head.own, 1), head.read(qkv, head.own, 2)

    def over_queries(block, carry):
        query, upstream = head.read(qkv, block, 0), head.read(grad, block)
        weights, scores_grad = weights_and_grad(query, key, value, upstream, block, head.own)
        key_grad = carry[0] + _dot(scores_grad.astype(query.dtype).T, query)
        return key_grad, carry[1] + _dot(weights.astype(query.dtype).T, upstream)

    zero = jnp.zeros(key.shape, jnp.float32)
    key_grad, value_grad = jax.lax.fori_loop(0, head.num_blocks, over_queries, (zero, zero))
    head.write(qkv_grad, head.own, key_grad, 1)
    head.write(qkv_grad, head.own, value_grad, 2)

    query, upstream = head.read(qkv, head.own, 0), head.read(grad, head.own)

    def over_keys(block, carry):
        key, value = head.read(qkv, block, 1), head.read(qkv, block, 2)
        _, scores_grad = weights_and_grad(query, key, value, upstream, head.own, block)
        return carry + _dot(scores_grad.astype(key.dtype), key)

    head.write(qkv_grad, head.own, jax.lax.fori_loop(0, head.num_blocks, over_keys, zero), 0)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
