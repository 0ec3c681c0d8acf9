"""The sections that a run's page and a sweep's have in common: curves, time, what differs."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vit_jax.metrics import duration
from vit_jax.paths import absolute
from vit_jax.report import figures
from vit_jax.report.figures import Curve
from vit_jax.report.markup import Cell, Html, broken, el, table
from vit_jax.report.page import Page, grid, note
from vit_jax.report.runs import Run, config_rows, when

FEW = 5  # runs that stand side by side; more stand below one another


class Metric(NamedTuple):
    """A curve of training.

    Attributes:
      key: in metrics.jsonl.
      title: of the figure.
      y: of its axis, with the unit.
      percent: whether it is a share.
      zero: whether the axis begins at zero.
      note: below the title.
    """

    key: str
    title: str
    y: str
    percent: bool = False
    zero: bool = False
    note: str = ""


BATCHES = "of single batches"
METRICS = (
    Metric("train/loss", "Training loss", "loss", note=BATCHES),
    Metric(
        *("train/accuracy", "Training accuracy", "accuracy"),
        percent=True,
        note=f"{BATCHES}; of the first of mixed labels",
    ),
    Metric("train/learning_rate", "Learning rate", "learning rate", zero=True),
    Metric("train/grad_norm", "Norm of the gradient", "norm", note="before clipping"),
    Metric("train/update_norm", "Norm of the update", "norm"),
    Metric(
        *("speed/images_per_second", "Throughput", "images / s"),
        zero=True,
        note="saving and evaluation apart",
    ),
    Metric(
        *("speed/data_wait", "Waiting for data", "share of the time"),
        percent=True,
        zero=True,
        note="while the device has nothing to do",
    ),
    Metric(
        *("speed/mfu", "Model FLOPs utilisation", "share of the peak"),
        percent=True,
        zero=True,
        note="of the devices' data sheet",
    ),
)
WATCHED = ("step", "time", "train/skipped", "train/rejected", "speed/seconds_left")  # not drawn


def training(page: Page, runs: Sequence[Run]) -> None:
    """Adds the curves of training and of its speed, each run in its colour."""
    known = {metric.key for metric in METRICS} | set(WATCHED)
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    more = [key for key in keys if key.startswith("train/") and key not in known]
    names = [key.removeprefix("train/") for key in more]
    others = [Metric(key, name, name) for key, name in zip(more, names, strict=True)]
    drawn = [figure for metric in (*METRICS, *others) if (figure := _drawn(page, runs, metric))]
    if not drawn:
        page.add("Training", note("No step was logged yet."))
        return
    hint = "Drag to zoom in all of them, double-click to come back."
    lost = [run.name for run in runs if run.last("speed/mfu") is None]
    if lost:
        whose = "" if len(lost) == len(runs) else f" of {', '.join(lost)}"
        hint += f" No MFU{whose}: the peak of these devices is not in the table of chips."
    page.add("Training", note(hint), grid(*drawn, even=True))


def _drawn(page: Page, runs: Sequence[Run], metric: Metric) -> Html | None:
    series = {run.name: run.series(metric.key) for run in runs}
    found = [Curve(name, page.runs.index(name), *its) for name, its in series.items() if its[0]]
    if not found:
        return None
    said = [metric.note] if metric.note else []
    if all(value is None for curve in found for value in curve.y):
        said.append("never finite")
    if any(len(curve.x) > figures.points(len(found)) for curve in found):
        said.append(f"thinned to {figures.points(len(found)):,} points, extremes kept")
    figure = figures.curves(found, y=metric.y, percent=metric.percent, zero=metric.zero)
    return page.figure(figure, metric.title, "; ".join(said))


def time(page: Page, runs: Sequence[Run]) -> None:
    """Adds where the wall time went: bars for one run, a table for several."""
    told = [run for run in runs if any(run.record.get("seconds", {}).values())]
    said = (
        "'lost' is the time between processes, and what they did after the checkpoint that the "
        "next one took up."
    )
    if not told:
        page.add("Time", note("No account of the time yet."))
    elif len(runs) > 1:
        page.add("Time", note(f"Wall time in seconds; {said}"), _seconds(told))
    else:
        seconds, starts = told[0].record["seconds"], told[0].record.get("starts", 1)
        total = told[0].record.get("wall_seconds", sum(seconds.values()))
        parts = sorted(seconds.items(), key=lambda part: -part[1])
        names = [name.replace("_", " ") for name, _ in parts]
        figure = figures.bars(names, [value for _, value in parts], x="seconds")
        said = f"{duration(total)} in all, in {starts} start{'' if starts == 1 else 's'}; {said}"
        page.add("Time", page.figure(figure, "Where the wall time went", said, wide=True))


def _seconds(runs: Sequence[Run]) -> Html:
    spent = [part for run in runs for part in run.record["seconds"].items()]
    names = list(dict.fromkeys(name for name, seconds in spent if seconds))
    rows = []
    for run in runs:
        seconds = run.record["seconds"]
        speeds = [x for x in run.series("speed/images_per_second")[1] if x is not None]
        total = run.record.get("wall_seconds", sum(seconds.values()))
        speed = statistics.median(speeds) if speeds else None
        rows.append([broken(run.name, ",/"), total, *map(seconds.get, names), speed])
    heads = ["run", "in all", *(name.replace("_", " ") for name in names)]
    return table([*heads, "median images / s"], rows, sortable=True)


def differences(values: Mapping[str, Mapping[str, Any]]) -> list[Html]:
    """What differs between configs (or other values) of some name, and what they share."""
    names, rows = list(values), config_rows(values)
    differing = [(leaf, its) for leaf, its, differs in rows if differs]
    same = [[leaf, el("code", its[0])] for leaf, its, differs in rows if not differs]
    content = []
    if differing and len(names) > FEW and len(differing) <= 2 * FEW:
        columns = [its for _, its in differing]
        cells = [
            [broken(name, ",/"), *map(_value, its)]
            for name, its in zip(names, zip(*columns, strict=True), strict=True)
        ]
        found = table(["run", *(broken(leaf, "._") for leaf, _ in differing)], cells, sortable=True)
    else:
        cells = [[leaf, *(el("code", shown) for shown in its)] for leaf, its in differing]
        found = table(["", *names], cells)
    if differing:
        content += [el("h3", "What differs"), found]
    elif len(names) > 1:
        content.append(note("They do not differ."))
    if same:
        content.append(el("h3", "What they have in common") if len(names) > 1 else None)
        content.append(el("div", table(["", ""], same, class_="values dense"), class_="columns"))
    return content


def _value(shown: str) -> Cell:
    """A value that sorts as a number where it is one."""
    try:
        order = float(shown)
    except ValueError:
        order = None
    return Cell(el("code", shown), order)


def environment(page: Page, runs: Sequence[Run]) -> None:
    """Adds what the runs ran on: devices, versions, datasets."""
    told = {run.name: _surroundings(run) for run in runs if run.record}
    content = differences(told) if told else note("There is no run.json yet.")
    page.add("Environment", content)


def _surroundings(run: Run) -> dict[str, str]:
    record, dataset = run.record, run.record.get("dataset", {})
    found = {"workdir": str(absolute(run.workdir))}
    if "started" in record:
        found["started"] = when(record["started"])
    found |= {f"devices: {key}": value for key, value in record.get("devices", {}).items()}
    if dataset:
        splits = (f"{name} {count:,}" for name, count in dataset.get("splits", {}).items())
        found |= {"dataset": dataset.get("name"), "splits": ", ".join(splits)}
        found["classes"] = len(dataset.get("class_names", []))
    for kind, key in (("fingerprint", "fingerprints"), ("version", "versions")):
        found |= {f"{kind} of {name}": value for name, value in record.get(key, {}).items()}
    return found
