import io
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_jax.data import decode
from vit_jax.data.decode import DecodeError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(height=40, width=60) -> np.ndarray:
    """Smooth colours, so that what a JPEG loses is small."""
    rows, columns = np.mgrid[0:height, 0:width]
    colours = [rows * 255 // height, columns * 255 // width, (rows + columns) % 64 + 90]
    return np.stack(colours, -1).astype(np.uint8)


RGB = Image.fromarray(photo())
FILES = {
    "jpeg": encoded(RGB, "JPEG", quality=95),
    "jpeg progressive": encoded(RGB, "JPEG", quality=95, progressive=True),
    "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "png": encoded(RGB, "PNG"),
    "png palette": encoded(RGB.quantize(256), "PNG"),
    "webp": encoded(RGB, "WEBP", lossless=True),
    "bmp": encoded(RGB, "BMP"),
    "gif": encoded(RGB, "GIF"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_the_same_rgb_picture(kind):
    image = decode.decode(FILES[kind])
    assert image.dtype == np.uint8
    assert image.shape == (40, 60, 3) == (*decode.image_shape(FILES[kind]), 3)
    assert np.abs(image.astype(int) - photo()).mean() < 6


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (40, 60), (33, 17)])
def test_a_small_png_has_the_pixels_that_pillow_sees(mode, shape, monkeypatch):
    rng = np.random.default_rng(0)
    for picture in (photo(*shape), rng.integers(0, 256, (*shape, 3), np.uint8)):
        data = encoded(Image.fromarray(picture).convert(mode), "PNG")
        with monkeypatch.context() as patched:
            patched.setattr(decode, "_open", None)  # it is not asked
            image, size = decode.decode(data), decode.image_shape(data)
        assert size == shape and image.flags.c_contiguous and image.flags.writeable
        np.testing.assert_array_equal(image, decode._decode_pillow(data))


@given(st.sampled_from(["L", "RGB"]), st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_png_is_judged_by_pillow(mode, draw):
    """What is decoded without Pillow has its pixels, also where the checksums fit the damage."""
    data = bytearray(encoded(Image.fromarray(photo(9, 7)).convert(mode), "PNG"))
    for _ in range(draw.draw(st.integers(1, 2))):
        data[draw.draw(st.integers(16, len(data) - 13))] = draw.draw(st.integers(0, 255))
    del data[draw.draw(st.sampled_from([len(data), len(data) - 5, len(data) - 20])) :]
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    end = 41 + int.from_bytes(data[33:37], "big")
    if end + 4 < len(data):
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[37:end]))
    try:
        image = decode._decode_plain_png(bytes(data))
    except DecodeError:  # too large
        return
    if image is not None:
        np.testing.assert_array_equal(image, decode._decode_pillow(bytes(data)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_grey_becomes_three_equal_channels(kind):
    image = decode.decode(encoded(RGB.convert("L"), kind))
    assert image.shape == (40, 60, 3)
    assert np.ptp(image, axis=-1).max() <= (1 if kind == "WEBP" else 0)


def test_cmyk_as_adobe_writes_it_is_not_a_negative():
    white = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    assert decode.decode(encoded(white, "JPEG")).min() > 250


def test_transparent_pixels_are_laid_over_white():
    red = np.zeros((4, 4, 4), np.uint8)
    red[..., 0] = 255
    red[:2, :, 3] = 255  # the upper half is opaque
    red[2, :, 3] = 128
    image = decode.decode(encoded(Image.fromarray(red), "PNG"))
    assert (image[:2] == (255, 0, 0)).all()
    assert (image[2] == (255, 127, 127)).all()
    assert (image[3] == 255).all()


def test_transparency_of_a_palette_and_of_a_grey_png():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (decode.decode(encoded(palette, "PNG", transparency=1)) == 255).all()
    assert (decode.decode(encoded(palette, "PNG")) == (255, 0, 0)).all()
    grey = Image.new("L", (4, 4), 7)
    assert (decode.decode(encoded(grey, "PNG", transparency=7)) == 255).all()


def test_of_sixteen_bits_the_upper_eight_are_kept():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = decode.decode(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(image, np.repeat((values >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    image = decode.decode(encoded(red, kind, save_all=True, append_images=[blue]))
    assert image[..., 0].min() > 250
    assert image[..., 2].max() < 5


def test_exif_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode.decode(encoded(RGB, "JPEG", exif=exif)).shape == (40, 60, 3)


@pytest.mark.parametrize(
    ("min_size", "shape"),
    [
        (None, (375, 500)),
        ((376, 500), (375, 500)),
        ((224, 224), (375, 500)),
        ((188, 250), (188, 250)),
        ((188, 251), (375, 500)),
        ((94, 125), (94, 125)),
        ((100, 20), (188, 250)),
        ((1, 1), (47, 63)),
    ],
)
def test_min_size_decodes_a_jpeg_at_the_smallest_scale_that_holds_it(min_size, shape):
    data = encoded(Image.fromarray(photo(375, 500)), "JPEG")
    assert decode.decode(data, min_size=min_size).shape == (*shape, 3)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 80), st.integers(1, 80))
@settings(max_examples=200, deadline=None)
def test_min_size_holds_for_every_shape(height, width, least_height, least_width):
    data = simplejpeg.encode_jpeg(np.zeros((height, width, 3), np.uint8))
    factor = decode.scale_factor((height, width), (least_height, least_width))
    shape = decode.decode(data, min_size=(least_height, least_width)).shape
    assert shape == (-(-height // factor), -(-width // factor), 3)
    assert factor == 1 or (shape[0] >= least_height and shape[1] >= least_width)


def test_a_smaller_scale_is_the_same_picture():
    picture = photo(64, 96)
    half = decode.decode(encoded(Image.fromarray(picture), "JPEG", quality=95), min_size=(32, 48))
    means = picture.reshape(32, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(half - means).mean() < 2


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_file_is_an_error_in_one_line(kind, kept):
    data = FILES[kind][: int(kept * len(FILES[kind]))]
    with pytest.raises(DecodeError) as caught:
        decode.decode(data)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_jpeg_cut_short_and_closed_again_is_an_error():
    data = encoded(Image.fromarray(photo(375, 500)), "JPEG")
    with pytest.raises(DecodeError, match="premature end"):
        decode.decode(data[: len(data) // 2] + b"\xff\xd9")


def test_stray_bytes_at_the_end_are_taken_as_every_reader_takes_them():
    data = FILES["jpeg"]
    image = decode.decode(data[:-2] + bytes(50) + data[-2:] + b"trailer")
    np.testing.assert_array_equal(image, decode.decode(data))


@given(st.sampled_from(sorted(FILES)), st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_give_an_image_or_a_decode_error(kind, draw):
    data = bytearray(FILES[kind])
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        image = decode.decode(bytes(data))
    except DecodeError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", zlib.crc32(chunk)) + bytes(4) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + end


def jpeg_header(width: int, height: int, base: bytes = FILES["jpeg"]) -> bytes:
    start = base.index(b"\xff\xc0") + 5
    return base[:start] + struct.pack(">HH", height, width) + base[start + 4 :]


@pytest.mark.parametrize(
    "data",
    [
        png_header(10_000, 10_000),
        png_header(60_000, 60_000),
        jpeg_header(10_000, 10_000),
        jpeg_header(65_000, 65_000),
        jpeg_header(10_000, 10_000, FILES["jpeg cmyk"]),
        FILES["bmp"][:18] + struct.pack("<ii", 30_000, 30_000) + FILES["bmp"][26:],
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header(data):
    start = time.perf_counter()
    for read in (decode.decode, decode.image_shape):
        with pytest.raises(DecodeError, match="pixels"):
            read(data)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"hello", b"II*\0" + bytes(60), b"%!PS-Adobe"])
def test_what_is_no_image_is_named_as_such(data):
    with pytest.raises(DecodeError, match="not an image"):
        decode.decode(data)
    with pytest.raises(DecodeError, match="not an image"):
        decode.image_shape(data)


@pytest.mark.parametrize("antialias", [True, False])
def test_resize_is_centred_on_half_pixels(antialias):
    picture = photo(41, 67)
    resized = decode.resize(picture, (17, 23), antialias=antialias)
    mirrored = decode.resize(
        np.ascontiguousarray(picture[::-1, ::-1]), (17, 23), antialias=antialias
    )
    assert resized.shape == (17, 23, 3)
    assert np.abs(resized.astype(int) - mirrored[::-1, ::-1]).max() <= 1


def test_antialiasing_averages_what_plain_bilinear_skips():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = 255  # one column of eight is white
    smooth = decode.resize(stripes, (8, 8), antialias=True)[2:-2, 2:-2]
    assert np.abs(smooth.astype(int) - 255 // 8).max() <= 2
    assert np.ptp(decode.resize(stripes, (8, 8), antialias=False)[2:-2, 2:-2]) == 0


def test_resize_to_the_same_size_changes_nothing():
    for antialias in (True, False):
        same = decode.resize(photo(), (40, 60), antialias=antialias)
        np.testing.assert_array_equal(same, photo())
