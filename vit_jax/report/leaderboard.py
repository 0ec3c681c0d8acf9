"""Who is best at what, and what it cost."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from vit_jax.report import figures
from vit_jax.report.figures import Point
from vit_jax.report.markup import Cell, Html, broken, el, number, table
from vit_jax.report.page import Page, grid, note

Key = tuple[str, int | None]  # model and step: a line
Column = tuple[str, str, str]  # dataset, evaluation and metric

SHARES = r"(held_out_)?(top1|top5|accuracy|ece|class_mean)(_.*)?"  # metrics shown as percent
LOWER = ("loss", "ece")  # metrics of which less is better
RANKED = ("top1", "accuracy")  # what an evaluation is ranked by, if it has one of them
DRAWN = ("training time (s)", "parameters")  # costs that an accuracy is drawn against
MAX_MODELS = 16  # intervals
LONG = 28  # letters of a name that need a figure of the page's width


@dataclasses.dataclass(frozen=True)
class Score:
    """A number of a leaderboard.

    Attributes:
      model, step: what was evaluated.
      dataset, evaluation, metric: how.
      value: a number; NaN if it was not finite.
      count: examples; 0 if nobody said.
      low, high: ends of a 95% interval, where one was computed.
      seconds: that the evaluation took.
      p_value: of a paired test against the best.
    """

    model: str
    step: int | None
    dataset: str
    evaluation: str
    metric: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    p_value: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval; of an accuracy that came without one, Wilson's (1927)."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        known = self.metric in ("top1", "top5") and math.isfinite(self.value)
        return wilson(self.value, self.count) if known else None

    @property
    def who(self) -> str:
        """'seed=0 @ 1,500'."""
        return self.model if self.step is None else f"{self.model} @ {self.step:,}"

    @property
    def said(self) -> str:
        """'98.33%', '0.217' or 'not finite'."""
        if not math.isfinite(self.value):
            return "not finite"
        return f"{self.value:.2%}" if is_share(self.metric) else number(self.value)

    @property
    def place(self) -> float:
        """What it is ranked by, least first: a loss or an error as it is, an accuracy negative."""
        if not math.isfinite(self.value):
            return math.inf
        return self.value if self.metric in LOWER else -self.value

    @property
    def shown(self) -> Cell:
        """The value as a cell."""
        return Cell(self.said, self.value)


def is_share(metric: str) -> bool:
    """Whether a metric is a part of one: 'top1', 'top1_k20', 'ece'."""
    return re.fullmatch(SHARES, metric) is not None


def span(metric: str, interval: tuple[float, float]) -> str:
    """'94.7 to 98.3%'."""
    low, high = interval
    if is_share(metric):
        return f"{100 * low:.1f} to {100 * high:.1f}%"
    return f"{number(low)} to {number(high)}"


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float] | None:
    """Wilson's 95% score interval of a share of `count` examples (1927, equation 7)."""
    if not count:
        return None
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half /= 1 + z * z / count
    return max(middle - half, 0.0), min(middle + half, 1.0)


def primary(scores: Sequence[Score]) -> list[Score]:
    """Of each evaluation the accuracy that it is ranked by; of one without, its first metric."""
    groups: dict[tuple, list[Score]] = {}
    for score in scores:
        key = score.model, score.step, score.dataset, score.evaluation
        groups.setdefault(key, []).append(score)
    chosen = []
    for group in groups.values():
        ranked = [score for name in RANKED for score in group if score.metric == name]
        chosen.append((ranked or group)[0])
    return chosen


