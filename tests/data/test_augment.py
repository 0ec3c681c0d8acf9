import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_jax.data import augment, decode
from vit_jax.data.augment import AUGMENTATIONS, make_augmentation


def record(picture: np.ndarray, kind: str = "PNG") -> dict:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind)
    return {"image": stream.getvalue(), "label": 0}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    colours = [rows * 255 / height, columns * 255 / width, (rows / height + columns / width) * 127]
    return np.stack(colours, -1).astype(np.uint8)


class Draws:
    """A generator that can only `random()`, with given numbers: recipes must use nothing else."""

    def __init__(self, *numbers: float):
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def test_none_is_the_stored_image_and_refuses_another_size():
    picture = noise(6, 8)
    image = make_augmentation(name="none", size=(6, 8))(record(picture), Draws())["image"]
    np.testing.assert_array_equal(image, picture)
    with pytest.raises(ValueError, match=r"8 x 6 and this one is 6 x 8; use 'resize_center_crop'"):
        make_augmentation(name="none", size=(8, 6))(record(picture), Draws())


def test_pad_crop_flip_moves_the_image_by_up_to_the_padding():
    picture = noise(6, 8)
    crop = make_augmentation(name="pad_crop_flip", size=(6, 8), padding=2, flip=False)
    centre = crop(record(picture), Draws(0.5, 0.5))["image"]
    np.testing.assert_array_equal(centre, picture)
    corner = crop(record(picture), Draws(0.0, 0.999))["image"]  # two down, two to the left
    np.testing.assert_array_equal(corner[2:, :-2], picture[:-2, 2:])
    assert not corner[:2].any()
    assert not corner[:, -2:].any()


def test_pad_crop_flip_flips_below_one_half():
    picture = noise(6, 8)
    crop = make_augmentation(name="pad_crop_flip", size=(6, 8), padding=0)
    np.testing.assert_array_equal(
        crop(record(picture), Draws(0, 0, 0.49))["image"], picture[:, ::-1]
    )
    np.testing.assert_array_equal(crop(record(picture), Draws(0, 0, 0.5))["image"], picture)


def test_pad_crop_flip_resizes_an_image_of_another_size():
    crop = make_augmentation(name="pad_crop_flip", size=(16, 16), padding=0, flip=False)
    wanted = decode.resize(gradient(40, 20), (16, 16), antialias=True)
    image = crop(record(gradient(40, 20)), Draws(0, 0))["image"]
    np.testing.assert_array_equal(image, wanted)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2**32), st.sampled_from([1, 2]))
@settings(max_examples=300, deadline=None)
def test_a_random_crop_has_the_area_and_shape_asked_for(height, width, seed, square):
    ratios = (3 / 4 * square, 4 / 3 * square)
    rng = np.random.default_rng(seed)
    top, left, rows, columns = augment._random_crop((height, width), rng, (0.08, 1.0), ratios)
    assert 0 <= top <= top + rows <= height
    assert 0 <= left <= left + columns <= width
    assert min(rows, columns) >= 1
    # Whole pixels move a ratio by at most one pixel of either side.
    assert (columns + 1) / max(rows - 1, 0.5) >= ratios[0] or columns == width
    assert (columns - 1) / (rows + 1) <= ratios[1] or rows == height


def test_random_crops_are_spread_over_areas_shapes_and_places():
    rng = np.random.default_rng(0)
    crops = [
        augment._random_crop((400, 400), rng, (0.25, 0.5), (3 / 4, 4 / 3)) for _ in range(4000)
    ]
    top, left, height, width = np.array(crops).T
    area, ratio = height * width / 160_000, width / height
    assert 0.245 < area.min() < 0.26 < 0.49 < area.max() < 0.505
    assert abs(area.mean() - 0.375) < 0.01
    assert abs(np.log(ratio).mean()) < 0.01
    assert 0.74 < ratio.min() < 0.76 < 1.32 < ratio.max() < 1.35
    for start, length in ((top, height), (left, width)):
        assert abs((start / (400 - length)).mean() - 0.5) < 0.02


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (1, 1), (3, 3)])
@pytest.mark.parametrize("name", ["inception_crop_flip", "resize_center_crop", "pad_crop_flip"])
def test_extreme_images_still_give_the_size(name, shape):
    crop = make_augmentation(name=name, size=(16, 24))
    for kind in ("PNG", "JPEG"):
        assert crop(record(noise(*shape), kind), np.random.default_rng(0))["image"].shape == (
            16,
            24,
            3,
        )


def test_an_image_that_would_be_resized_beyond_memory_is_refused():
    crop = make_augmentation(name="resize_center_crop", size=(224, 224))
    with pytest.raises(decode.DecodeError, match="resizing makes 256 x 15360000 pixels; at most"):
        crop(record(noise(1, 60_000), "JPEG"), np.random.default_rng(0))


