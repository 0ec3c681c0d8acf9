import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath

from tests.evals.test_classification import model
from tests.recipes import tiny
from tests.report.pages import write_run
from vit_jax.data.sources import dataset_info
from vit_jax.metrics import Stopwatch
from vit_jax.report.examples import batch, score
from vit_jax.report.layout import layout_rows, layout_table, say_bytes
from vit_jax.report.run_page import run_page, scores_of
from vit_jax.report.runs import config_rows, names, parent_of, read_run
from vit_jax.sharding import AXES, layout
from vit_jax.train import abstract_state, make_parts
from vit_jax.workdir import RunRecord


def test_runs_are_named_by_as_much_of_the_path_as_they_need():
    paths = [epath.Path(path) for path in ("a/x/run", "b/x/run", "other")]
    assert names(paths) == ["a/x/run", "b/x/run", "other"]


def test_the_parent_is_the_run_that_weights_came_from(tmp_path):
    first = write_run(tmp_path / "first")
    (tmp_path / "first" / "checkpoints" / "200").mkdir(parents=True)
    for source in (first, first / "checkpoints" / "200"):
        run = read_run(write_run(tmp_path / f"of_{source.name}", init_from=str(source)))
        parent, _ = parent_of(run)
        assert parent.workdir == first
    lost = read_run(write_run(tmp_path / "lost", init_from="nowhere"))
    assert parent_of(lost)[0] is None
    assert "nowhere" in parent_of(lost)[1]
    assert parent_of(read_run(first))[0] is None


def test_a_leaf_that_one_config_lacks_differs():
    rows = config_rows({"a": {"x": 1, "y": {"z": [1, 2]}}, "b": {"x": 1}})
    assert rows == [("x", ["1", "1"], False), ("y.z", ["[1, 2]", ""], True)]


def test_a_run_as_far_as_it_got(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"total_steps": 5}))
    run = read_run(epath.Path(folder))
    assert (run.rows, run.record, run.step, run.total_steps) == ([], {}, 0, 5)
    assert run.last("train/loss") is None


def test_what_a_watching_sweep_found_is_the_runs_too(tmp_path):
    workdir = write_run(tmp_path / "run")
    row = {"step": 100, "time": 1.9e9, "digits_knn/top1": 0.97}
    (workdir / "sweep.jsonl").write_text(json.dumps(row) + "\n")
    run = read_run(workdir)
    assert run.series("digits_knn/top1") == ([100], [0.97])
    assert run.evaluated()[-1] == "digits_knn/top1"


def test_the_time_of_training_is_that_of_its_steps(tmp_path):
    workdir = write_run(tmp_path / "run", batch_size=460, steps=40)
    run = read_run(workdir)  # 920 and 940 images a second
    assert run.seconds_to(20) == run.seconds_to(30) == 10
    assert run.seconds_to(40) == pytest.approx(10 + 20 * 460 / 940)
    assert run.seconds_to(10) is None and run.seconds_to(None) is None
    path = workdir / "metrics.jsonl"  # killed after step 20, and started a day later
    first, second = map(json.loads, path.read_text().splitlines()[:2])
    second["time"] += 86_400
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    assert read_run(workdir).seconds_to(40) == run.seconds_to(40)


def test_a_metric_has_the_count_that_it_was_computed_on(tmp_path):
    workdir = write_run(tmp_path / "run")
    values = {"top1": 0.9, "held_out_top1": 0.8, "held_out_top1_count": 144, "count": 360}
    row = {"step": 200, "time": 1.9e9} | {f"probe/{name}": x for name, x in values.items()}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    counts = {score.metric: score.count for score in scores_of(read_run(workdir))}
    assert counts == {"top1": 360, "held_out_top1": 144}


def test_a_run_that_diverged_is_told_as_such(tmp_path):
    workdir = write_run(tmp_path / "run")
    rows = [{"step": 100, "train/loss": None, "test/loss": None, "test/count": 360}]
    (workdir / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    sections = dict(run_page(workdir, [], examples=False)._sections)
    assert "never finite" in sections["Training"]
    assert '<td data-order="" class="number">not finite' in sections["Evaluation"]


def test_a_batch_without_a_record_or_a_dataset_is_a_line(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert "Not shown: no dataset" in batch(run)
    (run.workdir / "run.json").unlink()
    assert "Not shown: there is no run.json yet" in batch(read_run(run.workdir))


def test_an_evaluation_of_a_subset_knows_the_heads_classes(data_dir):
    section = {"name": "classification", "subset": "dataset", "dataset": "digits"}
    section |= {"data_dir": data_dir, "batch_size": 360}
    section["augment"] = {"name": "none", "size": (8, 8)}
    head = ("elk", "owl", *map(str, range(10)))
    scores = score("test", section, model(num_classes=12), head)
    assert scores.values[0].count == 360
    assert scores.artefacts["confusion"]["predicted_names"] == list(head)


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_what_is_no_run_is_said(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=pathlib.Path(tmp_path).name):
        read_run(epath.Path(tmp_path))


@pytest.mark.parametrize("offload", [False, True])
def test_the_layout_is_that_of_the_runs_arrays(data_dir, tmp_path, offload):
    """Also where FSDP goes over a torus in two axes, which the config does not tell."""
    config = tiny(data_dir, mesh__fsdp=8, train__offload_opt_state=offload)
    info = dataset_info("digits", data_dir=data_dir)
    devices = np.array(jax.devices()).reshape(1, 1, 4, 2, 1)
    mesh = jax.sharding.Mesh(devices, AXES)
    _, init = make_parts(config, info)
    wanted = layout(abstract_state(init, mesh, offload=offload))
    workdir = epath.Path(tmp_path)
    told = {"clock": Stopwatch(0.0), "fingerprints": {}, "num_params": 0, "started": False}
    RunRecord(workdir, config, info, mesh=mesh.shape, **told)
    run = read_run(workdir)
    sizes, rows = layout_rows(run)
    assert rows == wanted and sizes["fsdp"] == 8
    kernel = next(row for row in rows if row.name == "params/backbone/blocks/0/mlp/fc1/kernel")
    assert "fsdp_z" in kernel.spec and kernel.bytes_per_device == 4 * 32 * 64 // 8
    moved = {row.name.split("/")[0] for row in rows if row.note.startswith("in the host's memory")}
    assert moved == ({"opt_state"} if offload else set())
    assert all(row.bytes_per_device == 0 for row in rows if row.note.startswith("in the host"))
    said = "".join(map(str, layout_table(sizes, rows))).replace("<wbr>", "")
    assert "fsdp 8" in said and "fc1/kernel" in said and "fsdp_z" in said


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * 2**40, "3 TiB")])
def test_bytes(size, shown):
    assert say_bytes(size) == shown
