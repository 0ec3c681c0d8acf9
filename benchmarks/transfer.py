"""What weights are worth: pretraining on half of the classes, transfer to the other half.

  python benchmarks/transfer.py [--steps=100] [--pretrain_steps=1000]
      [--cifar10=shared/data/cifar10_jpg.zip]

Pretrains the digits' recipe on 0 to 4, then trains 5 to 9 for a few steps: by `configs/transfer.py`
in each of its modes, and by the digits' recipe from scratch, with as many steps of as many images.
With an archive of CIFAR-10 (train/<class>/, test/<class>/) the same for its classes by name. The
last line is JSON: the share of the held-out images of the second half that are told right.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from vit_jax.data.prepare import prepare_digits
from vit_jax.data.sources import load_source

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
RATES = {"full": 1e-3, "layerwise": 2e-3, "probe": 1e-2}  # small models want larger ones


def vit_jax(*argv):
    command = [sys.executable, "-m", "vit_jax.cli", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vit-jax {' '.join(map(str, argv))}\n{done.stderr}")


def digits_files(folder):
    """Writes folder/<half>/<split>/<class>/*.png; answers the halves' names."""
    prepare_digits(data_dir=str(folder / "data"))
    for split in ("train", "test"):
        source = load_source("digits", split=split, data_dir=str(folder / "data"))
        for index in range(len(source)):
            record = source[index]
            half = "digits_low" if record["label"] < 5 else "digits_high"
            put(folder / half / split / str(record["label"]) / f"{index}.png", record["image"])
    return "digits_low", "digits_high"


def cifar10_files(archive, folder):
    with zipfile.ZipFile(archive) as members:
        names = [name for name in members.namelist() if name.endswith(".jpg")]
        classes = sorted({pathlib.PurePath(name).parts[-2] for name in names})
        for name in names:
            *_, split, label, file = pathlib.PurePath(name).parts
            half = "cifar10_low" if classes.index(label) < 5 else "cifar10_high"
            put(folder / half / split / label / file, members.read(name))
    return "cifar10_low", "cifar10_high"


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def accuracy(folder, name, config, *flags):
    """Trains in folder/runs/name; the last evaluation's top-1."""
    workdir = folder / "runs" / name
    vit_jax("train", f"--config={CONFIGS}/{config}", f"--workdir={workdir}", *flags)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["test/top1"] for row in rows if "test/top1" in row][-1]


def measure(folder, halves, *, recipe, batch_size, augment, steps, pretrain_steps):
    """{'pretraining': …, 'scratch': …, and each mode}: accuracies."""
    where = f"data_dir={folder}/data"
    for half in halves:
        vit_jax("prepare", "folder", folder / half, f"--name={half}", f"--data_dir={folder}/data")

    def on(half):
        return f"--config.data.name={half}", f"--config.evals.test.dataset={half}"

    low, high = halves
    found = {}
    shape = {"digits": "digits.py:", "cifar10": f"cifar10.py:small,name={low},"}[recipe]
    first = f"{shape}steps={pretrain_steps},{where}"
    found["pretraining"] = accuracy(folder, f"{recipe}_low", first, *on(low))
    scratch = f"{shape}steps={steps},{where}"
    found["scratch"] = accuracy(folder, f"{recipe}_scratch", scratch, *on(high))
    for mode, rate in RATES.items():
        config = (
            f"transfer.py:name={high},{where},init_from={folder}/runs/{recipe}_low,mode={mode},"
            f"steps={steps},batch_size={batch_size},augment={augment},learning_rate={rate}"
        )
        found[mode] = accuracy(folder, f"{recipe}_{mode}", config)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pretrain_steps", type=int, default=1000)
    parser.add_argument("--cifar10", default="", help="archive of class folders")
    options = parser.parse_args()
    steps = {"steps": options.steps, "pretrain_steps": options.pretrain_steps}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        tasks = {"digits": (digits_files, (folder,), 64, "none")}
        if options.cifar10:
            arguments = (options.cifar10, folder)
            tasks["cifar10"] = (cifar10_files, arguments, 128, "pad_crop_flip")
        for recipe, (make, arguments, batch_size, augment) in tasks.items():
            shape = {"recipe": recipe, "batch_size": batch_size, "augment": augment}
            results[recipe] = measure(folder, make(*arguments), **shape, **steps)
            for name, value in results[recipe].items():
                print(f"{recipe:8} {name:12} {value:.2%}", flush=True)
    print(json.dumps(steps | results))


if __name__ == "__main__":
    main()
