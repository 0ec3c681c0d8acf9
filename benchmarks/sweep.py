"""What a sweep costs beside its computing.

  python benchmarks/sweep.py --cifar10=FOLDER --workdir=DIR [--steps=300]
  python benchmarks/sweep.py --watch --workdir=DIR [--steps=300] [--repeats=2]

The first prepares FOLDER (train/<class>/, test/<class>/) as `cifar10`, and once more with every
image halved and doubled in size as `cifar10_pixelated`, then runs `configs/sweeps/cifar10.py` on
both in DIR: 6 checkpoints × 2 datasets × 4 protocols. It counts, in what the sweep prints, feature
sets and programs, and the seconds of each unit beyond reading images, forward passes and protocols.
Stopped and started again, it goes on, and counts both.

The second trains the digits' recipe alone and beside a watcher that evaluates each of its
checkpoints, in turns, and gives the medians of the log's intervals: steps/s and the share of time
that the run waits for data.

The last line is JSON.
"""

import argparse
import contextlib
import json
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

from PIL import Image

from vit_jax.data.prepare import prepare_digits

DONE = re.compile(
    r"done    (\S+) \(([\d.]+) s; (\d+) feature sets extracted, (\d+) programs compiled, "
    r"(-?[\d.]+) s beside computing\)"
)
SWEEP = "configs/sweeps/cifar10.py:other=cifar10_pixelated,steps={steps},data_dir={data}"

WATCH = """
from ml_collections import ConfigDict


def get_config(arg=""):
    digits = {{"dataset": "digits", "data_dir": {data!r}, "batch_size": 360}}
    return ConfigDict({{
        "checkpoints": {{"runs": [{run!r}]}},
        "datasets": {{"digits": digits | {{"augment": {{"name": "none"}}}}}},
        "evals": {{"own": {{"name": "classification"}}, "knn": {{"name": "knn"}}}},
        "training": {{}},
    }})
"""
LIMIT = 240  # seconds that a process may take


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--cifar10", help="folder of train/ and test/<class>/")
    mode.add_argument("--watch", action="store_true")
    parser.add_argument("--repeats", type=int, default=2, help="of --watch")
    parser.add_argument("--workdir", required=True, help="of the sweep")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    args = parser.parse_args()
    workdir = pathlib.Path(args.workdir)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and what it started ends with it
    if args.watch:
        found = watched(workdir, args.steps, args.repeats)
    else:
        found = whole(workdir, args.cifar10, args.steps)
    print(json.dumps(found))


@contextlib.contextmanager
def vit_jax(*argv, **options):
    """A command that ends with the block, however that ends."""
    command = [sys.executable, "-u", "-m", "vit_jax.cli", *map(str, argv)]
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()  # nothing, once it has ended
        process.wait()


def run(*argv, **options):
    with vit_jax(*argv, **options) as process:
        process.wait()


def whole(workdir, files, steps):
    data = workdir / "data"
    if not (data / "cifar10_pixelated").exists():
        pixelate(pathlib.Path(files), workdir / "pixelated")
        for name, folder in (("cifar10", files), ("cifar10_pixelated", workdir / "pixelated")):
            if not (data / name).exists():
                run("prepare", "folder", folder, f"--name={name}", f"--data_dir={data}")
    config = SWEEP.format(steps=steps, data=data)
    with (workdir / "sweep.log").open("a") as log:
        run("sweep", f"--config={config}", f"--workdir={workdir}", stdout=log)
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


def watched(workdir, steps, repeats):
    prepare_digits(data_dir=str(workdir / "data"), exist_ok=True)
    turns = {"alone": [], "watched": []}
    for repeat in range(repeats):
        for name, rows in turns.items():
            rows.append(turn(workdir / f"{name}{repeat}", workdir / "data", steps, name))
    found = {
        name: {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        for name, rows in turns.items()
    }
    pairs = zip(turns["watched"], turns["alone"], strict=True)
    shares = [beside["steps_per_second"] / alone["steps_per_second"] for beside, alone in pairs]
    return found | {"rate_of_alone": [round(share, 3) for share in shares]}


def turn(folder, data, steps, name):
    """One training run, alone or beside a watcher that was there first; neither may hang."""
    folder.mkdir(parents=True)
    workdir = folder / "run"
    recipe = f"--config=digits:steps={steps},data_dir={data}"
    every = ("--config.log_every=20", "--config.save_every=60", f"--config.eval_every={steps}")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("w"))

        def start(*argv):
            return stack.enter_context(vit_jax(*argv, stdout=log, stderr=subprocess.STDOUT))

        watcher = None
        if name == "watched":
            (folder / "sweep.py").write_text(WATCH.format(run=str(workdir), data=str(data)))
            config = f"--config={folder / 'sweep.py'}"
            watcher = start("sweep", config, f"--workdir={folder / 'sweep'}", "--watch")
            time.sleep(15)  # to start in, as the run will take both cores
            if watcher.poll() is not None:
                raise SystemExit(f"the watcher ended: {folder / 'log'}")
        ended = start("train", recipe, f"--workdir={workdir}", *every).wait(LIMIT)
        done = len(list((folder / "sweep" / "results").glob("*.json")))
        if ended or (watcher and watcher.wait(LIMIT)):
            raise SystemExit(f"the run or its watcher failed: {folder / 'log'}")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "speed/data_wait" in row]
    rows = rows[len(rows) // 3 :]  # the others hold what is compiled, and the watcher's start
    batch_size = json.loads((workdir / "config.json").read_text())["batch_size"]
    rates = [row["speed/images_per_second"] / batch_size for row in rows]
    waits = [row["speed/data_wait"] for row in rows]
    return {
        "steps_per_second": statistics.median(rates),
        "data_wait": statistics.median(waits),
        "units_done_meanwhile": done,
    }


if __name__ == "__main__":
    main()
