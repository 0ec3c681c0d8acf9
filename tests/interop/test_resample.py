"""Resampling against plain loops in float64, and against what the transforms promise."""

import jax
import numpy as np
import pytest

from vit_jax.interop.resample import (
    keys_cubic,
    resize_matrix,
    resize_patch_kernel,
    resize_positions,
    triangle,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("old, new", [(7, 7), (4, 9), (9, 4), (14, 24), (3, 1), (1, 3)])
@pytest.mark.parametrize("kernel, method", [(keys_cubic, "cubic"), (triangle, "linear")])
def test_the_matrix_is_what_jax_does(old, new, kernel, method):
    samples = RNG.standard_normal((old, 3))
    wanted = jax.image.resize(samples.astype(np.float32), (new, 3), method, antialias=True)
    np.testing.assert_allclose(resize_matrix(old, new, kernel) @ samples, wanted, atol=1e-5)


def test_positions_by_plain_loops():
    old, new, dim, prefix = (4, 6), (3, 9), 5, 2
    table = RNG.standard_normal((prefix + 24, dim)).astype(np.float32)
    found = resize_positions(table, old, new, num_prefix=prefix)
    np.testing.assert_array_equal(found[:prefix], table[:prefix])
    assert found.dtype == np.float32
    rows, columns = resize_matrix(4, 3), resize_matrix(6, 9)
    grid = table[prefix:].astype(np.float64).reshape(4, 6, dim)
    for row in range(3):
        for column in range(9):
            wanted = sum(
                rows[row, i] * columns[column, j] * grid[i, j] for i in range(4) for j in range(6)
            )
            np.testing.assert_allclose(found[prefix + row * 9 + column], wanted, atol=1e-6)


def test_positions_of_the_same_grid_are_left_alone():
    table = RNG.standard_normal((5, 3)).astype(np.float32)
    assert resize_positions(table, (2, 2), (2, 2), num_prefix=1) is table


def test_a_constant_table_stays_constant():
    table = np.full((35, 2), 3.0, np.float32)
    for new in ((7, 5), (3, 4), (11, 2)):
        found = resize_positions(table, (5, 7), new, num_prefix=0)
        np.testing.assert_allclose(found, 3.0, rtol=1e-6)


@pytest.mark.parametrize("old, new", [((4, 4), (8, 8)), ((3, 5), (6, 7)), ((4, 2), (4, 6))])
def test_larger_patches_answer_the_same_for_resized_images(old, new):
    """Section 3.4: with more pixels than before, <Bx, pinv(Bᵀ)w> = <x, w> for every x."""
    kernel = RNG.standard_normal((*old, 3, 6)).astype(np.float32)
    patch = RNG.standard_normal((*old, 3))
    resized = np.einsum(
        "ai,bj,ijc->abc",
        resize_matrix(old[0], new[0], triangle),
        resize_matrix(old[1], new[1], triangle),
        patch,
    )
    found = np.tensordot(resized, resize_patch_kernel(kernel, new).astype(np.float64), 3)
    np.testing.assert_allclose(found, np.tensordot(patch, kernel, 3), atol=1e-4)


def test_smaller_patches_are_the_least_squares_solution():
    kernel = RNG.standard_normal((6, 6, 1, 2))
    b = np.kron(resize_matrix(6, 3, triangle), resize_matrix(6, 3, triangle))  # [9, 36]
    wanted = np.linalg.lstsq(b.T, kernel.reshape(36, 2), rcond=None)[0]
    found = resize_patch_kernel(kernel, (3, 3)).reshape(9, 2)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
