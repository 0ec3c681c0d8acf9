"""One HTML file that needs nothing else: the frame, the style, the libraries and the data."""

import base64
import contextlib
import importlib.resources
import importlib.util
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from vit_jax.report.figures import Figure
from vit_jax.report.markup import Html, el, join, script_json

LIBRARIES = {  # of the extra `report`: the script inside the package
    "plotly": "package_data/plotly.min.js",
    "itables": "html/dt_bundle.js",  # DataTables
}


FEW = 4  # runs that are switched one by one


class Page:
    """Sections of content, and the figures in them.

    Args:
      kind: what it is about: 'run' or 'sweep'.
      title: of the page.
      lede: a line below it.
      runs: names of the runs that figures draw, by number.
    """

    def __init__(self, kind: str, title: str, lede: str, runs: Sequence[str] = ()):
        self.kind, self.title, self.lede, self.runs = kind, title, lede, list(runs)
        self.facts: list[tuple[str, str]] = []
        self._sections: list[tuple[str, Html]] = []
        self._figures: dict[str, Figure] = {}

    def add(self, title: str, *content: Any) -> None:
        """Adds a section."""
        self._sections.append((title, join(content)))

    def figure(self, figure: Figure, title: str, note: str = "", *, wide: bool = False) -> Html:
        """Takes a figure into the page and answers its place."""
        name = f"figure-{len(self._figures)}"
        self._figures[name] = figure
        rows = figure.get("rows")
        style = f"height: {min(90 + 26 * rows, 900)}px" if rows else None
        plot = el("div", id=name, class_="plot", style=style, role="img", aria_label=title)
        kind = " ".join(["wide"] * wide + ["square"] * bool(figure.get("square"))) or None
        return el("figure", _caption(title, note), plot, class_=kind)

    def render(self) -> str:
        """The file's text.

        Raises:
          ImportError: the extra `report` is not installed.
        """
        check_libraries()
        sections = [
            el("section", el("h2", title), content, id=_anchor(title))
            for title, content in self._sections
        ]
        data = {"figures": self._figures, "runs": self.runs}
        head = el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("meta", name="color-scheme", content="light dark"),
            el("title", f"{self.title} · vit_jax"),
            el("link", rel="icon", href="data:,"),
            el("style", Html(_own("page.css"))),
        )
        body = el(
            "body",
            el("header", self._masthead()),
            self._navigation(),
            el("main", sections),
            el("noscript", el("p", "The figures need JavaScript; the tables do not.")),
            script_json("data", data),
            _script("plotly"),
            # A module, which only an import can enter.
            el("script", Html(_bundle("itables")), type="text/plain", id="datatables"),
            el("script", Html(_own("page.js")), type="module"),
        )
        return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'

    def _masthead(self) -> list[Html]:
        facts = [
            el("div", el("dd", value), el("dt", label), class_="fact")
            for value, label in self.facts
        ]
        return [
            el("p", f"vit_jax · {self.kind}", class_="kicker"),
            el("h1", self.title),
            el("p", self.lede, class_="lede"),
            el("dl", facts, class_="facts") if facts else Html(),
        ]

    def _navigation(self) -> Html:
        both = [el("button", word, type="button", data_runs=word) for word in ("all", "none")]
        links = [el("a", title, href=f"#{_anchor(title)}") for title, _ in self._sections]
        switches = [
            el(
                "label",
                el("input", type="checkbox", checked=True, data_run=number),
                el("span", class_="swatch", data_run=number),
                name,
            )
            for number, name in enumerate(self.runs)
        ]
        switches = [*(both if len(self.runs) > FEW else []), *switches]
        shown = el("div", switches, class_="runs") if len(self.runs) > 1 else None
        return el("nav", el("div", links, class_="links"), shown)


def note(text: str) -> Html:
    """A paragraph beside the matter: what is missing and why, what a figure leaves out."""
    return el("p", text, class_="note")


def or_why(content: Callable[[], Any]) -> Any:
    """The content, or a line on what is missing: a page of curves needs no dataset."""
    try:
        return content()
    except (OSError, ValueError) as error:
        return note(f"Not shown: {error}")


def grid(*figures: Html, even: bool = False) -> Html:
    """Figures side by side where there is room; `even` ones, of one height, share a base line."""
    return el("div", list(figures), class_="grid even" if even else "grid")


def check_libraries() -> None:
    """Raises ImportError, with what to install, unless the extra `report` is there."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"a report needs {' and '.join(missing)}, not installed here: "
            "pip install 'vit-jax[report]'."
        )


def write_whole(path: epath.Path, content: str) -> None:
    """Writes beside, then renames: a reader sees the old page or the new one."""
    temporary = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


def _caption(title: str, note: str) -> Html:
    return el("figcaption", el("strong", title), el("span", note) if note else None)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _own(name: str) -> str:
    return importlib.resources.files("vit_jax.report").joinpath(name).read_text()


def _script(package: str) -> Html:
    return el("script", Html(_library(package)))


def _bundle(package: str) -> str:
    return base64.b64encode(_library(package).encode()).decode()


def _library(package: str) -> str:
    return importlib.resources.files(package).joinpath(LIBRARIES[package]).read_text("utf-8")
