"""The short-sequence kernel, interpreted, against float64; memory that nobody wrote is NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from vit_jax.kernels import attention as kernels
from vit_jax.kernels import attention_tpu
from vit_jax.kernels.attention import Segments, attention

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
TOKENS = (16, 17, 49, 196, 197, 201, 256, 257, 261, 576, 577, 1025, 1100)
HEADS = ((4, 32), (6, 64), (2, 72), (16, 72), (16, 80), (3, 88), (16, 88), (4, 96), (1, 128))
"""(num_heads, head_dim): some fill whole tiles, some do not."""


def draw(batch, tokens, num_heads, head_dim, dtype, masked=False):
    """qkv, the bias in it, the output's gradient, and segments of which each has a key."""
    rng = np.random.default_rng([tokens, num_heads, head_dim])
    dim = num_heads * head_dim
    qkv = jnp.asarray(1.5 * rng.standard_normal((batch, tokens, 3 * dim)), dtype)
    bias = jnp.asarray(rng.standard_normal(3 * dim), jnp.float32)
    grad = jnp.asarray(rng.standard_normal((batch, tokens, dim)), dtype)
    if not masked:
        return qkv, bias, grad, None
    segments = rng.integers(0, 3, (batch, tokens)).astype(np.int32)
    keep = rng.random((batch, tokens)) < 0.8
    segments[:, :3], keep[:, :3] = range(3), True
    return qkv, bias, grad, Segments(segments, np.where(keep, segments, -1))


