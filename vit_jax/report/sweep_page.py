"""The page of a sweep: who is best at what and what it cost, and where the models differ."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vit_jax.report import figures, sections
from vit_jax.report.artefacts import attention, classification
from vit_jax.report.figures import Curve
from vit_jax.report.leaderboard import Score, is_share, leaderboard, primary, span
from vit_jax.report.markup import Cell, Html, broken, el, number, table
from vit_jax.report.page import Page, grid, note
from vit_jax.report.runs import Run, is_run, read_run
from vit_jax.sweep.store import Store
from vit_jax.sweep.table import leaderboard as paired

Result = Mapping[str, Any]

UNRANKED = ("attention",)  # protocols that describe a model
MAX_BATCHES = 3


def sweep_page(workdir: epath.Path, *, examples: bool, data_dir: str = "") -> Page:
    """The page of the sweep in `workdir`.

    Args:
      workdir: of the sweep.
      examples: whether to show images of the datasets.
      data_dir: where the datasets are, if not where the runs had them.

    Raises:
      ValueError: results that are damaged or a newer version's.
    """
    store = Store(workdir)
    results, orphaned = store.current()
    failures = store.current_failures()
    runs = _runs(results)
    names = list(dict.fromkeys(result["unit"]["checkpoint"] for result in results))
    page = Page("sweep", workdir.absolute().name, _lede(results, failures, orphaned), names)
    scores = scores_of(results)
    competing = scores_of([r for r in results if r["unit"]["protocol"] not in UNRANKED])
    page.facts = _facts(competing)
    if competing:
        page.add("Leaderboard", leaderboard(page, competing, costs=_costs(results, runs)))
        _over_steps(page, competing)
    else:
        page.add("Leaderboard", note("There is no result yet."))
    found = list(runs.values())
    if found:
        sections.training(page, found)
        sections.time(page, found)
    if found and examples:
        _batches(page, found, data_dir)
    for key in _groups(results):
        _models(page, key, results, runs, examples=examples, data_dir=data_dir)
    _failures(page, failures)
    if found:
        page.add("Configs", sections.differences({run.name: run.config for run in found}))
        sections.environment(page, found)
    else:
        page.add("Runs", note("No run of these checkpoints can be read from here."))
    _numbers(page, scores)
    return page


def _lede(results: Sequence[Result], failures: Mapping, orphaned: Sequence) -> str:
    units = [result["unit"] for result in results]
    counts = [
        (len(results), "result"),
        (len({(unit["checkpoint"], unit["step"]) for unit in units}), "checkpoint"),
        (len({unit["dataset"] for unit in units}), "dataset"),
        (len({unit["eval"] for unit in units}), "evaluation"),
    ]
    parts = [f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in counts]
    parts += [f"{len(failures):,} failed"] if failures else []
    parts += [f"{len(orphaned):,} kept that the file no longer asks for"] if orphaned else []
    return " · ".join(parts)


def _facts(scores: Sequence[Score]) -> list[tuple[str, str]]:
    best: dict[tuple, Score] = {}
    for score in primary(scores):
        key = score.dataset, score.evaluation
        if is_share(score.metric) and (key not in best or score.place < best[key].place):
            best[key] = score
    return [
        (score.said, f"best {score.evaluation} on {dataset}: {score.who}")
        for (dataset, _), score in list(best.items())[:6]
    ]


def scores_of(results: Sequence[Result]) -> list[Score]:
    """Every number of the results; those that a leaderboard ranks with their p-value."""
    tested = {
        (row["dataset"], row["eval"], row["metric"], row["checkpoint"], row["step"]): row["p_value"]
        for row in paired(results)
    }
    found = []
    for result in results:
        unit = result["unit"]
        for value in result["values"]:
            key = unit["dataset"], unit["eval"], value["metric"], unit["checkpoint"], unit["step"]
            found.append(
                Score(
                    model=unit["checkpoint"],
                    step=unit["step"],
                    dataset=unit["dataset"],
                    evaluation=unit["eval"],
                    metric=value["metric"],
                    value=math.nan if value["value"] is None else value["value"],
                    count=value["count"],
                    low=value["low"],
                    high=value["high"],
                    seconds=result["seconds"],
                    p_value=tested.get(key),
                )
            )
    return found


def _runs(results: Sequence[Result]) -> dict[str, Run]:
    """The runs that can be read from here, by the checkpoints' name."""
    paths = {result["unit"]["checkpoint"]: epath.Path(result["unit"]["run"]) for result in results}
    return {name: read_run(path, name=name) for name, path in paths.items() if is_run(path)}


def _costs(results: Sequence[Result], runs: Mapping[str, Run]) -> dict[str, dict]:
    costs: dict[str, dict] = {"training time (s)": {}, "parameters": {}, "evaluation time (s)": {}}
    for result in results:
        unit, key = result["unit"], _which(result)
        spent = costs["evaluation time (s)"]
        spent[key] = spent.get(key, 0.0) + result["seconds"]
        run = runs.get(unit["checkpoint"])
        if run is None:
            continue
        if "num_params" in run.record:
            costs["parameters"][key] = run.record["num_params"]
        seconds = run.seconds_to(unit["step"])
        if seconds is not None:
            costs["training time (s)"][key] = seconds
    return costs


