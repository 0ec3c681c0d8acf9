"""Every transform, there and back, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.interop.transforms import TRANSFORMS

SIZES = st.integers(1, 4)


def numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def there_and_back(kind, theirs, num_ours, heads=1):
    pair = TRANSFORMS[kind]
    ours = pair.forward(theirs, num_ours)
    assert len(ours) == num_ours
    again = pair.backward(ours, len(theirs), heads)
    for before, after in zip(theirs, again, strict=True):
        np.testing.assert_array_equal(before, after)
    return ours


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 99), st.sampled_from([(1, 1), (3, 1), (1, 2), (1, 3)]))
def test_linear_layers_and_their_biases(inputs, out, _, seed, counts):
    num_theirs, num_ours = counts
    out *= num_ours
    weights = [numbers((out, inputs), seed + i) for i in range(num_theirs)]
    ours = there_and_back("linear", weights, num_ours)
    assert ours[0].shape == (inputs, out * num_theirs // num_ours)
    whole = np.concatenate(ours, axis=1)
    for i, weight in enumerate(weights):
        np.testing.assert_array_equal(whole[:, i * out : (i + 1) * out], weight.T)
    there_and_back("same", [weight[:, 0] for weight in weights], num_ours)


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 99))
def test_convolutions(height, width, channels, dim, seed):
    weight = numbers((dim, channels, height, width), seed)
    (kernel,) = there_and_back("conv", [weight], 1)
    assert kernel.shape == (height, width, channels, dim)
    assert kernel[-1, 0, -1, 0] == weight[0, -1, -1, 0]


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, st.sampled_from([1, 3]), st.integers(0, 99))
def test_heads(heads, head_dim, inputs, num_theirs, seed):
    kernels = [numbers((inputs, heads, head_dim), seed + i) for i in range(num_theirs)]
    (ours,) = there_and_back("heads", kernels, 1, heads)
    assert ours.shape == (inputs, num_theirs * heads * head_dim)
    assert ours[-1, (heads - 1) * head_dim] == kernels[0][-1, heads - 1, 0]
    there_and_back("heads", [kernel[0] for kernel in kernels], 1, heads)
    (out,) = there_and_back("heads_out", [numbers((heads, head_dim, inputs), seed)], 1, heads)
    assert out.shape == (heads * head_dim, inputs)


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(0, 99))
def test_tokens(rows, dim, seed):
    (ours,) = there_and_back("batch", [numbers((1, rows, dim), seed)], 1)
    assert ours.shape == (rows, dim)


@pytest.mark.parametrize(
    "kind, shape, num_ours",
    [("linear", (3, 2), 2), ("batch", (2, 3, 4), 1), ("heads", (4,), 1), ("heads_out", (4, 4), 1)],
)
def test_a_shape_that_does_not_fit(kind, shape, num_ours):
    with pytest.raises(ValueError):
        TRANSFORMS[kind].forward([np.zeros(shape)], num_ours)
