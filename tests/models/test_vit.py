import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import reference, tree_mode
from vit_jax.models.heads import make_head, make_pool
from vit_jax.models.layers import ParallelBlock, draw_kept, fold_in
from vit_jax.models.vit import REMAT_POLICIES, VARIANTS, make_vit
from vit_jax.objectives import Model
from vit_jax.preprocess import Preprocess
from vit_jax.sharding import batch_sharding, make_mesh
from vit_jax.tree import named_leaves, num_params

# With a class token, learned positions and a linear head for 1,000 classes: timm's models and
# Google's; of g and G the papers say 1.01 and 1.84 billion.
PUBLISHED = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "H/14": 632_045_800,
    "g/14": 1_012_611_432,
    "G/14": 1_844_440_680,
}
SMALL = {"image_size": (6, 8), "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32}

# What whole families are made of; an epsilon so large that the norms show it.
TORCH = {"activation": "gelu", "norm_eps": 0.1}
DEIT = {**TORCH, "cls_token": True, "dist_token": True}
DINOV3 = {
    **{"cls_token": True, "num_reg_tokens": 3, "pos_embed": "rope2d", "mlp": "swiglu"},
    **{"layer_scale": 0.1, "norm_eps": 0.1},
}
VIT_22B = {
    **{"parallel": True, "qk_norm": True, "qkv_bias": False, "norm": "rmsnorm"},
    **{"norm_eps": 0.1},
}


@functools.cache
def small(**options):
    """3 × 2 pixels a patch, 2 × 4 patches; two blocks."""
    options = {"variant": "Ti/3x2"} | SMALL | options
    return reference.made(lambda: make_vit(**options, rngs=nnx.Rngs(0)))


def leaves(model):
    return named_leaves(nnx.to_pure_dict(nnx.state(model)))


def images(batch, size=(6, 8), seed=1):
    return np.random.default_rng(seed).standard_normal((batch, *size, 3)).astype(np.float32)


def keys(batch, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("layers", "method"))
def _run(graphdef, params, x, method, layers, **options):
    model = nnx.merge(graphdef, params)
    if method in ("encode", "features"):
        return getattr(model, method)(x, layers=layers, **options)
    return getattr(model, method)(x, **options)


def run(model, x, method="__call__", layers=(), **options):
    """A method under jit; answers NumPy."""
    graphdef, params = nnx.split(model)
    out = _run(graphdef, nnx.to_pure_dict(params), x, method=method, layers=layers, **options)
    return jax.tree.map(np.asarray, out)


def with_head(num_classes=1000, hidden_dim=None, pool="cls", **options):
    def make():
        rngs = nnx.Rngs(0)
        backbone = make_vit(**options, rngs=rngs)
        head = make_head(pool, backbone.dim, num_classes, hidden_dim=hidden_dim or 0, rngs=rngs)
        return Model(backbone, make_pool(pool, backbone, rngs=rngs), head, Preprocess())

    return make


def count(make):
    return num_params(nnx.to_pure_dict(nnx.state(nnx.eval_shape(make))))


# Parameters and FLOPs.


@pytest.mark.parametrize("variant", PUBLISHED)
def test_number_of_parameters_is_the_published_one(variant):
    # Blocks are alike: two depths tell the rest. Tracing all of G takes a while (below).
    one, two = (count(with_head(variant=variant, cls_token=True, depth=d)) for d in (1, 2))
    depth = VARIANTS[variant.split("/")[0]][1]
    assert one + (depth - 1) * (two - one) == PUBLISHED[variant]


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v == "Ti/16" else pytest.mark.slow) for v in PUBLISHED]
)
def test_number_of_parameters_of_the_whole_model(variant):
    assert count(with_head(variant=variant, cls_token=True)) == PUBLISHED[variant]


