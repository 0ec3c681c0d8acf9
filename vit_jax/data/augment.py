"""Augmentation recipes: a record and its random numbers in, uint8 arrays of one size out.

A recipe is `recipe(record, rng, *, size, …options) -> {'image': uint8 [height, width, 3]}`. Every
random choice is drawn with `rng.random()`, in a fixed order, and with nothing else: the stream of
that one method is what NumPy keeps stable. One that also takes `out` may write its arrays there,
which is the batch itself, and answer those: then nothing is copied.
"""

import dataclasses
import functools
import inspect
import io
import math
from collections.abc import Callable
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from vit_jax.data import decode
from vit_jax.spelling import nearest

Size = tuple[int, int]
Arrays = dict[str, np.ndarray]


class Rng(Protocol):
    """`order.ExampleRng`, or NumPy's Generator."""

    def random(self) -> float:
        """The next number, uniform in [0, 1)."""


def none(record: dict, rng: Rng, *, size: Size) -> dict[str, np.ndarray]:
    """The image as it is stored, which must be `size` (height, width); DecodeError if it is not."""
    image = decode.decode(record["image"])
    if image.shape[:2] != tuple(size):
        height, width = image.shape[:2]
        raise decode.DecodeError(
            f"augmentation 'none' wants images of {size[0]} x {size[1]} and this one is "
            f"{height} x {width}; use 'resize_center_crop' or prepare the images in that size."
        )
    return {"image": image}


def pad_crop_flip(
    record: dict, rng: Rng, *, size: Size, padding: int = 4, flip: bool = True
) -> dict[str, np.ndarray]:
    """CIFAR's recipe (He et al. 2015, section 4.2): pad with zeros, crop at random, flip half.

    An image of another size is resized to `size` (height, width) first, antialiased, its sides each
    on their own. `padding` is in pixels of `size`, on every side.
    """
    _check(padding >= 0, f"padding={padding} must be 0 or more pixels.")
    image = _decode_reduced(record["image"], size)
    image = decode.resize(image, size, antialias=True)
    top, left = _pick(rng, 2 * padding + 1), _pick(rng, 2 * padding + 1)
    image = cv2.copyMakeBorder(image, *[padding] * 4, cv2.BORDER_CONSTANT, value=0)
    image = image[top : top + size[0], left : left + size[1]]
    return {"image": _flip_half(image, rng) if flip else image}


def inception_crop_flip(
    record: dict,
    rng: Rng,
    *,
    size: Size,
    min_scale: float = 0.08,
    max_scale: float = 1.0,
    min_ratio: float = 3 / 4,
    max_ratio: float = 4 / 3,
    flip: bool = True,
    out: Arrays | None = None,
) -> Arrays:
    """ImageNet's recipe (Szegedy et al. 2015, section 6): a crop of random area and shape, flipped.

    The crop covers `min_scale` to `max_scale` of the image's area, and its width over height is
    `min_ratio` to `max_ratio` (log-uniform) times that of `size` (height, width). Where ten tries
    find none that fits, it is the largest central one of an allowed shape. Of a JPEG little more
    than the crop is decoded, at the scale that it needs, and the rest of the way, a factor below
    two, is bilinear.
    """
    _check(
        0 < min_scale <= max_scale <= 1,
        f"min_scale={min_scale} and max_scale={max_scale} must be rising, over 0 and at most 1.",
    )
    _check(
        0 < min_ratio <= max_ratio,
        f"min_ratio={min_ratio} and max_ratio={max_ratio} must be rising and over 0.",
    )
    shape = decode.image_shape(record["image"])
    square = size[1] / size[0]
    ratios = (min_ratio * square, max_ratio * square)
    crop = _random_crop(shape, rng, (min_scale, max_scale), ratios)
    image = decode.decode_window(record["image"], crop, min_size=size)
    # Two times too large is left only of a large PNG: then bilinear alone would skip pixels.
    antialias = image.shape[0] >= 2 * size[0] and image.shape[1] >= 2 * size[1]
    flipped = flip and rng.random() < 0.5
    into = None if out is None else out["image"]
    return {"image": decode.resize(image, size, antialias=antialias, flip=flipped, out=into)}


def resize_center_crop(
    record: dict,
    rng: Rng,
    *,
    size: Size,
    crop_fraction: float = 0.875,
    interpolation: str = "bilinear",
) -> dict[str, np.ndarray]:
    """The usual evaluation: resize, then keep the centre; nothing is random.

    The image is resized, keeping its shape, to the least that covers `size` / `crop_fraction`
    (each side rounded to the nearest pixel, halves up): 224 and 0.875 make the shorter side 256.
    Then `size` is cut from the centre, an odd margin being larger at the bottom and on the right.
    Resizing is antialiased, 'bilinear' or 'bicubic'. A JPEG of more than twice the wanted scale is
    decoded at half, a quarter or an eighth of its size first, never below twice what is wanted.
    """
    _check(0 < crop_fraction <= 1, f"crop_fraction={crop_fraction} must be over 0 and at most 1.")
    _check_interpolation(interpolation)
    shape = decode.image_shape(record["image"])
    least = [max(_round(side / crop_fraction), side) for side in size]
    scale = max(wanted / side for wanted, side in zip(least, shape, strict=True))
    resized = [max(_round(side * scale), low) for side, low in zip(shape, least, strict=True)]
    image = _decode_reduced(record["image"], (resized[0], resized[1]))
    options = {"antialias": True, "interpolation": interpolation}
    image = decode.resize(image, (resized[0], resized[1]), **options)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return {"image": image[top : top + size[0], left : left + size[1]]}


