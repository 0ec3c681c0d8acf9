"""Our kernels, interpreted, against float64; memory that nobody wrote is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tests.kernels.float64 import HEADS, TOKENS, TOLERANCES, check

KERNELS = ("interpret", "interpret_gpu")


def test_memory_that_nobody_wrote_is_nan():
    """What the others lean on: no result of theirs was left out."""
    some = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    found = pl.pallas_call(lambda out: None, out_shape=some, interpret=True)()
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    ("tokens", "num_heads", "head_dim", "dtype", "masked"),
    [(196, 2, 64, "bfloat16", False), (33, 3, 80, "float32", True)],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_and_gradients_are_those_of_float64(
    tokens, num_heads, head_dim, dtype, masked, kernel
):
    check(2, tokens, num_heads, head_dim, dtype, masked, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_number_of_tokens(tokens, dtype, kernel):
    check(1, tokens, 2, 64, dtype, masked=tokens % 2 == 1, implementation=kernel)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kind_of_heads(num_heads, head_dim, dtype, kernel):
    check(2, 20, num_heads, head_dim, dtype, masked=False, implementation=kernel)
