"""CIFAR-10 as a person would train it: the figures of the README's results table."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.archives import CIFAR10, NO_CIFAR10

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CIFAR10.exists(), reason=NO_CIFAR10),
]


def vit_jax(*argv, cwd, monkeypatch) -> str:
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as outside of the tests
    command = [sys.executable, "-m", "vit_jax.cli", *argv]
    done = subprocess.run(command, check=True, cwd=cwd, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize(
    "name, flags, low, high",
    [("cifar10", [], 40.0, 100.0), ("cifar10_shuffled", ["--shuffle_labels"], 8.5, 11.5)],
)
def test_it_learns_and_does_not_where_labels_are_shuffled(
    tmp_path, monkeypatch, name, flags, low, high
):
    where = {"cwd": tmp_path, "monkeypatch": monkeypatch}
    shutil.unpack_archive(CIFAR10, tmp_path / "images")
    vit_jax("prepare", "folder", "images", f"--name={name}", *flags, **where)
    shutil.rmtree(tmp_path / "images")
    recipe = f"--config={ROOT}/configs/cifar10.py:small,name={name}"
    said = vit_jax("train", recipe, "--workdir=run", **where)
    accuracy = float(re.search(r"done: test accuracy ([\d.]+)% \(\d+ of 10000\)", said)[1])
    assert low <= accuracy <= high, said
    losses = [float(loss) for loss in re.findall(r"\| loss ([\d.]+) \|", said)]
    fell = losses[0] - losses[-1]
    assert fell > 0.4 if name == "cifar10" else fell < 0.1
