import os
import pathlib

import pytest

from tests.data.images import write_tree
from vit_jax.data import folder as folder_lib
from vit_jax.data.folder import Item, scan_folder


def tree(root, *names):
    return write_tree(root, dict.fromkeys(names, b"x"))


def listing(found):
    return {
        split: sorted((item.name, found.class_names[item.label]) for item in items)
        for split, items in found.splits.items()
    }


def items(count):
    return [Item(f"{index % 5}/{index}.jpg", index % 5, bytes) for index in range(count)]


def test_class_folders_are_train(tmp_path):
    found = scan_folder(tree(tmp_path, "dog/1.jpg", "cat/2.PNG", "cat/1.JpEg"))
    assert found.class_names == ("cat", "dog")
    assert listing(found) == {
        "train": [("cat/1.JpEg", "cat"), ("cat/2.PNG", "cat"), ("dog/1.jpg", "dog")]
    }


def test_split_folders_share_the_union_of_their_classes(tmp_path):
    found = scan_folder(tree(tmp_path, "Train/b/1.jpg", "Train/c/1.jpg", "val/a/1.webp"))
    assert found.class_names == ("a", "b", "c")
    assert list(found.splits) == ["train", "val"]
    assert listing(found)["val"] == [("val/a/1.webp", "a")]


def test_classes_are_sorted_as_strings_like_image_folder(tmp_path):
    found = scan_folder(tree(tmp_path, "2/1.jpg", "10/1.jpg", "B/1.jpg", "a/1.jpg"))
    assert found.class_names == ("10", "2", "B", "a")


def test_a_class_may_be_called_like_a_split(tmp_path):
    found = scan_folder(tree(tmp_path, "train/1.jpg", "plane/1.jpg"))
    assert found.class_names == ("plane", "train")


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "bmp", "JPG", "Jpeg", "BMP"])
def test_every_ending_in_any_case(tmp_path, ending):
    assert len(scan_folder(tree(tmp_path, f"a/x.{ending}")).splits["train"]) == 1


def test_litter_is_silent_and_other_files_are_listed(tmp_path):
    root = tree(
        tmp_path,
        *("a/1.jpg", "a/.DS_Store", "a/Thumbs.db", ".git/config", "__MACOSX/a/1.jpg"),
        *("a/notes.txt", "a/film.gif", "list.csv", "stray.jpg"),
    )
    found = scan_folder(root)
    assert [item.name for item in found.splits["train"]] == ["a/1.jpg"]
    assert sorted(found.ignored) == ["a/film.gif", "a/notes.txt", "list.csv", "stray.jpg"]


def test_links_are_followed(tmp_path):
    tree(tmp_path / "store", "1.jpg")
    tree(tmp_path / "root", "a/2.jpg")
    (tmp_path / "root/a/link.jpg").symlink_to(tmp_path / "store/1.jpg")
    (tmp_path / "root/b").symlink_to(tmp_path / "store")
    names = [item.name for item in scan_folder(tmp_path / "root").splits["train"]]
    assert names == ["a/2.jpg", "a/link.jpg", "b/1.jpg"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images or class folders in .*root; images belong in PATH/<class>/"),
        (["readme.txt"], "no images or class folders"),
        (["1.jpg", "2.jpg"], "no classes: .*root holds images but no folders"),
        (["train/1.jpg", "test/2.jpg"], r"no classes: .*test holds images but no folders"),
        (["train/a/1.jpg", "test/2.jpg"], "no classes: .*test holds images but no folders"),
        (["train/a/1.jpg", "test/x.txt"], "no images or class folders in .*test"),
        (["a/1.jpg", "b/x.txt"], "no images in the class folder .*b "),
        (["a/1.jpg", "b/c/1.jpg"], "b/c is a folder within a class folder"),
        (["train/a/1.jpg", "extra/b/1.jpg"], "holds splits with classes in them .train. beside"),
        (["train/a/1.jpg", "Train/a/1.jpg"], "holds the split 'train' twice"),
        (["a /1.jpg"], "has spaces around its name"),
        (["a\nb/1.jpg"], "unprintable"),
    ],
)
def test_bad_layouts_are_one_clear_line(tmp_path, names, message):
    root = tree(tmp_path / "root", *names)
    root.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message) as caught:
        scan_folder(root)
    assert "\n" not in str(caught.value)


def test_an_empty_class_folder_is_refused(tmp_path):
    tree(tmp_path, "a/1.jpg")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"no images in the class folder .*b"):
        scan_folder(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scan_folder(tmp_path / "nowhere")
    (tmp_path / "images.zip").touch()
    with pytest.raises(NotADirectoryError, match="unpack"):
        scan_folder(tmp_path / "images.zip")


def test_names_that_are_no_unicode_do_not_stop_it(tmp_path):
    tree(tmp_path, "a/1.jpg")
    pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.jpg")).write_bytes(b"x")
    assert len(folder_lib.permute(scan_folder(tmp_path).splits["train"], seed=0)) == 2


def test_the_permutation_is_the_same_for_ever():
    names = [item.name for item in folder_lib.permute(items(8), seed=0)]
    assert " ".join(names) == ("0/5.jpg 2/7.jpg 3/3.jpg 4/4.jpg 0/0.jpg 1/6.jpg 1/1.jpg 2/2.jpg")
    assert folder_lib.permute(items(8)[::-1], seed=0) == folder_lib.permute(items(8), seed=0)
    assert [item.name for item in folder_lib.permute(items(8), seed=1)] != names


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(30, 0.1, 3), (31, 0.1, 4), (2, 0.01, 1), (1797, 0.2, 360)]
)
def test_hold_out_cuts_the_stated_share(count, fraction, held):
    rest, test = folder_lib.hold_out(items(count), fraction=fraction, seed=0)
    assert len(test) == held
    assert {item.name for item in rest + test} == {item.name for item in items(count)}
    assert folder_lib.hold_out(items(count)[::-1], fraction=fraction, seed=0) == (rest, test)


def test_hold_out_is_not_sorted_by_class():
    ordered = sorted(items(500), key=lambda item: item.label)
    _, test = folder_lib.hold_out(ordered, fraction=0.1, seed=0)
    assert {item.label for item in test} == set(range(5))


@pytest.mark.parametrize(
    ("count", "fraction"), [(10, 0.0), (10, 1.0), (10, -0.1), (10, 1.5), (1, 0.5), (3, 0.9)]
)
def test_hold_out_leaves_an_example_on_either_side(count, fraction):
    with pytest.raises(ValueError, match="holdout="):
        folder_lib.hold_out(items(count), fraction=fraction, seed=0)


def test_shuffled_labels_keep_their_counts_and_lose_their_meaning():
    before = items(1000)
    after = folder_lib.shuffle_labels(before, seed=0)
    assert sorted(item.name for item in after) == sorted(item.name for item in before)
    assert sorted(item.label for item in after) == sorted(item.label for item in before)
    true = {item.name: item.label for item in before}
    agree = sum(true[item.name] == item.label for item in after)
    assert 140 < agree < 260  # a fifth by chance, 4.7 deviations either way
    assert folder_lib.shuffle_labels(before[::-1], seed=0) == after
    assert folder_lib.shuffle_labels(before, seed=1) != after
