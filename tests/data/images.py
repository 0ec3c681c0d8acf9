"""Image files of every kind, made on the spot."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image


def noise(height: int = 16, width: int = 24, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours: what a JPEG keeps nearly, and each place of it another."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, channels), np.uint8).squeeze())
    return np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))


def encode(
    pixels: np.ndarray, kind: str, *, mode: str = "", orientation: int = 1, **options
) -> bytes:
    picture = Image.fromarray(pixels)
    if mode:
        picture = picture.convert(mode)
    if orientation != 1:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def bomb_png() -> bytes:
    """Says it is 60,000 pixels wide and high, in 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum_)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bad_files() -> dict[str, bytes]:
    """A file of each bad kind, by name."""
    whole = encode(noise(64, 64), "JPEG", quality=95)
    png = encode(noise(64, 64), "PNG")
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "truncated.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
        "bomb.png": bomb_png(),
        "tiff.png": encode(noise(), "TIFF"),
        "gif.jpg": encode(noise(), "GIF"),
        "header.jpg": whole[:20],
    }


def write_tree(root, files: dict[str, bytes]):
    """Writes files by relative path; answers `root`."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def class_tree(root, *, classes=("cat", "dog"), per_class: int = 4, prefix: str = ""):
    """A folder of small JPEGs: `root/[prefix/]<class>/<number>.jpg`."""
    return write_tree(
        root,
        {
            f"{prefix}{name}/{number}.jpg": encode(noise(seed=100 * label + number), "JPEG")
            for label, name in enumerate(classes)
            for number in range(per_class)
        },
    )
