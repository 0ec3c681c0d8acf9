"""Schedules, masks and optimisers: optax, named."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.tree import STACKED, layer_names, map_named, named_leaves

# Weights of matrix products decay; biases, norms, scales, tokens and positions do not.
DECAYED = ("kernel",)


def cosine(peak: float, num_steps: int, end: float, cooldown_steps: int) -> optax.Schedule:
    """Half a cosine from `peak` to `end` (Loshchilov & Hutter 2017, eq. 5, one period)."""
    return optax.cosine_decay_schedule(peak, max(num_steps, 1), end / peak if peak else 0.0)


def linear(peak: float, num_steps: int, end: float, cooldown_steps: int) -> optax.Schedule:
    """A straight line from `peak` to `end`."""
    return optax.linear_schedule(peak, end, max(num_steps, 1))


def constant(peak: float, num_steps: int, end: float, cooldown_steps: int) -> optax.Schedule:
    """`peak` for ever."""
    return optax.constant_schedule(peak)


def rsqrt(peak: float, num_steps: int, end: float, cooldown_steps: int) -> optax.Schedule:
    """peak / √(1 + t / timescale), then a line to `end` in the last `cooldown_steps`.

    Zhai et al. 2022, section 3.5 (timescale 10,000 steps).
    """
    timescale = 10_000

    def decay(count):
        return peak * (1 + count / timescale) ** -0.5

    start = max(num_steps - cooldown_steps, 0)
    if not cooldown_steps:
        return decay
    cooldown = optax.linear_schedule(decay(start), end, cooldown_steps)
    return optax.join_schedules([decay, cooldown], [start])


SCHEDULES: dict[str, Callable[[float, int, float, int], optax.Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "rsqrt": rsqrt,
}


def make_schedule(
    *,
    name: str,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    end_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Linear warmup from 0 to `learning_rate`, then the schedule called `name`.

    Args:
      name: one of SCHEDULES.
      learning_rate: the peak.
      total_steps: of the run, warmup and cooldown included.
      warmup_steps, cooldown_steps: how many of them; only 'rsqrt' has a cooldown.
      end_learning_rate: at the last step ('constant' ignores it).

    Raises:
      ValueError: an unknown name, or steps that do not fit.
    """
    _check_choice("schedule", name, SCHEDULES)
    if cooldown_steps and name != "rsqrt":
        raise ValueError(f"cooldown_steps={cooldown_steps} needs schedule='rsqrt', not {name!r}.")
    if (
        not 0 <= warmup_steps + cooldown_steps <= total_steps
        or min(warmup_steps, cooldown_steps) < 0
    ):
        raise ValueError(
            f"warmup_steps={warmup_steps} and cooldown_steps={cooldown_steps} must fit into "
            f"total_steps={total_steps}; shorten them."
        )
    after = total_steps - warmup_steps
    schedule = SCHEDULES[name](learning_rate, after, end_learning_rate, cooldown_steps)
    if not warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, schedule], [warmup_steps])


def decay_mask(params: Any) -> Any:
    """The same tree with a bool for each parameter: whether weight decay applies to it."""
    return map_named(lambda name, _: name.rsplit("/", 1)[-1] in DECAYED, params)


def trained_names(params: Any, pattern: str) -> frozenset[str]:
    """The names of those parameters that the regex `pattern` takes; all for ''.

    Raises:
      ValueError: it takes none, or some of the layers that a scan has in one array.
    """
    leaves = named_leaves(params)
    if not pattern:
        return frozenset(leaves)
    taken = set()
    for name, leaf in leaves.items():
        layers = layer_names(name, leaf)
        matches = [layer for layer in layers if re.fullmatch(pattern, layer)]
        if matches and matches != layers:
            raise ValueError(
                f"train.trainable={pattern!r} takes {len(matches)} of the {len(layers)} layers of "
                f"{name}, which model.scan=True keeps in one array; use model.scan=False."
            )
        taken |= {name} if matches else set()
    if not taken:
        known = [layer for name, leaf in leaves.items() for layer in layer_names(name, leaf)]
        raise ValueError(
            f"train.trainable={pattern!r} matches none of the {len(known)} parameters, which are "
            f"called like {known[0]!r}, {known[-1]!r}; '' trains all."
        )
    return frozenset(taken)


def names_filter(module: str, names: frozenset[str]) -> Callable[[tuple, Any], bool]:
    """An NNX filter of the module's variables whose full name is among `names`."""
    return lambda path, _: "/".join(map(str, (module, *path))) in names


