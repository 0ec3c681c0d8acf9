"""The page of a run that was trained, with what its checkpoint makes of its data."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.report.pages import Opened, browser
from vit_jax.commands import report
from vit_jax.data.decode import decode
from vit_jax.data.sources import load_source

pytest.importorskip("plotly", reason="needs the extra 'report'")
pytest.importorskip("itables", reason="needs the extra 'report'")


@pytest.mark.slow
def test_the_page_of_a_trained_run(data_dir, finished_copy):
    workdir, results = finished_copy
    assert report.main([f"--workdir={workdir}"]) == 0
    page = (workdir / "report.html").read_text()
    body = page.split('<script type="application/json"')[0]
    assert f"{results['test/top1']:.2%}" in body
    assert "Not shown" not in body
    assert "cannot be read" not in body
    batch = body.split('id="a-batch"')[1].split("</section>")[0]
    assert batch.count("<img ") > 4
    mistakes = body.split("Worst mistakes")[1].split("</section>")[0]
    assert 0 < mistakes.count("<img ") <= 24  # six steps leave enough of them
    said = re.findall(
        r'base64,([^"]+)"[^>]* title="example (\d+): is (\d), taken for (\d) with ', mistakes
    )
    assert len(said) == mistakes.count("<img ")
    source = load_source("digits", split="test", data_dir=data_dir)
    for png, index, true, taken in said:
        record = source[int(index)]
        assert int(true) == record["label"] != int(taken)
        shown = Image.open(io.BytesIO(base64.b64decode(png)))
        np.testing.assert_array_equal(np.asarray(shown), decode(record["image"]))
    with browser() as chromium:
        opened = Opened(chromium, workdir / "report.html")
        for title in ("Calibration", "Confusion", "Accuracy by class", "Mean attention distance"):
            assert opened.figure(title).locator(".main-svg").count() > 0
        loaded = opened.page.evaluate(
            "[...document.images].every((one) => one.complete && one.naturalWidth > 0)"
        )
        assert loaded
        assert opened.problems == []
        assert opened.requests == []
