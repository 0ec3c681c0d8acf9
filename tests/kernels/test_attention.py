import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from vit_jax.kernels.attention import Segments, attention

run = functools.partial(jax.jit, static_argnames="num_heads")(attention)


def qkv(dtype, batch=3, tokens=7, dim=12):
    x = 2 * np.random.default_rng(0).standard_normal((batch, tokens, 3 * dim))
    return jnp.asarray(x, dtype)


def masks():
    rng = np.random.default_rng(1)
    keys = rng.random((3, 7)) < 0.6
    keys[:, 2] = True
    segments = np.array([[0, 0, 0, 1, 1, 2, 2]] * 3, np.int32)
    return {
        "none": None,
        "keys": keys,
        "segments": Segments(segments, np.where(np.arange(7) == 1, -1, segments)),
    }


@pytest.mark.parametrize("mask", ["none", "keys", "segments"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_attention_is_that_of_the_paper(dtype, tolerance, mask):
    mask, x = masks()[mask], qkv(dtype)
    out = run(x, num_heads=3, mask=mask)
    assert out.dtype == dtype and out.shape == (3, 7, 12)
    if isinstance(mask, Segments):
        mask = mask.queries[:, :, None] == mask.keys[:, None]
    elif mask is not None:
        mask = np.broadcast_to(mask[:, None], (3, 7, 7))
    query, key, value = np.split(np.asarray(x, np.float64), 3, axis=-1)
    wanted = reference.attention(query, key, value, 3, mask)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=tolerance)


def test_what_is_masked_has_no_influence_and_gets_no_gradient():
    mask = masks()["keys"]

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: (attention(x, num_heads=3, mask=mask)[:, 2] ** 2).sum())(x)

    grad = np.asarray(gradient(qkv(jnp.float32)))[:, :, 12:]  # of keys and values
    assert (grad[~mask] == 0).all() and (np.abs(grad[mask]).sum(-1) > 0).all()


@pytest.mark.parametrize("implementation", ["xla", "interpret", "interpret_gpu"])
def test_a_query_that_may_look_nowhere_answers_zeros_and_has_no_gradient(implementation):
    x = jnp.tile(qkv(jnp.float32, dim=64), (1, 3, 1))
    segments = np.repeat([[0, 1, 2]], 7, axis=1).repeat(3, axis=0).astype(np.int32)
    mask = Segments(segments, np.where(segments == 1, -1, segments))
    options = {"num_heads": 2, "mask": mask, "implementation": implementation}
    out, pull = jax.vjp(jax.jit(lambda x: attention(x, **options)), x)
    nowhere = segments == 1
    assert (out[nowhere] == 0).all() and (out[~nowhere] != 0).all()
    (grad,) = pull(jnp.where(nowhere[..., None], 1.0, 0.0) * jnp.ones_like(out))
    assert (grad == 0).all()


def test_scores_and_softmax_are_in_float32():
    traced = jax.make_jaxpr(functools.partial(attention, num_heads=3))(qkv(jnp.bfloat16))
    for eqn, _ in reference.equations(traced.jaxpr):
        if eqn.primitive.name in ("exp", "div", "reduce_sum", "reduce_max"):
            assert eqn.invars[0].aval.dtype == jnp.float32, eqn
