import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from vit_jax.models.pos_embed import rope2d, rotate, sincos2d


@pytest.mark.parametrize(("grid", "dim"), [((2, 4), 16), ((3, 1), 8)])
def test_sincos2d_is_that_of_the_paper(grid, dim):
    table = sincos2d(grid, dim)
    assert table.shape == (grid[0] * grid[1], dim) and table.dtype == np.float32
    np.testing.assert_allclose(table, reference.sincos2d(*grid, dim), atol=1e-6)


def test_places_in_the_grid_differ():
    table = np.asarray(sincos2d((14, 14), 192))
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert (distances + np.eye(len(table)) > 0.5).all()


def test_dim_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="dim=6 must be a multiple of 4"):
        sincos2d((2, 2), 6)


@pytest.mark.parametrize(("grid", "head_dim"), [((2, 4), 16), ((3, 1), 8), ((14, 14), 64)])
def test_rope2d_is_that_of_the_paper(grid, head_dim):
    angles = rope2d(grid, head_dim)
    assert angles.shape == (grid[0] * grid[1], head_dim // 2) and angles.dtype == np.float32
    np.testing.assert_allclose(angles, reference.rope2d(*grid, head_dim), atol=2e-6)


def test_turning_is_that_of_complex_numbers():
    x = np.random.default_rng(0).standard_normal((2, 8, 3, 16)).astype(np.float32)
    angles = rope2d((2, 4), 16)
    turned = rotate(jnp.asarray(x, jnp.bfloat16), (jnp.cos(angles), jnp.sin(angles)))
    assert turned.dtype == np.float32
    turned = rotate(x, (jnp.cos(angles), jnp.sin(angles)))
    for head in range(3):
        wanted = reference.rotated(x[:, :, head], reference.rope2d(2, 4, 16))
        np.testing.assert_allclose(turned[:, :, head], wanted, atol=1e-5)


def test_scores_of_turned_queries_and_keys_depend_on_the_distance_only():
    angles = np.asarray(rope2d((5, 5), 16)).reshape(5, 5, 8)
    query, key = np.random.default_rng(0).standard_normal((2, 16))

    def score(one, other):
        return reference.rotated(query, angles[one]) @ reference.rotated(key, angles[other])

    assert score((0, 1), (2, 2)) == pytest.approx(score((2, 3), (4, 4)), abs=1e-4)
    assert abs(score((0, 1), (2, 2)) - score((0, 1), (2, 3))) > 0.1


def test_an_angle_of_zero_turns_nothing():
    x = np.random.default_rng(0).standard_normal((2, 8, 3, 16)).astype(np.float32)
    np.testing.assert_array_equal(rotate(x, (jnp.ones((8, 8)), jnp.zeros((8, 8)))), x)


def test_head_dim_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="head_dim=6 must be a multiple of 4"):
        rope2d((2, 2), 6)
