"""The Vision Transformer in NumPy and float64, written from the papers, and counts of FLOPs."""

import math

import jax
import jax.extend.core
import numpy as np
from flax import nnx

from vit_jax.tree import map_named, named_leaves


def initialised(make):
    """make() under jit: one program, which the compilation cache holds."""
    graphdef = nnx.graphdef(nnx.eval_shape(make))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))())


def made(make, seed=0):
    """What make() describes with weights drawn by NumPy, none zero or one; compiles nothing."""
    graphdef, params = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        noise = rng.standard_normal(leaf.shape)
        if name.endswith("kernel"):
            inputs = leaf.shape[-2] if len(leaf.shape) < 4 else math.prod(leaf.shape[:-1])
            return (noise / inputs**0.5).astype(np.float32)
        return (name.endswith(("scale", "gamma")) + 0.3 * noise).astype(np.float32)

    return nnx.merge(graphdef, map_named(draw, nnx.to_pure_dict(params)))


class Weights(dict):
    """A module's parameters by name, in float64."""

    def __init__(self, module):
        leaves = named_leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
        super().__init__({name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()})

    def linear(self, name, x):
        return x @ self[f"{name}/kernel"] + self[f"{name}/bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-6) * self[f"{name}/scale"] + self[f"{name}/bias"]

    def mlp(self, name, x):
        return self.linear(f"{name}/fc2", gelu(self.linear(f"{name}/fc1", x)))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attention(query, key, value, num_heads, mask=None):
    """Head by head; mask: [batch, queries, keys], False where nobody may look."""
    outputs = []
    heads = [np.split(x, num_heads, axis=-1) for x in (query, key, value)]
    for q, k, v in zip(*heads, strict=True):
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        if mask is not None:
            scores = np.where(mask, scores, -1e30)
        outputs.append(softmax(scores) @ v)
    return np.concatenate(outputs, axis=-1)


def sincos2d(rows, columns, dim):
    table = np.zeros((rows * columns, dim))
    for row in range(rows):
        for column in range(columns):
            for i in range(dim // 4):
                omega = 10_000.0 ** (-i / (dim // 4 - 1))
                x, y = column * omega, row * omega
                values = np.sin(x), np.cos(x), np.sin(y), np.cos(y)
                table[row * columns + column, i :: dim // 4] = values
    return table


def encoder(model, images):
    """[batch, height, width, 3] -> [batch, tokens, dim]."""
    w = Weights(model)
    (height, width), (rows, columns) = model.patch_size, model.grid
    patches = [
        images[:, r * height : (r + 1) * height, c * width : (c + 1) * width].reshape(
            len(images), -1
        )
        for r in range(rows)
        for c in range(columns)
    ]
    kernel = w["patch_embed/kernel"].reshape(height * width * 3, -1)
    x = np.stack(patches, axis=1) @ kernel + w["patch_embed/bias"]
    if "pos_embed" in w:
        positions = w["pos_embed"]
    else:
        positions = sincos2d(rows, columns, x.shape[-1])
        positions = np.concatenate([np.zeros((model.num_prefix_tokens, x.shape[-1])), positions])
    if "cls_token" in w:
        cls = np.broadcast_to(w["cls_token"], (len(x), 1, x.shape[-1]))
        x = np.concatenate([cls, x], axis=1)
    x = x + positions
    for i in range(model.depth):
        name = f"blocks/{i}"
        query, key, value = np.split(
            w.linear(f"{name}/attn/qkv", w.norm(f"{name}/norm1", x)), 3, -1
        )
        branch = w.linear(f"{name}/attn/proj", attention(query, key, value, model.num_heads))
        x = x + branch * w.get(f"{name}/ls1/gamma", 1.0)
        branch = w.mlp(f"{name}/mlp", w.norm(f"{name}/norm2", x))
        x = x + branch * w.get(f"{name}/ls2/gamma", 1.0)
    return w.norm("norm", x)


def pooled(name, pool, tokens, num_prefix_tokens):
    """[batch, tokens, dim] -> [batch, dim]."""
    if name == "cls":
        return tokens[:, 0]
    if name == "gap":
        return tokens[:, num_prefix_tokens:].mean(1)
    w = Weights(pool)
    query = w.linear("query", np.broadcast_to(w["probe"], (len(tokens), *w["probe"].shape)))
    key, value = w.linear("key", tokens), w.linear("value", tokens)
    x = w.linear("proj", attention(query, key, value, pool.num_heads))[:, 0]
    return x + w.mlp("mlp", w.norm("norm", x))


def logits(head, x):
    """[batch, dim] -> [batch, num_classes]."""
    w = Weights(head)
    if "pre_logits/kernel" in w:
        x = np.tanh(w.linear("pre_logits", x))
    return w.linear("fc", x)


def equations(jaxpr):
    """All equations of a jaxpr with how often each runs, those inside of others too."""
    for eqn in jaxpr.eqns:
        yield eqn, 1
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from ((each, times * count) for each, count in equations(inner))


def dot_flops(jaxpr):
    """Two for each multiply-add of every matrix product."""
    total = 0
    for eqn, times in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * times * terms * math.prod(eqn.outvars[0].aval.shape)
    return total
