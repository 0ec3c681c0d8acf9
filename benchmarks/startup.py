"""Seconds from the command to the end of the first step of the digits run, cold and warm.

  python benchmarks/startup.py [--repeats=3]

Cold: an empty compilation cache. Warm: the cache that the cold run left. The bound of the same run
is a Python process that only imports jax.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def first_step(folder, cache):
    """Runs one step; the seconds until its end, by run.json and by the clock before the command."""
    workdir = pathlib.Path(tempfile.mkdtemp(dir=folder))
    flags = ["--config=digits:steps=1", f"--config.data.data_dir={folder}/data"]
    flags += ["--config.evals.test.data_dir=" + f"{folder}/data", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "vit_jax.cli", "train", *flags]
    before = time.time()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    record = json.loads((workdir / "run.json").read_text())
    spent = [record["seconds"][name] for name in ("start", "compile", "steps", "data_wait")]
    return record["started"] - before + sum(spent)


def import_jax():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vit_jax.cli", "prepare", "digits"]
        prepare = [*command, f"--data_dir={folder}/data"]
        subprocess.run(prepare, check=True, capture_output=True)
        rows = {"cold": [], "warm": [], "import_jax": []}
        for index in range(repeats):
            cache = pathlib.Path(folder) / f"cache{index}"
            rows["cold"].append(first_step(folder, cache))
            rows["warm"].append(first_step(folder, cache))
            rows["import_jax"].append(import_jax())
    medians = {name: round(statistics.median(values), 2) for name, values in rows.items()}
    print(json.dumps({"seconds": medians, "warm_over_cold": medians["warm"] / medians["cold"]}))


if __name__ == "__main__":
    main()
