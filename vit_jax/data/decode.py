"""Image bytes to uint8 RGB arrays, and the resize: what bytes are accepted is decided here.

JPEG goes through libjpeg-turbo (simplejpeg), small plain PNGs through OpenCV; everything else, and
the JPEGs which libjpeg-turbo cannot turn into RGB, through Pillow. EXIF orientation is not applied,
as TensorFlow does not: `vit-jax prepare` turns such images once, on disk.
"""

import io
import math
import struct
import zlib

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from vit_jax.data import jpeg

MAX_PIXELS = 89_478_485
"""The largest image that is decoded (Pillow's limit). Larger ones are refused by their header."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What Pillow may try. Its other readers are many, old, and never needed here."""

BACKGROUND = (255, 255, 255)
"""Shows through transparent pixels, as on a page; dropping alpha would show what hid in them."""

# Damage that leaves every pixel in its place: common on the web, and taken by every reader.
_HARMLESS = ("extraneous bytes before marker 0xd9", "unknown JFIF revision number")
_LEFT_OVER = "extraneous bytes before marker 0x"  # behind the last row of a JPEG that ends early

# What Pillow's readers raise on bytes that somebody cut, flipped or made up.
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# The loader's threads and processes each have their own image; OpenCV's would be in their way.
cv2.setNumThreads(0)


class DecodeError(ValueError):
    """The bytes are no whole image of a kind that is read; the message says why, in one line."""


