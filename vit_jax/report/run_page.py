"""The page of a run: its curves, what its model makes of the data, and how it was made."""

import math
import re

from etils import epath

from vit_jax.metrics import duration
from vit_jax.report import figures, sections
from vit_jax.report.figures import Curve, Figure
from vit_jax.report.layout import layout_rows, layout_table
from vit_jax.report.leaderboard import Score, is_share, leaderboard, span
from vit_jax.report.markup import Html, el, table
from vit_jax.report.page import Page, grid, note, or_why
from vit_jax.report.runs import Run, parent_of, read_runs

COUNTS = r"(.*_)?count|rejected"  # of an evaluation: said in words, not drawn


def run_page(
    workdir: epath.Path, compare: list[epath.Path], *, examples: bool, data_dir: str = ""
) -> Page:
    """The page of the run in `workdir`.

    Args:
      workdir: of the run.
      compare: of other runs that are drawn beside it.
      examples: whether to load the checkpoint and the data, for what needs them.
      data_dir: where the datasets are, if not where the run had them.

    Raises:
      FileNotFoundError, ValueError: no run there.
    """
    runs = read_runs([workdir, *compare])
    run = runs[0]
    page = Page("run", run.name, _lede(run), [one.name for one in runs])
    page.facts = _facts(run)
    sections.training(page, runs)
    _evaluation(page, runs)
    sections.time(page, runs)
    if examples:  # training's libraries, only for what needs them
        from vit_jax.report.model_sections import model_sections

        model_sections(page, run, data_dir=data_dir)
    else:
        page.add("Examples", note("Left out: this page was made without the model and the data."))
    _config(page, runs)
    _layout(page, run)
    sections.environment(page, runs)
    return page


def _lede(run: Run) -> str:
    step, total = run.step, run.total_steps
    parts = [f"finished at step {step:,}" if step >= total else f"at step {step:,} of {total:,}"]
    if "num_params" in run.record:
        parts.append(f"{run.record['num_params']:,} parameters")
    if devices := run.record.get("devices"):
        parts.append(f"{devices.get('count')} × {devices.get('kind')}")
    if dataset := run.record.get("dataset"):
        parts.append(f"trained on {dataset.get('name')}")
    if "wall_seconds" in run.record:
        parts.append(f"{duration(run.record['wall_seconds'])} of wall time")
    return " · ".join(parts)


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = []
    for score in scores_of(run):
        if score.metric == "top1" and score.count and math.isfinite(score.value):
            right = round(score.value * score.count)
            label = f"{score.evaluation} top-1, {right:,} of {score.count:,} right"
            facts.append((f"{score.value:.2%}", label))
    for key, label, form in (
        ("train/loss", "last training loss", "{:.3f}"),
        ("speed/images_per_second", "images a second", "{:,.0f}"),
        ("speed/mfu", "model FLOPs utilisation", "{:.1%}"),
    ):
        value = run.last(key)
        if value is not None:
            facts.append((form.format(value), label))
    skipped, rejected = run.last("train/skipped"), run.last("train/rejected")
    if skipped:
        facts.append((f"{skipped:,.0f}", "updates skipped: they were not finite"))
    if rejected:
        facts.append((f"{rejected:,.0f}", "images that could not be read"))
    return facts


def scores_of(run: Run) -> list[Score]:
    """The newest value of every metric of every evaluation; `count` is the examples' number."""
    found = []
    for key in run.evaluated():
        evaluation, metric = key.split("/", 1)
        steps, values = run.series(key)
        if re.fullmatch(COUNTS, metric):
            continue
        own = run.last(f"{key}_count")  # where it is not that of the evaluation
        count = run.last(f"{evaluation}/count") if own is None else own
        section = run.config.get("evals", {}).get(evaluation) or {}
        found.append(
            Score(
                model=run.name,
                step=steps[-1],
                dataset=f"{section['dataset']}/{section.get('split', 'test')}" if section else "",
                evaluation=evaluation,
                metric=metric,
                value=math.nan if values[-1] is None else values[-1],
                count=int(count or 0),
            )
        )
    return found


def _evaluation(page: Page, runs: list[Run]) -> None:
    scores = [score for run in runs for score in scores_of(run)]
    if not scores:
        page.add("Evaluation", note("Nothing was evaluated yet."))
        return
    metrics = dict.fromkeys(score.metric for score in scores)
    drawn = [page.figure(_over_steps(runs, metric), metric) for metric in metrics]
    if len(runs) > 1:
        ranked = [el("h3", "Leaderboard"), *leaderboard(page, scores, costs=_costs(runs, scores))]
    else:
        ranked = [el("h3", "Newest values"), _newest(scores)]
    page.add("Evaluation", grid(*drawn, even=True), ranked)


def _over_steps(runs: list[Run], metric: str) -> Figure:
    found, variants = [], {}
    for number_, run in enumerate(runs):
        for key in run.evaluated():
            evaluation, its = key.split("/", 1)
            if its == metric:
                variant = variants.setdefault(evaluation, len(variants))
                name = f"{run.name} · {evaluation}" if len(runs) > 1 else evaluation
                found.append(Curve(name, number_, *run.series(key), variant))
    return figures.curves(found, y=metric, percent=is_share(metric), markers=True)


def _newest(scores: list[Score]) -> Html:
    rows = []
    for score in scores:
        ends = score.interval
        interval = span(score.metric, ends) if ends else ""
        rows.append(
            [
                *(score.evaluation, score.dataset, score.metric, score.shown),
                *(interval, score.count or None, score.step),
            ]
        )
    heads = ["evaluation", "dataset", "metric", "value", "95% interval", "examples", "step"]
    return table(heads, rows, sortable=True)


def _costs(runs: list[Run], scores: list[Score]) -> dict[str, dict]:
    """Of each run what an accuracy may be set against."""
    steps = {run.name: {score.step for score in scores if score.model == run.name} for run in runs}
    found = [(run, step) for run in runs for step in steps[run.name]]
    costs = {
        "training time (s)": {(run.name, step): run.seconds_to(step) for run, step in found},
        "parameters": {(run.name, step): run.record.get("num_params") for run, step in found},
    }
    return {
        name: {key: cost for key, cost in its.items() if cost is not None}
        for name, its in costs.items()
    }


def _config(page: Page, runs: list[Run]) -> None:
    parent, sentence = parent_of(runs[0])
    shown = [*runs, *([parent] if parent else [])]
    page.add(
        "Config", note(sentence), sections.differences({run.name: run.config for run in shown})
    )


def _layout(page: Page, run: Run) -> None:
    page.add("Sharding", or_why(lambda: layout_table(*layout_rows(run))))
