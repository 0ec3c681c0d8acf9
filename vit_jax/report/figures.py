"""Figures as plain data for Plotly: what is drawn; colours and type are the page's (page.js)."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_POINTS = 12_000  # of all curves of a figure; more are thinned, see `thin`

Figure = dict[str, Any]


def points(num_curves: int) -> int:
    """How many a curve may have, beside so many others: never more than a screen can show."""
    return max(min(2000, MAX_POINTS // max(num_curves, 1)), 200)


class Curve(NamedTuple):
    """A line.

    Attributes:
      name: in the legend.
      run: number of the run, which its colour stands for.
      x, y: values; None is a gap.
      variant: number of its dashes, where a run has several curves in a figure.
    """

    name: str
    run: int
    x: Sequence[float]
    y: Sequence[float | None]
    variant: int = 0


def curves(
    found: Sequence[Curve],
    *,
    y: str,
    percent: bool = False,
    zero: bool = False,
    markers: bool = False,
    group: str = "step",
    x: str = "step",
) -> Figure:
    """Lines over a common x axis; figures of a group zoom together.

    Args:
      found: the lines.
      y: what is drawn, and its unit.
      percent: whether it is a share.
      zero: whether the axis begins at zero.
      markers: whether each point is marked, as few points should be.
      group: of figures whose x axes are the same.
      x: what the x axis is.
    """
    number = ":.2%" if percent else ":.4~g"
    hover = f"%{{fullData.name}}<br>{x} %{{x:,}}: %{{y{number}}}<extra></extra>"
    traces, drawn = [], [value for curve in found for value in curve.y]
    for curve in found:
        xs, ys = thin(curve.x, curve.y, points(len(found)))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if markers or len(xs) == 1 else "lines",
                "x": xs,
                "y": ys,
                "name": text(curve.name),
                "meta": {"run": curve.run, "variant": curve.variant},
                "hovertemplate": hover,
            }
        )
    axis = {"title": {"text": x}, "rangemode": "tozero", "ticklabeloverflow": "allow"}
    return {
        "data": traces,
        "layout": {
            "xaxis": axis,
            "yaxis": _scale(percent, y)
            | (_around(drawn) if percent and not zero else {})
            | ({"rangemode": "tozero"} if zero else {}),
        },
        "group": group,
        "label": y,
    }


def _scale(percent: bool, title: str) -> dict[str, Any]:
    return {"tickformat": "~%" if percent else "~g", "title": {"text": title}}


def _around(values: Sequence[float | None]) -> dict[str, Any]:
    """A range for what does not change, which Plotly would show from 0 to its double."""
    known = {value for value in values if value is not None}
    if len(known) != 1:
        return {}
    value = known.pop()
    return {"range": [value - 0.05, value + 0.05]}


def thin(
    xs: Sequence[float], ys: Sequence[float | None], limit: int
) -> tuple[list[float], list[float | None]]:
    """At most `limit` points: of each stretch the least, the greatest and a gap; spikes stay."""
    if len(xs) <= limit:
        return list(xs), list(ys)
    values = np.array([np.nan if value is None else value for value in ys], float)
    keep = {0, len(xs) - 1}
    for part in np.array_split(np.arange(len(xs)), (limit - 2) // 3):
        gaps, whole = part[np.isnan(values[part])], part[~np.isnan(values[part])]
        keep |= set(gaps[:1].tolist())
        if len(whole):
            keep |= {int(whole[values[whole].argmin()]), int(whole[values[whole].argmax()])}
    kept = sorted(keep)
    return [xs[i] for i in kept], [ys[i] for i in kept]


def reliability(
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
    counts: Sequence[int],
    *,
    name: str = "",
    run: int = 0,
) -> Figure:
    """Accuracy over confidence by bin, beside the diagonal of a calibrated model.

    Args:
      confidence: mean of each bin; None for an empty one.
      accuracy: share of right answers of each bin.
      counts: examples in each bin.
      name, run: of the model.
    """
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "meta": {"role": "reference"},
        "hoverinfo": "skip",
        "name": "calibrated",
    }
    whole = [
        (x, y, n) for x, y, n in zip(confidence, accuracy, counts, strict=True) if x is not None
    ]
    largest = max((n for _, _, n in whole), default=1)
    bins = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [x for x, _, _ in whole],
        "y": [y for _, y, _ in whole],
        "customdata": [n for _, _, n in whole],
        "marker": {"size": [5 + 13 * (n / largest) ** 0.5 for _, _, n in whole]},
        "meta": {"run": run, "variant": 0},
        "name": text(name or "model"),
        "hovertemplate": (
            "confidence %{x:.1%}, right %{y:.1%}<br>%{customdata:,} examples<extra></extra>"
        ),
    }
    axis = {"range": [-0.02, 1.02], "tickformat": ".0%"}
    return {
        "data": [diagonal, bins],
        "layout": {
            "xaxis": axis | {"title": {"text": "confidence"}},
            "yaxis": axis | {"title": {"text": "share that is right"}},
        },
        "label": "calibration",
    }


def confusion(
    matrix: np.ndarray, totals: np.ndarray, classes: Sequence[str], predicted: Sequence[str]
) -> Figure:
    """Shares of each true class by predicted class.

    Args:
      matrix: [true, predicted] counts.
      totals: examples of each true class; more than its row's where some classes are left out.
      classes, predicted: names of its rows and columns.
    """
    share = matrix / np.maximum(totals, 1)[:, None]
    names = [[text(name) for name in each] for each in (classes, predicted)]
    ticks = [
        {
            "tickvals": list(range(len(each))),
            "ticktext": [text(short(name)) for name in each],
            "showgrid": False,
        }
        for each in (classes, predicted)
    ]
    heat = {
        "type": "heatmap",
        "z": np.round(share, 4).tolist(),
        "customdata": [
            [[is_, taken, count] for taken, count in zip(names[1], row, strict=True)]
            for is_, row in zip(names[0], matrix.tolist(), strict=True)
        ],
        "meta": {"role": "heat"},
        "xgap": 1,
        "ygap": 1,
        "zmin": 0,
        "zmax": 1,
        "hovertemplate": (
            "is %{customdata[0]}, taken for %{customdata[1]}<br>"
            "%{customdata[2]:,} of its examples, %{z:.1%}<extra></extra>"
        ),
        "hoverongaps": False,
    }
    if max(matrix.shape) <= 20:
        heat["text"] = [[str(n) if n else "" for n in row] for row in matrix.tolist()]
        heat["texttemplate"] = "%{text}"
    return {
        "data": [heat],
        "layout": {
            "xaxis": ticks[1] | {"title": {"text": "predicted"}},
            "yaxis": ticks[0] | {"title": {"text": "true"}, "autorange": "reversed"},
        },
        "label": "confusion",
        "square": True,
    }


def by_layer(values: Sequence[Sequence[float]], *, run: int = 0) -> Figure:
    """A point for each head, and a line through the layers' means.

    Args:
      values: [layers][heads], pixels.
      run: number of the run.
    """
    known = [[value for value in row if value is not None] for row in values]
    heads = [(layer, value) for layer, row in enumerate(known) for value in row]
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": [layer for layer, _ in heads],
        "y": [value for _, value in heads],
        "meta": {"run": run, "variant": 0},
        "hovertemplate": "layer %{x}, a head: %{y:.3~g} pixels<extra></extra>",
    }
    means = {
        "type": "scatter",
        "mode": "lines",
        "x": list(range(len(values))),
        "y": [sum(row) / len(row) if row else None for row in known],
        "meta": {"run": run, "variant": 0},
        "hovertemplate": "layer %{x}, mean: %{y:.3~g} pixels<extra></extra>",
    }
    return {
        "data": [points, means],
        "layout": {
            "xaxis": {
                "title": {"text": "layer"},
                "tickformat": "d",
                "dtick": 1 + len(values) // 13,
            },
            "yaxis": {"title": {"text": "distance (pixels)"}, "rangemode": "tozero"},
        },
        "label": "attention distance",
    }


class Point(NamedTuple):
    """A model in `scatter` or `intervals`: its value with the ends of its 95% interval."""

    name: str
    run: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def scatter(found: Sequence[Point], *, x: str, y: str, percent: bool) -> Figure:
    """Value against cost; the checkpoints of a run are joined."""
    number = ":.2%" if percent else ":.4~g"
    runs: dict[int, list[Point]] = {}
    for point in sorted(found, key=lambda point: point.x):
        runs.setdefault(point.run, []).append(point)
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [point.x for point in its],
            "y": [point.y for point in its],
            "error_y": _errors(its, [point.y for point in its]),
            "text": [text(point.name) for point in its],
            "meta": {"run": run, "variant": 0, "role": "point"},
            "hovertemplate": f"%{{text}}<br>{x}: %{{x:,.4~s}}<br>%{{y{number}}}<extra></extra>",
        }
        for run, its in runs.items()
    ]
    costs = [point.x for point in found]
    axis = {"title": {"text": x}, "tickformat": "~s", "nticks": 6}
    if min(costs) > 0 and max(costs) >= 10 * min(costs):
        axis |= {"type": "log", "title": {"text": f"{x}, logarithmic"}}
    return {
        "data": traces,
        "layout": {"xaxis": axis, "yaxis": _scale(percent, y)},
        "label": f"{y} against {x}",
    }


def intervals(found: Sequence[Point], *, x: str, percent: bool) -> Figure:
    """One line a model: its value (`Point.x`) and its interval."""
    number = ":.2%" if percent else ":.4~g"
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [point.x],
            "y": [row],
            "error_x": _errors([point], [point.x]),
            "name": text(point.name),
            "meta": {"run": point.run, "variant": 0, "role": "point"},
            "hovertemplate": f"%{{fullData.name}}<br>%{{x{number}}}<extra></extra>",
        }
        for row, point in enumerate(found)
    ]
    return {
        "data": traces,
        "layout": {
            "xaxis": _scale(percent, x),
            "yaxis": _rows([point.name for point in found]),
        },
        "label": x,
        "rows": len(found),
    }


def _errors(found: Sequence[Point], values: Sequence[float]) -> dict[str, Any]:
    """Bars from each value to the ends of its interval; none where there is no interval."""
    lows = [value if p.low is None else p.low for p, value in zip(found, values, strict=True)]
    highs = [value if p.high is None else p.high for p, value in zip(found, values, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for high, value in zip(highs, values, strict=True)],
        "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
        "thickness": 1.5,
        "width": 4,
    }


def bars(names: Sequence[str], values: Sequence[float], *, x: str, percent: bool = False) -> Figure:
    """Horizontal bars, the first on top."""
    number = ":.1%" if percent else ":,.4~g"
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "x": list(values),
                "y": list(range(len(names))),
                "text": [text(name) for name in names],
                "textposition": "none",
                "meta": {"run": 0, "variant": 0, "role": "bar"},
                "hovertemplate": f"%{{text}}: %{{x{number}}}<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": _scale(percent, x) | ({"range": [0, 1]} if percent else {}),
            "yaxis": _rows(names),
        },
        "label": x,
        "rows": len(names),
    }


def _rows(names: Sequence[str]) -> dict[str, Any]:
    """An axis with a line for each name, the first on top; two may have the same name."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [text(short(name, 64)) for name in names],
        "range": [len(names) - 0.5, -0.5],
        "automargin": True,
        "showgrid": False,
    }


def text(value: str) -> str:
    """A name for Plotly, which reads a little HTML: none of the name's own is any."""
    return html.escape(str(value), quote=False)


def short(name: str, length: int = 18) -> str:
    """The name, or its beginning and end."""
    name = str(name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
