import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from vit_jax import optim
from vit_jax.checkpoint import unstack
from vit_jax.models.vit import make_vit
from vit_jax.objectives.supervised import Supervised
from vit_jax.optim import (
    OPTIMIZERS,
    SCHEDULES,
    decay_mask,
    make_optimizer,
    make_schedule,
    num_updates,
    update_ema,
)
from vit_jax.preprocess import Preprocess
from vit_jax.tree import named_leaves

PEAK, END, TOTAL, WARMUP, COOLDOWN = 0.3, 0.02, 1000, 100, 200


def cosine(step):
    return END + (PEAK - END) * (1 + math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP))) / 2


def linear(step):
    return PEAK + (END - PEAK) * (step - WARMUP) / (TOTAL - WARMUP)


def constant(step):
    return PEAK


def rsqrt(step):
    start = TOTAL - COOLDOWN
    value = PEAK / math.sqrt(1 + (min(step, start) - WARMUP) / 10_000)
    return value if step <= start else value + (END - value) * (step - start) / COOLDOWN


FORMULAS = {"cosine": cosine, "linear": linear, "constant": constant, "rsqrt": rsqrt}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_their_formulas(name):
    cooldown = COOLDOWN if name == "rsqrt" else 0
    schedule = make_schedule(
        name=name,
        learning_rate=PEAK,
        total_steps=TOTAL,
        warmup_steps=WARMUP,
        cooldown_steps=cooldown,
        end_learning_rate=END,
    )
    steps = np.array([0, 1, 50, 99, 100, 101, 400, 799, 800, 801, 950, 999, 1000])
    wanted = [PEAK * s / WARMUP if s < WARMUP else FORMULAS[name](s) for s in steps]
    np.testing.assert_allclose(jax.vmap(schedule)(steps), wanted, rtol=1e-4)
    assert float(schedule(TOTAL)) == pytest.approx(PEAK if name == "constant" else END, rel=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak(name):
    schedule = make_schedule(name=name, learning_rate=PEAK, total_steps=TOTAL)
    assert float(schedule(0)) == pytest.approx(PEAK)


def test_rsqrt_without_cooldown_falls_by_half_where_it_should():
    schedule = make_schedule(name="rsqrt", learning_rate=PEAK, total_steps=100_000)
    assert float(schedule(30_000)) == pytest.approx(PEAK / 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "cosin"}, "schedule='cosin' is unknown; choose one of cosine, linear"),
        ({"warmup_steps": 11}, "warmup_steps=11 .* must fit into total_steps=10"),
        ({"name": "rsqrt", "warmup_steps": 6, "cooldown_steps": 5}, "must fit into total_steps=10"),
        ({"warmup_steps": -1}, "must fit"),
        ({"name": "rsqrt", "warmup_steps": 5, "cooldown_steps": -1}, "must fit"),
        ({"cooldown_steps": 2}, "cooldown_steps=2 needs schedule='rsqrt', not 'cosine'"),
    ],
)
def test_steps_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_schedule(**{"name": "cosine", "learning_rate": 1.0, "total_steps": 10} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": 10},
        {"name": "rsqrt", "warmup_steps": 4, "cooldown_steps": 6},
        {"name": "rsqrt", "cooldown_steps": 10},
        {"total_steps": 1},
    ],
)
def test_steps_that_just_fit_are_fine(options):
    options = {"name": "cosine", "learning_rate": 1.0, "total_steps": 10} | options
    assert np.isfinite(jax.vmap(make_schedule(**options))(np.arange(11))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "adam"}, "optimizer='adam' is unknown; choose one of adamw, sgd"),
        ({"mu_dtype": "float16"}, "mu_dtype='float16' is unknown; choose one of float32, bf"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0.*must not be negative"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0.*must not be negative"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0.*must not be negative"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"layer_decay": 0.0}, "layer_decay=0.0 must be over 0 and at most 1.0"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 must be over 0 and at most 1.0"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_optimizer(**{"learning_rate": 1.0, "total_steps": 10} | options)


@pytest.mark.parametrize("scan", [False, True])
def test_kernels_decay_and_nothing_else(scan):
    def params():
        rngs = nnx.Rngs(0)
        shape = {"image_size": 4, "dim": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12}
        vit = make_vit(
            variant="Ti/2", **shape, cls_token=True, layer_scale=0.1, scan=scan, rngs=rngs
        )
        options = {"num_classes": 3, "preprocess": Preprocess(), "pool": "map", "hidden_dim": 5}
        objective = Supervised(backbone=vit, **options, rngs=rngs)
        modules = {"backbone": vit, "objective": objective}
        return {name: nnx.to_pure_dict(nnx.state(module)) for name, module in modules.items()}

    decays = named_leaves(decay_mask(jax.eval_shape(params)))
    layers = ["blocks"] if scan else ["blocks/0", "blocks/1"]
    linears = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    assert {name for name, decay in decays.items() if decay} == {
        "backbone/patch_embed/kernel",
        *(f"backbone/{layer}/{linear}/kernel" for layer in layers for linear in linears),
        *(f"objective/pool/{name}/kernel" for name in ("query", "key", "value", "proj")),
        *("objective/pool/mlp/fc1/kernel", "objective/pool/mlp/fc2/kernel"),
        *("objective/head/pre_logits/kernel", "objective/head/fc/kernel"),
    }
    spared = {name.rsplit("/", 1)[-1] for name, decay in decays.items() if not decay}
    assert spared == {"bias", "scale", "gamma", "cls_token", "pos_embed", "probe"}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_in_float64(clip_norm):
    b1, b2, eps, weight_decay = 0.8, 0.95, 1e-6, 0.3
    optimizer, schedule = make_optimizer(
        schedule="linear",
        learning_rate=0.1,
        total_steps=10,
        warmup_steps=2,
        weight_decay=weight_decay,
        b1=b1,
        b2=b2,
        eps=eps,
        clip_norm=clip_norm,
    )
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((3, 2)), "bias": rng.standard_normal(2)}
    grads = [
        {"kernel": scale * rng.standard_normal((3, 2)), "bias": scale * rng.standard_normal(2)}
        for scale in (5.0, 0.1, 1.0, 3.0, 0.01)  # some above the norm of clipping, some below
    ]
    x = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state, update = optimizer.init(x), jax.jit(optimizer.update)
    mean = jax.tree.map(np.zeros_like, params)
    square = jax.tree.map(np.zeros_like, params)
    for step, grad in enumerate(grads):
        updates, state = update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grad), state, x)
        x = jax.tree.map(jnp.add, x, updates)
        norm = math.sqrt(sum((g**2).sum() for g in grad.values()))
        shrink = min(1.0, clip_norm / norm) if clip_norm else 1.0
        rate = float(schedule(step))
        for name in params:
            g = shrink * grad[name]
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            unbiased = mean[name] / (1 - b1 ** (step + 1))
            root = np.sqrt(square[name] / (1 - b2 ** (step + 1)))
            decay = weight_decay * params[name] if name == "kernel" else 0.0
            params[name] = params[name] - rate * (unbiased / (root + eps) + decay)
            np.testing.assert_allclose(x[name], params[name], rtol=2e-5, atol=1e-6)


