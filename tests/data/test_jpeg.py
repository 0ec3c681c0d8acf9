"""What is decoded of a window is what decoding the whole image gives there, to the last bit."""

import shutil

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.images import encode
from vit_jax.data import decode, jpeg
from vit_jax.data.decode import DecodeError

needs_jpegtran = pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="jpegtran is not installed"
)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Sharp noise in all colours: any pixel that is taken from a wrong place shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def plain(height: int, width: int, sampling: str = "420", quality: int = 80) -> bytes:
    pixels = picture(height, width)
    if sampling == "Gray":
        return simplejpeg.encode_jpeg(pixels[..., :1].copy(), quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(pixels, quality, colorsubsampling=sampling)


def with_tiles(height: int, width: int, sampling: str = "420") -> bytes:
    """As `jpeg.tiled` makes it, but by OpenCV, which can write restart markers too."""
    interval = jpeg.tile_interval(jpeg.layout(plain(height, width, sampling)))
    factors = {"444": 0x111111, "422": 0x211111, "420": 0x221111, "440": 0x121111}
    options = [cv2.IMWRITE_JPEG_QUALITY, 80, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    pixels = picture(height, width)
    if sampling == "Gray":
        pixels = pixels[..., 0].copy()
    else:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factors[sampling]]
    return jpeg.with_index(cv2.imencode(".jpg", pixels, options)[1].tobytes())


@st.composite
def windows(draw):
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 190))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    window = top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
    return (height, width), window


@settings(max_examples=150, deadline=None)
@given(
    where=windows(),
    sampling=st.sampled_from(["444", "422", "420", "440", "Gray"]),
    tiles=st.booleans(),
    smaller=st.sampled_from([1, 2, 4, 8]),
)
def test_a_window_has_the_pixels_of_the_whole(where, sampling, tiles, smaller):
    shape, window = where
    data = (with_tiles if tiles else plain)(*shape, sampling)
    least = [max(1, side // smaller) for side in window[2:]]
    found = decode.decode_window(data, window, min_size=(least[0], least[1]))

    needed = [-(-shape[i] * least[i] // window[2 + i]) for i in (0, 1)]
    whole = decode.decode(data, min_size=(needed[0], needed[1]))
    begin, length = [], []
    for i in (0, 1):  # the window's borders, on whole pixels of what was decoded
        scale = whole.shape[i] / shape[i]
        length.append(max(1, int(window[2 + i] * scale + 0.5)))
        begin.append(min(int(window[i] * scale + 0.5), whole.shape[i] - length[i]))
    (top, left), (height, width) = begin, length
    np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, int]]:
    """The sides of what libjpeg-turbo decoded."""
    sides, original = [], simplejpeg.decode_jpeg

    def spy(data, *args, buffer, **options):
        sides.append(buffer.shape[:2])
        return original(data, *args, buffer=buffer, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    return sides


def test_nothing_below_the_window_is_decoded(decoded):
    decode.decode_window(plain(200, 100), (40, 30, 50, 20))
    assert decoded == [(92, 100)]  # two rows more, which the colours of the last one need


def test_of_tiles_only_those_around_the_window_are_decoded(decoded):
    decode.decode_window(with_tiles(400, 512), (100, 200, 50, 60))
    assert decoded == [(64, 128)]  # rows 96 to 160, columns 192 to 320


def test_tiles_are_decoded_at_a_smaller_scale_too(decoded):
    image = decode.decode_window(with_tiles(400, 512), (96, 192, 128, 128), min_size=(64, 64))
    assert image.shape == (64, 64, 3)
    assert decoded == [(80, 128)]  # rows 80 to 240, columns 128 to 384, halved


def test_damage_is_seen_in_the_window_and_not_below_it():
    data = bytearray(plain(200, 100))
    data[-40:-38] = b"\xff\xd9"  # the end, in the midst of the last rows
    assert decode.decode_window(bytes(data), (0, 0, 150, 100)).shape == (150, 100, 3)
    with pytest.raises(DecodeError):
        decode.decode_window(bytes(data), (0, 0, 198, 100))
    with pytest.raises(DecodeError, match="Premature end"):  # which is seen from everywhere
        decode.decode_window(plain(200, 100)[:-40], (0, 0, 50, 100))


def test_tiles_whose_list_is_wrong_are_decoded_as_a_whole(decoded):
    data = with_tiles(400, 512)
    wrong = bytearray(data)
    wrong[jpeg.layout(data).index] += 1
    image = decode.decode_window(bytes(wrong), (0, 0, 10, 10))
    assert decoded == [(400, 512)]
    np.testing.assert_array_equal(image, decode.decode(data)[:10, :10])


@pytest.mark.parametrize("make", [plain, with_tiles])
def test_damage_anywhere_is_an_error_of_the_image_alone(make):
    whole = make(200, 256)
    header, rng = jpeg.layout(whole).scan, np.random.default_rng(0)
    for _ in range(1000):
        data = bytearray(whole)
        for at in rng.integers(2, header, rng.integers(1, 4)):
            data[at] = rng.integers(256)
        length = len(data) if rng.random() < 0.8 else rng.integers(2, len(data))
        try:
            image = decode.decode_window(bytes(data[:length]), (80, 90, 60, 70))
        except DecodeError:
            continue
        assert image.dtype == np.uint8 and image.ndim == 3


def test_tiles_that_were_cut_short_are_an_error():
    with pytest.raises(DecodeError, match="remature end"):
        decode.decode_window(with_tiles(400, 512)[:-20], (0, 0, 10, 10))


@pytest.mark.parametrize("kind", ["progressive", "png", "cmyk", "empty", "header"])
def test_other_files_have_no_layout(kind):
    pixels = picture(40, 60)
    files = {
        "progressive": encode(pixels, "JPEG", progressive=True),
        "png": encode(pixels, "PNG"),
        "cmyk": encode(pixels, "JPEG", mode="CMYK"),
        "empty": b"\xff\xd8",
        "header": plain(40, 60)[:100],
    }
    assert jpeg.layout(files[kind]) is None


@needs_jpegtran
@pytest.mark.parametrize("width", [500, 496, 33, 7])
@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "Gray"])
def test_tiling_changes_no_pixel(width, sampling):
    data = plain(375, width, sampling, quality=95)
    made = jpeg.tiled(data)
    assert jpeg.layout(made).index
    assert len(made) < 1.05 * len(data) + 1000
    np.testing.assert_array_equal(decode.decode(made), decode.decode(data))
    window = (120, width // 3, 90, width // 4 + 1)
    np.testing.assert_array_equal(
        decode.decode_window(made, window), decode.decode_window(data, window)
    )


@needs_jpegtran
def test_what_cannot_be_tiled_is_left_alone():
    for data in (
        encode(picture(40, 60), "JPEG", progressive=True),
        b"no image",
        plain(40, 60)[:99],
    ):
        assert jpeg.tiled(data) is None


def test_tiling_without_jpegtran_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(FileNotFoundError, match=r"libjpeg-turbo-progs\); choose another store"):
        jpeg.tiled(plain(40, 60))
