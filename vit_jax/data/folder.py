"""A folder of images: which files are examples of which class in which split."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence

SPLITS = ("train", "val", "valid", "validation", "test")
"""Folder names (in any case) that mean a split. The split gets the folder's name in lower case."""

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Endings (in any case) of files that are taken for images."""

_LAYOUT = "images belong in PATH/<class>/ or PATH/<split>/<class>/"
_LITTER = ("thumbs.db", "desktop.ini", "__macosx")  # what systems leave behind, besides dot files


@dataclasses.dataclass(frozen=True)
class Item:
    """An example to be: what it is called, its label, and how its bytes are had."""

    name: str
    label: int
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Folder:
    """What `scan_folder` found."""

    splits: dict[str, list[Item]]
    class_names: tuple[str, ...]
    ignored: list[str]
    """Files that are no images by their ending."""


def scan_folder(path: str | os.PathLike) -> Folder:
    """Lists the examples of `PATH/<class>/*` or `PATH/<split>/<class>/*`; opens none.

    If every folder in PATH is called like a split (`SPLITS`), they are splits, and the classes are
    the union over them. Otherwise they are classes, and all examples are `train`. Then one class
    may be called `train` if it holds images, but split folders with classes in them beside other
    folders are refused, and so are folders within a class. Labels follow the class names sorted as
    strings, as in torchvision's ImageFolder: `10` comes before `2`.

    Dot files and the like are passed over, other files that are no images are listed as ignored.
    Raises FileNotFoundError, NotADirectoryError or ValueError, saying where images belong.
    """
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; give the folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; give a folder (unpack an archive first)")
    folders, ignored = _class_folders(root)
    split_folders = [each for each in folders if each.name.lower() in SPLITS]
    if len(split_folders) == len(folders):
        found = {}
        for folder in split_folders:
            if folder.name.lower() in found:
                raise ValueError(f"{root} holds the split {folder.name.lower()!r} twice")
            classes, others = _class_folders(folder)
            ignored += others
            found[folder.name.lower()] = _list_classes(classes, ignored)
    elif mixed := [each.name for each in split_folders if _list(each)[0]]:
        raise ValueError(
            f"{root} holds splits with classes in them ({', '.join(mixed)}) beside other folders: "
            f"move those away, or call each split one of {', '.join(SPLITS)}"
        )
    else:
        found = {"train": _list_classes(folders, ignored)}

    class_names = tuple(sorted({name for classes in found.values() for name in classes}))
    found = dict(sorted(found.items(), key=lambda split: (split[0] != "train", split[0])))
    splits = {
        split: [
            Item(_relative(image, root), class_names.index(name), functools.partial(_read, image))
            for name, images in classes.items()
            for image in images
        ]
        for split, classes in found.items()
    }
    return Folder(splits, class_names, [_relative(each, root) for each in ignored])


def permute(items: Sequence[Item], *, seed: int) -> list[Item]:
    """A permutation that depends on the names and the seed alone: not on the machine or on numpy.

    Datasets are stored in this order, so that no part of a split (`train[:90%]`) lacks a class.
    """
    return sorted(items, key=lambda item: _hash(f"{seed}/{item.name}"))


def hold_out(items: Sequence[Item], *, fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Cuts permuted items in two: (the rest, `fraction` of them, rounded up).

    Not stratified by class. Raises ValueError if either part would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"holdout={fraction} must lie between 0 and 1, such as 0.1 for a tenth")
    count = -int(-round(fraction * len(items), 6) // 1)  # 0.1 * 30 is 3.0000000000000004
    if not 0 < count < len(items):
        raise ValueError(
            f"holdout={fraction} of {len(items)} images leaves none to train on; hold out less"
        )
    items = permute(items, seed=seed)
    return items[count:], items[:count]


def shuffle_labels(items: Sequence[Item], *, seed: int) -> list[Item]:
    """Deals the labels out anew, at random: the class counts stay, what could be learnt goes.

    The control of Zhang et al. 2017 (Understanding deep learning requires rethinking
    generalization, section 2): held-out accuracy must fall to chance.
    """
    labels = [item.label for item in permute(items, seed=seed)]
    dealt = sorted(items, key=lambda item: _hash(f"labels/{seed}/{item.name}"))
    return [
        dataclasses.replace(item, label=label) for item, label in zip(dealt, labels, strict=True)
    ]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _list(
    folder: pathlib.Path,
) -> tuple[list[pathlib.Path], list[pathlib.Path], list[pathlib.Path]]:
    """The folders, images and other files in `folder`, each sorted by name."""
    folders, images, others = [], [], []
    for each in sorted(folder.iterdir(), key=lambda each: each.name):
        if each.name.startswith(".") or each.name.lower() in _LITTER:
            continue
        if each.is_dir():
            folders.append(each)
        else:
            (images if each.suffix.lower() in ENDINGS else others).append(each)
    return folders, images, others


def _class_folders(parent: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The folders in `parent`, and the files beside them: those have no class."""
    folders, images, others = _list(parent)
    if folders:
        return folders, images + others
    if images:
        raise ValueError(f"no classes: {parent} holds images but no folders; {_LAYOUT}")
    raise ValueError(f"no images or class folders in {parent}; {_LAYOUT}")


def _list_classes(
    folders: list[pathlib.Path], ignored: list[pathlib.Path]
) -> dict[str, list[pathlib.Path]]:
    """The images of each class folder of a split; adds files of other kinds to `ignored`."""
    classes = {}
    for folder in folders:
        nested, images, others = _list(folder)
        if nested:
            raise ValueError(
                f"{nested[0]} is a folder within a class folder; {_LAYOUT}, "
                f"<split> being one of {', '.join(SPLITS)}"
            )
        if not images:
            raise ValueError(
                f"no images in the class folder {folder} (*{', *'.join(ENDINGS)}); "
                "remove the folder or fill it"
            )
        if not folder.name.isprintable() or folder.name != folder.name.strip():
            raise ValueError(
                f"the class folder {str(folder)!r} has spaces around its name or unprintable "
                "letters in it, which TFDS would not keep; rename it"
            )
        classes[folder.name] = images
        ignored += others
    return classes


def _read(path: pathlib.Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would keep its reader waiting
        raise OSError("not a regular file")
    return path.read_bytes()


def _relative(path: pathlib.Path, root: pathlib.Path) -> str:
    return path.relative_to(root).as_posix()