def _over_steps(page: Page, scores: Sequence[Score]) -> None:
    groups: dict[tuple, dict[str, list[Score]]] = {}
    for score in primary(scores):
        if score.step is not None:
            key = score.dataset, score.evaluation, score.metric
            groups.setdefault(key, {}).setdefault(score.model, []).append(score)
    drawn = []
    for (dataset, evaluation, metric), models in groups.items():
        if max(map(len, models.values())) < 2:
            continue
        found = []
        for model, its in models.items():
            its = sorted(its, key=lambda score: score.step)
            xs, ys = [score.step for score in its], [score.value for score in its]
            found.append(Curve(model, page.runs.index(model), xs, ys))
        figure = figures.curves(found, y=metric, percent=is_share(metric), markers=True)
        drawn.append(page.figure(figure, f"{evaluation} on {dataset}", metric))
    if drawn:
        page.add("Over steps", grid(*drawn, even=True))


def _groups(results: Sequence[Result]) -> list[tuple[str, str]]:
    """(dataset, evaluation) of those that have something to show of a model."""
    shown = ("reliability", "confusion", "mistakes", "pictures")
    keys = [
        (result["unit"]["dataset"], result["unit"]["eval"])
        for result in results
        if any(result["artefacts"].get(name) for name in shown)
    ]
    return list(dict.fromkeys(keys))


def _models(
    page: Page,
    key: tuple[str, str],
    results: Sequence[Result],
    runs: Mapping[str, Run],
    *,
    examples: bool,
    data_dir: str,
) -> None:
    """What the best model of a dataset and evaluation makes of it."""
    dataset, evaluation = key
    group = {_which(r): r for r in results if (r["unit"]["dataset"], r["unit"]["eval"]) == key}
    # Of an evaluation without an accuracy, the model that is best elsewhere.
    ranked = paired(list(group.values())) or paired(results)
    order = [(row["checkpoint"], row["step"]) for row in ranked] + list(group)
    model, step = which = next(one for one in order if one in group)
    artefacts, unit = group[which]["artefacts"], group[which]["unit"]
    said = note(f"Of the best: {model}{'' if step is None else f' at step {step:,}'}.")
    run = page.runs.index(model)
    content = classification(page, artefacts, name=model, run=run)
    content += attention(page, artefacts, run=run)
    if examples and (found := artefacts.get("mistakes")):
        content += _mistakes(found, unit, runs.get(model), data_dir)
    page.add(f"{evaluation} on {dataset}", said, content)


def _which(result: Result) -> tuple[str, int | None]:
    return result["unit"]["checkpoint"], result["unit"]["step"]


def _mistakes(
    found: Sequence[Mapping], unit: Mapping[str, Any], run: Run | None, data_dir: str
) -> list[Html]:
    from vit_jax.report.examples import worst_mistakes

    section = dict(unit["settings"]["dataset"])
    config = run.config if run else {}
    section["data_dir"] = data_dir or config.get("data", {}).get("data_dir", "data")
    size = config.get("model", {}).get("image_size", (224, 224))
    augment = section.get("augment", {"name": "resize_center_crop"})
    section["augment"] = {"size": list(size)} | augment
    return worst_mistakes(found, section)


def _failures(page: Page, failures: Mapping[str, Mapping[str, Any]]) -> None:
    if not failures:
        return
    rows = [[el("code", unit), failure.get("error", "")] for unit, failure in failures.items()]
    said = note("These units failed; vit-jax sweep --retry_failed tries them again.")
    page.add("Failures", said, table(["unit", "error"], rows))


def _batches(page: Page, runs: Sequence[Run], data_dir: str) -> None:
    """The first batch of a run of each recipe of data."""
    from vit_jax.report.examples import batch

    recipes: dict[str, list[Run]] = {}
    for run in runs:
        data = run.config.get("data", {}) | {"data_dir": ""}  # the same from anywhere
        recipe = data, run.config.get("augment"), run.config.get("preprocess")
        recipes.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    content = []
    for alike in list(recipes.values())[:MAX_BATCHES]:
        heading = f"{alike[0].name}" + (f" and {len(alike) - 1} more" if alike[1:] else "")
        content += [el("h3", heading) if len(recipes) > 1 else None, batch(alike[0], data_dir)]
    if len(recipes) > MAX_BATCHES:
        content.append(note(f"{len(recipes) - MAX_BATCHES} more recipes of data are not shown."))
    page.add("A batch", content)


def _numbers(page: Page, scores: Sequence[Score]) -> None:
    rows = []
    for score in scores:
        ends = score.interval
        interval = span(score.metric, ends) if ends else None
        seconds = None if score.seconds is None else Cell(number(score.seconds), score.seconds)
        p_value = None if score.p_value is None else Cell(f"{score.p_value:.3g}", score.p_value)
        rows.append(
            [
                *(broken(score.model, ",/"), score.step, broken(score.dataset)),
                *(broken(score.evaluation), broken(score.metric)),
                *(score.shown, interval, score.count, p_value, seconds),
            ]
        )
    heads = ["model", "step", "dataset", "evaluation", "metric", "value", "95% interval"]
    heads += ["examples", "p", "seconds"]
    said = note(
        "p: of the paired test against the best of the same evaluation, where there is one."
    )
    found = table(heads, rows, sortable=True, class_="dense")
    page.add("All numbers", said, el("div", found, class_="tall"))
