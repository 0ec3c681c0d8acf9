import base64
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.models import reference
from vit_jax.evals import attention as figures
from vit_jax.models.vit import make_vit


def vit(**options):
    shape = {"image_size": (8, 12), "dim": 16, "depth": 3, "num_heads": 2, "mlp_dim": 12}
    return reference.made(lambda: make_vit(variant="Ti/4", **shape, **options, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "options", [{}, {"cls_token": True, "pos_embed": "rope2d"}, {"scan": True}]
)
def test_the_weights_are_those_that_the_blocks_use(options):
    model = vit(**options)
    images = np.random.default_rng(0).standard_normal((2, 8, 12, 3)).astype(np.float32)
    weights = np.asarray(jax.jit(lambda: model.attention(jnp.asarray(images)))())
    tokens = model.num_tokens
    assert weights.shape == (3, 2, 2, tokens, tokens)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    w = reference.Weights(model)
    outputs = reference.outputs(model, images.astype(np.float64))
    # From the weights and the values alone follows each block's output.
    for layer in (1, 2):
        x = outputs[layer - 1]
        normed = w.norm(f"blocks/{layer}/norm1", x)
        value = np.split(w.linear(f"blocks/{layer}/attn/qkv", normed), 3, axis=-1)[2]
        heads = [weights[layer][:, h] @ v for h, v in enumerate(np.split(value, 2, axis=-1))]
        y = x + w.linear(f"blocks/{layer}/attn/proj", np.concatenate(heads, axis=-1))
        y = y + w.mlp(f"blocks/{layer}/mlp", w.norm(f"blocks/{layer}/norm2", y))
        np.testing.assert_allclose(y, outputs[layer], atol=1e-4)


def test_distances_by_hand():
    # Four patches in a row of 1 × 4, 10 pixels apart, behind a class token that does not count.
    weights = np.zeros((1, 1, 2, 5, 5))
    weights[0, 0, 0] = 0.2  # everywhere alike
    weights[0, 0, 1] = np.eye(5)  # at itself
    distance = figures.mean_distance(weights, (1, 4), (7, 10))
    alike = np.abs(np.arange(4)[:, None] - np.arange(4)).mean() * 10
    np.testing.assert_allclose(distance, [[alike, 0.0]])


def test_rollout_by_hand():
    first, second = np.full((2, 2), 0.5), np.array([[1.0, 0.0], [1.0, 0.0]])
    weights = np.stack([first, second])[:, None, None]
    by_hand = (second + np.eye(2)) / 2 @ ((first + np.eye(2)) / 2)
    np.testing.assert_allclose(figures.rollout(weights)[0], by_hand)


def test_pictures_can_be_opened():
    model = vit()
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    weights = np.asarray(model.attention(jnp.asarray(images, jnp.float32) / 255))
    found = [*figures._maps(images, weights, model), *figures._embeddings(model)]
    kinds = [picture["kind"] for picture in found]
    assert kinds == 2 * ["image", "attention", "rollout"] + ["positions", "filters"]
    for picture in found:
        Image.open(io.BytesIO(base64.b64decode(picture["png"]))).verify()
    same = figures.position_similarity(np.asarray(model.pos_embed[...]), model.grid)
    np.testing.assert_allclose([same[0, 1, 0, 1], same[1, 2, 1, 2]], 1)
    components = figures.patch_filters(np.asarray(model.patch_embed.kernel[...]))
    assert components.shape == (16, 4, 4, 3) and components.min() == 0 and components.max() == 1


def test_filters_stand_in_rows_and_maps_apart():
    filters = np.zeros((9, 4, 4, 3))
    tiles = figures._tiled(figures._in_rows(filters, 7), gap=1.0)
    assert tiles.shape == (2 * 5, 7 * 5, 3)
    assert tiles[5:9, 5:9].max() == 0 and tiles[5:, 10:].min() == 1  # the ninth is the last
    (picture,) = [x for x in figures._embeddings(vit()) if x["kind"] == "positions"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png"]))))
    assert pixels[0, 0] < pixels[-1, -1] == 255  # of a position by itself, and the paper