def stretch(
    record: dict, rng: Rng, *, size: Size, interpolation: str = "bilinear"
) -> dict[str, np.ndarray]:
    """The whole image at `size` (height, width), its sides each on their own; nothing is random.

    So transformers' ViTs are evaluated. Otherwise as in `resize_center_crop`.
    """
    _check_interpolation(interpolation)
    image = _decode_reduced(record["image"], size)
    return {"image": decode.resize(image, size, antialias=True, interpolation=interpolation)}


AUGMENTATIONS = {
    "none": none,
    "pad_crop_flip": pad_crop_flip,
    "inception_crop_flip": inception_crop_flip,
    "resize_center_crop": resize_center_crop,
    "stretch": stretch,
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A recipe with its options; picklable. Call it as `augmentation(record, rng)`."""

    recipe: Callable[..., dict[str, np.ndarray]]
    options: dict

    def __call__(self, record: dict, rng: Rng, out: Arrays | None = None) -> Arrays:
        """The recipe's arrays for one record, `{'image': uint8 [height, width, 3]}` or more.

        Those that it could write into `out`, arrays of the same names, are those of `out`.
        """
        into = {"out": out} if out is not None and self._writes else {}
        return self.recipe(record, rng, **into, **self.options)

    @functools.cached_property
    def _writes(self) -> bool:
        return "out" in inspect.signature(self.recipe).parameters

    def zeros(self) -> dict[str, np.ndarray]:
        """Arrays of the recipe's names, shapes and dtypes: what stands for an unreadable record."""
        png = io.BytesIO()
        Image.new("RGB", self.options["size"][::-1]).save(png, "PNG")
        example = self({"image": png.getvalue(), "label": 0}, np.random.default_rng(0))
        return {name: np.zeros_like(value) for name, value in example.items()}


def make_augmentation(*, name: str = "", size: Size = (), **options) -> Augmentation:
    """Looks a recipe up in AUGMENTATIONS and fixes its options; `size` is (height, width).

    Raises ValueError for an unknown name (the choices listed), an unknown option (the nearest right
    one named) and a value that the recipe refuses.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(
            f"augmentation {name!r} is unknown{nearest(str(name), AUGMENTATIONS)}; "
            f"choose from {', '.join(AUGMENTATIONS)}."
        )
    _check_options(name, options)
    sides = tuple(size) if isinstance(size, tuple | list) else ()
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"size={size!r} must be (height, width) in pixels, such as (224, 224).")
    augmentation = Augmentation(AUGMENTATIONS[name], {"size": sides, **options})
    augmentation.zeros()  # tries it, so that a wrong value is told now and not by a worker
    return augmentation


def _check_interpolation(interpolation: str) -> None:
    known = decode.INTERPOLATIONS
    _check(
        interpolation in known,
        f"interpolation={interpolation!r} is unknown{nearest(str(interpolation), known)}; "
        f"choose from {', '.join(known)}.",
    )


def _check_options(name: str, options: dict) -> None:
    known = list(inspect.signature(AUGMENTATIONS[name]).parameters)[2:]  # record, rng, size, …
    known = [option for option in known if option != "out"]
    for option in options:
        if option not in known:
            raise ValueError(
                f"augmentation {name!r} has no option {option!r}{nearest(option, known)}; "
                f"it has {', '.join(known)}."
            )


def _random_crop(
    shape: Size, rng: Rng, scales: tuple[float, float], ratios: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of an image of `shape`."""
    image_height, image_width = shape
    log_ratios = math.log(ratios[0]), math.log(ratios[1])
    for _ in range(10):
        area = image_height * image_width * _uniform(rng, *scales)
        ratio = math.exp(_uniform(rng, *log_ratios))
        height, width = _round(math.sqrt(area / ratio)), _round(math.sqrt(area * ratio))
        if 0 < height <= image_height and 0 < width <= image_width:
            top = _pick(rng, image_height - height + 1)
            left = _pick(rng, image_width - width + 1)
            return top, left, height, width
    height = max(1, min(image_height, _round(image_width / ratios[0])))
    width = max(1, min(image_width, _round(image_height * ratios[1])))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def _decode_reduced(data: bytes, size: Size) -> np.ndarray:
    """Decodes, and a JPEG that is far too large at a smaller scale, but not below twice `size`.

    An antialiased resize then gives what it would give of the whole, within a grey level or so.
    """
    return decode.decode(data, min_size=(2 * size[0], 2 * size[1]))


def _flip_half(image: np.ndarray, rng: Rng) -> np.ndarray:
    """Swaps left and right in one half of the cases."""
    return cv2.flip(image, 1) if rng.random() < 0.5 else image


def _pick(rng: Rng, num_choices: int) -> int:
    """One of 0 … num_choices - 1."""
    return int(rng.random() * num_choices)


def _uniform(rng: Rng, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _round(value: float) -> int:
    """To the nearest integer, halves up: Python's round() goes to the even one."""
    return math.floor(value + 0.5)


def _check(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)
