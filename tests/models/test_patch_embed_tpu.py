"""What the TPU compiler makes of the patch embedding; needs libtpu, and no TPU."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vit_jax import hlo, plan
from vit_jax.models.layers import PatchEmbed
from vit_jax.preprocess import Preprocess

BATCH, SIDE, DIM = 128, 224, 384
IMAGES = BATCH * SIDE * SIDE * 3


@pytest.fixture(scope="module")
def program():
    """From uint8 images to patches with positions, and the gradients of kernel and bias."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    place = jax.sharding.SingleDeviceSharding(plan.topology("v5e:4x4").devices[0])
    module = nnx.eval_shape(lambda: PatchEmbed((16, 16), DIM, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(module)

    def embed(params, images, positions):
        return nnx.merge(graphdef, params)(Preprocess()(images)) + positions

    def step(params, images, positions, grad):
        out, vjp = jax.vjp(lambda params: embed(params, images, positions), params)
        return out, vjp(grad)

    def there(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    tokens = (SIDE // 16) ** 2
    operands = (
        nnx.to_pure_dict(params),
        jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.uint8),
        jax.ShapeDtypeStruct((tokens, DIM), jnp.bfloat16),
        jax.ShapeDtypeStruct((BATCH, tokens, DIM), jnp.bfloat16),
    )
    compiled = jax.jit(step).lower(*jax.tree.map(there, operands)).compile()
    return hlo.parse(compiled.as_text())


def written(program):
    """Arrays of whole images that some operation writes, fusions' insides aside."""
    for _, instruction, _, fused in program.visits():
        if fused or instruction.opcode in hlo.ALIASES or instruction.opcode.endswith("-start"):
            continue
        yield from (a for a in instruction.arrays if len(a.sides) and numbers(a) >= IMAGES)


def numbers(array):
    return array.bytes * 8 // hlo.ITEM_BITS[array.dtype]


@pytest.mark.slow
def test_images_are_never_float32_and_never_leave_the_chip_as_floats(program):
    arrays = list(written(program))
    assert not [a for a in arrays if a.dtype == "f32"]
    assert not [a for a in arrays if not a.on_chip], arrays


@pytest.mark.slow
def test_memory_sees_the_bytes_once_and_no_rearranged_copy(program):
    """All that the program writes to memory is its results."""
    sizes = sum(
        array.padded_bytes
        for _, instruction, _, fused in program.visits()
        if not fused and instruction.opcode not in (*hlo.ALIASES, "constant")
        if not instruction.opcode.endswith("-start")  # names its operand too
        for array in instruction.arrays
        if not array.on_chip
    )
    results = 2 * BATCH * (SIDE // 16) ** 2 * DIM + 4 * (16 * 16 * 3 + 1) * DIM
    assert sizes < 1.1 * results
