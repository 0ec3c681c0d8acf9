import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import reference
from vit_jax import axes, hlo, plan
from vit_jax.models import layers
from vit_jax.models.heads import make_head, make_pool
from vit_jax.models.layers import (
    ACTIVATIONS,
    Attention,
    Block,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGlu,
    draw_kept,
    drop,
    fold_in,
    make_norm,
    take,
    xavier_qkv,
)
from vit_jax.models.model import Model
from vit_jax.models.vit import make_vit
from vit_jax.preprocess import Preprocess
from vit_jax.sharding import Splitting, make_mesh
from vit_jax.tree import named_leaves


def make(cls, *args, **options):
    return reference.initialised(lambda: cls(*args, **options, rngs=nnx.Rngs(0)))


def tokens(batch=2, count=5, dim=8):
    return np.random.default_rng(0).standard_normal((batch, count, dim)).astype(np.float32)


def keys(batch):
    return jax.random.split(jax.random.key(0), batch)


@functools.partial(jax.jit, static_argnames=("rate", "shape"))
def jit_drop(x, keys, *, rate, shape=None):
    return drop(x, rate, keys, shape=shape)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_entries_and_keeps_the_mean(rate):
    x = np.ones((4, 8000), np.float32)
    out = np.asarray(jit_drop(x, keys(4), rate=rate))
    zero = out == 0
    np.testing.assert_allclose(zero.mean(axis=1), rate, atol=5 * (rate / 8000) ** 0.5)
    np.testing.assert_allclose(out[~zero], 1 / (1 - rate), rtol=1e-6)
    assert not np.array_equal(zero[0], zero[1])  # each example has its own draws


def test_dropping_with_a_shape_of_ones_drops_whole_examples():
    out = np.asarray(
        jit_drop(np.ones((4000, 3, 2), np.float32), keys(4000), rate=0.3, shape=(1, 1))
    )
    per_example = out.reshape(4000, -1)
    assert (per_example == per_example[:, :1]).all()
    assert (per_example[:, 0] == 0).mean() == pytest.approx(0.3, abs=0.04)


def test_without_keys_nothing_is_dropped():
    x = tokens()
    assert drop(x, 0.5, None) is x
    assert fold_in(None, 3) is None


def test_fold_in_makes_other_keys_for_each_example_and_number():
    folded = [jax.random.key_data(fold_in(keys(3), number)) for number in (0, 1)]
    assert len({row.tobytes() for each in folded for row in np.asarray(each)}) == 6


def test_kept_patches_are_another_random_set_for_each_example():
    kept = np.asarray(jax.jit(draw_kept, static_argnums=(1, 2))(keys(4000), 3, 8))
    assert kept.shape == (4000, 3) and kept.dtype == np.int32
    assert (np.diff(kept, axis=1) > 0).all()  # in order, each once
    assert len({row.tobytes() for row in kept}) == 56  # each of the 8 choose 3 sets
    frequencies = np.bincount(kept.ravel(), minlength=8) / 4000
    np.testing.assert_allclose(frequencies, 3 / 8, atol=0.04)


def test_taking_some_tokens_leaves_the_other_axes():
    x, kept = tokens(2, 5), np.array([[0, 4], [3, 1]])
    np.testing.assert_array_equal(take(x, kept), np.stack([x[0, [0, 4]], x[1, [3, 1]]]))
    np.testing.assert_array_equal(take(x[..., 0], kept), take(x, kept)[..., 0])
    assert take(None, kept) is None


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms_are_computed_in_float32_with_the_epsilon_given(norm, eps):
    module = make(lambda rngs: make_norm(8, norm=norm, eps=eps, rngs=rngs))
    assert jax.jit(module)(jnp.asarray(tokens(), jnp.bfloat16)).dtype == jnp.float32
    x = 1e-3 * tokens().astype(np.float64) + 1e-3  # so small that another epsilon would show
    wanted = reference.Weights({"norm": module}).norm("norm", x, eps)
    np.testing.assert_allclose(jax.jit(module)(x.astype(np.float32)), wanted, rtol=1e-3, atol=1e-5)


def test_norms_of_the_paper_have_an_epsilon_of_a_millionth():
    assert make(lambda rngs: make_norm(8, rngs=rngs)).epsilon == 1e-6


