"""In which form images are stored: the trade of disk for cores.

| store | on disk | to read a random crop |
|---|---|---|
| `jpeg` | each file as it came | decodes down to the crop's last row |
| `tiled` | the same with restart markers, 1% larger | decodes the tiles around the crop |
| `resized` | JPEGs with tiles, whose shorter side is at most a given one | the same, of less |
| `raw` | the pixels | copies nothing, decodes nothing |

All but `raw` are TFDS datasets.
"""

import dataclasses
from typing import Any

import cv2
import numpy as np
from PIL import Image

from vit_jax.data import jpeg
from vit_jax.data.ingest import Ingested

STORES = ("jpeg", "tiled", "resized", "raw")

QUALITY = 95
"""Of JPEGs that are encoded anew."""


@dataclasses.dataclass(frozen=True)
class Store:
    """How `vit-jax prepare` stores images.

    Attributes:
      name: one of STORES.
      size: the shorter side in pixels that larger images are reduced to, for `resized` and `raw`;
        0 keeps them as they are, which only `raw` may.
    """

    name: str = "jpeg"
    size: int = 0

    def __post_init__(self):
        if self.name not in STORES:
            raise ValueError(f"store={self.name!r} is unknown; choose from {', '.join(STORES)}")
        if self.size < 0:
            raise ValueError(f"store_size={self.size} must be a number of pixels, such as 256")
        if self.name == "resized" and not self.size:
            raise ValueError("store='resized' needs the shorter side, such as --store_size=256")
        if self.name in ("jpeg", "tiled") and self.size:
            raise ValueError(
                f"store={self.name!r} keeps sizes; leave store_size out, or choose 'resized'"
            )

    def take(self, image: Ingested) -> Ingested:
        """An image as it is to be stored; of a raw store the pixels alone count.

        Raises FileNotFoundError where `tiled` finds no `jpegtran`.
        """
        if self.name == "tiled":
            return image._replace(data=jpeg.tiled(image.data) or image.data)
        if self.size and min(image.pixels.shape[:2]) > self.size:
            pixels = reduce(image.pixels, self.size)
            if self.name == "raw":
                return image._replace(data=b"", pixels=pixels)
            data = encode_tiled(pixels)
            return image._replace(data=data, pixels=pixels)
        return image._replace(data=b"") if self.name == "raw" else image


AS_IT_CAME = Store()


def reduce(pixels: np.ndarray, size: int) -> np.ndarray:
    """Makes the shorter side `size`, antialiased and bicubic; the other one follows, rounded."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    sides = max(size, round(width * scale)), max(size, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(sides, Image.Resampling.BICUBIC))


def encode_tiled(pixels: np.ndarray) -> bytes:
    """A JPEG with tiles (4:2:0), grey if all channels are the same."""
    grey = bool((pixels == pixels[..., :1]).all())
    options: list[Any] = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    if not grey:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    picture = pixels[..., 0] if grey else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    plain = cv2.imencode(".jpg", picture, options)[1].tobytes()
    interval = jpeg.tile_interval(jpeg.layout(plain))
    options += [cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    data = cv2.imencode(".jpg", picture, options)[1].tobytes()
    return jpeg.with_index(data) or data
