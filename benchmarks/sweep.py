"""What a sweep costs beside its computing, and what a watching one costs the training beside it.

  python benchmarks/sweep.py --cifar10=FOLDER --workdir=DIR [--steps=300]
  python benchmarks/sweep.py --watch [--seconds=120]

The first prepares FOLDER (train/<class>/, test/<class>/) as `cifar10`, and once more with every
image halved and doubled in size as `cifar10_pixelated`, then runs `configs/sweeps/cifar10.py` on
both in DIR: 6 checkpoints × 2 datasets × 4 protocols. It counts, in what the sweep prints, feature
sets and programs, and the seconds of each unit beyond reading images, forward passes and protocols.
Stopped and started again, it goes on, and counts both.

The second trains the digits while a sweep watches the run, stops the watcher by SIGSTOP for every
second stretch of steps, and compares the images/s of the training with and without it.

The last line is JSON.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from PIL import Image

DONE = re.compile(
    r"done    (\S+) \(([\d.]+) s; (\d+) feature sets extracted, (\d+) programs compiled, "
    r"(-?[\d.]+) s beside computing\)"
)
SWEEP = "configs/sweeps/cifar10.py:other=cifar10_pixelated,steps={steps},data_dir={data}"
WATCHED = """
from ml_collections import ConfigDict

def get_config(arg=""):
    digits = {{"dataset": "digits", "data_dir": {data!r}, "batch_size": 360,
              "augment": {{"name": "none"}}}}
    probes = {{f"probe{{n}}": {{"name": "linear_probe", "seed": n}} for n in range(100)}}
    return ConfigDict({{"checkpoints": {{"runs": [{run!r}]}}, "datasets": {{"digits": digits}},
                       "evals": probes, "training": {{}}}})
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar10", help="folder of train/<class>/ and test/<class>/")
    parser.add_argument("--workdir", help="of the sweep")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0, help="that the watched run lasts")
    args = parser.parse_args()
    if args.watch:
        with tempfile.TemporaryDirectory() as folder:
            found = watch(pathlib.Path(folder), args.seconds)
    else:
        found = whole(pathlib.Path(args.workdir), args.cifar10, args.steps)
    print(json.dumps(found))


def vit_jax(*argv, **options):
    return subprocess.Popen([sys.executable, "-u", "-m", "vit_jax.cli", *map(str, argv)], **options)


def whole(workdir, files, steps):
    data = workdir / "data"
    if not (data / "cifar10_pixelated").exists():
        pixelate(pathlib.Path(files), workdir / "pixelated")
        for name, folder in (("cifar10", files), ("cifar10_pixelated", workdir / "pixelated")):
            if not (data / name).exists():
                vit_jax("prepare", "folder", folder, f"--name={name}", f"--data_dir={data}").wait()
    config = SWEEP.format(steps=steps, data=data)
    with (workdir / "sweep.log").open("a") as log:
        sweep = vit_jax("sweep", f"--config={config}", f"--workdir={workdir}", stdout=log)
        sweep.wait()
    return counted((workdir / "sweep.log").read_text())


def pixelate(files, out):
    """A copy with every image at half of its detail."""
    for path in files.glob("*/*/*"):
        target = (out / path.relative_to(files)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        half.resize(image.size, Image.Resampling.NEAREST).save(target)


def counted(log):
    units = [
        {"id": name, "seconds": float(took), "sets": int(sets), "programs": int(programs)}
        | {"beside": float(beside)}
        for name, took, sets, programs, beside in DONE.findall(log)
    ]
    beside = [unit["beside"] for unit in units]
    with_programs = [number for number, unit in enumerate(units) if unit["programs"]]
    return {
        "units": len(units),
        "seconds": round(sum(unit["seconds"] for unit in units), 1),
        "feature_sets": sum(unit["sets"] for unit in units),
        "programs": sum(unit["programs"] for unit in units),
        "units_that_compiled": len(with_programs),
        "seconds_beside_computing": {
            "mean": round(statistics.mean(beside), 3),
            "median": round(statistics.median(beside), 3),
            "largest": round(max(beside), 3),
        },
    }


def watch(folder, seconds, stretch=10.0):
    """Images/s of a training while a watcher works, over those while it stands still."""
    data, run = folder / "data", folder / "run"
    (folder / "watch.py").write_text(WATCHED.format(data=str(data), run=str(run)))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    flags = ["--config.log_every=10", "--config.save_every=200", "--config.eval_every=1000000"]
    config = f"--config=digits:steps=1000000,data_dir={data}"
    training = vit_jax("train", config, f"--workdir={run}", *flags, **quiet)
    where = [f"--config={folder}/watch.py", f"--workdir={folder}/sweep"]
    watcher = vit_jax("sweep", *where, "--watch", **quiet)
    try:
        results = folder / "sweep" / "results"
        while not list(results.glob("*.json")):  # both are at work by now
            time.sleep(0.5)
        stretches, end = [], time.time() + seconds
        while time.time() < end:
            for working in (True, False):
                os.kill(watcher.pid, signal.SIGCONT if working else signal.SIGSTOP)
                time.sleep(1.0)
                start = time.time()
                time.sleep(stretch)
                stretches.append((working, start, time.time()))
        done = len(list(results.glob("*.json")))
    finally:
        for process in (watcher, training):
            process.kill()
            process.wait()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {True: [], False: []}
    for working, start, stop in stretches:
        inside = [row for row in rows if start < row["time"] < stop]
        steps = inside[-1]["step"] - inside[0]["step"]
        rates[working].append(64 * steps / (inside[-1]["time"] - inside[0]["time"]))
    shares = [a / b for a, b in zip(rates[True], rates[False], strict=True)]
    return {
        "images_per_second": {
            "watched": round(statistics.median(rates[True])),
            "alone": round(statistics.median(rates[False])),
        },
        "share": round(statistics.median(shares), 3),
        "spread": [round(min(shares), 3), round(max(shares), 3)],
        "units_done": done,
    }


if __name__ == "__main__":
    main()
