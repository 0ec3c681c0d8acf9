import json
import re
import signal

import pytest

from tests.runs import deterministic_rows, save_recipe, short, steps_on_disk
from vit_jax.commands import train
from vit_jax.exit_codes import EXIT_PREEMPTED
from vit_jax.runtime import Preempted


@pytest.fixture
def flags(data_dir, tmp_path):
    config = short(data_dir, save_every=3, eval_every=3, log_every=3)
    recipe = save_recipe(config, tmp_path / "recipe.py")
    return [f"--config={recipe}", f"--workdir={tmp_path / 'runs' / 'new'}"]


def test_what_it_prints_and_leaves(flags, tmp_path, capsys):
    workdir = tmp_path / "runs" / "new"
    assert train.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    values = deterministic_rows(workdir)
    top1, count = values[6, "test/top1"], values[6, "test/count"]
    assert re.fullmatch(r"[\d,]+ parameters on 8 × \w+, digits: 1,797 images, 10 classes", lines[0])
    assert lines[1] == "compiling the training step …"
    assert re.fullmatch(r"compiled in \d+\.\d s", lines[2])
    assert re.fullmatch(
        r"step 3/6 \| loss \d\.\d{4} \| lr \d\.\d\de-\d\d \| [\d,]+ images/s \| left \d+:\d\d "
        r"\| data wait \d+%",
        lines[3],
    )
    assert any(line.startswith("step 3 | test accuracy ") for line in lines)
    assert re.fullmatch(
        "time: start .* s, compile .* s, steps .* s, data wait .* s, saving .* s, "
        r"evaluation .* s, lost 0\.0 s; \d+:\d\d in all",
        lines[-4],
    )
    assert lines[-3] == f"checkpoint {workdir}/checkpoints/6"
    assert lines[-2] == f"metrics {workdir}/metrics.jsonl, TensorBoard {workdir}/tensorboard"
    assert lines[-1] == (
        f"done: test accuracy {top1:.2%} ({round(top1 * count)} of {count}), "
        f"loss {values[6, 'test/loss']:.4f}"
    )
    found = {path.name for path in workdir.iterdir()} - {".lock"}
    assert found == {"config.json", "run.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert steps_on_disk(workdir) == [3, 6]
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == 6
    record = json.loads((workdir / "run.json").read_text())
    assert record["devices"]["count"] == 8 and record["starts"] == 1
    assert record["dataset"]["name"] == "digits" and len(record["dataset"]["fingerprint"]) == 64
    assert {"python", "jax", "flax", "vit-jax"} <= record["versions"].keys()
    assert record["num_params"] == int(lines[0].split()[0].replace(",", ""))


@pytest.fixture
def stopped(monkeypatch):
    """Every run is stopped where it would start; the configs that came so far."""
    configs = []

    def trainer(config, workdir, **_):
        assert workdir.is_dir()
        configs.append(config)
        raise Preempted

    monkeypatch.setattr("vit_jax.trainer.Trainer", trainer)
    return configs


def test_overrides_reach_the_run(flags, stopped, capsys):
    more = "--config.seed=7", "--config.optimizer.learning_rate=1e-4", "--config.mesh.data=2"
    assert train.main([*flags, *more]) == EXIT_PREEMPTED
    (config,) = stopped
    assert config.seed == 7 and config.optimizer.learning_rate == 1e-4 and config.mesh.data == 2
    assert "the same command goes on from here" in capsys.readouterr().out


def test_a_stopped_run_lets_go_of_its_workdir_and_of_the_signals(flags, stopped):
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        assert train.main(flags) == EXIT_PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_digits_are_prepared_where_they_are_missing(tmp_path, monkeypatch, stopped, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main(["--config=digits:debug", "--workdir=run"]) == EXIT_PREEMPTED
    assert capsys.readouterr().err == "preparing the digits in data\n"  # once
    assert (tmp_path / "data" / "digits" / "1.0.0").is_dir()
