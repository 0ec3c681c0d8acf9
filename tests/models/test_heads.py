import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import reference
from vit_jax.models.heads import Head, make_pool
from vit_jax.models.vit import make_vit
from vit_jax.tree import named_leaves


def backbone(cls_token):
    shape = {"image_size": 4, "dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12}
    return nnx.eval_shape(
        lambda: make_vit(variant="Ti/2", **shape, cls_token=cls_token, rngs=nnx.Rngs(0))
    )


def pool(name, cls_token):
    def make():
        return make_pool(name, backbone(cls_token), rngs=nnx.Rngs(0))

    return reference.made(make)


def tokens(count=5):
    return np.random.default_rng(0).standard_normal((3, count, 8)).astype(np.float32)


def apply(module, x):
    return np.asarray(jax.jit(lambda x: module(x))(x))


@pytest.mark.parametrize(
    ("name", "cls_token"), [("cls", True), ("gap", True), ("gap", False), ("map", True)]
)
def test_pooling(name, cls_token):
    module = pool(name, cls_token)
    x = tokens()
    wanted = reference.pooled(name, module, x.astype(np.float64), int(cls_token))
    np.testing.assert_allclose(apply(module, x), wanted, rtol=1e-4, atol=1e-4)


def test_map_pooling_has_the_parameters_of_the_paper():
    leaves = named_leaves(nnx.to_pure_dict(nnx.state(pool("map", False))))
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
    answer = apply(pool("gap", False), jnp.asarray(x, jnp.bfloat16))
    assert answer.dtype == jnp.bfloat16  # a sum in bfloat16 would stall at 256
    np.testing.assert_allclose(answer.astype(np.float64), 1.004, atol=0.005)


def test_class_token_pooling_needs_a_class_token():
    with pytest.raises(ValueError, match=r"pool='cls' needs model.cls_token=True"):
        make_pool("cls", backbone(False), rngs=nnx.Rngs(0))


def test_unknown_pooling_lists_the_choices():
    with pytest.raises(
        ValueError, match="pool='max' is unknown; choose one of 'cls', 'gap', 'map'"
    ):
        make_pool("max", backbone(False), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_head(hidden_dim):
    def make():
        return Head(8, 4, hidden_dim=hidden_dim, bias_init=-math.log(4), rngs=nnx.Rngs(0))

    head, x = reference.initialised(make), tokens()[:, 0]
    np.testing.assert_allclose(apply(head, x), -math.log(4) * np.ones((3, 4)), rtol=1e-6)
    head = reference.made(make)
    np.testing.assert_allclose(apply(head, x), reference.logits(head, x), rtol=1e-4, atol=1e-5)
    assert apply(head, jnp.asarray(x, jnp.bfloat16)).dtype == np.float32