def test_names_of_parameters_are_stable():
    model = small(cls_token=True, depth=1, layer_scale=0.1)
    block = (
        *("attn/proj/bias", "attn/proj/kernel", "attn/qkv/bias", "attn/qkv/kernel"),
        *("ls1/gamma", "ls2/gamma"),
        *("mlp/fc1/bias", "mlp/fc1/kernel", "mlp/fc2/bias", "mlp/fc2/kernel"),
        *("norm1/bias", "norm1/scale", "norm2/bias", "norm2/scale"),
    )
    assert {name: leaf.shape for name, leaf in leaves(model).items()}.keys() == {
        *(f"blocks/0/{name}" for name in block),
        *("cls_token", "norm/bias", "norm/scale", "patch_embed/bias", "patch_embed/kernel"),
        "pos_embed",
    }
    assert leaves(model)["patch_embed/kernel"].shape == (3, 2, 3, 16)
    assert leaves(model)["pos_embed"].shape == (1 + 2 * 4, 16)
    scanned = small(depth=2, scan=True, pos_embed="sincos2d")
    assert leaves(scanned)["blocks/attn/qkv/kernel"].shape == (2, 16, 48)
    assert "pos_embed" not in leaves(scanned) and "cls_token" not in leaves(scanned)


def test_parameters_are_float32_whatever_the_compute_type():
    assert {leaf.dtype for leaf in leaves(small(dtype="bfloat16")).values()} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize(
    ("variant", "published"),
    [("Ti/16", 7.52), ("S/16", 27.59), ("B/16", 105.38), ("L/16", 369.33), ("H/14", 1003.8)],
)
def test_flops_of_a_training_step_are_the_computed_ones(variant, published):
    options = {"cls_token": True, "depth": 1, "num_classes": 1000, "pool": "cls"}
    model = nnx.eval_shape(with_head(variant=variant, **options))
    model.backbone.depth = VARIANTS[variant.split("/")[0]][1]
    digits = 2 if published < 1000 else 1
    flops = 3 * (model.backbone.flops() + model.head.flops())
    assert round(flops / 1e9, digits) == published


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
@pytest.mark.parametrize("hidden_dim", [None, 24])
def test_flops_formula_counts_every_matrix_product(pool, scan, hidden_dim):
    options = {"variant": "S/3x2", "num_classes": 7, "pool": pool, "cls_token": pool == "cls"}
    model = nnx.eval_shape(with_head(**options, **SMALL, scan=scan, hidden_dim=hidden_dim))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)

    def forward(params, images):
        return nnx.merge(graphdef, params)(images)

    batch = jax.ShapeDtypeStruct((1, 6, 8, 3), jnp.float32)
    counted = reference.dot_flops(jax.make_jaxpr(forward)(params, batch).jaxpr)
    once = 2 * 16 * 16 if pool == "map" else 0  # the learned query, projected once a batch
    pooling = model.pool.flops(model.backbone.num_tokens)
    assert counted - once == model.backbone.flops() + pooling + model.head.flops()
    # A step's are three times that, but for the gradient of the images, which nobody wants.
    loss = jax.value_and_grad(lambda *args: forward(*args).sum())
    step = reference.dot_flops(jax.make_jaxpr(loss)(params, batch).jaxpr)
    assert 3 * counted - step == 2 * 8 * (3 * 2 * 3) * 16


@pytest.mark.parametrize(
    ("pool", "options"),
    [
        ("cls_dist", DEIT | {"num_reg_tokens": 2}),
        ("gap_norm", DINOV3 | {"qk_norm": True, "scan": True}),
        ("map", VIT_22B | {"patch_dropout": 0.5}),
    ],
)
def test_flops_formula_counts_every_part(pool, options):
    model = nnx.eval_shape(with_head(variant="S/3x2", num_classes=7, pool=pool, **SMALL | options))
    graphdef, params = nnx.split(model)
    batch = jax.ShapeDtypeStruct((1, 6, 8, 3), jnp.float32)

    def count(key):
        def forward(params, images):
            model = nnx.merge(graphdef, params)
            return model.head(model.pool(model.backbone(images, key=key)))

        traced = jax.make_jaxpr(forward)(nnx.to_pure_dict(params), batch)
        return reference.dot_flops(traced.jaxpr) - (2 * 16 * 16 if pool == "map" else 0)

    def formula(tokens):
        rest = model.pool.flops(tokens) + model.head.flops()
        return model.backbone.flops(tokens) + rest

    assert count(None) == formula(model.backbone.num_tokens)
    assert count(keys(1)) == formula(model.backbone.num_train_tokens)
    assert model.backbone.flops() == model.backbone.flops(model.backbone.num_tokens)