def test_patches_go_row_by_row():
    embed = make(PatchEmbed, (2, 3), 1, dtype=jnp.float32)
    ones = jax.tree.map(jnp.ones_like, nnx.to_pure_dict(nnx.state(embed)))
    embed = nnx.merge(nnx.graphdef(embed), ones | {"bias": jnp.zeros(1)})
    images = np.zeros((1, 4, 6, 3), np.float32)
    for row in range(2):
        for column in range(2):
            images[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3] = 1 + 2 * row + column
    np.testing.assert_array_equal(
        jax.jit(embed)(images)[0, :, 0], np.array([1, 2, 3, 4]) * 2 * 3 * 3
    )


def test_patch_embedding_in_half_precision():
    embed = make(PatchEmbed, (2, 2), 8, dtype=jnp.bfloat16)
    out = jax.jit(embed)(np.ones((1, 4, 4, 3), np.float32))
    assert out.shape == (1, 4, 8) and out.dtype == jnp.bfloat16
    assert embed.kernel[...].dtype == jnp.float32


def test_fused_projection_starts_as_three_of_its_own():
    kernel = np.asarray(xavier_qkv(jax.random.key(0), (64, 192), jnp.float32))
    limit = (6 / (64 + 64)) ** 0.5  # Glorot & Bengio 2010, eq. 16, of a 64 × 64 matrix
    assert 0.98 * limit < np.abs(kernel).max() <= limit


@pytest.mark.parametrize("cls", [Attention, Mlp, SwiGlu])
def test_initial_values(cls):
    leaves = named_leaves(nnx.to_pure_dict(nnx.state(make(cls, 64, 4, dtype=jnp.float32))))
    for name, leaf in leaves.items():
        if name.endswith("bias"):
            assert np.abs(leaf).max() < 1e-5, name
        else:
            packed = cls is SwiGlu and "fc1" in name
            fan_out = 64 if "qkv" in name else leaf.shape[1] // (1 + packed)
            deviation = (2 / (leaf.shape[0] + fan_out)) ** 0.5
            assert np.std(leaf) == pytest.approx(deviation, rel=0.1), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gelu_tanh", "TPU v6 lite"), ("gelu", "TPU v6 lite"), ("gelu", "TPU v5 lite")],
)
def test_activations_and_their_gradients_are_float64s(monkeypatch, name, kind):
    monkeypatch.setattr(layers, "device_kind", lambda: kind)  # of a chip that keeps both, or x
    x = 3 * np.random.default_rng().standard_normal((2, 5, 8))
    grad = np.random.default_rng().standard_normal(x.shape)
    exact = reference.gelu if name == "gelu_tanh" else reference.exact_gelu
    slope = (exact(x + 1e-5) - exact(x - 1e-5)) / 2e-5

    @jax.jit
    def run(x, grad):
        function = functools.partial(layers.activate, ACTIVATIONS[name])
        out, pull = jax.vjp(jax.checkpoint(function), x)
        return out, *pull(grad)

    for dtype, error in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        out, found = run(jnp.asarray(x, dtype), jnp.asarray(grad, dtype))
        assert out.dtype == found.dtype == dtype
        for got, wanted in ((out, exact(x)), (found, grad * slope)):
            assert np.abs(np.asarray(got, np.float64) - wanted).max() < error * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "times"), [("v6e:2x2", 1), ("v5e:2x2", 3)])
def test_wide_tpus_compute_a_gelu_once(topology, times):
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    devices = plan.topology(topology).devices[:1]
    mesh = make_mesh(devices=devices)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    mlp = nnx.eval_shape(lambda: Mlp(128, 512, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(mlp)

    def step(params, x, grad):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, pull = jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x), params, x)
            return out, pull(grad)

    x = jax.ShapeDtypeStruct((8, 64, 128), jnp.bfloat16)
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (nnx.to_pure_dict(params), x, x),
    )
    program = hlo.parse(jax.jit(step).lower(*operands).compile().as_text())
    assert sum(i.opcode == "tanh" for _, i, _, _ in program.visits()) == times


