"""HTML made of values: text is escaped here and nowhere else, so nothing can be forgotten."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

VOID = {"img", "input", "meta", "br", "wbr", "link"}
LOSSLESS_SIDE = 64  # pixels; larger pictures become JPEG, which is a tenth of the size


class Html(str):
    """Text that is HTML already."""


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """`el("td", text, class_="number")`: an element with escaped text and attributes.

    Args:
      tag: its name.
      children: elements, text or numbers, lists of them, or None for nothing.
      attributes: a trailing underscore is dropped and others become hyphens; True is an attribute
        without a value, None and False leave it out.
    """
    parts = []
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {name}")
        elif value is not None and value is not False:
            parts.append(f' {name}="{html.escape(str(value))}"')
    opening = f"<{tag}{''.join(parts)}>"
    return Html(opening if tag in VOID else f"{opening}{join(children)}</{tag}>")


def join(children: Any) -> Html:
    """Children as `el` takes them, one behind the other."""
    if children is None:
        return Html()
    if isinstance(children, Html):
        return children
    if isinstance(children, (list, tuple)):
        return Html("".join(map(join, children)))
    return Html(html.escape(str(children)))


UPRIGHT = 9  # columns that an upright sheet of paper has room for


def table(
    heads: list[Any], rows: list[list[Any]], *, class_: str = "", sortable: bool = False
) -> Html:
    """A table; numbers stand to the right.

    Args:
      heads: of the columns.
      rows: of cells: text, numbers, elements, `Cell`s, or None for an empty one.
      class_: of the table.
      sortable: whether a click on a head sorts.
    """
    columns = [[row[i] for row in rows if row[i] is not None] for i in range(len(heads))]
    kinds = ["number" if cells and all(map(_is_number, cells)) else None for cells in columns]
    head = [el("th", name, class_=kind) for name, kind in zip(heads, kinds, strict=True)]
    body = [
        el("tr", [_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True)]) for row in rows
    ]
    classes = f"{class_} sortable".strip() if sortable else class_ or None
    found = el("table", el("thead", el("tr", head)), el("tbody", body), class_=classes)
    # A table of many columns is printed on sheets that lie across.
    return el("div", found, class_="scroll across" if len(heads) > UPRIGHT else "scroll")


class Cell:
    """A cell that sorts by a number of its own.

    Args:
      content: what is shown.
      order: what it sorts by; None for a cell of text.
    """

    def __init__(self, content: Any, order: float | None = None):
        self.content, self.order = content, order


def _cell(cell: Any, kind: str | None) -> Html:
    if not isinstance(cell, Cell):
        cell = Cell(number(cell), cell) if _is_number(cell) else Cell(cell)
    order = cell.order
    if order is not None and not math.isfinite(order):
        order = ""  # one that is no number would make DataTables sort the column as text
    return el("td", cell.content, data_order=order, class_=kind)


def _is_number(cell: Any) -> bool:
    if isinstance(cell, Cell):
        return cell.order is not None
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def number(value: float) -> str:
    """1234567 -> '1,234,567', 0.00123456 -> '0.00123'."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def broken(name: str, at: str = ",/_") -> list[Any]:
    """A name that may be broken behind these of its letters."""
    return [[part, el("wbr")] for part in re.findall(f"[^{at}]*[{at}]|[^{at}]+", name)]


def script_json(name: str, values: Mapping[str, Any]) -> Html:
    """Data for the page's scripts; no text in it can end the element or begin a comment."""
    text = json.dumps(finite(values), separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    text = text.replace("<", "\\u003c")
    return el("script", Html(text), type="application/json", id=name)


def finite(values: Any) -> Any:
    """The same with None for each number that is not finite, which JSON cannot hold."""
    if isinstance(values, Mapping):
        return {str(key): finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    if isinstance(values, np.ndarray):
        return finite(values.tolist())
    if isinstance(values, (float, np.floating)):
        return float(values) if math.isfinite(values) else None
    return int(values) if isinstance(values, np.integer) else values


def picture(image: np.ndarray, *, side: int, title: str) -> Html:
    """An image in the page itself.

    Args:
      image: [height, width, 3] uint8.
      side: pixels on the page of its longer side.
      title: says what it is; also stands in for it.
    """
    found = Image.fromarray(image)
    if max(found.size) > 2 * side:  # twice as fine as shown, for dense screens
        found.thumbnail((2 * side, 2 * side))
    small = max(found.size) <= LOSSLESS_SIDE
    out = io.BytesIO()
    found.save(out, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
    scale = side / max(image.shape[:2])
    height, width = (round(length * scale) for length in image.shape[:2])
    pixels = "pixels" if scale > 1 else None
    return el("img", src=source, alt=title, title=title, width=width, height=height, class_=pixels)
