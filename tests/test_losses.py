import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.losses import sigmoid_cross_entropy, softmax_cross_entropy


def logits_and_targets():
    rng = np.random.default_rng(0)
    logits = 5 * rng.standard_normal((6, 10))
    targets = rng.random((6, 10)) ** 4
    return logits.astype(np.float32), (targets / targets.sum(-1, keepdims=True)).astype(np.float32)


def softmax_reference(logits, targets):
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(targets * log_probabilities).sum(-1)


def sigmoid_reference(logits, targets):
    p = 1 / (1 + np.exp(-logits))
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1)


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (softmax_cross_entropy, softmax_reference),
        (sigmoid_cross_entropy, sigmoid_reference),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_in_float64(loss, reference, dtype):
    logits, targets = logits_and_targets()
    logits = jnp.asarray(logits, dtype)
    out = loss(logits, jnp.asarray(targets))
    assert out.dtype == jnp.float32 and out.shape == (6,)
    wanted = reference(np.asarray(logits, np.float64), targets.astype(np.float64))
    np.testing.assert_allclose(out, wanted, rtol=1e-5)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_huge_logits_stay_finite(loss):
    logits = jnp.array([[1e4, -1e4, 0.0]])
    out = loss(logits, jnp.array([[0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(out, [2e4], rtol=1e-4)
    assert float(loss(logits, jnp.array([[1.0, 0.0, 0.0]]))[0]) < 1
