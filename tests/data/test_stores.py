"""Whatever the store, training sees the same examples in the same order, and refuses damage."""

import functools
import json
import pathlib
import pickle
import shutil
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.images import class_tree, encode, noise, write_tree
from vit_jax.data import jpeg, raw, sources, stores
from vit_jax.data.augment import make_augmentation
from vit_jax.data.decode import decode
from vit_jax.data.loader import Loader, make_loader
from vit_jax.data.prepare import prepare_convert, prepare_folder

AVAILABLE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "tiled" and shutil.which("jpegtran") is None, reason="jpegtran is not installed"
        ),
    )
    for name in stores.STORES
]
SIZES = {"resized": 48}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The same 24 images in each store that can be made here."""
    root = tmp_path_factory.mktemp("stores")
    files = {
        f"{'ab'[i % 2]}/{i}.{kind}": encode(noise(96 + i, 120, seed=i), kind.upper(), **options)
        for i in range(24)
        for kind, options in [("png", {}) if i % 5 == 0 else ("jpeg", {"quality": 90})]
    }
    write_tree(root / "images", files)

    @functools.cache
    def make(store: str):
        return prepare_folder(
            root / "images",
            name=store,
            data_dir=str(root / "data"),
            holdout=0.25,
            progress=False,
            store=store,
            store_size=SIZES.get(store, 0),
        )

    return make


def source(made, split="train"):
    return sources.load_source(made.name, split=split, data_dir=made.data_dir)


def batches(made, start=0, stop=3, **options):
    augment = make_augmentation(name="inception_crop_flip", size=(64, 64))
    options = {"name": made.name, "data_dir": made.data_dir, "num_threads": 1} | options
    with make_loader(
        **options, augment=augment, batch_size=8, seed=3, start_step=start, num_steps=stop
    ) as loader:
        return list(loader)


def same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


@pytest.mark.parametrize("store", AVAILABLE)
def test_every_store_is_read_through_the_same_seam(prepared, store):
    made, plain = prepared(store), prepared("jpeg")
    found, info = source(made), sources.dataset_info(store, data_dir=made.data_dir)
    assert len(found) == 18
    assert info.splits == {"train": 18, "test": 6}
    assert info.class_names == ("a", "b")
    for index, (record, original) in enumerate(zip(found, source(plain), strict=True)):
        assert record["filename"] == original["filename"], index
        assert record["label"] == original["label"]
        pixels = decode(record["image"])
        if store == "resized":
            assert min(pixels.shape[:2]) == 48
        else:
            np.testing.assert_array_equal(pixels, decode(original["image"]))
    with pytest.raises(IndexError):
        found[18]


@pytest.mark.parametrize("store", AVAILABLE)
def test_batches_are_those_of_the_files_as_they_came(prepared, store):
    expected, got = batches(prepared("jpeg")), batches(prepared(store))
    for left, right in zip(expected, got, strict=True):
        if store == "resized":  # the same examples, of other pixels
            left, right = ({**each, "image": each["image"].shape} for each in (left, right))
        same(left, right)


@pytest.mark.parametrize("store", AVAILABLE)
def test_reading_can_begin_anywhere_and_be_shared(prepared, store):
    made = prepared(store)
    whole = batches(made, 0, 4)
    for left, right in zip(whole[2:], batches(made, 2, 4), strict=True):
        same(left, right)
    for part in (0, 1):
        mine = batches(made, 0, 4, slots=range(4 * part, 4 * part + 4))
        for left, right in zip(whole, mine, strict=True):
            half = {key: value[4 * part : 4 * part + 4] for key, value in left.items()}
            same(half, right)


def test_fingerprints_are_of_what_training_sees(prepared, tmp_path):
    fingerprints = {store: prepared(store).fingerprint for store in ("jpeg", "resized", "raw")}
    assert len(set(fingerprints.values())) == 3
    again = prepare_folder(
        pathlib.Path(prepared("raw").data_dir).parent / "images",
        name="other",
        data_dir=str(tmp_path),
        holdout=0.25,
        progress=False,
        store="raw",
    )
    assert again.fingerprint == fingerprints["raw"]
    assert (again.mean, again.std) == (prepared("jpeg").mean, prepared("jpeg").std)


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")
def test_tiles_change_no_pixel_and_so_not_the_fingerprint(prepared):
    assert prepared("tiled").fingerprint == prepared("jpeg").fingerprint
    tiles = [jpeg.layout(record["image"]) for record in source(prepared("tiled"))]
    assert sum(found is not None and found.index > 0 for found in tiles) >= 13  # not the PNGs


@pytest.mark.parametrize("store", ["resized", "jpeg"])
def test_stock_tfds_reads_what_is_not_raw(prepared, store):
    opened = tfds.builder_from_directory(prepared(store).path).as_data_source("train")
    assert len(opened) == 18
    assert opened[0]["image"].ndim == 3


def test_images_are_never_enlarged():
    small = noise(20, 30)
    image = stores.Ingested(encode(small, "PNG"), small)
    assert stores.Store("resized", 48).take(image) == image
    reduced = stores.Store("raw", 16).take(image)
    assert (reduced.data, reduced.pixels.shape) == (b"", (16, 24, 3))


def test_resized_images_are_jpegs_with_tiles():
    taken = stores.Store("resized", 100).take(stores.Ingested(b"", noise(300, 400)))
    assert jpeg.layout(taken.data).index
    assert decode(taken.data).shape == (100, 133, 3)
    assert np.abs(decode(taken.data).astype(int) - taken.pixels).mean() < 2
    grey = stores.Store("resized", 100).take(
        stores.Ingested(b"", noise(300, 400)[..., :1].repeat(3, 2))
    )
    assert np.ptp(decode(grey.data), axis=-1).max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "tar"}, "store='tar' is unknown; choose from jpeg, tiled, resized, raw"),
        ({"store": "resized"}, "needs the shorter side, such as --store_size=256"),
        ({"store_size": 9}, "store='jpeg' keeps sizes; leave store_size out, or choose 'resized'"),
        ({"store": "raw", "store_size": -1}, "store_size=-1 must be a number of pixels"),
    ],
)
def test_wrong_stores_are_refused_before_anything_is_made(tmp_path, options, message):
    class_tree(tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        prepare_folder(tmp_path / "images", name="mine", data_dir=str(tmp_path / "data"), **options)
    assert not (tmp_path / "data").exists()


def test_tiles_without_jpegtran_are_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    write_tree(tmp_path / "images", {"a/0.jpg": encode(noise(), "JPEG")})
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(FileNotFoundError, match="jpegtran is not installed"):
        prepare_folder(
            tmp_path / "images", name="mine", data_dir=str(tmp_path / "data"), store="tiled"
        )
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("store", ["resized", "raw"])
def test_a_dataset_can_be_moved_to_another_store(prepared, store, tmp_path):
    made = prepare_convert(
        prepared("jpeg").path,
        name="moved",
        data_dir=str(tmp_path),
        progress=False,
        store=store,
        store_size=SIZES.get(store, 0),
    )
    assert made.class_counts == prepared("jpeg").class_counts
    assert made.fingerprint == prepared(store).fingerprint
    with pytest.raises(ValueError, match="and tfrecord is converted"):
        prepare_convert(prepared("jpeg").path, name="again", data_dir=str(tmp_path))


# Raw


@pytest.fixture
def copy(prepared, tmp_path):
    shutil.copytree(prepared("raw").data_dir, tmp_path / "data")
    return next((tmp_path / "data" / "raw").iterdir())


def opened(copy, split="train"):
    return sources.load_source("raw", split=split, data_dir=str(copy.parents[1]))


def test_raw_images_are_views_of_the_file(copy):
    image = opened(copy)[3]["image"]
    assert not image.flags.owndata
    assert not image.flags.writeable


def test_parts_of_raw_splits(copy):
    train, test = opened(copy), opened(copy, "test")
    part = opened(copy, "train[6:12]+test[:50%]")
    labels = [train[index]["filename"] for index in range(6, 12)]
    assert [record["filename"] for record in part] == labels + [
        test[i]["filename"] for i in (0, 1, 2)
    ]
    with pytest.raises(ValueError, match=r"no split 'val'; it has train, test"):
        opened(copy, "val")
    with pytest.raises(ValueError, match="holds no example"):
        opened(copy, "train[:0]")


def test_a_raw_source_can_be_pickled(copy):
    train = opened(copy)
    train[0]
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(again[5]["image"], train[5]["image"])


@pytest.mark.parametrize("file", ["raw-00000", "rows", "names"])
@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer", "missing"])
def test_a_corrupt_raw_store_is_refused_with_the_files_name(copy, file, damage):
    path = copy / f"raw-train.{file}"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    elif damage == "shorter":
        del data[-1]
    elif damage == "longer":
        data.append(0)
    path.write_bytes(data)
    if damage == "missing":
        path.unlink()
    error = FileNotFoundError if damage == "missing" else raw.CorruptStoreError
    with pytest.raises(error, match=f"raw-train.{file} .*prepare the dataset again"):
        opened(copy)
    assert len(list(opened(copy, "test"))) == 6


def test_a_flipped_pixel_far_behind_ends_a_run_and_is_not_left_out(copy, monkeypatch):
    monkeypatch.setattr(raw, "CHECKED_BYTES", 100_000)  # what is checked before a run starts
    path = copy / "raw-train.raw-00000"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    augment = make_augmentation(name="resize_center_crop", size=(32, 32))
    options = {"augment": augment, "batch_size": 18, "seed": 0, "num_steps": 1}
    with (
        Loader(opened(copy), order=lambda position: position, **options) as loader,
        pytest.raises(raw.CorruptStoreError, match=r"raw-train\.raw-00000 is damaged: image 17 "),
    ):
        next(loader)


def test_raw_heads_of_another_format_or_damaged(copy):
    head = (copy / "raw.json").read_text()
    (copy / "raw.json").write_text(head.replace("raw 2", "raw 9"))
    with pytest.raises(ValueError, match=r"raw\.json says format 'vit_jax raw 9'"):
        opened(copy)
    class_name, number = head.replace('"a"', '"e"'), head.replace("18", "19")
    assert class_name != head != number
    for damaged in (head[:50], "[]", "{}", "\udcff", class_name, number):
        (copy / "raw.json").write_text(damaged, errors="surrogateescape")
        with pytest.raises(raw.CorruptStoreError, match=r"raw\.json is damaged.*prepare the data"):
            opened(copy)


@pytest.mark.parametrize("damaged", [None, "", "[]", "{}", '{"mean": null}'])
def test_what_prepare_learnt_of_a_raw_store_must_be_there(copy, damaged):
    path = copy / sources.METADATA
    path.unlink() if damaged is None else path.write_text(damaged)
    with pytest.raises(ValueError, match=rf"{sources.METADATA} is .*prepare the dataset again"):
        opened(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [("file", 1), ("offset", -1), ("offset", 10**9), ("height", 0), ("width", 2**31 - 1)],
)
def test_rows_that_point_elsewhere_are_refused_by_name(copy, field, value):
    """As a stranger's store might, whose checksums are right."""
    rows = np.frombuffer((copy / "raw-train.rows").read_bytes(), raw.ROW).copy()
    rows[field][7] = value
    (copy / "raw-train.rows").write_bytes(rows.tobytes())
    head = raw.read_head(copy)
    head["splits"]["train"]["files"]["raw-train.rows"]["crc32"] = zlib.crc32(rows.tobytes())
    (copy / "raw.json").write_text(json.dumps(head | {"crc32": raw._checksum(head)}))
    with pytest.raises(
        raw.CorruptStoreError, match=r"raw-train\.rows is damaged: image 7 lies out"
    ):
        opened(copy)


def test_raw_files_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "_SHARD_BYTES", 1000)
    writer = raw.RawWriter(tmp_path, name="mine", split="train")
    images = [noise(10, 20, seed=i) for i in range(5)]
    for image in images:
        writer.write(image, label=0, filename=b"")
    writer.close()
    raw.write_head(tmp_path, name="mine", version="1.0.0", writers=[writer], class_names=["a"])
    assert writer.shard_lengths == [2, 2, 1]
    for record, image in zip(raw.RawSplit(tmp_path, "train"), images, strict=False):
        np.testing.assert_array_equal(record["image"], image)
    rows = np.frombuffer((tmp_path / "mine-train.rows").read_bytes(), raw.ROW)
    assert rows["checksum"][3] == zlib.crc32(images[3].tobytes())
