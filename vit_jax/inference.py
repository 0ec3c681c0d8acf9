"""Answers of a loaded model for image files or a dataset, in batches, every example once."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax.data.augment import Augmentation, make_augmentation
from vit_jax.data.folder import ENDINGS
from vit_jax.data.loader import Loader, Records, each_once
from vit_jax.functional import Functional
from vit_jax.models.model import Model


class Answer(NamedTuple):
    """What a batch became.

    Attributes:
      index: [examples] int64, their places among the records; unreadable ones are left out.
      label: [examples] int32.
      values: [examples, …] float32.
      errors: of each unreadable example, which it is and why.
    """

    index: np.ndarray
    label: np.ndarray
    values: np.ndarray
    errors: list[str]


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files as records."""

    paths: tuple[pathlib.Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error.strerror or error}") from error
        return {"image": data, "label": 0, "filename": str(path)}


def image_files(names: Sequence[str]) -> Files:
    """The files given, and all images in the folders given, however deep, sorted by name.

    Raises:
      FileNotFoundError: something is not there, or a folder holds no image.
    """
    found = []
    for name in names:
        path = pathlib.Path(name).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{name} does not exist; give images or a folder of them.")
        inside = [path]
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if _is_image(each, path))
            if not inside:
                raise FileNotFoundError(f"no images in {name} (*{', *'.join(ENDINGS)}).")
        found += inside
    return Files(tuple(dict.fromkeys(found)))


def _is_image(path: pathlib.Path, root: pathlib.Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in ENDINGS and not hidden and path.is_file()


def eval_augmentation(
    image_size: tuple[int, int], *, crop_fraction: float | None, interpolation: str = "bilinear"
) -> Augmentation:
    """'resize_center_crop' to the model's size, or 'stretch' where `crop_fraction` is None.

    With either 1.0 or None an image of that size stays as it is.
    """
    options = {"size": tuple(image_size), "interpolation": interpolation}
    if crop_fraction is None:
        return make_augmentation(name="stretch", **options)
    return make_augmentation(name="resize_center_crop", crop_fraction=crop_fraction, **options)


def answers(
    model: Model,
    records: Records,
    function: Callable[[Model, jax.Array], jax.Array],
    *,
    augment: Augmentation,
    batch_size: int,
) -> Iterator[Answer]:
    """function(model, uint8 images) of all records, in order, batch by batch.

    Args:
      model: see `vit_jax.load`.
      records: `Files`, or a split of a dataset.
      function: one of this module's, or any other that stays the same object.
      augment: how images get the model's size.
      batch_size: the last batch is padded, so one program serves all.
    """
    run = functools.partial(_apply, function, *Functional.of(model))
    batch_size = min(batch_size, len(records))
    loader = Loader(
        records,
        order=functools.partial(each_once, num_examples=len(records)),
        augment=augment,
        batch_size=batch_size,
        seed=0,
        num_steps=-(-len(records) // batch_size),
    )
    pending = None
    with loader:
        for batch in loader:
            values = run(batch["image"])
            if pending is not None:  # fetched while the next batch is computed
                yield _answer(*pending)
            pending = batch, values
    yield _answer(*pending)


def probabilities(model: Model, images: jax.Array) -> jax.Array:
    """[batch, height, width, 3] uint8 -> [batch, num_classes], the softmax of the logits."""
    return jax.nn.softmax(model(images), axis=-1)


def features(model: Model, images: jax.Array) -> jax.Array:
    """[batch, height, width, 3] uint8 -> [batch, features]: what the head reads."""
    return model.features(images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(function, build, variables, images) -> jax.Array:
    return function(build(variables), images)


def _answer(batch: dict[str, np.ndarray], values: jax.Array) -> Answer:
    whole = batch["mask"]
    return Answer(
        index=batch["index"][whole],
        label=batch["label"][whole],
        values=np.asarray(values, np.float32)[whole],
        errors=[str(error) for error in batch["error"] if error],
    )


def file_name(path: os.PathLike | str) -> str:
    """For tables: bytes that are no UTF-8 are shown escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
