"""What becomes of an image file on its way into a dataset: which bytes are kept, which change."""

import io
import shutil
import struct
import subprocess
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from vit_jax.data.decode import DecodeError, decode

_SIGNATURES = {
    "JPEG": lambda data: data[:3] == b"\xff\xd8\xff",
    "PNG": lambda data: data[:8] == b"\x89PNG\r\n\x1a\n",
    "WEBP": lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP",
    "BMP": lambda data: data[:2] == b"BM",
}
_EXIF_MARKS = (b"Exif", b"eXIf", b"EXIF", b"Raw profile type exif")  # JPEG, PNG, WebP, older PNG

# EXIF orientation -> what makes the image upright: for Pillow, and for jpegtran.
_UPRIGHT = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, ("-flip", "horizontal")),
    3: (Image.Transpose.ROTATE_180, ("-rotate", "180")),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, ("-flip", "vertical")),
    5: (Image.Transpose.TRANSPOSE, ("-transpose",)),
    6: (Image.Transpose.ROTATE_270, ("-rotate", "90")),
    7: (Image.Transpose.TRANSVERSE, ("-transverse",)),
    8: (Image.Transpose.ROTATE_90, ("-rotate", "270")),
}


class Ingested(NamedTuple):
    """An image as it is stored, and what was done to it."""

    data: bytes
    pixels: np.ndarray
    """uint8 [height, width, 3], decoded from `data`: proof that it can be."""
    transposed: str = ""
    """How an EXIF-rotated image was turned upright; empty if it stood upright."""
    converted: str = ""
    """From and to which format; empty if the format was kept."""


def ingest(data: bytes) -> Ingested:
    """Takes an image file's bytes into a dataset.

    JPEG and PNG bytes are kept as they are. What EXIF says is rotated is transposed: a JPEG by
    `jpegtran` where that is installed and the sides are whole blocks (the coefficients are moved,
    nothing is lost), else it is decoded and stored as PNG (the pixels are the same, the file is
    larger). WebP and BMP become PNG. The content decides about the format, not the file's name.

    Raises DecodeError for anything that cannot be decoded in full.
    """
    kind = _kind(data)
    pixels = decode(data)
    orientation = _orientation(data)
    if orientation == 1 and kind in ("JPEG", "PNG"):
        return Ingested(data, pixels)
    converted = transposed = ""
    stored = _jpegtran(data, orientation) if kind == "JPEG" else None
    if orientation != 1:
        transposed = f"EXIF orientation {orientation}, " + ("jpegtran" if stored else "as PNG")
    if not stored:
        stored = _png(data if kind != "JPEG" else pixels, orientation)
        converted = f"{kind} to PNG" if kind != "PNG" else ""
    return Ingested(stored, decode(stored), transposed, converted)


def is_png(data: bytes) -> bool:
    """Whether these are the bytes of a PNG file."""
    return _SIGNATURES["PNG"](data)


def _kind(data: bytes) -> str:
    if not data:
        raise DecodeError("the file is empty")
    for kind, matches in _SIGNATURES.items():
        if matches(data):
            return kind
    raise DecodeError(f"the content is none of {', '.join(_SIGNATURES)}")


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 2 to 8; 1 (upright) if there is none or none that makes sense."""
    if not any(mark in data for mark in _EXIF_MARKS):  # asking Pillow costs a PNG its decoding
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_SIGNATURES)) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error):
        return 1  # garbled EXIF around an image that has just been decoded
    return orientation if orientation in _UPRIGHT else 1


def _jpegtran(data: bytes, orientation: int) -> bytes | None:
    """The upright JPEG, or None where only decoding helps."""
    program = shutil.which("jpegtran")
    if program is None or orientation == 1:
        return None
    turn = _UPRIGHT[orientation][1]
    done = subprocess.run(
        [program, "-copy", "none", "-perfect", *turn], input=data, capture_output=True, check=False
    )
    return done.stdout if done.returncode == 0 else None


def _png(image: bytes | np.ndarray, orientation: int) -> bytes:
    """Stores an image upright as PNG, with its mode (grey, palette, alpha) if it comes as bytes."""
    if isinstance(image, bytes):
        picture = Image.open(io.BytesIO(image))
    else:
        grey = (image == image[..., :1]).all()
        picture = Image.fromarray(image[..., 0] if grey else image)
    if orientation != 1:
        picture = picture.transpose(_UPRIGHT[orientation][0])
    out = io.BytesIO()
    picture.save(out, "PNG", exif=b"")  # no orientation may outlive the turn
    return out.getvalue()
