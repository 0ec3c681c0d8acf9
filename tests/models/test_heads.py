import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import reference
from vit_jax.models.heads import DistilledHead, Head, make_head, make_pool
from vit_jax.models.vit import make_vit
from vit_jax.tree import named_leaves


def backbone(**options):
    shape = {"image_size": 4, "dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12}
    return nnx.eval_shape(lambda: make_vit(variant="Ti/2", **shape, **options, rngs=nnx.Rngs(0)))


def pool(name, **options):
    def make():
        return make_pool(name, backbone(**options), rngs=nnx.Rngs(0))

    return reference.made(make)


def tokens(count=5):
    return np.random.default_rng(0).standard_normal((3, count, 8)).astype(np.float32)


def apply(module, x):
    return np.asarray(jax.jit(lambda x: module(x))(x))


CLS, PREFIX = {"cls_token": True}, {"cls_token": True, "dist_token": True, "num_reg_tokens": 1}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cls", CLS),
        ("cls_dist", PREFIX),
        ("gap", CLS),
        ("gap", {}),
        ("gap", PREFIX),
        ("gap_norm", CLS | {"norm_eps": 0.1}),
        ("gap_norm", {"norm": "rmsnorm"}),
        ("map", CLS),
        ("map", {"activation": "gelu", "norm_eps": 0.1}),
        ("map", {"norm": "rmsnorm", "mlp": "swiglu"}),
    ],
)
def test_pooling(name, options):
    module = pool(name, **options)
    x = tokens()
    wanted = reference.pooled(name, module, x.astype(np.float64), backbone(**options))
    # So near that the two forms of GELU, 4.7e-4 apart, are not taken for each other.
    np.testing.assert_allclose(apply(module, x), wanted, rtol=1e-5, atol=1e-5)


def test_map_pooling_has_the_parameters_of_the_paper():
    leaves = named_leaves(nnx.to_pure_dict(nnx.state(pool("map"))))
    assert {name: leaf.shape for name, leaf in leaves.items() if name.endswith(("l", "e"))} == {
        "probe": (1, 8),
        "query/kernel": (8, 8),
        "key/kernel": (8, 8),
        "value/kernel": (8, 8),
        "proj/kernel": (8, 8),
        "norm/scale": (8,),
        "mlp/fc1/kernel": (8, 12),
        "mlp/fc2/kernel": (12, 8),
    }


def test_means_are_taken_in_float32():
    x = np.full((1, 4096, 8), 1.0) + np.arange(4096)[None, :, None] % 2 * 0.0078125
    answer = apply(pool("gap"), jnp.asarray(x, jnp.bfloat16))
    assert answer.dtype == jnp.bfloat16  # a sum in bfloat16 would stall at 256
    np.testing.assert_allclose(answer.astype(np.float64), 1.004, atol=0.005)


def test_the_norm_of_a_mean_is_taken_in_float32():
    module = pool("gap_norm")
    assert apply(module, jnp.asarray(tokens(), jnp.bfloat16)).dtype == jnp.bfloat16
    traced = jax.make_jaxpr(lambda x: module(x))(jnp.asarray(tokens(), jnp.bfloat16))
    found = [e for e, _ in reference.equations(traced.jaxpr) if e.primitive.name == "rsqrt"]
    assert {str(var.aval.dtype) for eqn in found for var in eqn.invars} == {"float32"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cls", {}, r"pool='cls' needs model.cls_token=True, or use pool='gap'"),
        ("cls", {"num_reg_tokens": 2}, "needs model.cls_token=True"),
        ("cls_dist", CLS, r"pool='cls_dist' needs model.dist_token=True, or use pool='cls'"),
        ("max", {}, "pool='max' is unknown; .* 'cls', 'cls_dist', 'gap', 'gap_norm', 'map'"),
    ],
)
def test_pooling_that_does_not_work_out_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_pool(name, backbone(**options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_head(hidden_dim):
    def make():
        return Head(8, 4, hidden_dim=hidden_dim, bias_init=-math.log(4), rngs=nnx.Rngs(0))

    head, x = reference.initialised(make), tokens()[:, 0]
    np.testing.assert_allclose(apply(head, x), -math.log(4) * np.ones((3, 4)), rtol=1e-6)
    head = reference.made(make)
    np.testing.assert_allclose(apply(head, x), reference.logits(head, x), rtol=1e-4, atol=1e-5)
    assert apply(head, jnp.asarray(x, jnp.bfloat16)).dtype == np.float32


def test_distilled_head_averages_the_logits_of_two():
    def make():
        return make_head("cls_dist", 8, 4, bias_init=-math.log(4), rngs=nnx.Rngs(0))

    head, x = reference.initialised(make), tokens()[:, :2].reshape(3, 16)
    assert isinstance(head, DistilledHead)
    np.testing.assert_allclose(apply(head, x), -math.log(4) * np.ones((3, 4)), rtol=1e-6)
    head = reference.made(make)
    assert sorted(named_leaves(nnx.to_pure_dict(nnx.state(head)))) == [
        *("fc/bias", "fc/kernel", "fc_dist/bias", "fc_dist/kernel")
    ]
    np.testing.assert_allclose(apply(head, x), reference.logits(head, x), rtol=1e-4, atol=1e-5)
    assert apply(head, jnp.asarray(x, jnp.bfloat16)).dtype == np.float32
    traced = jax.make_jaxpr(lambda x: head(x))(x[:1])
    assert head.flops() == reference.dot_flops(traced.jaxpr)


def test_other_pools_have_one_head():
    head = nnx.eval_shape(lambda: make_head("gap", 8, 4, hidden_dim=6, rngs=nnx.Rngs(0)))
    assert isinstance(head, Head) and head.pre_logits.kernel.shape == (8, 6)
    with pytest.raises(ValueError, match="hidden_dim=6 does not go with pool='cls_dist'"):
        make_head("cls_dist", 8, 4, hidden_dim=6, rngs=nnx.Rngs(0))
