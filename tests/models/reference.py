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
    """A module's parameters by name, in float64; those of scanned blocks by their number."""

    def __init__(self, module):
        for name, leaf in named_leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param))).items():
            leaf = np.asarray(leaf, np.float64)
            if not getattr(module, "scan", False) or not name.startswith("blocks/"):
                self[name] = leaf
                continue
            for i, part in enumerate(leaf):
                self[name.replace("blocks/", f"blocks/{i}/", 1)] = part

    def linear(self, name, x):
        return x @ self[f"{name}/kernel"] + self.get(f"{name}/bias", 0.0)

    def norm(self, name, x, eps=1e-6):
        """LayerNorm (Ba et al. 2016), or RMSNorm (Zhang & Sennrich 2019) if it has no bias."""
        if f"{name}/bias" not in self:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * self[f"{name}/scale"]
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + eps) * self[f"{name}/scale"] + self[f"{name}/bias"]

    def mlp(self, name, x, activation="gelu_tanh"):
        activate = gelu if activation == "gelu_tanh" else exact_gelu
        return self.linear(f"{name}/fc2", activate(self.linear(f"{name}/fc1", x)))

    def swiglu(self, name, x):
        """Shazeer 2020, eq. 6: (SiLU(x W) * x V) W2, with W and V side by side."""
        kernel, bias = self[f"{name}/fc1/kernel"], self[f"{name}/fc1/bias"]
        hidden = len(bias) // 2
        gate = x @ kernel[:, :hidden] + bias[:hidden]
        value = x @ kernel[:, hidden:] + bias[hidden:]
        return self.linear(f"{name}/fc2", gate / (1 + np.exp(-gate)) * value)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x):
    """x times the normal distribution's integral up to x (Hendrycks & Gimpel 2016, eq. 1)."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


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


def rope2d(rows, columns, head_dim):
    """Angles [rows * columns, head_dim / 2] as DINOv3 describes them: height's, then width's."""
    quarter = head_dim // 4
    angles = np.zeros((rows * columns, 2 * quarter))
    for row in range(rows):
        for column in range(columns):
            y, x = -1 + (row + 0.5) * 2 / rows, -1 + (column + 0.5) * 2 / columns
            for i in range(quarter):
                period = 100.0 ** (i / quarter)
                angles[row * columns + column, i] = 2 * np.pi * y / period
                angles[row * columns + column, quarter + i] = 2 * np.pi * x / period
    return angles


def rotated(x, angles):
    """Channels i and i + half of [batch, tokens, head_dim] as a complex number, turned."""
    first, second = np.split(x, 2, axis=-1)
    turned = (first + 1j * second) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def self_attention(w, name, x, model, angles):
    """Projection, the norm and the turning of each head's queries and keys, attention."""
    query, key, value = np.split(w.linear(f"{name}/qkv", x), 3, axis=-1)

    def prepared(x, norm):
        heads = np.split(x, model.num_heads, axis=-1)
        if f"{name}/{norm}/scale" in w:
            heads = [w.norm(f"{name}/{norm}", head, model.norm_eps) for head in heads]
        if angles is not None:
            heads = [rotated(head, angles) for head in heads]
        return np.concatenate(heads, axis=-1)

    query, key = prepared(query, "q_norm"), prepared(key, "k_norm")
    return w.linear(f"{name}/proj", attention(query, key, value, model.num_heads))


def block(w, name, x, model, angles=None):
    """One block: attention, then the MLP, or both at once if there is one norm only."""

    def mlp(x):
        if model.mlp_kind == "swiglu":
            return w.swiglu(f"{name}/mlp", x)
        return w.mlp(f"{name}/mlp", x, model.activation)

    ls1, ls2 = (w.get(f"{name}/{scale}/gamma", 1.0) for scale in ("ls1", "ls2"))
    normed = w.norm(f"{name}/norm1", x, model.norm_eps)
    attended = ls1 * self_attention(w, f"{name}/attn", normed, model, angles)
    if f"{name}/norm2/scale" not in w:
        return x + attended + ls2 * mlp(normed)
    x = x + attended
    return x + ls2 * mlp(w.norm(f"{name}/norm2", x, model.norm_eps))


