"""What a model makes of images, and what a batch looks like: needs the checkpoint and the data."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vit_jax import config as config_lib
from vit_jax.data.augment import make_augmentation
from vit_jax.data.loader import make_loader
from vit_jax.data.order import ExampleRng
from vit_jax.data.sources import load_source
from vit_jax.evals import EVALS
from vit_jax.evals.base import Live, Scores
from vit_jax.functional import Functional
from vit_jax.report.artefacts import Example, gallery
from vit_jax.report.markup import Html, el
from vit_jax.report.page import note, or_why
from vit_jax.report.runs import Run

BATCH = 24  # images of a batch that are shown


def look(section: Mapping[str, Any], model: Any) -> Scores:
    """The attention figures of a model on the images of an evaluation; see `score`."""
    known = ("dataset", "split", "data_dir", "augment", "batch_size")
    chosen = {key: section[key] for key in known if key in section}
    return score("attention", {"name": "attention"} | chosen, model)


def score(
    name: str, section: Mapping[str, Any], model: Any, class_names: Sequence[str] = ()
) -> Scores:
    """An evaluation of a run's config on every example, with its artefacts.

    Args:
      name: the evaluation's in the config.
      section: of the config.
      model: see `vit_jax.load`.
      class_names: of its head; () takes the dataset's.

    Raises:
      FileNotFoundError: the dataset is not here.
      ValueError: it does not fit the model.
    """
    evaluation, options = config_lib.choose(f"evals.{name}", EVALS, section)
    derived = {"class_names": tuple(class_names)}
    evaluation = config_lib.call(f"evals.{name}", evaluation, options, **derived)

    def put(batch):
        return {key: jnp.asarray(value) for key, value in batch.items()}

    return evaluation.measure(Live(Functional.of(model), put, lambda: None))


def mistakes(found: Sequence[Mapping[str, Any]], section: Mapping[str, Any]) -> list[Example]:
    """The artefact 'mistakes' of `Classification` with the images as the model saw them.

    Args:
      found: index, label, predicted, confidence of each.
      section: the evaluation's, which names dataset, split and recipe.
    """
    images = eval_images(section, [one["index"] for one in found])
    return [
        Example(
            image=image,
            caption=f"{one['label']} → {one['predicted']}",
            title=(
                f"example {one['index']}: is {one['label']}, "
                f"taken for {one['predicted']} with {one['confidence']:.2%}"
            ),
        )
        for one, image in zip(found, images, strict=True)
    ]


def worst_mistakes(found: Sequence[Mapping[str, Any]], section: Mapping[str, Any]) -> list[Html]:
    """Their gallery, or why there is none; see `mistakes`."""
    said = "The most confident mistakes: the true class → what it was taken for."
    shown = or_why(lambda: [note(said), gallery(mistakes(found, section))])
    return [el("h3", "Worst mistakes"), shown]


def eval_images(section: Mapping[str, Any], indices: Sequence[int]) -> list[np.ndarray]:
    """Images of a split as an evaluation's recipe makes them, [height, width, 3] uint8 each."""
    source = load_source(
        section["dataset"],
        split=section.get("split", "test"),
        data_dir=section.get("data_dir", "data"),
    )
    augment = make_augmentation(**config_lib.plain(section["augment"]))
    return [augment(source[index], ExampleRng(index, seed=0))["image"] for index in indices]


def batch(run: Run, data_dir: str = "") -> Any:
    """The first images of the run's first batch, or why they are not shown.

    Args:
      run: whose batch it is.
      data_dir: where the dataset is, if not where the run had it.
    """
    config = run.config | {"data": run.config.get("data", {}) | moved(data_dir)}
    mixup = config.get("preprocess", {}).get("mixup")
    said = f"The first images of the first batch of {run.name}, as the loader hands them over"
    said += "; mixup follows on the device." if mixup else "."
    class_names = run.record.get("dataset", {}).get("class_names", [])
    if not class_names:
        return note("Not shown: there is no run.json yet, which names the classes.")
    return or_why(lambda: [note(said), gallery(first_batch(config, class_names))])


def moved(data_dir: str) -> dict[str, str]:
    """What a section of data gets from `--data_dir`."""
    return {"data_dir": data_dir} if data_dir else {}


def first_batch(config: Mapping[str, Any], class_names: Sequence[str]) -> list[Example]:
    """The first slots of the batch of step 0, as the loader hands them over.

    Raises:
      FileNotFoundError: the dataset is not here.
    """
    # Slot j of step 0 is position j of the stream, whatever the batch size.
    size = min(BATCH, config["batch_size"])
    with config_lib.call(
        "data",
        make_loader,
        config["data"] | {"num_workers": 0},
        augment=make_augmentation(**config_lib.plain(config["augment"])),
        batch_size=size,
        seed=config["seed"],
        num_steps=1,
    ) as loader:
        batch = next(loader)
    found = []
    for slot in np.flatnonzero(batch["mask"]):
        name = class_names[batch["label"][slot]]
        title = f"slot {slot}: example {batch['index'][slot]}, {name}"
        found.append(Example(batch["image"][slot], name, title))
    return found