EMBEDDING = re.compile(r"backbone/(patch_embed|cls_token|dist_token|reg_tokens|pos_embed)\b")
BLOCK = re.compile(r"backbone/blocks/(\d+/)?")  # without a number: all of them, stacked by a scan


def layer_scale_of(name: str, leaf: jax.Array, *, decay: float, depth: int) -> jax.Array:
    """decay^(depth + 1 - l), l the layer of a parameter; what it is multiplied with.

    Embeddings are layer 0, block i is layer i + 1, norm, pooling and heads are layer depth + 1
    (Bao et al. 2022, BEiT, appendix H; He et al. 2022, MAE, appendix A.1). Stacked blocks have a
    leading axis of layers: then the answer has it, too.
    """
    if EMBEDDING.match(name):
        layer = jnp.array(0.0)
    elif not (match := BLOCK.match(name)):
        layer = jnp.array(depth + 1.0)
    elif match[1]:
        layer = jnp.array(float(match[1][:-1]) + 1)
    else:
        layer = jnp.arange(1.0, depth + 1).reshape(depth, *[1] * (leaf.ndim - 1))
    return (decay ** (depth + 1 - layer)).astype(leaf.dtype)


def scale_by_layer(decay: float, depth: int) -> optax.GradientTransformation:
    """Smaller updates, weight decay included, the further a layer is from the output."""

    def scale(updates, params=None):
        return map_named(
            lambda name, x: x * layer_scale_of(name, x, decay=decay, depth=depth), updates
        )

    return optax.stateless(scale)