def test_swiglu_is_gated_by_the_first_half():
    mlp = reference.made(lambda: SwiGlu(8, 6, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert mlp.fc1.kernel.shape == (8, 12) and mlp.fc2.kernel.shape == (6, 8)
    wanted = reference.Weights({"mlp": mlp}).swiglu("mlp", tokens().astype(np.float64))
    np.testing.assert_allclose(jax.jit(mlp)(tokens()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [Mlp, SwiGlu])
def test_dropout_in_the_mlp_is_drawn_from_the_keys(cls):
    mlp = reference.made(lambda: cls(8, 6, dropout=0.5, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    run = jax.jit(lambda x, keys: mlp(x, keys))
    quiet, one, other = run(tokens(), None), run(tokens(), keys(2)), run(tokens(), keys(3)[1:])
    assert np.abs(one - quiet).max() > 0.1 and np.abs(one - other).max() > 0.1


def test_layer_scale_starts_where_it_is_told():
    np.testing.assert_allclose(jax.jit(LayerScale(8, 0.25))(tokens()), 0.25 * tokens())


def test_block_drops_a_whole_branch_of_an_example():
    block = reference.made(lambda: Block(8, 2, 16, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = tokens(256)

    @jax.jit
    def run(block_params, keys, rate):
        block_ = nnx.merge(nnx.graphdef(block), block_params)
        return block_(x, drop_path=rate, keys=keys)

    params = nnx.to_pure_dict(nnx.state(block))
    out = np.asarray(run(params, keys(256), jnp.float32(0.5)))
    untouched = (out == x).all(axis=(1, 2))
    assert 40 <= untouched.sum() <= 90  # both branches dropped: a quarter
    whole = np.asarray(run(params, None, jnp.float32(0.5)))
    assert not (whole == x).any(axis=(1, 2)).any()


def test_modules_hold_no_random_state():
    block = make(Block, 8, 2, 16, dropout=0.5, layer_scale=0.1, dtype=jnp.float32)
    assert {type(v) for _, v in nnx.to_flat_state(nnx.state(block))} == {nnx.Param}


def test_a_block_with_the_kernel_has_the_gradients_of_one_without():
    x = np.random.default_rng(0).standard_normal((2, 17, 32)).astype(np.float32)

    def gradients(implementation):
        options = {"attention": implementation, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        graphdef, params = nnx.split(Block(32, 1, 64, **options))
        loss = jax.jit(jax.grad(lambda params: (nnx.merge(graphdef, params)(x) ** 2).sum()))
        return jax.tree.leaves(loss(params))

    for one, other in zip(gradients("interpret"), gradients("xla"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_heads_split_over_devices_take_the_kernel(qk_norm):
    x = tokens(count=16, dim=128)
    mask = np.arange(16) < np.array([[16], [11]])

    def run(attention):
        module = make(Attention, 128, 4, qk_norm=qk_norm, attention=attention, dtype=jnp.float32)
        graphdef, params = nnx.split(module)
        bias = jnp.linspace(-1, 1, 3 * 128)
        params = nnx.to_pure_dict(params) | {
            "qkv": {"kernel": params.qkv.kernel[...], "bias": bias}
        }

        @jax.jit
        def both(params, x):
            out, pull = jax.vjp(lambda params: nnx.merge(graphdef, params)(x, mask), params)
            return out, *pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

        return both(params, x), both.lower(params, x).as_text()

    wanted, _ = run("xla")
    mesh = make_mesh(tensor=2, data=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh), axes.splitting(Splitting(mesh)):
        found, text = run("interpret")
    assert "manual_computation" in text or "shard_map" in text
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_on_a_tpu_auto_takes_the_kernel_for_heads_that_are_split():
    module = make(Attention, 128, 4, attention="auto", dtype=jnp.bfloat16)
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = make_mesh(tensor=2, data=2, devices=jax.devices()[:4])
    abstract = mesh.abstract_mesh.update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(abstract), axes.splitting(Splitting(abstract)):
        text = str(jax.make_jaxpr(module)(tokens(count=16, dim=128)))
    assert "shard_map" in text and "pallas_call" in text


@pytest.mark.parametrize("cls_token, pool", [(True, "cls"), (False, "gap"), (False, "map")])
def test_a_model_takes_batches_of_any_size(cls_token, pool):
    """A graph is exported for a batch whose size is a symbol: no shape may need its number."""
    rngs = nnx.Rngs(0)
    shape = {"variant": "Ti/4", "image_size": 8, "dim": 24, "depth": 1, "cls_token": cls_token}
    backbone = make_vit(**shape, rngs=rngs)
    head = make_head(pool, 24, 5, rngs=rngs)
    model = Model(backbone, make_pool(pool, backbone, rngs=rngs), head, Preprocess())
    graphdef, state = nnx.split(model)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 8, 8, 3), np.uint8)
    logits = jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, images)
    assert logits.shape == (batch, 5) and logits.dtype == np.float32