def test_ema_is_the_weighted_mean_of_all_that_was():
    decay, values = 0.9, [1.0, 5.0, -2.0, 3.0]
    ema = {"x": jnp.float32(values[0])}
    for value in values[1:]:
        ema = update_ema(ema, {"x": jnp.float32(value)}, decay)
    weights = [0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    assert float(ema["x"]) == pytest.approx(np.dot(weights, values))


def model_params(scan: bool) -> dict:
    """Parameters of three blocks and all tokens, as a run names them; the same numbers."""
    shape = {"image_size": 4, "dim": 8, "depth": 3, "num_heads": 2, "mlp_dim": 12, "scan": scan}
    tokens = {"cls_token": True, "dist_token": True, "num_reg_tokens": 2}
    vit = make_vit(variant="Ti/2", **shape, **tokens, rngs=nnx.Rngs(0))
    options = {"num_classes": 3, "preprocess": Preprocess(), "pool": "map", "rngs": nnx.Rngs(1)}
    modules = {"backbone": vit, "objective": Supervised(backbone=vit, **options)}
    return {name: nnx.to_pure_dict(nnx.state(module)) for name, module in modules.items()}


def updates_of(params, **options):
    """By unstacked name, three steps' updates for gradients that depend on the name alone."""
    optimizer, _ = make_optimizer(learning_rate=0.1, total_steps=10, weight_decay=0.3, **options)

    def run(params):
        state = optimizer.init(params)
        for step in range(1, 4):
            grads = jax.tree.map(lambda x, step=step: jnp.sin(step * (x + 1)), params)
            updates, state = optimizer.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return updates

    return unstack(named_leaves(jax.jit(run)(params)))


def test_layers_further_from_the_output_learn_more_slowly():
    decay, params = 0.5, model_params(scan=False)
    step = {"learning_rate": 0.1, "total_steps": 10, "weight_decay": 0.3, "depth": 3}
    plain, scaled = (make_optimizer(**step, layer_decay=value)[0] for value in (1.0, decay))
    grads = jax.tree.map(jnp.ones_like, params)
    one = named_leaves(plain.update(grads, plain.init(params), params)[0])
    two = named_leaves(scaled.update(grads, scaled.init(params), params)[0])
    layers = {}
    for name in one:  # the decay of weights shrinks as well: the whole update does
        ratio = np.unique(np.round(np.asarray(two[name] / one[name]), 5))
        assert len(ratio) == 1, name
        layers[name] = 4 + np.log2(ratio[0])
    for name, layer in layers.items():
        parts = name.split("/")
        if parts[1] == "blocks":
            assert layer == int(parts[2]) + 1, name
        elif parts[1] in ("patch_embed", "cls_token", "dist_token", "reg_tokens", "pos_embed"):
            assert layer == 0, name
        else:  # the backbone's norm, pooling and head
            assert layer == 4, name
    assert set(layers.values()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_stacked_blocks_are_updated_like_looped_ones(layer_decay):
    options = {"layer_decay": layer_decay, "depth": 3}
    looped = updates_of(model_params(scan=False), **options)
    stacked = updates_of(model_params(scan=True), **options)
    assert looped.keys() == stacked.keys()
    for name in looped:
        np.testing.assert_allclose(looped[name], stacked[name], rtol=1e-5, atol=1e-8, err_msg=name)


def stacked_params(dim=128, depth=2):
    """Every kind of parameter, the blocks' of very different sizes from layer to layer."""
    rng = np.random.default_rng(0)
    size = 10.0 ** np.arange(depth)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)

    def layers(*shape):
        return draw(depth, *shape) * size.reshape(-1, *[1] * len(shape)).astype(np.float32)

    blocks = {
        "attn": {"qkv": {"kernel": layers(dim, 3 * dim), "bias": layers(3 * dim)}},
        "mlp": {"fc1": {"kernel": layers(dim, 2 * dim)}},
        "norm1": {"scale": layers(dim)},
    }
    backbone = {"blocks": blocks, "patch_embed": {"kernel": draw(4, 4, 3, dim)}}
    return {"backbone": backbone, "objective": {"head": {"fc": {"kernel": draw(dim, 10)}}}}


def looped(tree):
    """The same with blocks by number, as a loop has them and a checkpoint holds them."""
    return traverse_util.unflatten_dict(unstack(named_leaves(tree)), sep="/")


def first_updates(name, params, num_steps=2, **options):
    """The last of some updates, and the optimiser's state."""
    options = {"learning_rate": 0.1, "total_steps": 10, "weight_decay": 0.1} | options
    optimizer, _ = make_optimizer(name=name, **options)

    @jax.jit
    def run(params):
        state = optimizer.init(params)
        for step in range(num_steps):
            grads = jax.tree.map(lambda x, i=step + 1: i**3 * jnp.cos(i * x) * x, params)
            updates, state = optimizer.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return updates, state

    return run(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_are_updated_like_looped_ones(name):
    params = stacked_params()
    updates, state = first_updates(name, params)
    wanted, wanted_state = first_updates(name, looped(params))
    found, wanted = named_leaves(looped(updates)), named_leaves(wanted)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = np.abs(value).max()
        assert scale > 0
        np.testing.assert_allclose(found[key] / scale, value / scale, atol=2e-5, err_msg=key)
    # On disk the state of the one can be taken up by the other.
    saved, wanted = unstack(named_leaves(state)), named_leaves(wanted_state)
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in wanted.items()}
    assert int(num_updates(state)) == int(num_updates(wanted_state)) == 2


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_layers_that_are_not_told_apart_are_updated_otherwise(name, monkeypatch):
    params = stacked_params()
    wanted, _ = first_updates(name, params)
    monkeypatch.setattr(optim, "per_layer", lambda transform: transform)
    found, _ = first_updates(name, params)
    pair = [x["backbone"]["blocks"]["norm1"]["scale"] for x in (found, wanted)]
    assert np.abs(pair[0] / pair[1] - 1).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_moments_may_be_bfloat16(name):
    params = stacked_params(dim=8)
    full, half = (
        first_updates(name, params, mu_dtype=dtype)[1] for dtype in ("float32", "bfloat16")
    )
    pairs = zip(named_leaves(full).items(), jax.tree.leaves(half), strict=True)
    moments = {key: b.dtype for (key, a), b in pairs if a.dtype != b.dtype}
    assert set(moments.values()) == {jnp.dtype(jnp.bfloat16)}
    sizes = [x.size for x in jax.tree.leaves(params)]
    found = [x.size for x in jax.tree.leaves(half) if x.dtype == jnp.bfloat16]
    assert sorted(found) == sorted(sizes)  # one of each parameter


def test_momentum_lion_and_lamb_follow_their_formulas():
    params = {"backbone": {"blocks": {"0": {"attn": {"proj": {"kernel": jnp.eye(3) * 2.0}}}}}}
    grads = jax.tree.map(lambda x: x - 0.5, params)

    def update(name):
        options = {"schedule": "constant", "learning_rate": 0.1, "total_steps": 10}
        optimizer, _ = make_optimizer(name=name, **options, weight_decay=0.5)
        found, state = optimizer.update(grads, optimizer.init(params), params)
        found, _ = optimizer.update(grads, state, params)
        return np.asarray(jax.tree.leaves(found)[0])

    w, g = np.eye(3) * 2, np.eye(3) * 2 - 0.5
    np.testing.assert_allclose(update("sgd"), -0.1 * (1.9 * g + 0.5 * w), rtol=1e-5)
    np.testing.assert_allclose(update("lion"), -0.1 * (np.sign(g) + 0.5 * w), rtol=1e-5)
    direction = np.sign(g) + 0.5 * w  # Adam's second step with the same gradient
    trust = np.linalg.norm(w) / np.linalg.norm(direction)
    np.testing.assert_allclose(update("lamb"), -0.1 * trust * direction, rtol=1e-4)


def test_muon_makes_each_of_queries_keys_and_values_orthogonal():
    params = stacked_params(dim=32)
    updates, _ = first_updates("muon", params, 1, weight_decay=0.0, schedule="constant")
    qkv = np.asarray(updates["backbone"]["blocks"]["attn"]["qkv"]["kernel"])
    patches = np.asarray(updates["backbone"]["patch_embed"]["kernel"]).reshape(48, 32)
    matrices = [*np.split(qkv[1], 3, axis=-1), patches]
    for matrix in matrices:
        values = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * max(matrix.shape) ** 0.5)
        # So close to 1 do five iterations come; the least ones need more.
        assert np.quantile(values, 0.1) > 0.5 and values.max() < 1.3
    head = np.asarray(updates["objective"]["head"]["fc"]["kernel"])
    np.testing.assert_allclose(np.abs(head), 0.1, rtol=1e-3)  # Adam's first step