def per_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform` of each array alone, and of each layer that a scan has stacked in one alone.

    For what looks at a whole tensor, such as its norm. The state of each array stands under the
    array's name.
    """

    def each(function, name):
        return jax.vmap(function) if STACKED.match(name) else function

    def init(params):
        return map_named(lambda name, x: each(transform.init, name)(x), params)

    def update(updates, state, params=None):
        named, tree = named_leaves(updates), jax.tree.structure(updates)
        rows = zip(named.items(), *map(tree.flatten_up_to, (state, params)), strict=True)
        results = [each(transform.update, name)(x, s, p) for (name, x), s, p in rows]
        return tuple(tree.unflatten(result) for result in zip(*results, strict=True))

    return optax.GradientTransformation(init, update)


def decayed(schedule, weight_decay) -> tuple[optax.GradientTransformation, ...]:
    """How all optimisers end: decoupled weight decay, then the learning rate."""
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    return decay, optax.scale_by_learning_rate(schedule)


def adamw(schedule, *, b1, b2, eps, weight_decay, mu_dtype) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019): the decay is `weight_decay` × learning rate a step."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)
    return optax.chain(adam, *decayed(schedule, weight_decay))


def sgd(schedule, *, b1, b2, eps, weight_decay, mu_dtype) -> optax.GradientTransformation:
    """Gradient descent with momentum `b1`."""
    momentum = optax.trace(decay=b1, accumulator_dtype=mu_dtype)
    return optax.chain(momentum, *decayed(schedule, weight_decay))


def lion(schedule, *, b1, b2, eps, weight_decay, mu_dtype) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, algorithm 2): the sign of two momenta."""
    sign = optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype)
    return optax.chain(sign, *decayed(schedule, weight_decay))


def lamb(schedule, *, b1, b2, eps, weight_decay, mu_dtype) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, algorithm 2): Adam's update, as long as its layer's weights are."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)
    decay, rate = decayed(schedule, weight_decay)
    return optax.chain(adam, decay, per_layer(optax.scale_by_trust_ratio()), rate)


def adafactor(schedule, *, b1, b2, eps, weight_decay, mu_dtype) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018) with momentum `b1`, as Zhai et al. 2022, section 3.4.

    The second moment of a matrix whose sides are at least 128 is kept as two vectors, decays by
    1 - t^-0.8, and updates are clipped to a root mean square of 1.
    """
    factored = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    momentum = optax.ema(b1, debias=False, accumulator_dtype=mu_dtype)
    return optax.chain(per_layer(factored), momentum, *decayed(schedule, weight_decay))


# What Muon takes: the matrices inside, not the first and the last layer's own.
HIDDEN = re.compile(r"/blocks/.*/kernel$|/patch_embed/kernel$")


def muon(schedule, *, b1, b2, eps, weight_decay, mu_dtype) -> optax.GradientTransformation:
    """Muon (Jordan 2024) with momentum `b1` for the blocks' and the patches' kernels, else AdamW.

    Queries, keys and values are three matrices; a patch's pixels are one side of theirs. Updates
    are scaled to AdamW's root mean square (Liu et al. 2025, section 2.2).
    """

    def labels(params):
        return map_named(lambda name, _: "muon" if HIDDEN.search(name) else "adamw", params)

    def sides(params):
        return map_named(lambda name, x: optax.contrib.MuonDimensionNumbers(*_sides(name)), params)

    def like_adamw(updates, params=None):
        def scale(name, x):
            rows = math.prod(x.shape[axis] for axis in _sides(name)[0])
            return 0.2 * max(rows, x.shape[-1]) ** 0.5 * x

        return map_named(scale, updates)

    options = {"beta": b1, "eps": eps, "mu_dtype": mu_dtype}
    orthogonal = optax.contrib.scale_by_muon(**options, weight_dimension_numbers=sides)
    orthogonal = optax.chain(orthogonal, optax.stateless(like_adamw))
    matrices = optax.chain(qkv_apart(orthogonal), *decayed(schedule, weight_decay))
    options = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay, "mu_dtype": mu_dtype}
    return optax.partition({"muon": matrices, "adamw": adamw(schedule, **options)}, labels)


def _sides(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which axes are the rows and the columns of a kernel; the others are a batch of matrices."""
    if name.endswith("/patch_embed/kernel"):
        return (-4, -3, -2), (-1,)
    return ((-3,) if name.endswith("/qkv/kernel") else (-2,)), (-1,)


def qkv_apart(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform` with fused projections [dim, 3 · dim] as [dim, 3, dim]."""

    def apart(name, x):
        return x.reshape(*x.shape[:-1], 3, -1) if name.endswith("/qkv/kernel") else x

    def init(params):
        return transform.init(map_named(apart, params))

    def update(updates, state, params=None):
        new, state = transform.update(map_named(apart, updates), state, map_named(apart, params))
        return jax.tree.map(lambda x, old: x.reshape(old.shape), new, updates), state

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {
    "adamw": adamw,
    "sgd": sgd,
    "lion": lion,
    "lamb": lamb,
    "adafactor": adafactor,
    "muon": muon,
}
MOMENT_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def make_optimizer(
    *,
    name: str = "adamw",
    schedule: str = "cosine",
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    end_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: str = "float32",
    clip_norm: float = 0.0,
    layer_decay: float = 1.0,
    depth: int = 0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser and its learning-rate schedule.

    Args:
      name: one of OPTIMIZERS.
      schedule, learning_rate, total_steps, warmup_steps, cooldown_steps, end_learning_rate: see
        `make_schedule`.
      weight_decay: decoupled, times the learning rate, on kernels only.
      b1, b2, eps: of Adam; the others say what they make of them.
      mu_dtype: of the first moment, 'float32' or 'bfloat16', which saves a sixth of the state.
      clip_norm: the global norm that gradients are scaled down to; 0.0 for no clipping.
      layer_decay: the learning rate of each layer over that of the next one, see
        `layer_scale_of`; 1.0 makes them the same.
      depth: of the backbone, in blocks; for `layer_decay`.

    Raises:
      ValueError: an unknown name or a value out of range.
    """
    _check_choice("optimizer", name, OPTIMIZERS)
    _check_choice("mu_dtype", mu_dtype, MOMENT_DTYPES)
    if learning_rate < 0 or weight_decay < 0 or clip_norm < 0:
        raise ValueError(
            f"learning_rate={learning_rate}, weight_decay={weight_decay} and clip_norm={clip_norm} "
            "must not be negative."
        )
    if eps <= 0:
        raise ValueError(f"eps={eps} must be positive: it keeps a zero gradient from 0 / 0.")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} must be over 0 and at most 1.0, for none.")
    learning_rates = make_schedule(
        name=schedule,
        learning_rate=learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        cooldown_steps=cooldown_steps,
        end_learning_rate=end_learning_rate,
    )
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    options = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    parts.append(OPTIMIZERS[name](learning_rates, **options, mu_dtype=MOMENT_DTYPES[mu_dtype]))
    parts += [scale_by_layer(layer_decay, depth)] if layer_decay < 1 else []
    return optax.chain(*parts), learning_rates


def num_updates(opt_state: Any) -> jax.Array:
    """How many updates were made: where the schedule is read. Skipped steps do not count."""
    counts = [count for _, count in optax.tree.get_all_with_path(opt_state, "count")]
    return next(count for count in counts if not count.ndim)  # stacked layers count alike


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """decay · ema + (1 - decay) · params, leaf by leaf."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def _check_choice(kind: str, name: str, choices: dict) -> None:
    if name not in choices:
        raise ValueError(f"{kind}={name!r} is unknown; choose one of {', '.join(choices)}.")