def test_the_whole_image_is_what_a_scale_of_one_gives():
    crop = make_augmentation(
        name="inception_crop_flip", size=(32, 32), min_scale=1.0, min_ratio=1.0, max_ratio=1.0
    )
    wanted = decode.resize(gradient(48, 48), (32, 32), antialias=False)
    image = crop(record(gradient(48, 48)), Draws(0.3, 0.3, 0.3, 0.3, 0.9))["image"]
    np.testing.assert_array_equal(image, wanted)
    flipped = crop(record(gradient(48, 48)), Draws(0.3, 0.3, 0.3, 0.3, 0.1))["image"]
    np.testing.assert_array_equal(flipped, wanted[:, ::-1])


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [
        ("inception_crop_flip", (100, 100), (100, 100)),
        ("resize_center_crop", (56, 56), (128, 128)),
        ("pad_crop_flip", (64, 64), (128, 128)),
    ],
)
def test_of_a_large_jpeg_only_the_scale_that_is_needed_is_decoded(name, size, least, monkeypatch):
    decoded = []

    def spy(data, *, min_size=None, decode=decode.decode):
        image = decode(data, min_size=min_size)
        decoded.append(image.shape[:2])
        return image

    crop = make_augmentation(name=name, size=size)
    monkeypatch.setattr(augment.decode, "decode", spy)
    draws = np.random.default_rng(3)
    images = [crop(record(gradient(800, 800), kind), draws)["image"] for kind in ("JPEG", "JPEG")]
    assert all(image.shape == (*size, 3) for image in images)
    assert all(max(shape) < 800 and shape >= least for shape in decoded)


@pytest.mark.parametrize("name", ["inception_crop_flip", "resize_center_crop", "pad_crop_flip"])
def test_the_scaled_jpeg_gives_the_picture_that_the_whole_one_gives(name):
    picture, rngs = gradient(900, 700), [np.random.default_rng(seed) for seed in (5, 5)]
    crop = make_augmentation(name=name, size=(48, 48))
    from_jpeg = crop(record(picture, "JPEG"), rngs[0])["image"]
    from_png = crop(record(picture, "PNG"), rngs[1])["image"]
    assert np.abs(from_jpeg.astype(int) - from_png).mean() < 1.5


@pytest.mark.parametrize(
    ("shape", "size", "resized"),
    [
        ((375, 500), (224, 224), (256, 341)),
        ((500, 375), (224, 224), (341, 256)),
        ((100, 100), (224, 224), (256, 256)),
        ((300, 400), (64, 128), (110, 146)),
        ((32, 32), (28, 28), (32, 32)),
    ],
)
def test_resize_center_crop_follows_its_rule(shape, size, resized):
    picture = gradient(*shape)
    image = make_augmentation(name="resize_center_crop", size=size)(record(picture), Draws())[
        "image"
    ]
    whole = decode.resize(picture, resized, antialias=True)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    np.testing.assert_array_equal(image, whole[top : top + size[0], left : left + size[1]])


def test_crop_fraction_one_keeps_the_whole_shorter_side():
    crop = make_augmentation(name="resize_center_crop", size=(8, 8), crop_fraction=1.0)
    np.testing.assert_array_equal(crop(record(noise(8, 8)), Draws())["image"], noise(8, 8))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_equal_generators_give_equal_images_and_pickles_do_too(name):
    crop = make_augmentation(name=name, size=(20, 30))
    again = pickle.loads(pickle.dumps(crop))
    picture = record(noise(20, 30), "JPEG")
    for seed in range(5):
        image = crop(picture, np.random.default_rng(seed))["image"]
        assert image.dtype == np.uint8
        assert image.shape == (20, 30, 3)
        np.testing.assert_array_equal(image, again(picture, np.random.default_rng(seed))["image"])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_zeros_have_the_shape_of_what_the_recipe_gives(name):
    zeros = make_augmentation(name=name, size=(20, 30)).zeros()
    assert list(zeros) == ["image"]
    assert zeros["image"].shape == (20, 30, 3)
    assert zeros["image"].dtype == np.uint8
    assert not zeros["image"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "inception"},
            "did you mean 'inception_crop_flip'.*choose from none, pad_crop_flip",
        ),
        ({"name": "pad_crop_flip", "paddin": 4}, "no option 'paddin' \\(did you mean 'padding'"),
        ({"name": "none", "flip": True}, "no option 'flip'; it has size"),
        ({"name": "none", "size": (224,)}, r"size=\(224,\) must be"),
        ({"name": "none", "size": (0, 8)}, r"size=\(0, 8\) must be"),
        ({"name": "none", "size": 224}, "size=224 must be"),
        ({"name": "pad_crop_flip", "padding": -1}, "padding=-1"),
        ({"name": "inception_crop_flip", "min_scale": 0.0}, "min_scale=0.0"),
        ({"name": "inception_crop_flip", "max_scale": 1.5}, "max_scale=1.5"),
        ({"name": "inception_crop_flip", "min_ratio": 2.0}, "min_ratio=2.0"),
        ({"name": "resize_center_crop", "crop_fraction": 1.1}, "crop_fraction=1.1"),
    ],
)
def test_a_wrong_recipe_is_refused_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_augmentation(**{"size": (8, 8)} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("draw", [0.2, 0.8], ids=["flipped", "as it is"])
@pytest.mark.parametrize("side", [40, 300, 700], ids=["enlarged", "reduced", "antialiased"])
def test_a_crop_is_written_where_the_batch_wants_it(side, draw):
    crop = make_augmentation(
        name="inception_crop_flip", size=(64, 48), min_scale=0.5, max_scale=0.6
    )
    numbers = [0.0, 0.5, 0.0, 0.0, draw]  # area, shape, top, left, flip
    expected = crop(record(noise(side, side)), Draws(*numbers))["image"]
    out = {"image": np.zeros((2, 64, 48, 3), np.uint8)[1]}
    made = crop(record(noise(side, side)), Draws(*numbers), out)
    assert made["image"] is out["image"]
    np.testing.assert_array_equal(out["image"], expected)
    again = crop(record(noise(side, side)), Draws(*numbers[:4], 1 - draw))["image"]
    np.testing.assert_array_equal(again, expected[:, ::-1])