def exact(qkv, grad, num_heads, mask):
    """Output and gradient of qkv in float64."""
    qkv, grad = (np.asarray(x, np.float64) for x in (qkv, grad))
    batch, tokens = qkv.shape[:2]
    heads = qkv.reshape(batch, tokens, 3, num_heads, -1)
    query, key, value = heads.transpose(2, 0, 3, 1, 4)
    scale = query.shape[-1] ** -0.5
    scores = query @ key.mT * scale
    if mask is not None:
        same = mask.queries[:, None, :, None] == mask.keys[:, None, None, :]
        scores = np.where(same, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    upstream = grad.reshape(batch, tokens, num_heads, -1).swapaxes(1, 2)
    weights_grad = upstream @ value.mT
    inner = (weights * weights_grad).sum(-1, keepdims=True)
    scores_grad = weights * (weights_grad - inner) * scale
    grads = scores_grad @ key, scores_grad.mT @ query, weights.mT @ upstream
    out = (weights @ value).swapaxes(1, 2).reshape(grad.shape)
    return out, np.stack([g.swapaxes(1, 2) for g in grads], axis=2).reshape(qkv.shape)


def relative(found, wanted):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@functools.partial(jax.jit, static_argnames=("num_heads", "implementation"))
def run(qkv, bias, grad, mask, num_heads, implementation="interpret"):
    """Output, and the gradients of qkv and bias."""
    options = {"num_heads": num_heads, "mask": mask, "implementation": implementation}
    out, vjp = jax.vjp(lambda qkv, bias: attention(qkv, bias=bias, **options), qkv, bias)
    return out, *vjp(grad)


def check(batch, tokens, num_heads, head_dim, dtype, masked):
    qkv, bias, grad, mask = draw(batch, tokens, num_heads, head_dim, dtype, masked)
    found = run(qkv, bias, grad, mask, num_heads)
    out, qkv_grad = exact(qkv, grad, num_heads, mask)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == jnp.float32
    for one, wanted in zip(found, (out, qkv_grad, qkv_grad.sum(axis=(0, 1))), strict=True):
        assert relative(one, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("tokens", "num_heads", "head_dim", "dtype", "masked"),
    [(196, 2, 64, "bfloat16", False), (33, 3, 80, "float32", True)],
)
def test_forward_and_gradients_are_those_of_float64(tokens, num_heads, head_dim, dtype, masked):
    check(1, tokens, num_heads, head_dim, dtype, masked)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_number_of_tokens(tokens, dtype):
    check(1, tokens, 2, 64, dtype, masked=tokens % 2 == 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_heads", "head_dim"), HEADS)
def test_every_kind_of_heads(num_heads, head_dim, dtype):
    check(2, 20, num_heads, head_dim, dtype, masked=False)


def test_groups_of_heads_in_a_loop_are_the_same(monkeypatch):
    monkeypatch.setattr(attention_tpu, "MAX_UNROLLED", 1)
    assert attention_tpu.heads_a_group(24, 256, 8) == 4
    check(2, 24, 8, 32, "float32", masked=True)


def test_queries_are_cut_into_whole_tiles():
    for tokens in TOKENS:
        slices = attention_tpu._queries(tokens)
        assert [s.start for s in slices] == [0] + [s.stop for s in slices[:-1]]
        assert slices[-1].stop == tokens
        assert all(s.start % 128 == 0 and s.stop - s.start <= 384 for s in slices)


@pytest.mark.parametrize("axes", [{"data": 4, "tensor": 2}, {"data": 8}])
def test_split_over_batch_and_heads_it_is_the_same(axes):
    operands = draw(8, 16, 2, 32, "float32", masked=True)
    alone = run(*operands, 2)
    types = (AxisType.Auto,) * len(axes)
    with jax.set_mesh(jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)):
        split = run(*operands, 2)
        text = run.lower(*operands, 2).as_text()
    assert "manual_computation" in text or "shard_map" in text
    for one, other in zip(split, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_rematerialisation_can_keep_its_residuals(capsys):
    qkv, bias, grad, _ = draw(1, 16, 1, 32, "float32")

    def loss(qkv):
        out = attention(qkv, num_heads=1, bias=bias, implementation="interpret")
        return (out * grad).sum()

    names = jax.checkpoint_policies.save_only_these_names(*kernels.RESIDUALS)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(loss, policy=names), qkv)
    kept = capsys.readouterr().out
    assert all(f"named '{name}'" in kept for name in kernels.RESIDUALS), kept
    assert "f32[1,16,32]" in kept and "f32[1,1,16]" in kept
    remade = jax.grad(jax.checkpoint(loss))(qkv)
    np.testing.assert_array_equal(jax.grad(jax.checkpoint(loss, policy=names))(qkv), remade)
    np.testing.assert_array_equal(jax.grad(loss)(qkv), remade)


@pytest.mark.parametrize(
    ("shape", "num_heads", "dtype", "why"),
    [
        ((2, 15, 192), 1, jnp.float32, "16 to 1100 tokens, not 15"),
        ((2, 1101, 192), 1, jnp.float32, "16 to 1100 tokens, not 1101"),
        ((2, 16, 72), 1, jnp.float32, "32 to 128 channels in steps of 8, not 24"),
        ((2, 16, 108), 1, jnp.float32, "32 to 128 channels in steps of 8, not 36"),
        ((2, 16, 192), 1, jnp.float16, "bfloat16 or float32, not float16"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(shape, num_heads, dtype, why):
    with pytest.raises(ValueError, match=why):
        attention(jnp.zeros(shape, dtype), num_heads=num_heads, implementation="interpret")


def test_the_kernel_on_another_platform_is_an_error():
    with pytest.raises(ValueError, match="runs on TPU, not on cpu"):
        attention(jnp.zeros((2, 16, 192)), num_heads=1, implementation="tpu")
    with pytest.raises(ValueError, match="choose one of 'auto', 'xla', 'tpu', 'interpret'"):
        attention(jnp.zeros((2, 16, 192)), num_heads=1, implementation="flash")


def test_devices_that_do_not_divide_the_batch_are_named():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="8 devices, which do not divide 3"):
        attention(jnp.zeros((3, 16, 192)), num_heads=1, implementation="interpret")


def test_auto_takes_what_the_table_says_and_logs_a_fallback_once(monkeypatch, caplog):
    assert kernels.choose("auto", jnp.zeros((8, 16, 192)), 1) == "xla"  # on CPU
    monkeypatch.setattr(kernels, "_platform", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    kernels._log_once.cache_clear()
    assert kernels.choose("auto", jnp.zeros((8, 16, 192)), 1) == "tpu"
    assert not caplog.records
    for _ in range(3):
        assert kernels.choose("auto", jnp.zeros((8, 7, 192)), 1) == "xla"
    assert [r.message for r in caplog.records] == [
        "attention: 'xla' instead of 'tpu', which takes 16 to 1100 tokens, not 7."
    ]


@pytest.mark.parametrize(("kind", "taken"), [("TPU v3", "xla"), ("TPU v4", "tpu")])
def test_on_tpus_whose_compiler_refuses_the_kernel_auto_goes_on_without(kind, taken):
    device = jax.sharding.AbstractDevice(kind, 2, "tpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert kernels.choose("auto", jnp.zeros((8, 16, 192)), 1) == taken
        if taken == "xla":
            with pytest.raises(ValueError, match="wants a TPU v4 or a newer one, not a TPU v3"):
                kernels.choose("tpu", jnp.zeros((8, 16, 192)), 1)
