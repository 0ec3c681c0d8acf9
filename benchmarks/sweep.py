"""What a sweep costs beside its computing.

  python benchmarks/sweep.py --cifar10=FOLDER --workdir=DIR [--steps=300]

It prepares FOLDER (train/<class>/, test/<class>/) as `cifar10`, and once more with every
image halved and doubled in size as `cifar10_pixelated`, then runs `configs/sweeps/cifar10.py` on
both in DIR: 6 checkpoints × 2 datasets × 4 protocols. It counts, in what the sweep prints, feature
sets and programs, and the seconds of each unit beyond reading images, forward passes and protocols.
Stopped and started again, it goes on, and counts both.

The last line is JSON.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys

from PIL import Image

DONE = re.compile(
    r"done    (\S+) \(([\d.]+) s; (\d+) feature sets extracted, (\d+) programs compiled, "
    r"(-?[\d.]+) s beside computing\)"
)
SWEEP = "configs/sweeps/cifar10.py:other=cifar10_pixelated,steps={steps},data_dir={data}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar10", required=True, help="folder of train/ and test/<class>/")
    parser.add_argument("--workdir", required=True, help="of the sweep")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    args = parser.parse_args()
    print(json.dumps(whole(pathlib.Path(args.workdir), args.cifar10, args.steps)))


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


if __name__ == "__main__":
    main()