def image_shape(data: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width in pixels, from the header alone; DecodeError if unreadable or too large."""
    if isinstance(data, np.ndarray):
        return data.shape[:2]
    shape = _turbo_shape(data) or _plain_png_shape(data)
    if shape is None:
        with _open(data) as image:
            shape = image.height, image.width
    return shape[:2]


def decode(data: bytes | np.ndarray, *, min_size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes to uint8 [height, width, 3] RGB.

    With `min_size` (height, width) a JPEG is decoded at 1/2, 1/4 or 1/8 of its size (rounded up) as
    long as both sides stay at least `min_size`; other formats come in full. Grey is repeated into
    three channels, CMYK is converted without a profile, of 16 bits the upper 8 are kept,
    transparent pixels are laid over `BACKGROUND`, and of an animation the first frame is taken.

    What is decoded already, an array, stays as it is.

    Raises DecodeError for what is truncated, damaged, larger than MAX_PIXELS, or no image.
    """
    if isinstance(data, np.ndarray):
        return data
    shape = _turbo_shape(data)
    if shape is None:
        image = _decode_plain_png(data)
        return _decode_pillow(data) if image is None else image
    return _decode_turbo(data, shape, scale_factor(shape, min_size) if min_size else 1)


def decode_window(
    data: bytes | np.ndarray, window: jpeg.Window, *, min_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Decodes a window (top, left, height, width) and, as far as the format lets one, no more.

    With `min_size` a JPEG is decoded at 1/2, 1/4 or 1/8 as long as the window's sides stay at least
    that; then its borders move to whole pixels of the smaller image. The pixels are those that
    `decode` gives of the whole image at that scale. Of a JPEG nothing below the window is decoded
    (and damage there is not seen, but for a missing end), and of one with tiles (`jpeg.tiled`)
    little around it.

    Raises what `decode` raises.
    """
    shape = None if isinstance(data, np.ndarray) else _turbo_shape(data)
    if shape is None:
        top, left, height, width = window
        return decode(data)[top : top + height, left : left + width]
    sides = zip(shape, min_size or window[2:], window[2:], strict=True)
    factor = scale_factor(shape, tuple(-(-side * least // part) for side, least, part in sides))
    top, height = _reduced(window[0], window[2], shape[0], factor)
    left, width = _reduced(window[1], window[3], shape[1], factor)
    found = jpeg.layout(data)
    wanted = tuple(factor * each for each in (top, left, height, width))
    # Smoothed colours look at one more sample of them, which is two pixels.
    cut = jpeg.cut(data, found, wanted, margin=2 * factor) if found else None
    if cut is not None:
        data, shape = cut.data, (cut.height, cut.width)
        top, left = top - cut.top // factor, left - cut.left // factor
    image = _decode_turbo(data, shape, factor, ends_early=cut is not None and cut.ends_early)
    return image[top : top + height, left : left + width]


def _reduced(start: int, length: int, side: int, factor: int) -> tuple[int, int]:
    """A stretch of `side` pixels, as a stretch of that side divided by `factor` (rounded up)."""
    smaller = -(-side // factor)
    shorter = max(1, math.floor(length * smaller / side + 0.5))
    return min(math.floor(start * smaller / side + 0.5), smaller - shorter), shorter


def _decode_turbo(
    data: bytes, shape: tuple[int, int], factor: int, *, ends_early: bool = False
) -> np.ndarray:
    """Decodes a JPEG of `shape` at 1/`factor` of its size."""
    # Only halves have SIMD code in libjpeg-turbo: 5/8 takes longer than the whole. Two minima with
    # nothing to spare make simplejpeg choose exactly this factor.
    height, width = (-(-side // factor) for side in shape)
    pixels = np.empty((height, width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=pixels)
    except ValueError as error:  # of several faults the first one is told; the pixels are there
        harmless = (*_HARMLESS, _LEFT_OVER) if ends_early else _HARMLESS
        if not any(text in str(error) for text in harmless):
            raise DecodeError(_one_line(error)) from error
    return pixels


def scale_factor(shape: tuple[int, int], min_size: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 by which `shape`, divided and rounded up, is still `min_size`."""
    for factor in (8, 4, 2):
        if all(-(-side // factor) >= least for side, least in zip(shape, min_size, strict=True)):
            return factor
    return 1


INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
"""Filters for antialiased resizing."""


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    *,
    antialias: bool,
    interpolation: str = "bilinear",
    flip: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resizes uint8 [height, width, 3] to `size` (height, width): half-pixel centres.

    With `antialias` the triangle filter widens with the reduction (Pillow's BILINEAR, torchvision's
    default): for evaluation. Without it each output pixel mixes its four neighbours (OpenCV's
    INTER_LINEAR; big_vision's training crops do so with `tf.image.resize`): about eight times as
    fast, and meant for factors below two, which is what decoding at a DCT scale leaves; always
    bilinear. With `antialias` the filter is that of INTERPOLATIONS.

    `flip` swaps left and right, and into `out` (of `size`, contiguous) the result is written.
    """
    height, width = size
    if image.shape[:2] != (height, width):
        _check_size(height, width, "resizing makes")
        if antialias:
            filtered = INTERPOLATIONS[interpolation]
            image = np.array(Image.fromarray(image).resize((width, height), filtered))
        else:
            into = None if flip else out
            image = cv2.resize(image, (width, height), dst=into, interpolation=cv2.INTER_LINEAR)
    if flip:
        image = cv2.flip(image, 1, dst=out)
    if out is None or image is out:
        return image
    out[...] = image
    return out


def _turbo_shape(data: bytes) -> tuple[int, int] | None:
    """The shape of a JPEG that libjpeg-turbo turns into RGB, else None: Pillow's case.

    Pillow's are CMYK and rare samplings; and it judges the headers that libjpeg-turbo cannot read.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace in ("CMYK", "YCCK"):
        return None
    _check_size(height, width)
    return height, width


_PNG_START = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
_PNG_END = bytes(4) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
_PLAIN = {(8, 0, 0, 0, 0): 1, (8, 2, 0, 0, 0): 3}  # 8-bit grey and RGB -> channels
_SMALL_PNG = 1 << 16  # bytes; Pillow's start, 100 microseconds, is lost in decoding larger ones


def _plain_png_shape(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and channels of a small PNG of nothing but 8-bit grey or RGB, else None."""
    if len(data) > _SMALL_PNG or not data.startswith(_PNG_START) or data[37:41] != b"IDAT":
        return None
    width, height, *kind = struct.unpack(">IIBBBBB", data[16:29])
    channels = _PLAIN.get(tuple(kind))
    if channels is None or _checksum(data[12:29]) != data[29:33]:
        return None
    _check_size(height, width)
    return height, width, channels


def _decode_plain_png(data: bytes) -> np.ndarray | None:
    """Decodes what `_plain_png_shape` knows and is whole, with all pixels in one chunk, else None.

    Whether it is whole is seen here, as OpenCV would give the rest of a damaged file some colour.
    """
    shape = _plain_png_shape(data)
    if shape is None:
        return None
    height, width, channels = shape
    end = 41 + int.from_bytes(data[33:37], "big")
    if data[end + 4 :] != _PNG_END or _checksum(data[37:end]) != data[end : end + 4]:
        return None
    size = height * (1 + width * channels)  # each row begins with the name of its filter
    inflated = zlib.decompressobj()
    try:
        rows = inflated.decompress(data[41:end], size + 1)
    except zlib.error:
        return None
    if len(rows) != size or not inflated.eof or inflated.unused_data:
        return None
    if max(rows[:: 1 + width * channels]) > 4:  # no such filter
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def _open(data: bytes) -> Image.Image:
    """Reads the header with Pillow, and no pixels yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise DecodeError(f"not an image ({len(data)} bytes; {kinds} are read)") from error
    except _PILLOW_ERRORS as error:
        raise DecodeError(_one_line(error)) from error
    _check_size(image.height, image.width)
    return image


def _decode_pillow(data: bytes) -> np.ndarray:
    with _open(data) as image:
        try:
            return np.array(_to_rgb(image))
        except _PILLOW_ERRORS as error:
            raise DecodeError(_one_line(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
    return Image.alpha_composite(background, image).convert("RGB")


def _check_size(height: int, width: int, who: str = "the header says") -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise DecodeError(f"{who} {height} x {width} pixels; at most {MAX_PIXELS} are allowed")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
