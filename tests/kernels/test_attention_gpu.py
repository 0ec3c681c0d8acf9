"""What a GPU would run: our kernel's own ways, interpreted, and what is asked of cuDNN.

`test_kernels.py` holds the kernel's numbers to float64, interpreted.

On a GPU the kernel and cuDNN themselves are held to float64, too:

    VIT_JAX_TEST_PLATFORM=cuda pytest tests/kernels/test_attention_gpu.py -k test_on_a_gpu
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractMesh, AxisType

from tests.kernels.float64 import HEADS, TOKENS, check, draw, run
from vit_jax.kernels import attention as kernels
from vit_jax.kernels import attention_gpu
from vit_jax.kernels.attention import attention, choose

ON_GPU = jax.default_backend() == "gpu"


@pytest.mark.skipif(not ON_GPU, reason="no GPU here, or VIT_JAX_TEST_PLATFORM is not cuda")
@pytest.mark.parametrize("implementation", ["gpu", "cudnn"])
def test_on_a_gpu(implementation):
    for tokens in TOKENS:
        masked = implementation == "gpu" and tokens % 2 == 1
        check(2, tokens, 6, 64, "bfloat16", masked, implementation)
    for num_heads, head_dim in HEADS:
        check(2, 196, num_heads, head_dim, "bfloat16", False, implementation)


def test_split_over_batch_and_heads_it_is_the_same():
    operands = draw(8, 16, 2, 32, "float32", masked=True)
    alone = run(*operands, 2, "interpret_gpu")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = run(*operands, 2, "interpret_gpu")
    for one, other in zip(split, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture
def gpu(monkeypatch):
    """As in a process that compiles for a GPU which is elsewhere."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    kernels._log_once.cache_clear()
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def lowered(tokens, implementation):
    """The program for CUDA, forward and backward."""

    def loss(qkv):
        out = attention(qkv, num_heads=2, implementation=implementation)
        return out.astype(jnp.float32).sum()

    qkv = jax.ShapeDtypeStruct((4, tokens, 3 * 128), jnp.bfloat16)
    return jax.jit(jax.grad(loss)).trace(qkv).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [196, 197])
def test_what_cudnn_gets_is_what_it_takes(gpu, tokens):
    calls = [line for line in lowered(tokens, "cudnn").splitlines() if "custom_call" in line]
    forward, backward = (line for line in calls if "__cudnn$fmha" in line)
    assert "fmhaSoftmaxBackward" in backward and "fmhaSoftmaxBackward" not in forward
    even = tokens + tokens % 2
    for call in (forward, backward):
        assert f"tensor<4x{even}x2x64xbf16>" in call
        assert ("NO_MASK" in call) == (tokens == even)
        assert ("PADDING" in call) == (tokens != even)


@pytest.mark.parametrize("tokens", [20, 21])
def test_padding_for_cudnn_changes_nothing(gpu, monkeypatch, tokens):
    by_xla = jax.nn.dot_product_attention

    def instead(*operands, implementation, **lengths):
        assert implementation == "cudnn"
        return by_xla(*operands, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    check(2, tokens, 3, 32, "bfloat16", masked=False, implementation="cudnn")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_our_kernel_becomes_triton_code(gpu):
    text = lowered(197, "gpu")
    assert text.count("xla.gpu.triton") == 2
    assert "tensor<4x198" not in text and "stablehlo.concatenate" not in text  # all in place


def test_a_jax_without_triton_goes_on_without_the_kernel(gpu, monkeypatch):
    monkeypatch.setattr(attention_gpu, "plgpu", None)
    qkv = jax.ShapeDtypeStruct((8, 196, 1152), jnp.bfloat16)
    assert choose("auto", qkv, 6) == "cudnn"
    assert choose("auto", qkv, 6, masked=True) == "xla"
    with pytest.raises(ValueError, match="'gpu' needs Pallas' Triton backend, which this JAX lack"):
        choose("gpu", qkv, 6)


@pytest.mark.parametrize(
    ("shape", "num_heads", "dtype", "masked", "taken", "why"),
    [
        ((8, 196, 1152), 6, jnp.bfloat16, False, "cudnn", ""),
        ((8, 197, 1152), 6, jnp.float16, False, "cudnn", ""),
        ((8, 4097, 1152), 6, jnp.bfloat16, False, "cudnn", ""),
        ((8, 196, 1152), 6, jnp.bfloat16, True, "gpu", "takes no mask"),
        ((8, 4097, 1152), 6, jnp.bfloat16, True, "xla", "takes no mask"),
        ((8, 196, 1152), 6, jnp.float32, False, "xla", "takes bfloat16 or float16, not float32"),
        ((8, 7, 1152), 6, jnp.bfloat16, False, "xla", "takes 16 to 65536 tokens, not 7"),
        ((8, 196, 1296), 2, jnp.bfloat16, False, "xla", "takes heads of 8 to 128 .*, not 216"),
    ],
)
def test_auto_on_a_gpu(gpu, caplog, shape, num_heads, dtype, masked, taken, why):
    qkv = jax.ShapeDtypeStruct(shape, dtype)
    for _ in range(2):
        assert choose("auto", qkv, num_heads, masked=masked) == taken
    assert len(caplog.records) == bool(why)
    if why:
        assert caplog.records[0].message.startswith(f"attention: {taken!r} instead of 'cudnn', wh")
        with pytest.raises(ValueError, match=why):
            choose("cudnn", qkv, num_heads, masked=masked)


def test_a_gpu_without_the_tensor_cores_is_said(gpu, monkeypatch):
    class Device:
        compute_capability = "7.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    qkv = jax.ShapeDtypeStruct((8, 196, 1152), jnp.bfloat16)
    assert choose("auto", qkv, 6) == "xla"
    for name in ("cudnn", "gpu"):
        with pytest.raises(ValueError, match="compute capability 8.0 or more, not 7.0"):
            choose(name, qkv, 6)
    Device.compute_capability = "gfx942"
    with pytest.raises(ValueError, match="NVIDIA GPU .*, not gfx942"):
        choose("cudnn", qkv, 6)
    Device.compute_capability = "10.0"
    assert choose("auto", qkv, 6) == "cudnn"


@pytest.mark.parametrize("name", ["cudnn", "gpu"])
def test_on_another_platform_it_is_an_error(name):
    qkv = jnp.zeros((2, 16, 192), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"{name}' runs on GPU, not on cpu; use 'auto' or 'xla'"):
        attention(qkv, num_heads=1, implementation=name)
