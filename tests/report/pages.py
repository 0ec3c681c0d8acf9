"""Runs as files, without training, and a browser to look at their pages."""

import contextlib
import json
import math
import pathlib
import shutil

import pytest
from etils import epath

from vit_jax.commands.config_flag import load_config

HOSTILE = "</script><script>window.hacked = 1</script>"
IMAGE = "<img src=x onerror='window.hacked = 1'>&amp;\"%{x}"
TIMEOUT = 120_000  # milliseconds: other tests may have the machine
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def write_run(folder: pathlib.Path, *, steps: int = 200, total: int = 200, **leaves) -> epath.Path:
    """A run that logged every 20 steps and evaluated every 100.

    Its config is the digits' with `leaves` set; what needs its data or checkpoint is not there.
    """
    folder.mkdir(parents=True)
    config = load_config("digits:debug").to_dict()
    config |= {"total_steps": total, "train": config["train"] | {"wandb": HOSTILE}}
    config["data"]["data_dir"] = config["evals"]["test"]["data_dir"] = str(folder / "nowhere")
    for key, value in leaves.items():
        config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    record = {
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
        "mesh": {"replica": 1, "data": 1, "fsdp": 1, "fsdp_z": 1, "tensor": 1},
        "dataset": {
            "name": IMAGE,
            "fingerprint": "1429b6a1",
            "splits": {"train": 1437, "test": 360},
            "class_names": ["a", HOSTILE],
        },
        "fingerprints": {"data": "1429b6a1"},
        "num_params": 152842,
        "started": 1.79e9,
        "starts": 2,
        "seconds": {"start": 10.6, "compile": 15.0, "steps": 58.3, "data_wait": 27.4, "lost": 0.0},
        "wall_seconds": 118.2,
    }
    (folder / "run.json").write_text(json.dumps(record))
    rows = [_logged(step, float(config["seed"])) for step in range(20, steps + 1, 20)]
    rows += [_evaluated(step, config["seed"]) for step in range(100, steps + 1, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return epath.Path(folder)


def _logged(step: int, shift: float) -> dict:
    return {
        "step": step,
        "time": 1.79e9 + step,
        "train/loss": None if step == 60 else 2.3 * math.exp(-step / 100) + 0.1 * shift,
        "train/accuracy": 1 - math.exp(-step / 90),
        "train/learning_rate": 1e-3 * (1 - step / 400),
        "train/grad_norm": 1.0,
        "train/update_norm": 0.1,
        "train/skipped": 1,
        "train/rejected": 0,
        "speed/images_per_second": 900.0 + step,
        "speed/seconds_left": 10.0,
        "speed/data_wait": 0.2,
        "speed/mfu": 0.41,
    }


def _evaluated(step: int, seed: int) -> dict:
    top1 = 0.9 + step / 4000 - 0.02 * seed
    values = {"top1": top1, "top5": 1.0, "loss": 0.3, "count": 360, "rejected": 0}
    return {"step": step, "time": 1.79e9 + step} | {f"test/{k}": v for k, v in values.items()}


@contextlib.contextmanager
def browser():
    """Chromium without a window; skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra 'test')")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("needs chromium: `apt-get install chromium`, or another system's")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page in a tab, with what it said and asked for.

    Attributes:
      page: Playwright's.
      problems: errors and warnings on the console, exceptions.
      requests: URLs other than the page's own.
    """

    def __init__(self, chromium, path: pathlib.Path):
        self.page = chromium.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(TIMEOUT)
        self.problems: list[str] = []
        self.requests: list[str] = []
        own = pathlib.Path(path).absolute().as_uri()
        self.page.on("console", lambda said: self.problems.append(said.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "request", lambda asked: asked.url != own and self.requests.append(asked.url[:100])
        )
        self.page.goto(own)
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def figure(self, title: str):
        """The figure of that title."""
        return (
            self.page.locator("figure").filter(has=self.page.get_by_text(title, exact=True)).first
        )

    def drawn(self, title: str) -> int:
        """How many curves a figure shows."""
        return self.figure(title).locator(".scatterlayer .trace").count()

    def ranges(self) -> list[list[float]]:
        """What every figure over steps shows of the steps."""
        return self.page.evaluate(
            """() => Object.entries(JSON.parse(document.getElementById("data").textContent).figures)
               .filter(([, figure]) => figure.group === "step")
               .map(([name]) => document.getElementById(name)._fullLayout.xaxis.range)"""
        )

    def column(self, place: int) -> list[str]:
        """A column of the first table that sorts, as shown."""
        cells = self.page.locator("table.sortable").first.locator(f"tbody td:nth-child({place})")
        return cells.all_inner_texts()
