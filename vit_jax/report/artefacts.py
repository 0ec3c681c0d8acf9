"""What one model makes of a dataset: the artefacts of evaluations, and pictures."""

import base64
import dataclasses
import io
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.report import figures
from vit_jax.report.markup import Cell, Html, el, picture, table
from vit_jax.report.page import Page, grid, note

MAPS = ("image", "attention", "rollout")  # pictures that stand side by side
REMARKS = {  # below the titles of other pictures
    "positions": "a map a position: the cosine of its embedding with every other; bright is alike",
    "filters": "what the patch embedding looks for most, each stretched to its own range",
}
MAX_CONFUSION = 40  # classes of a confusion matrix that can still be read
MOST_CONFUSED = 24  # of more, so many are shown
MAX_CLASSES = 40  # bars

Cells = Sequence[Sequence[int]]  # true class, predicted class, count


@dataclasses.dataclass(frozen=True)
class Example:
    """An image and what is said of it.

    Attributes:
      image: [height, width, 3] uint8.
      caption: short.
      title: all there is to say.
    """

    image: np.ndarray
    caption: str
    title: str


def classification(page: Page, artefacts: Mapping[str, Any], *, name: str, run: int) -> list[Html]:
    """Calibration, confusion and classes, from the artefacts of `evals.Classification`.

    Args:
      page: takes the figures.
      artefacts: 'reliability', 'confusion', 'per_class'; what is missing is left out.
      name: of the model.
      run: number of the run.
    """
    drawn, tables = [], []
    if bins := artefacts.get("reliability"):
        columns = [[one[key] for one in bins] for key in ("confidence", "accuracy", "count")]
        figure = figures.reliability(*columns, name=name, run=run)
        remark = "on the dotted line confidence is right; larger points hold more examples"
        drawn.append(page.figure(figure | {"square": True}, "Calibration", remark))
    if found := artefacts.get("confusion"):
        classes = found["class_names"]
        predicted = found.get("predicted_names") or classes
        drawn.append(_confusion(page, found["cells"], classes, predicted))
        tables.append(_confused(found["cells"], classes, predicted))
    if rows := artefacts.get("per_class"):
        drawn.append(_classes(page, rows))
    return [grid(*drawn), *tables]


def _confusion(
    page: Page, cells: Cells, classes: Sequence[str], predicted: Sequence[str]
) -> Html | None:
    remark, shown = "a row is a true class; darker is a larger share of it", {*classes, *predicted}
    if max(len(classes), len(predicted)) > MAX_CONFUSION:
        shown = _most_confused(cells, classes, predicted)
        remark += f"; of {len(classes):,} classes those of the most frequent mistakes"
    rows, columns = _places(classes, shown), _places(predicted, shown)
    if not rows:
        return None
    matrix, totals = np.zeros((len(rows), len(columns)), np.int64), np.zeros(len(rows), np.int64)
    for true, guess, count in cells:
        if true in rows:
            totals[rows[true]] += count
            if guess in columns:
                matrix[rows[true], columns[guess]] = count
    names = [classes[i] for i in rows], [predicted[i] for i in columns]
    return page.figure(
        figures.confusion(matrix, totals, *names), "Confusion", remark, wide=len(rows) > 12
    )


def _places(names: Sequence[str], shown: Container[str]) -> dict[int, int]:
    """Number of each name that is shown -> its place among them."""
    kept = [number for number, name in enumerate(names) if name in shown]
    return {number: place for place, number in enumerate(kept)}


def _most_confused(cells: Cells, classes: Sequence[str], predicted: Sequence[str]) -> set[str]:
    """Names of the classes that the most frequent mistakes are between."""
    shown: set[str] = set()
    for true, guess, _ in sorted(cells, key=lambda cell: -cell[2]):
        pair = {classes[true], predicted[guess]}
        if len(pair) == 2 and len(shown | pair) <= MOST_CONFUSED:
            shown |= pair
    return shown


def _confused(cells: Cells, classes: Sequence[str], predicted) -> Html | None:
    totals: dict[int, int] = {}
    for true, _, count in cells:
        totals[true] = totals.get(true, 0) + count
    wrong = [(count, t, p) for t, p, count in cells if classes[t] != predicted[p]]
    rows = [
        [classes[t], predicted[p], count, Cell(f"{count / totals[t]:.1%}", count / totals[t])]
        for count, t, p in sorted(wrong, key=lambda cell: (-cell[0], *cell[1:]))[:12]
    ]
    if not rows:
        return note("No example was taken for another class.")
    heads = ["is", "taken for", "examples", "of the class"]
    return el("div", el("h3", "Most confused"), table(heads, rows, sortable=True))


def _classes(page: Page, rows: Sequence[Mapping[str, Any]]) -> Html:
    known = sorted((row for row in rows if row["top1"] is not None), key=lambda row: row["top1"])
    said = "from the worst"
    if len(known) > MAX_CLASSES:
        said = f"the worst {MAX_CLASSES} of {len(known):,} classes"
    known = known[:MAX_CLASSES]
    names = [f"{row['class']} ({row['count']:,})" for row in known]
    figure = figures.bars(names, [row["top1"] for row in known], x="accuracy", percent=True)
    return page.figure(figure, "Accuracy by class", f"{said}; examples in brackets", wide=True)


def attention(page: Page, artefacts: Mapping[str, Any], *, run: int) -> list[Html]:
    """What a model looks at, from the artefacts of `evals.AttentionFigures`.

    Args:
      page: takes the figure.
      artefacts: 'pictures' and 'attention_distance'.
      run: number of the run.
    """
    maps, others = [], []
    for one in artefacts.get("pictures", []):
        if one["kind"] in MAPS:
            maps.append(one)
        else:
            caption = el("strong", one["title"].capitalize()), el("span", REMARKS.get(one["kind"]))
            others.append(el("figure", el("figcaption", caption), _png(one)))
    content = []
    if maps:
        said = (
            "Each image, the last layer's attention to it, and attention rolled out through all "
            "layers: of the class token, or of all patches; bright where there is most."
        )
        tiles = []
        for start in range(0, len(maps), len(MAPS)):
            three = maps[start : start + len(MAPS)]
            shape = "{} / {}".format(*_size(three[0]))  # patches need not be square: the image's
            tiles.append(el("div", [_png(one, shape) for one in three], class_="maps"))
        content = [note(said), el("div", tiles, class_="gallery wide")]
    drawn = []
    if distances := artefacts.get("attention_distance"):
        remark = "how far heads look, a point each; the line is the layer's mean"
        figure = figures.by_layer(distances, run=run)
        drawn.append(page.figure(figure, "Mean attention distance", remark))
    return [*content, grid(*drawn, *others)]


def _png(one: Mapping[str, str], shape: str | None = None) -> Html:
    style = f"aspect-ratio: {shape}" if shape else None
    source = f"data:image/png;base64,{one['png']}"
    return el("img", src=source, alt=one["title"], title=one["title"], style=style, class_="pixels")


def _size(one: Mapping[str, str]) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(one["png"]))).size


def gallery(found: Sequence[Example], *, side: int = 84) -> Html:
    """Pictures with their captions."""
    tiles = [
        el(
            "div",
            picture(example.image, side=side, title=example.title),
            el("span", example.caption),
            class_="tile",
        )
        for example in found
    ]
    return el("div", tiles, class_="gallery")