def test_flops_formula_agrees_with_xla():
    options = {"image_size": (64, 64), "dim": 256, "depth": 2, "num_heads": 4, "mlp_dim": 1024}
    model = nnx.eval_shape(with_head(variant="S/16", **options, num_classes=10, pool="gap"))
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
    batch = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    cost = forward.lower(nnx.to_pure_dict(params), batch).cost_analysis()
    ratio = cost["flops"] / (model.backbone.flops() + model.head.flops())
    assert 1 < ratio < 1.03  # XLA counts biases, norms and softmax too


# Numbers.


@pytest.mark.parametrize(
    ("pool", "options", "hidden_dim"),
    [
        ("cls", {"cls_token": True}, None),
        ("gap", {"pos_embed": "sincos2d", "layer_scale": 0.1}, 24),
        ("map", {"scan": True}, None),
        ("gap", {"cls_token": True, "pos_embed": "sincos2d"}, None),
        ("cls_dist", DEIT, None),
        ("cls_dist", DEIT | {"pos_embed": "sincos2d", "num_reg_tokens": 1}, None),
        ("gap_norm", TORCH | {"cls_token": True, "final_norm": False, "num_reg_tokens": 2}, None),
        ("cls", DINOV3, None),
        ("gap", DINOV3 | {"cls_token": False, "scan": True, "qk_norm": True}, None),
        ("map", VIT_22B, None),
        ("gap", VIT_22B | {"pos_embed": "none", "scan": True, "num_reg_tokens": 2}, None),
    ],
)
def test_forward_pass_is_that_of_the_paper(pool, options, hidden_dim):
    make = with_head(5, hidden_dim, pool, variant="Ti/3x2", **SMALL, **options)
    model = reference.made(make)
    x = images(4)
    tokens, logits = jax.jit(lambda x: (model.backbone(x), model(x)))(x)
    wanted = reference.encoder(model.backbone, x.astype(np.float64))
    np.testing.assert_allclose(tokens, wanted, rtol=1e-4, atol=1e-4)
    wanted = reference.pooled(pool, model.pool, wanted, model.backbone)
    wanted = reference.logits(model.head, wanted)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_exact_gelu_is_not_the_tanh_form():
    model = small(activation="gelu")
    tanh = nnx.merge(nnx.graphdef(small()), nnx.to_pure_dict(nnx.state(model)))
    wanted = reference.encoder(model, images(2).astype(np.float64))
    np.testing.assert_allclose(run(model, images(2)), wanted, atol=2e-5)
    assert np.abs(run(tanh, images(2)) - wanted).max() > 1e-4


def unscanned(model, **options):
    """The same model with looped blocks; `options` are its others than the names below."""
    if not model.scan:
        return model
    flat = nnx.to_pure_dict(nnx.state(model))
    flat["blocks"] = {
        i: jax.tree.map(lambda x, i=i: x[i], flat["blocks"]) for i in range(model.depth)
    }
    options = {"cls_token": model.cls_token is not None, "depth": model.depth} | options
    rates = {"drop_path": model.drop_path, "dropout": model.dropout}
    return nnx.merge(nnx.graphdef(small(**rates | options)), flat)


def value_and_grads(model, x, keys, **options):
    """The tokens summed with fixed random weights; its gradients, with the blocks unstacked."""
    graphdef, params = nnx.split(model)
    noise = np.random.default_rng(5).standard_normal((len(x), model.num_train_tokens, model.dim))
    noise = noise.astype(np.float32)

    @jax.jit
    def value(params, x):
        return (nnx.merge(graphdef, params)(x, key=keys) * noise).mean()

    loss, grads = jax.value_and_grad(value)(nnx.to_pure_dict(params), x)
    return float(loss), leaves(unscanned(nnx.merge(graphdef, grads), **options))


NOISY = {"dropout": 0.1, "drop_path": 0.5}


@pytest.fixture(scope="module")
def noisy():
    """A scanned model with dropout and drop path on, its value and its gradients when looped."""
    model = small(**NOISY, scan=True)
    return model, value_and_grads(unscanned(model), images(8), keys(8))


