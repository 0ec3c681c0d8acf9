"""The page of a sweep, from results as files."""

import numpy as np
import pytest
from etils import epath

from tests.report.pages import HOSTILE, Opened, browser, write_run
from vit_jax.commands import report

pytest.importorskip("plotly", reason="needs the extra 'report'")
pytest.importorskip("itables", reason="needs the extra 'report'")

from vit_jax.evals.intervals import pack_bits
from vit_jax.report.sweep_page import sweep_page
from vit_jax.sweep.store import Store, Unit

PNG = (  # 2 × 1 pixels
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAAAAADRSSBWAAAAC0lEQVR4nGNg+A8AAQIBAEK+vGgAAAAASUVORK5CYII="
)


def save(store, run, step, right: float, *, dataset="digits", name="classification"):
    """A result of 40 examples of which the first `right` are right."""
    checkpoint = run.name
    unit = Unit(
        id=f"{checkpoint}-{step}-{dataset}-{name}".replace("/", "_").replace("<", "_"),
        checkpoint=checkpoint,
        step=step,
        dataset=dataset,
        split="test",
        eval=name,
        protocol="classification",
        config_digest="1",
        checkpoint_digest="2",
        run=str(run),
        settings={"dataset": {"dataset": "nowhere", "augment": {"name": "none"}}, "eval": {}},
    )
    top1 = {"metric": "top1", "value": right / 40, "low": 0.1, "high": 0.99, "count": 40}
    loss = {"metric": "loss", "value": float("nan"), "low": None, "high": None, "count": 40}
    correct = np.arange(40) < right
    artefacts = {
        "reliability": [{"low": 0, "high": 1, "count": 40, "confidence": 0.7, "accuracy": 0.8}],
        "per_class": [{"class": HOSTILE, "top1": 0.5, "count": 20}],
        "confusion": {"class_names": ["a", HOSTILE], "cells": [[0, 0, 20], [1, 0, 9], [1, 1, 11]]},
        "mistakes": [{"index": 3, "label": HOSTILE, "predicted": "a", "confidence": 0.9}],
        "attention_distance": [[4.0, 2.0], [5.0, 6.0]],
        "pictures": [
            {"kind": kind, "title": f"{kind} <b>", "png": PNG}
            for kind in ("image", "attention", "rollout", "filters")
        ],
        "correct": pack_bits(correct, np.arange(40)),
        "rejected": 0,
    }
    assert store.save_result(unit, [top1, loss], artefacts, seconds=1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    store = Store(folder)
    runs = [write_run(folder / "runs" / name, seed=k) for k, name in enumerate(["one", "<i>two"])]
    for run, rights in zip(runs, [(20, 30), (25, 36)], strict=True):
        for step, right in zip((100, 200), rights, strict=True):
            save(store, run, step, right)
        save(store, run, 200, rights[0], dataset="<u>other", name="subset")
    store.save_failure("three-100-digits", f"a half written checkpoint {HOSTILE}", "Traceback …")
    return folder


def test_the_page_of_a_sweep(folder):
    assert report.main([f"--workdir={folder}"]) == 0
    page = (folder / "report.html").read_text()
    body = page.split('<script type="application/json"')[0]
    assert "6 results · 4 checkpoints · 2 datasets · 2 evaluations · 1 failed" in body
    assert "a half written checkpoint &lt;/script&gt;" in body
    assert "vit-jax sweep --retry_failed" in body
    assert "10.0 to 99.0%" in body  # the result's own interval, not Wilson's
    assert "p=0.031" in body  # 30 of 40 against 36 of the same
    assert "Not shown: " in body  # of the mistakes: there is no such dataset here
    assert body.split('id="a-batch"')[1].startswith("><h2>A batch</h2><p")  # one for both seeds
    for title in ("Throughput", "Waiting for data", "Model FLOPs utilisation", "Learning rate"):
        assert f"<strong>{title}</strong>" in body
    surroundings = body.split('id="environment"')[1].split("</section>")[0]
    assert "version of jax" in surroundings
    assert str(folder / "runs" / "one") in surroundings
    seconds = body.split('id="time"')[1].split("</section>")[0]
    assert '<td data-order="58.3" class="number">58.3</td>' in seconds


def test_what_is_not_finite_is_said_and_ranks_last(tmp_path):
    store = Store(tmp_path)
    runs = [write_run(tmp_path / "runs" / name) for name in ("diverged", "fine")]
    save(store, runs[0], 200, float("nan"))
    save(store, runs[1], 200, 4)
    page = sweep_page(epath.Path(tmp_path), examples=False)
    board = dict(page._sections)["Leaderboard"]
    assert board.index("fine") < board.index("diverged")
    assert '<td data-order="" class="number">not finite' in board
    assert page.facts == [("10.00%", "best classification on digits: fine @ 200")]


def test_the_checkpoint_of_an_imported_model_has_no_step(tmp_path):
    store = Store(tmp_path)
    save(store, epath.Path("/nowhere/dinov2"), None, 30)
    page = sweep_page(epath.Path(tmp_path), examples=True)
    assert "No run of these checkpoints can be read" in dict(page._sections)["Runs"]
    assert page.facts == [("75.00%", "best classification on digits: dinov2")]
    page.render()


def test_it_works_in_a_browser(folder):
    report.main([f"--workdir={folder}", "--noexamples"])
    with browser() as chromium:
        opened = Opened(chromium, folder / "report.html")
        assert [value.split("\n")[0] for value in opened.column(4)][:2] == ["90.00%", "75.00%"]
        heads = opened.page.locator("table.sortable").first.locator("th")
        assert heads.all_inner_texts()[:2] == ["model", "step"]
        heads.nth(3).click()
        assert opened.column(4)[0].startswith("50.00%")
        assert opened.drawn("classification on digits") == 4
        opened.page.locator("nav input").first.uncheck()
        assert opened.drawn("classification on digits") == 2
        maps = opened.page.locator(".maps").first.locator("img")
        assert maps.count() == 3
        assert maps.first.evaluate("one => one.naturalWidth") == 2
        for place in range(3):  # the attention maps get the image's shape
            box = maps.nth(place).bounding_box()
            assert box["height"] == pytest.approx(box["width"] / 2, abs=1)
        assert opened.problems == []
        assert opened.requests == []
        assert opened.page.evaluate("window.hacked") is None


def test_a_sweep_that_has_nothing_yet(tmp_path):
    Store(tmp_path)
    assert report.main([f"--workdir={tmp_path}"]) == 0
    assert "There is no result yet." in (tmp_path / "report.html").read_text()


def test_a_sweep_is_not_compared(tmp_path):
    Store(tmp_path)
    with pytest.raises(ValueError, match="--compare"):
        report.main([f"--workdir={tmp_path}", "--compare=x"])
