"""Pages in a real browser: they load from disk alone, and can be read, sorted, zoomed, printed."""

import pytest

from tests.report.pages import HOSTILE, IMAGE, Opened, browser, write_run
from vit_jax.commands import report
from vit_jax.report.markup import UPRIGHT, Cell, table
from vit_jax.report.page import Page

pytest.importorskip("plotly", reason="needs the extra 'report'")
pytest.importorskip("itables", reason="needs the extra 'report'")


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of a run beside two others, with names that try to break out of it."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "<b>one & only")
    write_run(folder / "two", seed=1)
    write_run(folder / "three", seed=2, steps=120, init_from="elsewhere")
    out = folder / "out" / "page.html"
    flags = [f"--compare={folder / 'two'}", f"--compare={folder / 'three'}", f"--out={out}"]
    assert report.main([f"--workdir={folder / '<b>one & only'}", "--noexamples", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def tab(chromium, path):
    return Opened(chromium, path)


@pytest.fixture
def page(tab):
    """Each test leaves it as it was."""
    yield tab
    assert tab.problems == []
    assert tab.requests == []
    assert tab.page.evaluate("window.hacked") is None


def test_every_figure_is_drawn(page):
    count = page.page.locator("figure").count()
    assert count >= 12
    assert page.page.locator("figure .main-svg").count() >= count
    for title in ("Training loss", "Learning rate", "Throughput", "Waiting for data", "top1"):
        assert page.drawn(title) == 3


def test_text_of_the_data_is_text(page):
    text = page.page.locator("body").inner_text()
    assert HOSTILE in text
    assert IMAGE in text
    assert page.page.locator("h1").inner_text() == "<b>one & only"
    assert page.page.locator("img[src=x]").count() == 0


def test_a_run_can_be_taken_out_of_the_curves(page):
    box = page.page.locator("nav input").nth(1)
    box.uncheck()
    assert page.drawn("Training loss") == 2
    assert page.drawn("top1") == 2
    box.check()
    assert page.drawn("Training loss") == 3


@pytest.mark.slow
def test_all_runs_are_switched_at_once(chromium, tmp_path):
    runs = [write_run(tmp_path / f"run{number}", seed=number % 3) for number in range(9)]
    out = tmp_path / "page.html"
    flags = [f"--compare={run}" for run in runs[1:]] + [f"--out={out}", "--noexamples"]
    assert report.main([f"--workdir={runs[0]}", *flags]) == 0
    opened = Opened(chromium, out)
    assert opened.drawn("Training loss") == 9
    lines = opened.figure("Training loss").locator(".scatterlayer .js-line")
    looks = lines.evaluate_all("all => all.map((one) => one.getAttribute('style'))")
    assert len(set(looks)) == 9  # the ninth has a colour again, but is dashed
    opened.page.get_by_role("button", name="none", exact=True).click()
    assert opened.drawn("Training loss") == 0
    opened.page.locator("nav input").nth(2).check()
    assert opened.drawn("Training loss") == 1
    opened.page.get_by_role("button", name="all", exact=True).click()
    assert opened.drawn("Training loss") == 9
    differing = opened.page.locator("#config table").first
    assert differing.locator("tbody tr").count() == 9  # so many runs stand below one another
    assert opened.problems == []


def test_numbers_sort_as_numbers_beside_those_that_are_none(chromium, tmp_path):
    cells = [Cell("9", 9.0), Cell("not finite", float("nan")), Cell("1e-05", 1e-5), None, 1234]
    page = Page("run", "x", "", [])
    page.add("Leaderboard", table(["value"], [[cell] for cell in cells], sortable=True))
    path = tmp_path / "page.html"
    path.write_text(page.render())
    opened = Opened(chromium, path)
    opened.page.locator("th").first.click()
    assert [one for one in opened.column(1) if one][-3:] == ["1e-05", "9", "1,234"]
    assert opened.problems == []


def test_zooming_one_figure_zooms_those_over_the_same_steps(page):
    before = page.ranges()
    box = page.figure("Training loss").locator(".nsewdrag").bounding_box()
    y = box["y"] + box["height"] / 2
    page.page.mouse.move(box["x"] + box["width"] * 0.4, y)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + box["width"] * 0.7, y, steps=5)
    page.page.mouse.up()
    page.page.wait_for_function(
        "() => document.getElementById('figure-2')._fullLayout.xaxis.range[0] > 40"
    )
    zoomed = page.ranges()
    assert len({tuple(one) for one in zoomed}) == 1
    assert zoomed[0][1] - zoomed[0][0] < 0.5 * (before[0][1] - before[0][0])
    page.figure("Training loss").locator(".nsewdrag").dblclick()
    page.page.wait_for_function(
        "() => document.getElementById('figure-2')._fullLayout.xaxis.range[0] < 40"
    )
    assert page.ranges() == before


def test_the_leaderboard_sorts_by_value(page):
    ranked = [text.split("\n")[0] for text in page.column(3)]
    assert ranked == ["95.00%", "93.00%", "88.50%"]  # the best first
    heads = page.page.locator("table.sortable").first.locator("th")
    heads.nth(2).click()
    assert [text.split("\n")[0] for text in page.column(3)] == ranked[::-1]
    heads.nth(1).click()  # numbers, not text
    assert page.column(2) == ["100", "200", "200"]


def test_configs_that_differ_stand_side_by_side(page):
    tables = page.page.locator("#config table")
    differing = [row.inner_text().split("\t") for row in tables.first.locator("tbody tr").all()]
    assert {row[0] for row in differing} >= {"seed", "init_from", "data.data_dir"}
    assert next(row for row in differing if row[0] == "seed") == ["seed", "0", "1", "2"]
    assert "batch_size" in tables.nth(1).inner_text()


def test_nothing_is_cut_on_paper(page):
    assert page.page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.page.set_viewport_size({"width": 690, "height": 1000})  # A4 without its margins
    page.page.emulate_media(media="print")
    page.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    cut = page.page.evaluate(
        """() => [...document.querySelectorAll("table, th, td, figure, .main-svg, .scroll, code")]
           .filter((one) => one.getBoundingClientRect().right > innerWidth + 1
                            || one.scrollWidth > one.clientWidth + 1 && one.clientWidth
                               && getComputedStyle(one).overflowX !== "visible")
           .map((one) => one.outerHTML.slice(0, 200))"""
    )
    lines = page.page.evaluate(
        """() => [...document.querySelectorAll("#sharding td")]
           .filter((one) => one.textContent === "float32")
           .map((one) => { const words = document.createRange(); words.selectNodeContents(one);
                           return words.getClientRects().length; })"""
    )
    page.page.emulate_media(media="screen")
    page.page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.page.set_viewport_size({"width": 1280, "height": 800})
    assert cut == []
    assert set(lines) == {1}  # no word of it is broken


@pytest.mark.slow
def test_a_table_of_many_columns_is_printed_across(tmp_path, chromium):
    heads = ["model", "step", *(f"a_long_name_of_a_dataset_{n}" for n in range(UPRIGHT))]
    rows = [["one", 100, *([0.5] * UPRIGHT)]]
    for name, columns in (("wide", len(heads)), ("narrow", UPRIGHT)):
        page = Page("run", name, "", [])
        page.add("Leaderboard", table(heads[:columns], [row[:columns] for row in rows]))
        path = tmp_path / f"{name}.html"
        path.write_text(page.render())
        opened = Opened(chromium, path)
        opened.page.set_viewport_size({"width": 1010, "height": 690})  # A4 across
        opened.page.emulate_media(media="print")
        where = opened.page.locator(".scroll").evaluate("one => getComputedStyle(one).page")
        assert where == ("across" if name == "wide" else "auto")
        fits = "one => one.getBoundingClientRect().right <= innerWidth"
        assert name == "narrow" or opened.page.locator("table").evaluate(fits)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_can_be_read_in_either_scheme(page, scheme):
    page.page.emulate_media(color_scheme=scheme)
    paper, ink, tick = page.page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor,
                  getComputedStyle(document.body).color,
                  getComputedStyle(document.querySelector(".xtick text")).fill]"""
    )
    assert (_luminance(paper) < 0.1) == (scheme == "dark")
    for colour in (ink, tick):
        assert contrast(paper, colour) >= 4.5  # WCAG 2.2, success criterion 1.4.3


def contrast(one: str, two: str) -> float:
    """WCAG's contrast of two 'rgb(1, 2, 3)'."""
    bright, dark = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
