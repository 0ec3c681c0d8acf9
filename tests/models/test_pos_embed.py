import numpy as np
import pytest

from tests.models import reference
from vit_jax.models.pos_embed import sincos2d


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
