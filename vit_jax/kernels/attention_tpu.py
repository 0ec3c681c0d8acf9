"""Attention for short sequences on TPU: a Pallas kernel that keeps whole images in fast memory.

XLA writes the scores of every head to memory and reads them back three times; at 196 tokens that
is most of a ViT's step. Here a grid cell takes some images, and their scores never leave VMEM.

Scores are kept transposed, [keys, queries]: the softmax then reduces over sublanes, which costs
plain additions instead of shuffles, its maximum and sum are rows that broadcast for free, and of
the backward pass's products only one needs a transposed operand, and a small one. The sum itself
comes out of the matrix unit, as one more row of the values. A head is seen through the 128-lane
tiles that hold it, the other heads' lanes zeroed: the matrix unit is that wide anyway, and nothing
is shuffled into place. The scores of the next heads are computed before the softmax of this one,
since the compiler does not move them there by itself.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vit_jax.kernels.devices import device_kind

LANES = 128
"""Of a vector register, and of a tile of an array in memory."""

LOG2E = math.log2(math.e)  # the unit has an exponential of base 2

MASKED = -1e30
"""Score of a key that may not be seen."""

LEAST = -1e20
"""What counts as the largest score of a query that sees no key: all its weights are then zero."""

MAX_QUERIES = 3 * LANES
"""Whose scores with all keys are held at a time."""

MAX_UNROLLED = 8 * 1024 * 1024
"""Scores of one body of code; beyond, heads are looped over. Compiling takes time in proportion."""

CELL_BYTES = 10 * 1024 * 1024
"""Of the images that a grid cell takes at a time: starting a cell costs about 500 cycles."""

VMEM_BYTES = 64 * 1024 * 1024

SMALL_CHIPS = ("TPU v4",)
SMALL_CELL_BYTES = 4 * 1024 * 1024
SMALL_VMEM_BYTES = 16 * 1024 * 1024
"""Of chips with less memory of their own."""

ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))
ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


def forward(qkv, query_ids, key_ids, *, num_heads, interpret=False):
    """Softmax attention and what its backward pass wants.

    Args:
      qkv: [batch, tokens, 3 * dim], queries, keys and values side by side, heads inside each.
      query_ids, key_ids: [batch, 1, tokens] and [batch, tokens, 1] int32; a query attends to the
        keys of its number. None for all.
      num_heads: divides dim.
      interpret: runs it anywhere, slowly, with memory that nobody wrote being NaN.

    Returns:
      [batch, tokens, dim] in qkv's dtype, and [batch, heads, tokens] float32: the logarithm, to
      base 2, of each query's sum of exponentials.
    """
    batch, tokens, width = qkv.shape
    out = jax.ShapeDtypeStruct((batch, tokens, width // 3), qkv.dtype)
    lse = jax.ShapeDtypeStruct((batch, num_heads, tokens), jnp.float32)
    masks = () if query_ids is None else (query_ids, key_ids)
    body = functools.partial(_forward, num_heads=num_heads, masked=bool(masks))
    return _call(body, "attention_forward", (qkv, *masks), (out, lse), num_heads, interpret)


def backward(qkv, query_ids, key_ids, out, lse, grad, *, num_heads, interpret=False):
    """The gradient of `forward`'s first result.

    Args:
      qkv, query_ids, key_ids, num_heads, interpret: as in `forward`.
      out, lse: what it answered.
      grad: of `out`.

    Returns:
      The gradient of qkv, and [cells, 1, 3 * dim] float32: its sum over the tokens of a grid
      cell's images, which is what the gradient of the projection's bias is made of.
    """
    width = qkv.shape[2]
    results = (
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        jax.ShapeDtypeStruct((1, 1, width), jnp.float32),
    )
    masks = () if query_ids is None else (query_ids, key_ids)
    body = functools.partial(_backward, num_heads=num_heads, masked=bool(masks))
    operands = (qkv, *masks, out, lse, grad)
    return _call(body, "attention_backward", operands, results, num_heads, interpret)


def _call(body, name, operands, results, num_heads, interpret):
    """Runs body(image, *refs, scratch) for every image.

    All arrays have a leading batch, except for results of 1, of which each cell has its own.
    """
    batch, tokens, width = operands[0].shape
    one = sum(x.size * x.dtype.itemsize for x in (*operands, *results)) // batch
    most = SMALL_CELL_BYTES if device_kind() in SMALL_CHIPS else CELL_BYTES
    images = max(n for n in range(1, batch + 1) if (batch % n == 0 and n * one <= most) or n == 1)
    group = heads_a_group(tokens, width // 3, num_heads) * (width // 3 // num_heads)

    def kernel(*refs):
        def image(index, carry):
            body(index, *refs)
            return carry

        jax.lax.fori_loop(0, images, image, None)

    cells = batch // images
    results = [
        x if x.shape[0] == batch else jax.ShapeDtypeStruct((cells, *x.shape[1:]), x.dtype)
        for x in results
    ]

    def spec(x):
        return pl.BlockSpec((x.shape[0] // cells, *x.shape[1:]), lambda cell: (cell, 0, 0))

    return pl.pallas_call(
        kernel,
        name=name,
        grid=(cells,),
        in_specs=[spec(x) for x in operands],
        out_specs=[spec(x) for x in results],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM((group, tokens), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
    )(*operands)


def too_large(tokens: int, width: int, dtype: str, num_heads: int, parts: int = 1) -> str:
    """Why an image does not fit into the chip's own memory, or ''.

    Args:
      tokens, width, dtype: of qkv, whose width is 3 * dim.
      num_heads: of all devices.
      parts: into which the heads are split.

    The backward pass holds qkv, the output and the gradients of both, each twice, while the next
    image comes and the last one goes, and the scratch memory.
    """
    if device_kind() not in SMALL_CHIPS:
        return ""
    dim, num_heads = width // 3 // parts, max(num_heads // parts, 1)
    group = heads_a_group(tokens, dim, num_heads) * (dim // num_heads)
    needed = 2 * (8 * dim * jnp.dtype(dtype).itemsize + 4 * num_heads) * tokens + 4 * group * tokens
    if needed <= SMALL_VMEM_BYTES:
        return ""
    return f"wants {needed / 2**20:.1f} MiB of the chip's own memory, of which it has 16"


def heads_a_group(tokens: int, dim: int, num_heads: int) -> int:
    """How many heads one body of code goes over: all, or those of some whole tiles."""
    head_dim = dim // num_heads
    least = LANES // math.gcd(LANES, head_dim)  # heads that fill whole tiles
    if dim % LANES or num_heads % least:
        return num_heads
    groups = [n for n in range(least, num_heads + 1, least) if num_heads % n == 0]
    fitting = [n for n in groups if n * tokens * tokens <= MAX_UNROLLED]
    return max(fitting, default=least)


def _forward(image, *refs, num_heads, masked):
    qkv, (query_ids, key_ids), (out, lse, turned) = refs[0], *_masks(refs, masked)
    tokens, dim = out.shape[1:]
    head_dim = dim // num_heads
    tiles = _queries(tokens)

    def heads(group, start, count):
        values = [qkv[image, :, lanes].T for lanes in _tiles(2 * dim + start, count * head_dim)]
        values = jnp.concatenate(values)  # [group's lanes, tokens]
        ones = jnp.ones((16, tokens), values.dtype)

        def scores(unit):
            head, rows = unit
            lanes = _lanes(head, head_dim, count * head_dim)
            key = _only(qkv[image, :, _at(dim + start, lanes)], lanes, head, head_dim)
            return _scores(key, qkv[image, rows, _at(start, lanes)], head_dim)

        def attend(unit, scores):
            head, rows = unit
            if masked:
                scores = _mask(scores, query_ids[image, :, rows], key_ids[image])
            largest = scores.max(axis=0, keepdims=True)
            if masked:
                largest = jnp.maximum(largest, LEAST)
            weights = jnp.exp2(scores - largest).astype(values.dtype)
            value = values[head * head_dim : (head + 1) * head_dim]
            result = _dot(jnp.concatenate([value, ones]), weights)  # [head_dim + 16, queries]
            total = result[head_dim : head_dim + 1]
            if masked:
                total = jnp.maximum(total, 1.0)  # less only where no key is seen
            turned[head * head_dim : (head + 1) * head_dim, rows] = result[:head_dim] / total
            lse[image, pl.ds(group * count + head, 1), rows] = largest + jnp.log2(total)

        _pipeline([(h, rows) for h in range(count) for rows in tiles], scores, attend, ahead=2)
        for lanes in _tiles(0, count * head_dim):
            out[image, :, _at(start, lanes)] = turned[lanes].T.astype(out.dtype)

    _loop_groups(heads, tokens, dim, num_heads)


def _backward(image, *refs, num_heads, masked):
    qkv, (query_ids, key_ids), rest = refs[0], *_masks(refs, masked)
    out, lse, grad, qkv_grad, sums, turned = rest
    tokens, dim = out.shape[1:]
    head_dim = dim // num_heads
    tiles = _queries(tokens)

    def heads(group, start, count):
        width = count * head_dim
        keys = [qkv[image, :, lanes].T for lanes in _tiles(dim + start, width)]
        keys = jnp.concatenate(keys)  # [group's lanes, tokens]
        deltas = _deltas(out[image, :, _at(start, slice(0, width))], grad, image, start, count)
        sides = {}  # tile -> gradients of keys and values of the heads in it so far

        def products(unit):
            head, rows = unit
            lanes = _lanes(head, head_dim, width)
            key = _only(qkv[image, :, _at(dim + start, lanes)], lanes, head, head_dim)
            value = _only(qkv[image, :, _at(2 * dim + start, lanes)], lanes, head, head_dim)
            scores = _scores(key, qkv[image, rows, _at(start, lanes)], head_dim)
            return scores, _dot(value, grad[image, rows, _at(start, lanes)], ROWS_BY_ROWS)

        def differentiate(unit, ready):
            (head, rows), (scores, weights_grad) = unit, ready
            lanes = _lanes(head, head_dim, width)
            if masked:
                scores = _mask(scores, query_ids[image, :, rows], key_ids[image])
            weights = jnp.exp2(scores - lse[image, pl.ds(group * count + head, 1), rows])
            scores_grad = weights * (weights_grad - deltas[head : head + 1, rows])
            weights, scores_grad = (x.astype(qkv.dtype) for x in (weights, scores_grad))
            query = _only(qkv[image, rows, _at(start, lanes)], lanes, head, head_dim)
            upstream = _only(grad[image, rows, _at(start, lanes)], lanes, head, head_dim)
            key_grad, value_grad = _dot(scores_grad, query), _dot(weights, upstream)
            key = keys[head * head_dim : (head + 1) * head_dim]
            query_grad = _dot(key, scores_grad) * head_dim**-0.5
            turned[head * head_dim : (head + 1) * head_dim, rows] = query_grad
            for tile in _tiles(lanes.start, lanes.stop - lanes.start):
                inside = slice(tile.start - lanes.start, tile.stop - lanes.start)
                before = sides.get(tile.start, (0.0, 0.0))
                parts = key_grad[:, inside], value_grad[:, inside]
                sides[tile.start] = tuple(map(jnp.add, before, parts))
                last = rows.stop == tokens and (head + 1) * head_dim >= tile.stop
                if last:
                    key_side, value_side = sides.pop(tile.start)
                    store(dim + start, tile, key_side * head_dim**-0.5)
                    store(2 * dim + start, tile, value_side)

        def store(base, tile, x):
            qkv_grad[image, :, _at(base, tile)] = x.astype(qkv_grad.dtype)
            at = _at(base, tile)
            before = jnp.where(image == 0, 0.0, sums[0, :, at])
            sums[0, :, at] = before + x.sum(axis=0, keepdims=True)

        units = [(head, rows) for head in range(count) for rows in tiles]
        _pipeline(units, products, differentiate, ahead=1)
        for tile in _tiles(0, width):
            store(start, tile, turned[tile].T)

    _loop_groups(heads, tokens, dim, num_heads)


def _deltas(out, grad, image, start, count):
    """[heads, tokens]: of each query the sum of output × gradient, heads by a product."""
    width = out.shape[1]
    rows = -(-count // 8) * 8
    shape = (rows, width)
    first = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * (width // count)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    inside = (lane >= first) & (lane < first + width // count)
    product = out.astype(jnp.float32) * grad[image, :, _at(start, slice(0, width))]
    if grad.dtype == jnp.float32:
        return _dot(jnp.where(inside, 1.0, 0.0), product, ROWS_BY_ROWS)
    ones = jnp.where(inside, 1.0, 0.0).astype(grad.dtype)
    high = product.astype(grad.dtype)  # two bfloat16 numbers hold 16 bits of it
    low = (product - high).astype(grad.dtype)
    return _dot(ones, high, ROWS_BY_ROWS) + _dot(ones, low, ROWS_BY_ROWS)


def _pipeline(units, prepare, finish, *, ahead):
    """finish(unit, prepare(unit)) for each, with `ahead` units prepared before they are needed."""
    ready = [prepare(unit) for unit in units[:ahead]]
    for index, unit in enumerate(units):
        if index + ahead < len(units):
            ready.append(prepare(units[index + ahead]))
        finish(unit, ready.pop(0))


def _loop_groups(body, tokens, dim, num_heads):
    """body(group, its first lane, its number of heads) for all groups of heads."""
    count = heads_a_group(tokens, dim, num_heads)
    width = count * dim // num_heads
    if count == num_heads:
        body(0, 0, count)
        return

    def step(group, carry):
        body(group, pl.multiple_of(group * width, LANES), count)
        return carry

    jax.lax.fori_loop(0, num_heads // count, step, None)


def _masks(refs, masked):
    return (refs[1:3], refs[3:]) if masked else ((None, None), refs[1:])


def _queries(tokens):
    """Slices of the queries, as even as whole tiles allow."""
    parts = -(-tokens // MAX_QUERIES)
    size = -(-tokens // (parts * LANES)) * LANES
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)]


def _tiles(start, width):
    """Slices of up to LANES lanes; `start` may be traced."""
    ends = [(at, min(at + LANES, width)) for at in range(0, width, LANES)]
    return [_at(start, slice(*end)) for end in ends]


def _at(start, lanes):
    if isinstance(start, int):
        return slice(start + lanes.start, start + lanes.stop)
    return pl.ds(start + lanes.start, lanes.stop - lanes.start)


def _lanes(head, head_dim, width):
    """The whole tiles that hold a head, in lanes of its group."""
    first = head * head_dim // LANES * LANES
    return slice(first, min(-(-(head + 1) * head_dim // LANES) * LANES, width))


def _only(x, lanes, head, head_dim):
    """x [rows, lanes], zero outside of the head."""
    if lanes.stop - lanes.start == head_dim:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1) + lanes.start
    inside = (lane >= head * head_dim) & (lane < (head + 1) * head_dim)
    return jnp.where(inside, x, jnp.zeros((), x.dtype))


def _scores(key, query, head_dim):
    """[keys, queries] float32, in units of log 2."""
    return _dot(key, query, ROWS_BY_ROWS) * (head_dim**-0.5 * LOG2E)


def _mask(scores, query_ids, key_ids):
    return jnp.where(query_ids == key_ids, scores, MASKED)


def _dot(a, b, dimensions=ROWS_BY_COLUMNS):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
