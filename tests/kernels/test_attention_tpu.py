"""The TPU kernel's own ways, interpreted; `test_kernels.py` holds its numbers to float64."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from tests.kernels.float64 import TOKENS, check, draw, run
from vit_jax.kernels import attention as kernels
from vit_jax.kernels import attention_tpu
from vit_jax.kernels.attention import attention


def test_groups_of_heads_in_a_loop_are_the_same(monkeypatch):
    monkeypatch.setattr(attention_tpu, "MAX_UNROLLED", 1)
    assert attention_tpu.heads_a_group(24, 256, 8) == 4
    check(2, 24, 8, 32, "float32", masked=True, implementation="interpret")


def test_cells_of_some_images_add_up_to_the_biases_gradient(monkeypatch):
    monkeypatch.setattr(attention_tpu, "CELL_BYTES", 120_000)  # 2 of 6 images of 49 kB
    qkv = jax.ShapeDtypeStruct((6, 24, 3 * 64), jnp.float32)
    out, lse = jax.eval_shape(lambda x: attention_tpu.forward(x, None, None, num_heads=2), qkv)
    sums = jax.eval_shape(
        lambda *x: attention_tpu.backward(x[0], None, None, *x[1:], num_heads=2),
        *(qkv, out, lse, out),
    )[1]
    assert sums.shape == (3, 1, 3 * 64)
    check(6, 24, 2, 32, "float32", masked=False, implementation="interpret")


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


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}, {"data": 4, "tensor": 1}])
@pytest.mark.parametrize("implementation", ["xla", "interpret", "interpret_gpu"])
def test_heads_in_groups_are_the_same(axes, implementation):
    qkv, bias, grad, mask = draw(4, 16, 4, 32, "float32", masked=True)

    def grouped(x):  # heads 0 and 1, 2 and 3
        x = x.reshape(*x.shape[:-1], -1, 2, 64)
        return jnp.moveaxis(x, -2, 0).reshape(2, *x.shape[:-3], -1)

    mesh = jax.make_mesh(
        *(tuple(axes.values()), tuple(axes)),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[: math.prod(axes.values())],
    )
    with jax.set_mesh(mesh) if axes else contextlib.nullcontext():
        found = run(*map(grouped, (qkv, bias, grad)), mask, 2, implementation)
    for one, other in zip(found, run(qkv, bias, grad, mask, 4, "xla"), strict=True):
        np.testing.assert_allclose(one, grouped(other), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("implementation", ["auto", "xla", "interpret", "interpret_gpu"])
@pytest.mark.parametrize(
    ("shape", "num_heads", "dtype", "why"),
    [
        ((2, 16, 3 * 129), 2, jnp.float32, r"num_heads=2 dividing dim, not \(2, 16, 387\)"),
        ((2, 16, 193), 1, jnp.float32, r"3 \* dim\] .*, not \(2, 16, 193\)"),
        ((16, 192), 1, jnp.float32, r"qkv is \[batch, tokens, .*, not \(16, 192\)"),
        ((2, 16, 192), 1, jnp.int32, "floating point, not int32"),
    ],
)
def test_what_is_no_qkv_is_said(shape, num_heads, dtype, why, implementation):
    """Heads of 64 and a half a kernel would round down."""
    with pytest.raises(ValueError, match=why):
        attention(jnp.zeros(shape, dtype), num_heads=num_heads, implementation=implementation)


def test_the_kernel_on_another_platform_is_an_error():
    with pytest.raises(ValueError, match="runs on TPU, not on cpu"):
        attention(jnp.zeros((2, 16, 192)), num_heads=1, implementation="tpu")
    with pytest.raises(ValueError, match="choose one of 'auto', 'xla', 'tpu', 'interpret'"):
        attention(jnp.zeros((2, 16, 192)), num_heads=1, implementation="flash")


def test_devices_that_do_not_divide_the_batch_are_named():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="8 devices, which do not divide 3"):
        attention(jnp.zeros((3, 16, 192)), num_heads=1, implementation="interpret")


@pytest.mark.parametrize(
    ("shape", "what"), [((4, 16, 576), "heads"), ((3, 4, 16, 192), "groups of heads")]
)
def test_devices_that_do_not_divide_the_heads_are_named(shape, what):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    num_heads = 3 if what == "heads" else 1
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=f"the {what} over 2 .* divide 3"):
        attention(jnp.zeros(shape), num_heads=num_heads, implementation="interpret")


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


@pytest.mark.parametrize(
    ("tokens", "num_heads", "head_dim", "taken"),
    [(196, 6, 64, "tpu"), (256, 16, 104, "tpu"), (577, 16, 64, "xla"), (256, 48, 128, "xla")],
)
def test_on_a_v4_with_its_small_memory_large_images_go_without(tokens, num_heads, head_dim, taken):
    """As its compiler has it: of the last two the backward pass, or both, are refused."""
    device = jax.sharding.AbstractDevice("TPU v4", 1, "tpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    qkv = jax.ShapeDtypeStruct((8, tokens, 3 * num_heads * head_dim), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        assert kernels.choose("auto", qkv, num_heads) == taken
        if taken == "xla":
            with pytest.raises(ValueError, match="MiB of the chip's own memory, of which it has"):
                kernels.choose("tpu", qkv, num_heads)
        elif tokens == 196:  # ten images of 1.2 MiB would take 24
            cells = jax.eval_shape(
                lambda q, o, s: attention_tpu.backward(q, None, None, o, s, o, num_heads=6),
                *(qkv, jax.ShapeDtypeStruct((8, 196, 384), jnp.bfloat16)),
                jax.ShapeDtypeStruct((8, 6, 196), jnp.float32),
            )[1].shape[0]
            assert cells == 4
