"""The page of a run: its curves, what its model makes of the data, and how it was made."""

import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from vit_jax.metrics import duration
from vit_jax.report import figures
from vit_jax.report.figures import Curve, Figure
from vit_jax.report.layout import layout_rows, layout_table
from vit_jax.report.leaderboard import Score, is_share, leaderboard, span
from vit_jax.report.markup import Html, el, table
from vit_jax.report.page import Page, grid, note
from vit_jax.report.runs import Run, config_rows, parent_of, read_runs, when

TRAINING = (  # metric, title, share of one, note
    ("train/loss", "Training loss", False, "of single batches"),
    (
        "train/accuracy",
        "Training accuracy",
        True,
        "of single batches; of the first of mixed labels",
    ),
    ("train/learning_rate", "Learning rate", False, ""),
    ("train/grad_norm", "Norm of the gradient", False, ""),
    ("train/update_norm", "Norm of the update", False, ""),
)
SPEED = (
    (
        "speed/images_per_second",
        "Throughput",
        False,
        "images a second, saving and evaluation apart",
    ),
    ("speed/data_wait", "Waiting for data", True, "share of the time that the device waits"),
    ("speed/mfu", "Model FLOPs utilisation", True, "share of the devices' peak"),
)
COUNTS = r"(.*_)?count|rejected"  # of an evaluation: said in words, not drawn
WATCHED = ("step", "time", "train/skipped", "train/rejected", "speed/seconds_left")


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
    _training(page, runs)
    _evaluation(page, runs)
    _time(page, run)
    if examples:  # training's libraries, only for what needs them
        from vit_jax.report.model_sections import model_sections

        model_sections(page, run, data_dir=data_dir)
    else:
        page.add("Examples", note("Left out: this page was made without the model and the data."))
    _config(page, runs)
    _layout(page, run)
    _environment(page, run)
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
        if score.metric == "top1" and score.count:
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
        if re.fullmatch(COUNTS, metric) or values[-1] is None:
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
                value=values[-1],
                count=int(count or 0),
            )
        )
    return found


def _training(page: Page, runs: list[Run]) -> None:
    drawn = [_figure(page, runs, *row) for row in TRAINING + SPEED]
    known = {row[0] for row in TRAINING + SPEED} | set(WATCHED)
    more = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    more = [key for key in more if key.startswith("train/") and key not in known]
    drawn += [_figure(page, runs, key, key.removeprefix("train/"), False, "") for key in more]
    drawn = [figure for figure in drawn if figure]
    if not drawn:
        page.add("Training", note("No step was logged yet."))
        return
    hint = "Drag to zoom in all of them, double-click to come back."
    lost = [run.name for run in runs if not any("speed/mfu" in row for row in run.rows)]
    if lost:
        hint += (
            f" No MFU of {', '.join(lost)}: the peak of its devices is not in the table of chips."
        )
    page.add("Training", note(hint), grid(*drawn, even=True))


def _figure(
    page: Page, runs: list[Run], key: str, title: str, percent: bool, remark: str
) -> Html | None:
    found = [Curve(run.name, i, *run.series(key)) for i, run in enumerate(runs)]
    found = [curve for curve in found if len(curve.x)]
    if not found:
        return None
    if any(len(curve.x) > figures.MAX_POINTS for curve in found):
        remark = f"{remark}; " if remark else ""
        remark += f"thinned to {figures.MAX_POINTS:,} points, extremes kept"
    return page.figure(figures.curves(found, y=title, percent=percent), title, remark)


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
    return {
        name: {
            (run.name, step): run.record[key]
            for run in runs
            if key in run.record
            for step in steps[run.name]
        }
        for name, key in (("training time (s)", "wall_seconds"), ("parameters", "num_params"))
    }


def _time(page: Page, run: Run) -> None:
    seconds = run.record.get("seconds", {})
    if not any(seconds.values()):
        page.add("Time", note("No account of the time yet."))
        return
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    names = [name.replace("_", " ") for name, _ in parts]
    figure = figures.bars(names, [value for _, value in parts], x="seconds")
    total = run.record.get("wall_seconds", sum(seconds.values()))
    starts = run.record.get("starts", 1)
    said = (
        f"{duration(total)} in all, in {starts} {'start' if starts == 1 else 'starts'}; 'lost' is "
        "the time between processes, and what they did after the checkpoint that the next one "
        "took up."
    )
    page.add("Time", page.figure(figure, "Where the wall time went", said, wide=True))


def _config(page: Page, runs: list[Run]) -> None:
    parent, sentence = parent_of(runs[0])
    shown = [*runs, *([parent] if parent else [])]
    configs: Mapping[str, Any] = {run.name: run.config for run in shown}
    rows = config_rows(configs)
    body = [
        el(
            "tr",
            el("td", el("code", leaf), class_="leaf"),
            [el("td", el("code", value)) for value in values],
            class_="differs" if differs else None,
        )
        for leaf, values, differs in rows
    ]
    head = el("thead", el("tr", el("th", "leaf"), [el("th", name) for name in configs]))
    listing = el("table", head, el("tbody", body), id="config-table")
    count = sum(differs for _, _, differs in rows)
    others = "its parent" if len(runs) == 1 else "one another"
    if len(shown) > 1:
        box = el("input", type="checkbox", data_only_differences="config-table")
        toggle = el("label", box, f"only the {count} that differ from {others}", class_="toggle")
    else:
        toggle = None
    page.add("Config", note(sentence), toggle, el("div", listing, class_="scroll"))


def _layout(page: Page, run: Run) -> None:
    try:
        page.add("Sharding", layout_table(*layout_rows(run)))
    except ValueError as error:
        page.add("Sharding", note(f"Not shown: {error}"))


def _environment(page: Page, run: Run) -> None:
    record = run.record
    if not record:
        page.add("Environment", note("There is no run.json yet."))
        return
    dataset, devices = record.get("dataset", {}), record.get("devices", {})
    rows: list[tuple[str, Any]] = [("workdir", str(run.workdir.absolute()))]
    if "started" in record:
        rows.append(("started", when(record["started"])))
    rows += [(f"devices: {key}", value) for key, value in devices.items()]
    if dataset:
        splits = ", ".join(f"{name} {count:,}" for name, count in dataset.get("splits", {}).items())
        rows += [("dataset", dataset.get("name")), ("splits", splits)]
        rows.append(("classes", len(dataset.get("class_names", []))))
    rows += [
        (f"fingerprint of {key}", value) for key, value in record.get("fingerprints", {}).items()
    ]
    rows += [(f"version of {key}", value) for key, value in record.get("versions", {}).items()]
    cells = [[key, el("code", value)] for key, value in rows]
    page.add("Environment", table(["", ""], cells, class_="values"))