@pytest.mark.parametrize(
    "scan, remat",
    [
        *[(True, remat) for remat in ("none", "full")],
        *[pytest.param(True, remat, marks=pytest.mark.slow) for remat in ("dots", "offload")],
        *[pytest.param(False, remat, marks=pytest.mark.slow) for remat in REMAT_POLICIES],
    ],
)
def test_scan_and_remat_change_no_number(noisy, scan, remat):
    model, (wanted, wanted_grads) = noisy
    graphdef = nnx.graphdef(small(**NOISY, scan=scan, remat=remat))
    source = model if scan else unscanned(model)
    model = nnx.merge(graphdef, nnx.to_pure_dict(nnx.state(source)))
    assert (model.scan, model.remat) == (scan, remat)
    loss, grads = value_and_grads(model, images(8), keys(8))
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        error = np.abs(grad - wanted_grads[name]).max()
        assert error <= 1e-6 * np.abs(wanted_grads[name]).max(), name


@pytest.mark.parametrize(
    "options", [DINOV3 | {"patch_dropout": 0.5, "drop_path": 0.5}, VIT_22B | {"drop_path": 0.5}]
)
def test_scan_and_remat_change_no_number_of_any_part(options):
    scanned = small(**options, scan=True)
    looped = unscanned(scanned, **options)
    assert isinstance(looped.blocks[0], ParallelBlock) == ("parallel" in options)
    loss, wanted = value_and_grads(looped, images(8), keys(8))
    graphdef = nnx.graphdef(small(**options, scan=True, remat="full"))
    model = nnx.merge(graphdef, nnx.to_pure_dict(nnx.state(scanned)))
    again, grads = value_and_grads(model, images(8), keys(8), **options)
    assert again == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert np.abs(grad - wanted[name]).max() <= 1e-5 * np.abs(wanted[name]).max(), name
        assert np.abs(grad).max() > 0, name


def test_layers_that_are_traced_once_are_drawn_each_on_its_own():
    """Inside of a trace: the numbers that a model made outside of one has."""

    def make():
        model = make_vit(variant="Ti/3x2", **SMALL, rngs=nnx.Rngs(0))
        return nnx.to_pure_dict(nnx.state(model))

    traced, plain = named_leaves(jax.jit(make)()), named_leaves(make())
    assert traced.keys() == plain.keys()
    for name, value in traced.items():
        np.testing.assert_allclose(value, plain[name], rtol=0, atol=1e-7, err_msg=name)
    kernel = "blocks/{}/attn/qkv/kernel"
    assert not np.array_equal(traced[kernel.format(0)], traced[kernel.format(1)])


def test_scanned_blocks_start_as_looped_ones_do():
    def start(scan):
        options = {"variant": "Ti/3x2", "scan": scan} | SMALL
        return reference.initialised(lambda: make_vit(**options, rngs=nnx.Rngs(0)))

    looped, scanned = leaves(start(False)), leaves(unscanned(start(True)))
    assert looped.keys() == scanned.keys()
    for name in looped:
        np.testing.assert_array_equal(looped[name], scanned[name], err_msg=name)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_policies_keep_less_and_less(scan):
    def flops(remat):
        graphdef, params = nnx.split(small(scan=scan, remat=remat))
        grad = jax.grad(lambda params, x: nnx.merge(graphdef, params)(x).sum())
        traced = jax.make_jaxpr(grad)(nnx.to_pure_dict(params), images(1))
        return reference.dot_flops(traced.jaxpr)

    assert flops("none") < flops("dots") < flops("full")


