"""The sections of a run's page that need its checkpoint, its data, or both."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vit_jax.report.artefacts import attention, classification, gallery
from vit_jax.report.examples import first_batch, look, score, worst_mistakes
from vit_jax.report.markup import Html
from vit_jax.report.page import Page, note
from vit_jax.report.runs import Run


def model_sections(page: Page, run: Run, *, data_dir: str = "") -> None:
    """Adds them; what cannot be had is said in its place.

    Args:
      page: takes them.
      run: whose newest checkpoint is looked at.
      data_dir: where the datasets are, if not where the run had them.
    """
    moved = {"data_dir": data_dir} if data_dir else {}
    config = run.config | {"data": run.config.get("data", {}) | moved}
    class_names = run.record.get("dataset", {}).get("class_names", [])
    page.add("A batch", _or_why(lambda: _batch(config, class_names)))
    try:
        from vit_jax.interop.load import read_source
        from vit_jax.interop.spec import fill, make_model

        source = read_source(run.workdir)
        model = fill(make_model(source.spec), source.params)
    except (OSError, ValueError) as error:
        page.add("Predictions", note(f"The model cannot be read: {error}"))
        return
    for name, section in config.get("evals", {}).items():
        section = section | moved
        predictions = functools.partial(_predictions, page, run, name, section)
        content = _or_why(functools.partial(predictions, model, source.spec.class_names))
        page.add(f"Predictions on {name}", content)

    first = next(iter(config.get("evals", {}).values()), None)
    if first is not None:
        content = _or_why(functools.partial(_attention, page, first | moved, model))
        page.add("Attention", content)


def _attention(page: Page, section: dict, model: Any) -> list[Html]:
    return attention(page, look(section, model).artefacts, run=0)


def _or_why(content: Callable[[], Any]) -> Any:
    """The content, or a line on what is missing: a page of curves needs no dataset."""
    try:
        return content()
    except (OSError, ValueError) as error:
        return note(f"Not shown: {error}")


def _batch(config: dict[str, Any], class_names: list[str]) -> list[Html]:
    if not class_names:
        raise ValueError("there is no run.json yet, which names the classes.")
    mixup = config.get("preprocess", {}).get("mixup")
    said = "The first images of the first batch, as the loader hands them over"
    said += "; mixup follows on the device." if mixup else "."
    return [note(said), gallery(first_batch(config, class_names))]


def _predictions(
    page: Page, run: Run, name: str, section: dict, model: Any, class_names: Sequence[str]
) -> list[Html]:
    artefacts = score(name, section, model, class_names).artefacts
    content = classification(page, artefacts, name=run.name, run=0)
    return content + worst_mistakes(artefacts.get("mistakes", []), section)