def patches(w, model, images):
    """[batch, height, width, 3] -> [batch, patches, dim]."""
    (height, width), (rows, columns) = model.patch_size, model.grid
    pixels = [
        images[:, r * height : (r + 1) * height, c * width : (c + 1) * width].reshape(
            len(images), -1
        )
        for r in range(rows)
        for c in range(columns)
    ]
    kernel = w["patch_embed/kernel"].reshape(height * width * 3, -1)
    return np.stack(pixels, axis=1) @ kernel + w["patch_embed/bias"]


def outputs(model, images, kept=None):
    """Each block's output, [batch, tokens, dim]; kept: [batch, kept] patches, all by default."""
    w = Weights(model)
    x = patches(w, model, images)
    batch, count, dim = x.shape
    special = [w[name] for name in ("cls_token", "dist_token") if name in w]
    positions = np.zeros((len(special) + count, dim))
    if "pos_embed" in w:
        positions = w["pos_embed"]
    elif model.pos_kind == "sincos2d":
        positions[len(special) :] = sincos2d(*model.grid, dim)
    x = x + positions[len(special) :]
    angles = None
    if model.pos_kind == "rope2d":
        angles = np.tile(rope2d(*model.grid, dim // model.num_heads), (batch, 1, 1))
    if kept is not None:
        x = np.take_along_axis(x, kept[..., None], axis=1)
        angles = None if angles is None else np.take_along_axis(angles, kept[..., None], axis=1)
    front = [token + row for token, row in zip(special, positions, strict=False)]
    front += [w["reg_tokens"]] if "reg_tokens" in w else []
    if front:
        front = np.concatenate(front)
        x = np.concatenate([np.broadcast_to(front, (batch, *front.shape)), x], axis=1)
        if angles is not None:  # only patches turn
            angles = np.pad(angles, ((0, 0), (len(front), 0), (0, 0)))
    found = []
    for i in range(model.depth):
        x = block(w, f"blocks/{i}", x, model, angles)
        found.append(x)
    return found


def encoder(model, images, kept=None):
    """[batch, height, width, 3] -> [batch, tokens, dim]."""
    w, x = Weights(model), outputs(model, images, kept)[-1]
    return w.norm("norm", x, model.norm_eps) if "norm/scale" in w else x


def pooled(name, pool, tokens, backbone):
    """[batch, tokens, dim] -> [batch, features]."""
    if name == "cls":
        return tokens[:, 0]
    if name == "cls_dist":
        return np.concatenate([tokens[:, 0], tokens[:, 1]], axis=-1)
    w, eps = Weights(pool), backbone.norm_eps
    if name.startswith("gap"):
        mean = tokens[:, backbone.num_prefix_tokens :].mean(1)
        return w.norm("norm", mean, eps) if name == "gap_norm" else mean
    query = w.linear("query", np.broadcast_to(w["probe"], (len(tokens), *w["probe"].shape)))
    key, value = w.linear("key", tokens), w.linear("value", tokens)
    x = w.linear("proj", attention(query, key, value, pool.num_heads))[:, 0]
    return x + w.mlp("mlp", w.norm("norm", x, eps), backbone.activation)


def logits(head, x):
    """[batch, features] -> [batch, num_classes]."""
    w = Weights(head)
    if "fc_dist/kernel" in w:
        cls, dist = np.split(x, 2, axis=-1)
        return (w.linear("fc", cls) + w.linear("fc_dist", dist)) / 2
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
    """Two for each multiply-add of every matrix product and (without padding) convolution."""
    total = 0
    for eqn, times in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            terms = math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        else:
            continue
        total += 2 * times * terms * math.prod(eqn.outvars[0].aval.shape)
    return total
