"""What weights are worth: pretraining on half of the classes, transfer to the other half.

  python benchmarks/transfer.py [--cifar10=PATH/TO/cifar10.zip] [--out=runs/transfer]

Pretrains the digits' recipe on 0 to 4, then trains 5 to 9 by `configs/transfer.py`: in each of its
modes from the weights, from scratch, and a probe of the same backbone as it is drawn. All take the
same model, steps and images. With an archive of CIFAR-10 (train/<class>/, test/<class>/) the same
for its classes by name.

There is one pretraining. An arm's learning rate is the best of three on the last fifth of the
training split, trained on the rest, with the first seed. Then each seed trains on the whole split;
printed are the mean and the standard deviation of accuracies on the test split. The last line is
JSON. The deviations are of the transfer's seeds alone: another pretraining may move every arm.
A finished run in --out is not run again, an interrupted one goes on.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import zipfile
from typing import NamedTuple

from etils import epath

from vit_jax import cli
from vit_jax.commands.config_flag import parse_with_config
from vit_jax.config import differences, load_run_config
from vit_jax.data.prepare import prepare_digits, prepare_folder
from vit_jax.data.sources import load_source

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SEEDS = (0, 1, 2)
# The transfer recipe's argument of each arm.
ARMS = {
    "scratch": "mode=full,pretrained=false",
    "full": "mode=full",
    "layerwise": "mode=layerwise",
    "probe": "mode=probe",
    "random probe": "mode=probe,pretrained=false",
}
RATES = {"backbone": (1e-3, 3e-3, 1e-2), "probe": (3e-2, 1e-1, 3e-1)}


class Task(NamedTuple):
    """A dataset in two halves: what pretrains on the first, and the transfer recipe's shape."""

    recipe: str
    low: str
    high: str
    shape: str


TASKS = {
    "digits": Task(
        recipe="digits.py:steps=300",
        low="digits_low",
        high="digits_high",
        shape="steps=30,batch_size=64,augment=none",
    ),
    "cifar10": Task(
        recipe="cifar10.py:small,steps=400,name=cifar10_low",
        low="cifar10_low",
        high="cifar10_high",
        shape="steps=20,batch_size=64,augment=pad_crop_flip",
    ),
}


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


def cifar10_files(archive, folder, every=1):
    """The same of one in `every` files of an archive, <split>/<class>/*.jpg, by the class names."""
    with zipfile.ZipFile(archive) as members:
        names = [name for name in members.namelist() if name.endswith(".jpg")]
        classes = sorted({pathlib.PurePath(name).parts[-2] for name in names})
        for name in names[::every]:
            *_, split, label, file = pathlib.PurePath(name).parts
            half = "cifar10_low" if classes.index(label) < 5 else "cifar10_high"
            put(folder / half / split / label / file, members.read(name))
    return "cifar10_low", "cifar10_high"


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def prepare(make, folder):
    """The halves as datasets in folder/data, unless they are there."""
    done = folder / "prepared"
    if not done.exists():
        for half in make(folder):
            options = {"data_dir": str(folder / "data"), "overwrite": True, "progress": False}
            prepare_folder(folder / half, name=half, **options)
        done.touch()


def train(workdir, config, *flags):
    """Trains unless that was done; the last evaluation's top-1, and the seconds after the start."""
    flags = *flags, "--config.eval_every=0"
    check_same(workdir, config, flags)
    found = finished(workdir)
    if found is None:
        workdir.mkdir(parents=True, exist_ok=True)
        argv = ["train", f"--config={CONFIGS}/{config}", f"--workdir={workdir}", *flags]
        with (workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            code = cli.main(argv)
        if code:
            sys.exit(f"vit-jax {' '.join(argv)} ended with {code}")
        found = finished(workdir)
        print(f"{workdir.name}: {found[0]:.2%}", file=sys.stderr, flush=True)
    return found


def check_same(workdir, config, flags):
    """Ends the program where the folder holds a run of another config than is wanted now."""
    if not (workdir / "config.json").exists():
        return
    argv = [f"--config={CONFIGS}/{config}", *flags]
    _, wanted = parse_with_config(argv, lambda values: None, usage="")
    if found := differences(load_run_config(epath.Path(workdir)), wanted):
        sys.exit(f"{workdir} holds another run ({found[0]}); give another --out.")


def finished(workdir):
    """What `train` answers, or None."""
    with contextlib.suppress(FileNotFoundError):
        rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        scores = [(row["step"], row["test/top1"]) for row in rows if "test/top1" in row]
        if scores and (workdir / "checkpoints" / str(scores[-1][0])).exists():
            seconds = json.loads((workdir / "run.json").read_text())["seconds"]
            return scores[-1][1], sum(seconds.values()) - seconds["start"]
    return None


def measure(task, folder):
    """{arm: {'rate', 'accuracies'}}, 'pretraining' among them, and the seconds of all runs."""
    seconds = {}

    def run(name, config, *flags):
        config = f"{config},data_dir={folder}/data"
        score, seconds[name] = train(folder / "runs" / name, config, *flags)
        return score

    def pretrain():
        half = [f"--config.{leaf}={task.low}" for leaf in ("data.name", "evals.test.dataset")]
        return run("pretraining", task.recipe, *half)

    def transfer(name, arm, rate, seed, *flags):
        source = f"init_from={folder}/runs/pretraining"
        config = f"transfer.py:name={task.high},{source},{task.shape},{ARMS[arm]}"
        flags = f"--config.seed={seed}", "--config.save_every=0", *flags
        return run(name.replace(" ", "-"), f"{config},learning_rate={rate}", *flags)

    def held_out(arm, rate):
        parts = "--config.data.split=train[:80%]", "--config.evals.test.split=train[80%:]"
        return transfer(f"{arm}-{rate}", arm, rate, SEEDS[0], *parts)

    def best_rate(arm):
        rates = RATES["probe" if "probe" in arm else "backbone"]
        return max(rates, key=lambda rate: held_out(arm, rate))

    found = {"pretraining": {"rate": None, "accuracies": [pretrain()]}}
    for arm in ARMS:
        rate = best_rate(arm)
        scores = [transfer(f"{arm}-test-{seed}", arm, rate, seed) for seed in SEEDS]
        found[arm] = {"rate": rate, "accuracies": scores}
    return found, sum(seconds.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", default="", help="archive of class folders")
    parser.add_argument("--out", default="runs/transfer", help="where runs and data are kept")
    options = parser.parse_args()
    makers = {"digits": digits_files}
    if options.cifar10:
        makers["cifar10"] = lambda folder: cifar10_files(options.cifar10, folder)
    results = {}
    for name, make in makers.items():
        folder = pathlib.Path(options.out, name)
        prepare(make, folder)
        found, seconds = measure(TASKS[name], folder)
        results[name] = found | {"seconds": seconds}
        for arm, row in found.items():
            mean, several = statistics.mean(row["accuracies"]), row["accuracies"][1:]
            spread = f"± {statistics.stdev(row['accuracies']):.1%}" if several else ""
            rate = f"learning rate {row['rate']}" if row["rate"] else ""
            print(f"{name:8} {arm:12} {mean:.1%} {spread}  {rate}")
        print(f"{name:8} {seconds / 60:.1f} min in runs")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
