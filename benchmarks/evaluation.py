"""How near evaluation comes to what it cannot do without, as ratios measured in turns.

  python benchmarks/evaluation.py [--cifar10=cifar10_jpg.zip] [--repeats=5] [--only=knn]

- forward: images/s of an evaluation over those of the bare jitted forward pass on batches that are
  on the device already, of the digits' recipe and of CIFAR-10's: `first_pass` reads and decodes,
  `kept` is a later pass over a small split, whose images are kept decoded and placed each time.
- probe: CPU seconds of training the linear probe's 40 settings over those of one, and over those
  of one what the 40 settings' products alone would take (`products_alone`) at the best rate that
  NumPy or XLA reach here with any of these shapes or a large square (`gflops_a_core`); the largest
  difference between a setting's weights there and alone; and the ratio of the whole protocol
  (50,000 examples of 384 features are read from the disk, standardised, trained on 1,000 steps of
  256; 10,000 more are scored).
- knn: seconds of 10,000 queries against a bank of 50,000 of 384 features.

The last line is JSON.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
import zipfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.commands.config_flag import load_config
from vit_jax.config import plain
from vit_jax.data.prepare import prepare_digits, prepare_folder
from vit_jax.data.sources import dataset_info
from vit_jax.evals import knn, linear_probe
from vit_jax.evals.classification import Classification
from vit_jax.features import FeatureCache, Features
from vit_jax.feeding import pad_batch, put_batch
from vit_jax.sharding import make_mesh
from vit_jax.train import make_parts

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar10", default="", help="archive of test/<class>/*.jpg")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["forward", "probe", "knn"])
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "forward"):
            found["forward"] = forward(folder, args.cifar10, args.repeats)
        if args.only in (None, "probe"):
            found["probe"] = probe(args.repeats)
            found["probe"]["protocol"] = protocol(folder, min(args.repeats, 3))
        if args.only in (None, "knn"):
            found["knn"] = neighbours()
    print(json.dumps(found))


def forward(folder, archive, repeats):
    prepare_digits(data_dir=folder)
    recipes = {"digits": f"digits:data_dir={folder}"}
    if archive:
        with zipfile.ZipFile(archive) as members:
            members.extractall(f"{folder}/files")
        for split in pathlib.Path(folder, "files").glob("**/train"):
            prepare_folder(split.parent, name="cifar10", data_dir=folder, progress=False)
        recipes["cifar10:small"] = f"cifar10:small,data_dir={folder}"
    return {name: recipe_forward(recipe, repeats) for name, recipe in recipes.items()}


def recipe_forward(recipe, repeats):
    config = load_config(recipe)
    info = dataset_info(config.data.name, data_dir=config.data.data_dir)
    parts, init = make_parts(config, info)
    state = jax.jit(init)()
    options = plain(config.evals.test)
    options.pop("name")
    evaluation, mesh = Classification(**options), make_mesh()

    def put(batch):
        return put_batch(pad_batch(batch, mesh), mesh)

    build, variables = parts.model(state)
    apply = jax.jit(lambda variables, images: build(variables)(images))
    with evaluation.loader("test") as loader:
        images = [put({"image": b["image"], "mask": b["mask"]})["image"] for b in loader]
    count = info.splits["test"]

    def bare():
        jax.block_until_ready([apply(variables, batch) for batch in images])

    def whole():
        assert evaluation.run(parts.model(state), put=put)["count"] == count

    fresh = iter([Classification(**options) for _ in range(repeats + 1)])

    def first():
        assert next(fresh).run(parts.model(state), put=put)["count"] == count

    passes = {"kept": whole, "first_pass": first}
    return {name: ratio(run, bare, count, repeats) for name, run in passes.items()}


def ratio(whole, bare, count, repeats):
    rates = {"evaluation": [], "bare": []}
    for run in (whole, bare):
        run()  # compiles
    for _ in range(repeats):
        for run, name in ((whole, "evaluation"), (bare, "bare")):
            start = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - start))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    shares = [a / b for a, b in zip(rates["evaluation"], rates["bare"], strict=True)]
    return {
        "images_per_second": {name: round(value) for name, value in middle.items()},
        "share": round(statistics.median(shares), 3),
        "spread": [round(min(shares), 3), round(max(shares), 3)],
    }


def probe(repeats, examples=20_000, features=384, classes=10, num_steps=300):
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, examples).astype(np.int32)
    centers = rng.standard_normal((classes, features))
    x = 0.3 * centers[label] + rng.standard_normal((examples, features))
    # Directions of very different size, as features have: the highest rates are not stable then.
    x @= rng.standard_normal((features, features)) * np.exp(-np.arange(features) / 60)
    x = linear_probe.stacked([linear_probe.Standard.of(x)(x.astype(np.float32))])
    grid = [(rate, decay) for rate in RATES for decay in DECAYS]
    options = {"num_steps": num_steps, "batch_size": 256, "seed": 0}
    train = functools.partial(linear_probe.train_probes, x, label, classes, **options)
    seconds = {1: [], 40: []}
    for settings in (grid[:1], grid):
        train(settings=settings)
    for _ in range(repeats):
        for settings in (grid[:1], grid):
            start = time.process_time()
            together = train(settings=settings)
            seconds[len(settings)].append(time.process_time() - start)
    largest = 0.0
    for number, setting in enumerate(grid):
        alone = train(settings=[setting])
        largest = max(largest, np.abs(alone.weights[0, 0] - together.weights[0, number]).max())
    middle = {count: statistics.median(values) for count, values in seconds.items()}
    columns = len(grid) * classes
    rates = products(columns, features, options["batch_size"], repeats)
    flops = num_steps * 2 * 2 * columns * features * options["batch_size"]
    peak = max(rate for reached in rates.values() for rate in reached.values())
    return {
        "cpu_seconds": {count: round(value, 3) for count, value in middle.items()},
        "ratio": round(middle[40] / middle[1], 2),
        "gflops_a_core": rates,
        "products_alone": round(flops / (1e9 * peak) / middle[1], 2),
        "largest_difference": float(largest),
    }


def products(columns, features, batch, repeats, square=2048):
    """GFLOP a CPU second of the probe's two products and of a large one, by NumPy and by XLA."""
    shapes = {
        "logits": (columns, features, batch),
        "gradient": (columns, batch, features),
        "block": (linear_probe.COLUMNS, features, batch),
        "square": (square, square, square),
    }
    found, rng = {}, np.random.default_rng(0)
    for name, (rows, inner, others) in shapes.items():
        a = rng.standard_normal((rows, inner), np.float32)
        b = rng.standard_normal((inner, others), np.float32)
        on_device, flops = jax.device_put((a, b)), 2 * rows * inner * others
        times = max(square**3 * 2 // flops // 4, 1)
        ways = {
            "numpy": lambda a=a, b=b: a @ b,
            "xla": lambda a=on_device[0], b=on_device[1]: jax.block_until_ready(_product(a, b)),
        }
        found[name] = {
            way: round(times * flops / 1e9 / cpu_seconds(run, times, repeats), 1)
            for way, run in ways.items()
        }
    return found


_product = jax.jit(jnp.matmul)


def cpu_seconds(run, times, repeats):
    """The least that `times` runs took."""
    found = []
    for _ in range(repeats + 1):  # the first compiles
        start = time.process_time()
        for _ in range(times):
            run()
        found.append(time.process_time() - start)
    return min(found[1:])


def protocol(folder, repeats, sizes=(50_000, 10_000), features=384, classes=10):
    """The linear probe from cached features to its scores, with 1 and with 40 settings."""
    prepare_digits(data_dir=folder, exist_ok=True)  # only its class names are read
    rng, cache = np.random.default_rng(0), FeatureCache(pathlib.Path(folder) / "features")
    centers = rng.standard_normal((classes, features))
    for split, size in zip(("train", "test"), sizes, strict=True):
        label = rng.integers(0, classes, size).astype(np.int32)
        x = (0.3 * centers[label] + rng.standard_normal((size, features))).astype(np.float32)
        cache.save(split, Features({"pooled": x}, label, np.arange(size), 0))
    where = {"dataset": "digits", "data_dir": folder, "augment": {"name": "none"}}
    where["augment"]["size"] = (8, 8)

    class Reader:
        def features(self, evaluation, split):
            return cache.load(split, evaluation.wants[split])

    grids = {1: {"learning_rates": (0.1,), "weight_decays": (0.0,)}, 40: {}}
    evals = {
        count: linear_probe.LinearProbe(batch_size=360, **where, **grid)
        for count, grid in grids.items()
    }
    seconds = {1: [], 40: []}
    for repeat in range(repeats + 1):
        for count, evaluation in evals.items():
            start = time.perf_counter()
            evaluation.measure(Reader())
            if repeat:  # the first compiles
                seconds[count].append(time.perf_counter() - start)
    middle = {count: statistics.median(values) for count, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds[1], seconds[40], strict=True)]
    return {
        "seconds": {count: round(value, 2) for count, value in middle.items()},
        "ratio": round(statistics.median(ratios), 2),
    }


def neighbours(queries=10_000, bank=50_000, features=384, k=200):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((bank, features), np.float32)
    wanted = rng.standard_normal((queries, features), np.float32)
    start, cpu = time.perf_counter(), time.process_time()
    knn.neighbours(wanted, rows, k)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return {name: round(value, 2) for name, value in seconds.items()} | {"cores": os.cpu_count()}


if __name__ == "__main__":
    main()
