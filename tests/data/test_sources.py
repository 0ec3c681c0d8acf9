import concurrent.futures
import json
import pickle
import shutil

import pytest
import tensorflow_datasets as tfds

from tests.data.images import class_tree, encode, noise
from vit_jax.data import sources, writer
from vit_jax.data.prepare import prepare_folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    class_tree(root / "images", per_class=20)
    prepare_folder(root / "images", name="mine", data_dir=str(root), holdout=0.1, progress=False)
    return root


@pytest.fixture
def copy(data_dir, tmp_path):
    """A dataset of one's own, to damage."""
    shutil.copytree(data_dir / "mine", tmp_path / "mine")
    return tmp_path


def load(data_dir, split="train", name="mine"):
    return sources.load_source(name, split=split, data_dir=str(data_dir))


def test_info(data_dir):
    info = sources.dataset_info("mine", data_dir=str(data_dir))
    assert info.splits == {"train": 36, "test": 4}
    assert info.class_names == ("cat", "dog")
    assert info.path == data_dir / "mine" / "1.0.0"
    assert len(info.fingerprint) == 64
    assert len(info.mean) == len(info.std) == 3 and 0 < min(info.mean) < max(info.mean) < 1


def test_records_are_encoded_images_with_labels(data_dir):
    source = load(data_dir)
    assert len(source) == 36
    record = source[0]
    assert record["image"] == (data_dir / "images" / record["filename"].decode()).read_bytes()
    assert ("cat", "dog")[record["label"]] == record["filename"].decode().split("/")[0]
    assert type(record["label"]) is int


def test_indices_out_of_range(data_dir):
    with pytest.raises(IndexError, match="example 36 of 36 in mine/train"):
        load(data_dir)[36]
    assert len(list(load(data_dir))) == 36


def test_part_of_a_split(data_dir):
    part = load(data_dir, split="train[:50%]")
    assert len(part) == 18
    assert part[3] == load(data_dir)[3]
    assert {part[index]["label"] for index in range(18)} == {0, 1}, "stored sorted by class"


def test_several_at_once_are_what_each_is(data_dir):
    source = load(data_dir, split="train[30:]+test+train[:7]")
    order = [16, 0, 9, 5, 6, 7, 9, 2]
    assert source.__getitems__(order) == [source[index] for index in order]
    train, test = load(data_dir), load(data_dir, split="test")
    assert [source[index] for index in (0, 6, 10)] == [train[30], test[0], train[0]]
    assert source.__getitems__([]) == []


def test_a_source_can_be_pickled_before_and_after_use(data_dir):
    source = load(data_dir)
    again = pickle.loads(pickle.dumps(source))
    assert again[5] == source[5]
    assert pickle.loads(pickle.dumps(source))[5] == source[5]


def test_threads_may_share_a_source(data_dir):
    expected = [load(data_dir)[index] for index in range(36)]
    source = load(data_dir)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, list(range(36)) * 20)) == expected * 20


def test_a_missing_dataset_names_the_command_that_makes_it(data_dir):
    with pytest.raises(FileNotFoundError) as caught:
        load(data_dir, name="other")
    assert f"vit-jax prepare folder PATH --name=other --data_dir={data_dir}" in str(caught.value)
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="vit-jax prepare digits"):
        load(data_dir / "nowhere", name="digits")


@pytest.mark.parametrize("split", ["valid", "train[", "train[:x]", "", "train[:0]"])
def test_unknown_splits_list_the_choices(data_dir, split):
    with pytest.raises(ValueError, match="split") as caught:
        load(data_dir, split=split)
    assert "\n" not in str(caught.value)
    if split == "valid":
        assert "train, test" in str(caught.value)


def test_versions_and_configs(data_dir, tmp_path):
    for place in ("mine/1.9.0", "mine/1.10.0", "set/big/2.0.0", "set/small/1.0.0"):
        shutil.copytree(data_dir / "mine" / "1.0.0", tmp_path / place)
    (tmp_path / "mine" / "2.0.0").mkdir()  # holds no dataset

    def version(name):
        return sources.dataset_info(name, data_dir=str(tmp_path)).path.name

    assert version("mine") == "1.10.0"
    assert version("mine:1.9.0") == "1.9.0"
    assert version("set/big") == version("set/big:2.0.0") == "2.0.0"
    with pytest.raises(FileNotFoundError, match=r"no version 3.0.0; it has 1.9.0, 1.10.0"):
        version("mine:3.0.0")
    with pytest.raises(FileNotFoundError, match="one of set/big, set/small"):
        version("set")


def test_a_dataset_that_only_tfds_has_seen(copy):
    path = copy / "mine" / "1.0.0"
    (path / sources.METADATA).unlink()
    info = sources.dataset_info("mine", data_dir=str(copy))
    assert info.mean is None and info.std is None and info.class_names == ("cat", "dog")
    assert info == sources.dataset_info("mine", data_dir=str(copy))
    (path / "label.labels.txt").write_text("cat\nfox\n")
    assert sources.dataset_info("mine", data_dir=str(copy)).fingerprint != info.fingerprint


def test_other_formats_are_refused_with_the_command_that_converts(copy):
    path = copy / "mine" / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="vit-jax prepare convert"):
        load(copy)


@pytest.mark.parametrize(
    "features",
    [
        {"picture": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)},
        {"image": tfds.features.Image(), "label": tfds.features.Text()},
    ],
)
def test_datasets_without_images_and_labels_are_refused(copy, features):
    path = copy / "mine" / "1.0.0"
    tfds.features.FeaturesDict(features).save_config(path)
    with pytest.raises(ValueError, match="an 'image' and a 'label' with classes are needed"):
        load(copy)


def test_a_missing_file_is_found_before_reading(copy):
    next((copy / "mine" / "1.0.0").glob("mine-train*")).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load(copy)
    assert len(load(copy, split="test")) == 4


def test_a_damaged_record_is_an_oserror_and_the_others_are_read(tmp_path):
    with writer.new_dataset("mine", data_dir=str(tmp_path)) as new:
        out = writer.SplitWriter(new.folder, name="mine", split="train")
        for index in range(4):
            image = encode(noise(64, 64, seed=index), "PNG")
            out.write(writer.serialize({"image": image, "label": 0, "filename": b"x"}))
        out.close()
        writer.write_tfds_metadata(new, writers=[out], class_names=["a"], description="")
    path = next(new.path.glob("mine-train*"))
    data = bytearray(path.read_bytes())
    place = data.index(encode(noise(64, 64, seed=2), "PNG")[:1000]) + 500
    data[place] ^= 0xFF
    path.write_bytes(data)
    source = load(tmp_path)
    with pytest.raises(OSError, match="example 2 of mine/train cannot be read"):
        source[2]
    with pytest.raises(OSError, match="an example of mine/train cannot be read"):
        source.__getitems__([1, 2])
    assert source.__getitems__([1, 3]) == [source[1], source[3]]
    assert source[1]["label"] == source[3]["label"] == 0