# Randomness.


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_rises_linearly_and_keeps_the_mean(scan):
    batch = 2048
    shape = {"image_size": (3, 2), "dim": 4, "num_heads": 1, "mlp_dim": 4, "depth": 3}
    model = small(**shape, drop_path=0.5, scan=scan, pos_embed="sincos2d")
    params = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(nnx.state(model)))
    blocks = [params["blocks"]] if scan else params["blocks"].values()
    for block in blocks:  # each block adds 1 to every token, by its MLP alone
        block["mlp"]["fc2"]["bias"] = jnp.ones_like(block["mlp"]["fc2"]["bias"])
    model = nnx.merge(nnx.graphdef(model), params)
    x = np.zeros((batch, 1, 4), np.float32)
    _, outputs = run(model, x, "encode", (0, 1, 2), key=keys(batch))
    before = run(model, x, "_add_positions", positions=None)
    kept_before = np.arange(batch) % 2 == 0
    for rate, output in zip((0.0, 0.25, 0.5), outputs, strict=True):
        added = output - before
        kept = added[:, 0, 0] != 0
        assert (1 - kept).mean() == pytest.approx(rate, abs=0.05 * (rate > 0))
        np.testing.assert_allclose(added[kept], 1 / (1 - rate), rtol=1e-5)  # the whole example
        # Independent of the layer before.
        assert (1 - kept[kept_before]).mean() == pytest.approx(rate, abs=0.07 * (rate > 0))
        before, kept_before = output, kept


def test_draws_of_an_example_do_not_depend_on_where_it_stands():
    model = small(**NOISY)
    x, key = images(16), keys(16)
    wanted = run(model, x, key=key)
    order = np.random.default_rng(0).permutation(16)
    moved = run(model, x[order], key=key[order])
    np.testing.assert_allclose(moved, wanted[order], atol=1e-5)
    place = batch_sharding(make_mesh())
    spread = run(model, jax.device_put(x, place), key=jax.device_put(key, place))
    np.testing.assert_allclose(spread, wanted, atol=1e-5)
    same_image = run(model, np.repeat(x[:1], 16, axis=0), key=key)
    assert len({row.tobytes() for row in same_image}) == 16  # and each key draws anew


def test_without_a_key_nothing_is_random():
    model = small(**NOISY)
    quiet = nnx.merge(nnx.graphdef(small()), nnx.to_pure_dict(nnx.state(model)))
    np.testing.assert_allclose(run(model, images(4)), run(quiet, images(4)), atol=1e-6)
    assert np.abs(run(model, images(4)) - run(model, images(4), key=keys(4))).max() > 0.1


# Half precision.


def test_bfloat16_keeps_norms_and_softmax_in_float32():
    model = small(dtype="bfloat16", cls_token=True)
    graphdef, params = nnx.split(model)
    traced = jax.make_jaxpr(lambda params, x: nnx.merge(graphdef, params)(x))(
        nnx.to_pure_dict(params), images(2)
    )
    seen = [eqn for eqn, _ in reference.equations(traced.jaxpr)]

    def types(name):
        found = [eqn for eqn in seen if eqn.primitive.name == name]
        assert found, name
        return {str(var.aval.dtype) for eqn in found for var in eqn.invars}

    assert types("dot_general") == {"bfloat16"}
    assert types("exp") == types("rsqrt") == {"float32"}  # softmax; LayerNorm
    assert types("tanh") == {"bfloat16"}  # GELU
    products = [eqn.outvars[0].aval for eqn in seen if eqn.primitive.name == "dot_general"]
    scores = [aval for aval in products if aval.shape[-2:] == (9, 9)]
    assert len(scores) == 2 and {str(aval.dtype) for aval in scores} == {"float32"}
    assert traced.out_avals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("options", [DINOV3 | {"qk_norm": True}, VIT_22B])
def test_bfloat16_keeps_norms_and_turns_of_every_part_in_float32(options):
    graphdef, params = nnx.split(small(dtype="bfloat16", **options))
    traced = jax.make_jaxpr(lambda params, x: nnx.merge(graphdef, params)(x))(
        nnx.to_pure_dict(params), images(2)
    )
    seen = {
        (eqn.primitive.name, str(var.aval.dtype))
        for eqn, _ in reference.equations(traced.jaxpr)
        for var in eqn.invars
    }
    types = {name: {t for n, t in seen if n == name} for name in ("dot_general", "rsqrt", "cos")}
    assert types["dot_general"] == {"bfloat16"} and types["rsqrt"] == {"float32"}
    assert types["cos"] == ({"float32"} if "pos_embed" in options else set())
    assert traced.out_avals[0].dtype == jnp.bfloat16


