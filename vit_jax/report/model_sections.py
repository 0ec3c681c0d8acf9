"""The sections of a run's page that need its checkpoint, its data, or both."""

import functools
from collections.abc import Sequence
from typing import Any

from vit_jax.report.artefacts import attention, classification
from vit_jax.report.examples import batch, look, moved, score, worst_mistakes
from vit_jax.report.markup import Html
from vit_jax.report.page import Page, note, or_why
from vit_jax.report.runs import Run


def model_sections(page: Page, run: Run, *, data_dir: str = "") -> None:
    """Adds them; what cannot be had is said in its place.

    Args:
      page: takes them.
      run: whose newest checkpoint is looked at.
      data_dir: where the datasets are, if not where the run had them.
    """
    page.add("A batch", batch(run, data_dir))
    try:
        from vit_jax.interop.load import read_source
        from vit_jax.interop.spec import fill, make_model

        source = read_source(run.workdir)
        model = fill(make_model(source.spec), source.params)
    except (OSError, ValueError) as error:
        page.add("Predictions", note(f"The model cannot be read: {error}"))
        return
    evals = {name: its | moved(data_dir) for name, its in run.config.get("evals", {}).items()}
    for name, section in evals.items():
        predictions = functools.partial(_predictions, page, run, name, section)
        content = or_why(functools.partial(predictions, model, source.spec.class_names))
        page.add(f"Predictions on {name}", content)

    first = next(iter(evals.values()), None)
    if first is not None:
        content = or_why(functools.partial(_attention, page, first, model))
        page.add("Attention", content)


def _attention(page: Page, section: dict, model: Any) -> list[Html]:
    return attention(page, look(section, model).artefacts, run=0)


def _predictions(
    page: Page, run: Run, name: str, section: dict, model: Any, class_names: Sequence[str]
) -> list[Html]:
    artefacts = score(name, section, model, class_names).artefacts
    content = classification(page, artefacts, name=run.name, run=0)
    return content + worst_mistakes(artefacts.get("mistakes", []), section)