def leaderboard(
    page: Page, scores: Sequence[Score], *, costs: Mapping[str, Mapping[Key, float]]
) -> list[Html]:
    """A table to sort, a figure of intervals for each evaluation, and accuracy against cost.

    Args:
      page: takes the figures.
      scores: any; ranked are those of `primary`.
      costs: name of a cost -> (model, step) -> it, where it is known.
    """
    columns: dict[Column, dict[Key, Score]] = {}
    for score in primary(scores):
        column = score.dataset, score.evaluation, score.metric
        columns.setdefault(column, {})[score.model, score.step] = score
    columns = {
        column: dict(sorted(its.items(), key=lambda item: item[1].place))
        for column, its in sorted(columns.items())
    }
    # By the first column; who is not in it follows.
    order = list(dict.fromkeys(key for its in columns.values() for key in its))
    costs = {name: its for name, its in costs.items() if any(key in its for key in order)}
    counts = {column: {score.count for score in its.values()} for column, its in columns.items()}
    heads = ["model", "step", *(_head(*column, its) for column, its in counts.items()), *costs]
    rows = [
        [
            *(broken(key[0], ",/"), key[1]),
            *(
                _ranked(its.get(key), next(iter(its.values())), counts[column])
                for column, its in columns.items()
            ),
            *(_cost(its.get(key)) for its in costs.values()),
        ]
        for key in order
    ]
    said = note(
        "A click on a head sorts; the best of each column is bold. Below a value: its 95% "
        "interval, and p of a paired test against the best where both saw the same examples; n is "
        "the count of examples."
    )
    drawn = [
        figure for column, its in columns.items() for figure in _figures(page, column, its, costs)
    ]
    return [said, table(heads, rows, sortable=True), grid(*drawn)]


def _figures(
    page: Page,
    column: Column,
    found: Mapping[Key, Score],
    costs: Mapping[str, Mapping[Key, float]],
) -> list[Html]:
    dataset, evaluation, metric = column
    numbers = {name: number for number, name in enumerate(page.runs)}
    title = f"{evaluation} on {dataset}" if dataset else evaluation
    found = {key: score for key, score in found.items() if math.isfinite(score.value)}
    if not found:
        return []
    points = [_point(score, numbers, score.value) for score in found.values()]
    figure = figures.intervals(points[:MAX_MODELS], x=metric, percent=is_share(metric))
    said = "95% intervals"
    said += f"; the best {MAX_MODELS} of {len(found)}" if len(found) > MAX_MODELS else ""
    wide = max(len(point.name) for point in points) > LONG
    drawn = [page.figure(figure, title, said, wide=wide)]
    for name in DRAWN:
        its = costs.get(name, {})
        points = [
            _point(score, numbers, its[key], score.value)
            for key, score in found.items()
            if key in its
        ]
        if len({point.x for point in points}) > 1:
            figure = figures.scatter(points, x=name, y=metric, percent=is_share(metric))
            drawn.append(page.figure(figure, title, f"against {name}"))
    return drawn


def _head(dataset: str, evaluation: str, metric: str, counts: set[int]) -> Html:
    """Names of a column, and the count of its examples where all values have the same."""
    lines = [broken(name) for name in (dataset, evaluation, metric) if name]
    if len(counts) == 1 and (count := max(counts)):
        lines.append(f"n={count:,}")
    return el("span", lines[0], [[el("br"), line] for line in lines[1:]])


def _ranked(score: Score | None, best: Score, counts: set[int]) -> Cell | None:
    if score is None:
        return None
    lines = [span(score.metric, score.interval)] if score.interval else []
    if len(counts) > 1:
        lines.append(f"n={score.count:,}")
    if score.p_value is not None:
        lines.append("p<0.001" if score.p_value < 0.001 else f"p={score.p_value:.2g}")
    small = [[el("br"), el("span", line, class_="low")] for line in lines]
    value = el("strong", score.said) if score.value == best.value else score.said
    return Cell([value, small], score.value)


def _cost(value: float | None) -> Cell | None:
    return None if value is None else Cell(number(value), value)


def _point(score: Score, numbers: Mapping[str, int], x: float, y: float = 0.0) -> Point:
    low, high = score.interval or (None, None)
    return Point(score.who, numbers.get(score.model, 0), x, y, low, high)