def test_bfloat16_is_close_to_float32():
    wanted = run(small(cls_token=True), images(8))
    half = run(small(cls_token=True, dtype="bfloat16"), images(8)).astype(np.float32)
    error = np.abs(half - wanted)
    assert 0 < error.max() < 0.06 and error.mean() < 0.01  # of entries of about 1


# What `encode` takes.


@pytest.mark.parametrize("scan", [False, True])
def test_some_positions_are_as_good_as_a_mask(scan):
    model = small(cls_token=True, scan=scan)
    tokens = run(model, images(3), "embed")
    kept = np.array([[0, 3, 5], [1, 2, 7], [7, 4, 0]], np.int32)  # [batch, kept], in any order
    some = np.take_along_axis(tokens, kept[..., None], axis=1)
    encoded = run(model, some, "encode", positions=kept)
    mask = np.zeros((3, 8), bool)
    np.put_along_axis(mask, kept, True, axis=1)
    whole = run(model, tokens, "encode", mask=mask)
    np.testing.assert_allclose(encoded[:, 0], whole[:, 0], atol=2e-5)
    wanted = np.take_along_axis(whole[:, 1:], kept[..., None], axis=1)
    np.testing.assert_allclose(encoded[:, 1:], wanted, atol=2e-5)
    assert np.abs(whole - run(model, tokens, "encode")).max() > 0.1  # the others do matter


def test_masked_patches_influence_nobody():
    model = small(cls_token=True)
    tokens = run(model, images(2), "embed")
    mask = np.array([[True] * 5 + [False] * 3, [False] + [True] * 7])
    other = np.where(mask[..., None], tokens, 100.0)
    one, two = (run(model, t, "encode", mask=mask) for t in (tokens, other))
    seen = np.concatenate([[[True], [True]], mask], axis=1)
    np.testing.assert_array_equal(one[seen], two[seen])
    assert not np.array_equal(one[~seen], two[~seen])


def test_two_images_packed_into_one_sequence_are_two_passes():
    model = small()
    tokens = run(model, images(2), "embed")  # [2, 8, dim]
    wanted = run(model, tokens, "encode")
    packed = np.concatenate([tokens[:1], tokens[1:, :5]], axis=1)
    positions = np.concatenate([np.arange(8), np.arange(5)])[None]
    segment_ids = np.array([[0] * 8 + [1] * 5])
    options = {"positions": positions, "segment_ids": segment_ids}
    out = run(model, packed, "encode", **options)
    np.testing.assert_allclose(out[:, :8], wanted[:1], atol=2e-5)
    part = run(model, tokens[1:, :5], "encode", positions=positions[:, 8:])
    np.testing.assert_allclose(out[:, 8:], part, atol=2e-5)
    # A mask narrows it further: the second image without its last two patches.
    mask = np.arange(13)[None] < 11
    out = run(model, packed, "encode", **options, mask=mask)
    part = run(model, tokens[1:, :3], "encode", positions=positions[:, 8:11])
    np.testing.assert_allclose(out[:, 8:11], part, atol=2e-5)


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "full")])
def test_layers_answers_the_outputs_of_blocks(scan, remat):
    model = small(cls_token=True, scan=scan, remat=remat)
    tokens = run(model, images(2), "embed")
    x, outputs = run(model, tokens, "encode", (1, 0))
    np.testing.assert_allclose(x, run(model, tokens, "encode"), atol=1e-6)
    block = unscanned(model).blocks
    first = jax.jit(lambda x: block[0](x))(run(model, tokens, "_add_positions", positions=None))
    np.testing.assert_allclose(outputs[1], first, atol=1e-5)
    np.testing.assert_allclose(outputs[0], jax.jit(lambda x: block[1](x))(first), atol=1e-5)
    last = reference.Weights(model).norm("norm", outputs[0].astype(np.float64))
    np.testing.assert_allclose(x, last, atol=1e-5)


