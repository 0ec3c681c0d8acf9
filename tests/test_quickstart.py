import pathlib
import subprocess
import sys

import pytest

from vit_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_digits_recipe_reaches_its_accuracy(tmp_path, monkeypatch):
    """As `make quickstart` runs it: at least 97.5% on a fifth of the images held out."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "digits", "--data_dir=data"]) == 0
    command = [sys.executable, "-m", "vit_jax.cli", "train"]
    flags = [f"--config={ROOT}/configs/digits.py", "--workdir=runs/digits"]
    monkeypatch.setenv("XLA_FLAGS", "")
    done = subprocess.run([*command, *flags], check=True, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    accuracy = float(last.split("test accuracy ")[1].split("%")[0])
    assert accuracy >= 97.5, last
    for left in ("metrics.jsonl", "tensorboard", "checkpoints/1500", "run.json", "config.json"):
        assert (tmp_path / "runs/digits" / left).exists()


def test_the_makefile_runs_what_the_readme_says():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for target in ("quickstart", "test"):
        assert f"\n{target}: " in makefile
        assert f"make {target} " in readme
    assert "vit-jax train --config=configs/digits.py --workdir=runs/digits" in makefile
