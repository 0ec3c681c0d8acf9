"""Position embeddings."""

import jax
import jax.numpy as jnp


def sincos2d(grid: tuple[int, int], dim: int, *, temperature: float = 10_000.0) -> jax.Array:
    """Fixed two-dimensional sine-cosine positions (Chen et al. 2021, MoCo v3, appendix).

    Args:
      grid: patches in height and width.
      dim: a multiple of 4; a quarter each for sin x, cos x, sin y, cos y.
      temperature: base of the geometric series of wavelengths.

    Returns:
      [height * width, dim] float32, row by row.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4 for sincos2d positions.")
    rows, columns = jnp.indices(grid).reshape(2, -1)
    omega = temperature ** -(jnp.arange(dim // 4) / max(dim // 4 - 1, 1))
    x, y = columns[:, None] * omega, rows[:, None] * omega
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)