def test_features_are_maps_of_the_blocks_outputs():
    model = small(**DINOV3)
    wanted = reference.outputs(model, images(2).astype(np.float64))
    found = jax.jit(lambda x: model.features(x, layers=(1, -2), final_norm=False))(images(2))
    for x, layer in zip(found, (1, 0), strict=True):
        assert x.shape == (2, 2, 4, 16)
        tokens = wanted[layer][:, 4:]  # behind the class token and three registers
        np.testing.assert_allclose(x.reshape(2, 8, 16), tokens, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(x[:, 1, 2], tokens[:, 6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_the_last_map_after_the_norm_is_the_encoders_output(scan):
    model = small(cls_token=True, scan=scan, norm_eps=0.1)
    found = run(model, images(2), "features", layers=(-1, 0))
    wanted = reference.encoder(model, images(2).astype(np.float64))[:, 1:]
    np.testing.assert_allclose(found[0].reshape(2, 8, 16), wanted, rtol=1e-4, atol=1e-4)
    first = reference.outputs(model, images(2).astype(np.float64))[0][:, 1:]
    first = reference.Weights(model).norm("norm", first, 0.1)
    np.testing.assert_allclose(found[1].reshape(2, 8, 16), first, rtol=1e-4, atol=1e-4)


def test_features_without_a_final_norm_are_the_blocks_outputs():
    model = small(final_norm=False)
    found = run(model, images(2), "features", layers=(1,))[0]
    np.testing.assert_allclose(found.reshape(2, 8, 16), run(model, images(2)), atol=1e-5)


# Patch dropout.


@pytest.mark.parametrize("options", [{"cls_token": True}, DINOV3])
def test_patch_dropout_keeps_a_random_set_of_each_example(options):
    model, key = small(**options, patch_dropout=0.5), keys(4)
    prefix = model.num_prefix_tokens
    assert model.num_train_tokens == prefix + 4
    kept = np.asarray(draw_kept(fold_in(key, model.depth + 1), 4, 8))
    assert len({row.tobytes() for row in kept}) > 1
    wanted = reference.encoder(model, images(4).astype(np.float64), kept)
    assert wanted.shape == (4, prefix + 4, 16)
    np.testing.assert_allclose(run(model, images(4), key=key), wanted, rtol=1e-4, atol=1e-4)


def test_patch_dropout_is_off_without_a_key():
    model = small(cls_token=True, patch_dropout=0.5)
    found = run(model, images(3))
    assert found.shape == (3, 9, 16)
    quiet = nnx.merge(nnx.graphdef(small(cls_token=True)), nnx.to_pure_dict(nnx.state(model)))
    np.testing.assert_array_equal(found, run(quiet, images(3)))


def test_kept_patches_depend_on_the_example_alone():
    model, x, key = small(patch_dropout=0.75), images(16), keys(16)
    wanted = run(model, x, key=key)
    assert wanted.shape == (16, 2, 16)
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_allclose(run(model, x[order], key=key[order]), wanted[order], atol=1e-5)
    place = batch_sharding(make_mesh())
    spread = run(model, jax.device_put(x, place), key=jax.device_put(key, place))
    np.testing.assert_allclose(spread, wanted, atol=1e-5)
    assert not np.allclose(run(model, x, key=keys(16, seed=1)), wanted, atol=1e-2)


def test_patch_dropout_takes_positions_and_mask_along():
    model, key = small(cls_token=True, patch_dropout=0.4), keys(2)
    tokens = run(model, images(2), "embed")[:, :5]
    positions = np.array([[7, 2, 0, 5, 3], [1, 4, 6, 0, 2]])
    mask = np.array([[True, False, True, True, True], [True, True, True, True, False]])
    found = run(model, tokens, "encode", positions=positions, mask=mask, key=key)
    kept = np.asarray(draw_kept(fold_in(key, model.depth + 1), 3, 5))
    some = [
        np.take_along_axis(x, kept.reshape(2, 3, *[1] * (x.ndim - 2)), axis=1)
        for x in (tokens, positions, mask)
    ]
    assert not some[2].all()  # so that the mask matters
    wanted = run(model, some[0], "encode", positions=some[1], mask=some[2])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("rate", "kept"), [(0.9, 1), (0.99, 1), (0.5, 4), (0.25, 6)])
def test_patch_dropout_keeps_the_nearest_number_of_patches_and_never_none(rate, kept):
    assert small(patch_dropout=rate).num_train_tokens == kept


# NNX's other mode.


@pytest.mark.slow
def test_tree_mode_gives_the_numbers_of_graph_mode():
    root = pathlib.Path(__file__).parents[2]
    changed = {"NNX_GRAPH_MODE": "false", "PYTHONPATH": str(root)}
    changed["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    output = subprocess.run(
        [sys.executable, "-m", "tests.models.tree_mode"],
        env=os.environ | changed,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # The mode that it says it ran in, then a loss and the gradients' squared norm a line.
    mode, *lines = output.splitlines()
    assert mode == "graph mode: False"
    for line, options in zip(lines, tree_mode.CASES, strict=True):
        wanted = tree_mode.loss_and_norm(**options)
        np.testing.assert_allclose(np.array(line.split(), float), wanted, rtol=1e-5)


# Errors.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "X/16"}, "variant='X/16' is unknown.*Ti, S, M, B, L, So400m, H, g, G, e"),
        ({"variant": "b/16"}, "variant='b/16' is unknown"),
        ({"variant": "Ti"}, "'Ti' needs a patch size in pixels, like 'Ti/16'"),
        ({"variant": "Ti/0"}, "patch size"),
        ({"variant": "Ti/3x2x1"}, "patch size"),
        ({"variant": "Ti/big"}, "patch size"),
        ({"image_size": (7, 8)}, r"image_size=\(7, 8\) .* patch_size=\(3, 2\); try \(6, 8\)"),
        ({"image_size": (8, 8)}, r"try \(9, 8\)"),
        ({"image_size": 1}, r"image_size=\(1, 1\) .* try \(3, 2\)"),
        *(
            ({"image_size": size}, "image_size=.* must be height and width, like")
            for size in ((6,), (6, 8, 3), ("big",), (6.0, 8.0))  # as a flag may make them
        ),
        ({"num_heads": 3}, "dim=16 must be a multiple of num_heads=3"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"drop_path": -0.1}, r"drop_path=-0.1 must be in \[0, 1\)"),
        ({"remat": "all"}, "remat='all' is unknown; choose one of 'none', 'dots', 'full'"),
        ({"pos_embed": "sincos"}, "pos_embed='sincos' is unknown.*'learned', 'sincos2d'"),
        ({"mlp": "glu"}, "mlp='glu' is unknown; choose one of 'mlp', 'swiglu'"),
        ({"activation": "relu"}, "activation='relu' is unknown; .* 'gelu_tanh', 'gelu'"),
        ({"norm": "batchnorm"}, "norm='batchnorm' is unknown; .* 'layernorm', 'rmsnorm'"),
        ({"patch_dropout": 1.0}, r"patch_dropout=1.0 must be in \[0, 1\)"),
        ({"num_reg_tokens": -1}, "num_reg_tokens=-1 must not be negative"),
        ({"dist_token": True}, "dist_token=True needs cls_token=True"),
        ({"dim": 12, "pos_embed": "rope2d"}, "heads of a multiple of 4 .* dim=12 / num_heads=2"),
    ],
)
def test_shapes_that_do_not_work_out_are_refused(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        small(**options)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images of \(8, 6\) pixels .*image_size=\(6, 8\)"):
        run(small(), images(2, (8, 6)))


@pytest.mark.parametrize("options", [{"cls_token": True}, {"num_reg_tokens": 1}])
def test_segments_need_a_model_without_prefix_tokens(options):
    with pytest.raises(ValueError, match="without class or other prefix tokens"):
        run(small(**options), images(1, (8, 16))[..., 0], "encode", segment_ids=[[0] * 8])


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((0, 2), r"layers=\(2,\) must be in \[-2, 2\): 2 blocks"),
        ((-3,), r"layers=\(-3,\) must be"),
        ((), r"layers=\(\) names no block; use layers=\(-1,\)"),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_blocks_that_are_not_there_are_refused(scan, layers, words):
    with pytest.raises(ValueError, match=words):
        small(scan=scan).features(images(1), layers=layers)


def test_one_number_stands_for_a_square_image():
    assert small(variant="Ti/4", image_size=8).grid == (2, 2)
