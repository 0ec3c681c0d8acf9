"""Weights for another resolution or patch size: linear maps, computed in float64 on the host."""

from collections.abc import Callable

import numpy as np


def triangle(x: np.ndarray) -> np.ndarray:
    """The bilinear kernel, of distances in samples."""
    return np.maximum(0, 1 - np.abs(x))


def keys_cubic(x: np.ndarray) -> np.ndarray:
    """The bicubic kernel with a = -1/2 (Keys 1981), of distances in samples."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resize_matrix(
    old: int, new: int, kernel: Callable[[np.ndarray], np.ndarray] = keys_cubic
) -> np.ndarray:
    """[new, old] float64: resampling of a row of `old` samples, half-pixel centres, antialiased.

    The kernel is stretched when there are fewer samples afterwards, and cut and renormalised at
    the border: what `jax.image.resize` does, and torch's `interpolate(antialias=True)`.
    """
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    distances = (centres[:, None] - np.arange(old)) / max(old / new, 1)
    weights = kernel(distances)
    return weights / weights.sum(axis=1, keepdims=True)


def resize_positions(
    table: np.ndarray, old: tuple[int, int], new: tuple[int, int], *, num_prefix: int
) -> np.ndarray:
    """A position table for another grid; the rows of prefix tokens stay as they are.

    Antialiased bicubic: bilinear blurs (the table's neighbours differ by whole periods at the high
    frequencies), and without antialiasing a smaller grid drops rows. timm resamples alike.

    Args:
      table: [num_prefix + height * width, dim].
      old, new: patches in height and width.
      num_prefix: class and distillation tokens in front.
    """
    if old == new:
        return table
    prefix, grid = np.split(np.asarray(table, np.float64), [num_prefix])
    grid = grid.reshape(*old, -1)
    rows, columns = (resize_matrix(a, b) for a, b in zip(old, new, strict=True))
    grid = np.einsum("ai,bj,ijd->abd", rows, columns, grid, optimize=True)
    return np.concatenate([prefix, grid.reshape(-1, grid.shape[-1])]).astype(np.float32)


def resize_patch_kernel(kernel: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """A patch embedding for another patch size, by pseudo-inverse (FlexiViT, section 3.4).

    Beyer et al. 2023: with B the bilinear resize of a patch, the weights that answer for a resized
    patch Bx what w answered for x are pinv(Bᵀ) w: exact when patches grow, least squares over
    white inputs when they shrink. B is separable, so its pseudo-inverse is, too.

    Args:
      kernel: [height, width, channels, dim].
      new: height and width wanted.
    """
    if kernel.shape[:2] == tuple(new):
        return kernel
    rows, columns = (
        np.linalg.pinv(resize_matrix(a, b, triangle).T)
        for a, b in zip(kernel.shape[:2], new, strict=True)
    )
    wide = np.asarray(kernel, np.float64)
    return np.einsum("ai,bj,ijcd->abcd", rows, columns, wide, optimize=True).astype(np.float32)
