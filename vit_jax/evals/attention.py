"""The ViT paper's figures: what a model looks at, and what its embeddings have learnt."""

import base64
import dataclasses
import functools
import io

import jax
import numpy as np
from PIL import Image

from vit_jax.evals.base import Evaluation, Reader, Scores, Value

NUM_FILTERS, FILTERS_A_ROW = 28, 7  # as in Dosovitskiy et al. 2021, figure 7
SIDE = 128  # pixels that a map has at least


@dataclasses.dataclass(kw_only=True, eq=False)
class AttentionFigures(Evaluation):
    """Mean attention distance of each layer, and pictures for the report.

    Args:
      num_images: the first so many of the split.

    The other arguments are `Evaluation`'s.
    """

    num_images: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.num_images < 1:
            raise ValueError(f"num_images={self.num_images} must be at least 1.")

    def measure(self, reader: Reader) -> Scores:
        """distance_layer0, …: in pixels, the mean over images, heads and patches.

        Artefacts: 'attention_distance' ([layers][heads], pixels) and 'pictures', a list of
        {'kind', 'title', 'png' (base64)}: 'image', 'attention' (of the last layer, mean of the
        heads), 'rollout', 'positions' (cosine similarity of the position embeddings, one small map
        for each patch) and 'filters' (principal components of the patch embedding).
        """
        model, images = reader.model, self._images()
        weights = np.asarray(_weights(*model, images))
        backbone = model.module().backbone
        distance = mean_distance(weights, backbone.grid, backbone.patch_size)
        values = [
            Value(f"distance_layer{layer}", float(heads.mean()), len(images))
            for layer, heads in enumerate(distance)
        ]
        pictures = [*_maps(images, weights, backbone), *_embeddings(backbone)]
        return Scores(values, {"attention_distance": distance.tolist(), "pictures": pictures})

    def _images(self) -> np.ndarray:
        found, needed = [], self.num_images
        with self.loader(self.split) as loader:
            for batch in loader:
                found.append(batch["image"][batch["mask"]][:needed])
                needed -= len(found[-1])
                if needed <= 0:
                    break
        return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _weights(build, variables, images) -> jax.Array:
    model = build(variables)
    return model.backbone.attention(model.preprocess(images))


def mean_distance(
    weights: np.ndarray, grid: tuple[int, int], patch_size: tuple[int, int]
) -> np.ndarray:
    """How far patches look (Dosovitskiy et al. 2021, section 4.5 and appendix D.7).

    Args:
      weights: [layers, images, heads, queries, keys]; the last rows × columns tokens are patches.
      grid: rows and columns.
      patch_size: in pixels.

    Returns:
      [layers, heads] pixels: the distance between query and key patch, weighted by attention among
      the patches, mean over images and queries.
    """
    patches = grid[0] * grid[1]
    among = weights[..., -patches:, -patches:].astype(np.float64)
    among /= among.sum(axis=-1, keepdims=True)
    rows, columns = np.divmod(np.arange(patches), grid[1])
    places = np.stack([rows * patch_size[0], columns * patch_size[1]], axis=1)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)  # [queries, keys]
    return (among * apart).sum(axis=-1).mean(axis=(1, 3))


def rollout(weights: np.ndarray) -> np.ndarray:
    """Attention through all layers (Abnar & Zuidema 2020, section 3), mean of the heads.

    Args:
      weights: [layers, images, heads, queries, keys].

    Returns:
      [images, queries, inputs], each row a distribution.
    """
    identity = np.eye(weights.shape[-1])
    total = np.broadcast_to(identity, (weights.shape[1], *identity.shape))
    for layer in weights.mean(axis=2, dtype=np.float64):
        total = (0.5 * layer + 0.5 * identity) @ total
    return total


def looked_at(attention: np.ndarray, backbone) -> np.ndarray:
    """[images, queries, keys] -> [images, rows, columns] of the class token, else of all."""
    rows, columns = backbone.grid
    query = attention[:, 0] if backbone.cls_token is not None else attention.mean(axis=1)
    return query[:, -rows * columns :].reshape(-1, rows, columns)


def _maps(images: np.ndarray, weights: np.ndarray, backbone) -> list[dict[str, str]]:
    last = looked_at(weights[-1].mean(axis=1), backbone)
    through = looked_at(rollout(weights), backbone)
    pictures = []
    for number, image in enumerate(images):
        pictures.append(_picture("image", f"image {number}", image))
        pictures.append(_picture("attention", f"last layer, image {number}", _grey(last[number])))
        pictures.append(_picture("rollout", f"rollout, image {number}", _grey(through[number])))
    return pictures


def _embeddings(backbone) -> list[dict[str, str]]:
    found = []
    if backbone.pos_embed is not None:
        similar = position_similarity(np.asarray(backbone.pos_embed[...]), backbone.grid)
        # Brighter than the brightest, which is each position's own.
        tiles = _grey(_tiled(similar, gap=similar.max() + 0.15 * np.ptp(similar)))
        found.append(_picture("positions", "similarity of positions", tiles))
    filters = patch_filters(np.asarray(backbone.patch_embed.kernel[...]))
    tiles = _tiled(_in_rows(filters, FILTERS_A_ROW), gap=1.0)
    return [*found, _picture("filters", "principal components of the patch embedding", tiles)]


def position_similarity(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[tokens, dim] -> [rows, columns, rows, columns], cosines of the patches' embeddings."""
    rows, columns = grid
    x = table[-rows * columns :].astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return (x @ x.T).reshape(rows, columns, rows, columns)


def patch_filters(kernel: np.ndarray) -> np.ndarray:
    """[height, width, channels, dim] -> [filters, height, width, channels] in 0 … 1.

    The first principal components of the patch embedding's filters, each stretched to its range.
    """
    flat = kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    components = np.linalg.svd(flat, full_matrices=False)[0].T[:NUM_FILTERS]
    components = components.reshape(-1, *kernel.shape[:3])
    low = components.min(axis=(1, 2, 3), keepdims=True)
    high = components.max(axis=(1, 2, 3), keepdims=True)
    return (components - low) / np.maximum(high - low, 1e-12)


def _in_rows(tiles: np.ndarray, columns: int) -> np.ndarray:
    """[number, …] -> [rows, columns, …], white where there are no more."""
    missing = -len(tiles) % columns
    tiles = np.pad(tiles, [(0, missing)] + [(0, 0)] * (tiles.ndim - 1), constant_values=1.0)
    return tiles.reshape(-1, columns, *tiles.shape[1:])


def _tiled(tiles: np.ndarray, *, gap: float) -> np.ndarray:
    """[rows, columns, height, width, …] -> one picture, tiles side by side, `gap` between them."""
    width = [(0, 0), (0, 0), (0, 1), (0, 1)] + [(0, 0)] * (tiles.ndim - 4)
    tiles = np.pad(tiles, width, constant_values=gap)
    rows, columns, height, width = tiles.shape[:4]
    return np.moveaxis(tiles, 2, 1).reshape(rows * height, columns * width, *tiles.shape[4:])


def _grey(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / max(float(x.max() - x.min()), 1e-12)


def _picture(kind: str, title: str, pixels: np.ndarray) -> dict[str, str]:
    if pixels.dtype != np.uint8:
        pixels = np.round(255 * pixels).astype(np.uint8)
    image = Image.fromarray(pixels)
    times = max(SIDE // max(image.size), 1)
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return {"kind": kind, "title": title, "png": base64.b64encode(file.getvalue()).decode()}
