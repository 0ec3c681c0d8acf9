"""Losses: pure functions of arrays, one value an example, in float32."""

import jax
import jax.numpy as jnp
import optax


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-Σ targets · log softmax(logits).

    Args:
      logits: [batch, num_classes].
      targets: [batch, num_classes], each row a distribution.

    Returns:
      [batch] float32, in nats.
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy of every class on its own, summed (Beyer et al. 2020, section 4.1).

    Args and returns as for `softmax_cross_entropy`; targets need not sum to one.
    """
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).sum(-1)
