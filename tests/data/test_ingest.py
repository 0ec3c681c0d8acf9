import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data.images import bad_files, encode, noise
from vit_jax.data import ingest as ingest_lib
from vit_jax.data.decode import DecodeError, decode
from vit_jax.data.ingest import ingest

# What a viewer shows for pixels stored with each orientation, by its definition in EXIF.
SHOWN = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


@pytest.fixture
def no_jpegtran(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P"])
def test_upright_jpeg_and_png_are_kept_byte_for_byte(kind, mode):
    if (kind, mode) in {("JPEG", "RGBA"), ("JPEG", "P"), ("PNG", "CMYK")}:
        pytest.skip("no such files")
    data = encode(noise(), kind, mode=mode)
    taken = ingest(data)
    assert taken.data == data
    assert not taken.transposed and not taken.converted
    assert np.array_equal(taken.pixels, decode(data))


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("BMP", {})])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_webp_and_bmp_become_png_with_the_same_pixels(kind, options, mode):
    data = encode(noise(), kind, mode=mode, **options)
    taken = ingest(data)
    assert taken.data.startswith(b"\x89PNG")
    assert taken.converted == f"{kind} to PNG"
    assert np.array_equal(taken.pixels, decode(data))


def test_webp_keeps_its_transparency():
    pixels = np.dstack([noise(), np.full((16, 24), 77, np.uint8)])
    taken = ingest(encode(pixels, "WEBP", lossless=True))
    with Image.open(ingest_lib.io.BytesIO(taken.data)) as image:
        assert image.mode == "RGBA"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_rotated_images_are_turned_without_loss(kind, orientation, no_jpegtran):
    options = {"lossless": True} if kind == "WEBP" else {}
    upright = encode(noise(), kind, **options)
    data = encode(noise(), kind, orientation=orientation, **options)
    assert np.array_equal(decode(data), decode(upright)), "decode() itself must not turn"
    taken = ingest(data)
    assert np.array_equal(taken.pixels, SHOWN[orientation](decode(upright)))
    assert np.array_equal(decode(taken.data), taken.pixels)
    assert taken.transposed == f"EXIF orientation {orientation}, as PNG"
    again = ingest(taken.data)
    assert again.data == taken.data, "an orientation was left behind"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_rotated_grey_and_cmyk_jpegs_keep_their_pixels(mode, no_jpegtran):
    data = encode(noise(), "JPEG", mode=mode, orientation=6)
    taken = ingest(data)
    assert np.array_equal(taken.pixels, SHOWN[6](decode(data)))


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")
@pytest.mark.parametrize("orientation", SHOWN)
def test_jpegtran_moves_the_coefficients_of_whole_blocks(orientation):
    data = encode(noise(32, 48), "JPEG", orientation=orientation)
    taken = ingest(data)
    assert taken.data[:2] == b"\xff\xd8"
    assert taken.transposed == f"EXIF orientation {orientation}, jpegtran"
    expected = SHOWN[orientation](decode(data)).astype(int)
    assert np.abs(taken.pixels - expected).max() <= 4  # rounding of the inverse transform


def test_jpegtran_that_refuses_is_passed_over(tmp_path, monkeypatch):
    program = tmp_path / "jpegtran"
    program.write_text("#!/bin/sh\necho 'transformation is not perfect' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    assert ingest(encode(noise(), "JPEG", orientation=6)).transposed.endswith("as PNG")


def test_jpegtran_is_asked_for_the_turn_that_exif_wants(tmp_path, monkeypatch):
    upright = tmp_path / "upright.jpg"
    upright.write_bytes(encode(noise(48, 32), "JPEG"))
    program = tmp_path / "jpegtran"
    program.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/args\ncat > /dev/null\ncat {upright}\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    taken = ingest(encode(noise(32, 48), "JPEG", orientation=6))
    assert taken.data == upright.read_bytes()
    assert (tmp_path / "args").read_text() == "-copy none -perfect -rotate 90\n"


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_senseless_orientations_are_upright(orientation):
    data = encode(noise(), "JPEG", orientation=orientation)
    assert ingest(data).data == data


def test_garbled_exif_does_not_cost_the_image():
    data = encode(noise(), "JPEG", orientation=6).replace(b"Exif\0\0MM", b"Exif\0\0??")
    data = data.replace(b"Exif\0\0II", b"Exif\0\0??")
    assert ingest(data).data == data


@pytest.mark.parametrize(("name", "data"), bad_files().items(), ids=bad_files())
def test_bad_files_are_decode_errors_in_one_line(name, data):
    with pytest.raises(DecodeError) as caught:
        ingest(data)
    assert str(caught.value) and "\n" not in str(caught.value)
