import dataclasses
import functools
import json
import time

import jax
import numpy as np
import pytest
from etils import epath

from tests.recipes import tiny
from tests.runs import StopAfter, assert_same_bits, deterministic_rows, run, short, steps_on_disk
from vit_jax import evaluation as evaluation_lib
from vit_jax import load
from vit_jax import train as train_lib
from vit_jax import trainer as trainer_lib
from vit_jax import workdir as workdir_lib
from vit_jax.checkpoint import Checkpoints
from vit_jax.data.augment import make_augmentation
from vit_jax.data.loader import HOST_ONLY, make_loader
from vit_jax.data.sources import dataset_info
from vit_jax.feeding import put_batch
from vit_jax.metrics import Stopwatch
from vit_jax.runtime import Preempted, StopSignal
from vit_jax.sharding import make_mesh
from vit_jax.tree import named_leaves


def losses_on(devices, config, num_steps=20):
    """Losses of the first steps on so many devices, without the loop around them."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    info = dataset_info("digits", data_dir=config.data.data_dir)
    parts, init = train_lib.make_parts(config, info)
    shardings = jax.tree.map(lambda x: x.sharding, train_lib.abstract_state(init, mesh))
    state = jax.jit(init, out_shardings=shardings)()
    step = jax.jit(functools.partial(train_lib.train_step, parts), donate_argnums=0)
    augment = make_augmentation(**config.augment)
    options = {"batch_size": config.batch_size, "seed": 0, "num_steps": num_steps}
    losses = []
    with make_loader(**config.data, augment=augment, **options) as loader:
        for batch in loader:
            arrays = {k: v for k, v in batch.items() if k not in HOST_ONLY}
            arrays["mask"] = np.arange(config.batch_size) % 5 != 0  # uneven over the devices
            state, metrics = step(state, put_batch(arrays, mesh))
            losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.slow
def test_one_and_eight_devices_give_the_same_losses(data_dir):
    config = tiny(data_dir)
    one, _ = losses_on(1, config)
    eight, state = losses_on(8, config)
    assert len(state.step.sharding.device_set) == 8
    assert len(set(one)) > 15  # it moves
    np.testing.assert_allclose(one, eight, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_scanned_blocks_give_the_losses_of_looped_ones(data_dir):
    looped, _ = losses_on(1, tiny(data_dir), num_steps=3)
    scanned, _ = losses_on(1, tiny(data_dir, model__scan=True), num_steps=3)
    np.testing.assert_allclose(looped, scanned, atol=1e-5, rtol=0)


def test_six_steps_are_two_a_restart_and_four_bit_for_bit(data_dir, tmp_path):
    leaves = {"eval_every": 1, "save_every": 1, "train__keep": 1}
    config = short(data_dir, **leaves)
    whole, results = run(config, tmp_path / "whole")

    class StopAfterTwo(StopSignal):
        def __bool__(self):
            return trainer_step() >= 2

    stop = StopAfterTwo()
    workdir = epath.Path(tmp_path / "parts")
    workdir.mkdir()
    first = trainer_lib.Trainer(config, workdir, clock=Stopwatch(time.time()), stop=stop)

    def trainer_step():
        return first.step

    with pytest.raises(Preempted):
        first.run()
    stop.restore()
    assert first.step == 2
    second, again = run(config, workdir)
    assert_same_bits(whole.state, second.state)
    assert results == again
    assert deterministic_rows(tmp_path / "whole") == deterministic_rows(workdir)


class Watched:
    """Stands for an array of step `step`; whoever wants its value is noted in `events`."""

    def __init__(self, array, step, events):
        self._array, self._step, self._events = array, step, events

    def __array__(self, *args, **kwargs):
        self._events.append(("read", self._step))
        return np.asarray(self._array)

    def __getattr__(self, name):  # a copy to the host, a wait until it is ready, an item, …
        self._events.append(("read", self._step))
        return getattr(self._array, name)

    def __float__(self):
        return float(self.__array__())

    __bool__ = __int__ = __index__ = __float__


@pytest.mark.parametrize("log_every", [1, 3])
def test_metrics_of_a_step_are_fetched_after_the_next_is_dispatched(
    data_dir, tmp_path, monkeypatch, log_every
):
    events = []
    compile_step = trainer_lib.Trainer._compile

    def watched_compile(trainer, batch):
        step = compile_step(trainer, batch)

        def dispatch(state, arrays):
            number = trainer.step + 1
            events.append(("dispatch", number))
            state, metrics = step(state, arrays)
            return state, {k: Watched(v, number, events) for k, v in metrics.items()}

        return dispatch

    monkeypatch.setattr(trainer_lib.Trainer, "_compile", watched_compile)
    leaves = {"eval_every": 0, "save_every": 0, "log_every": log_every}
    run(short(data_dir, **leaves), tmp_path / "run")
    events = list(dict.fromkeys(events))  # the first touch of each step
    steady = [("dispatch", 1), ("dispatch", 2)]
    for step in range(3, 7):
        steady += [("read", step - 2), ("dispatch", step)]
    assert events == [*steady, ("read", 5), ("read", 6)]


def test_the_state_is_donated(data_dir):
    config = tiny(data_dir)
    info = dataset_info("digits", data_dir=data_dir)
    parts, init = train_lib.make_parts(config, info)
    state = jax.jit(init)()
    batch = {
        "image": np.zeros((16, 8, 8, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "mask": np.ones(16, bool),
    }
    step = jax.jit(functools.partial(train_lib.train_step, parts), donate_argnums=0)
    new, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_a_loss_that_is_not_finite_ends_the_run_with_the_step_and_the_last_good_checkpoint(
    data_dir, tmp_path
):
    config = short(data_dir, save_every=2, eval_every=0)
    config.optimizer.update({"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 0.0})
    with pytest.raises(FloatingPointError, match=r"step \d+ is not finite .* last good"):
        run(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["seconds"]["compile"] > 0  # also a run that fails accounts for its time
    assert sum(record["seconds"].values()) == pytest.approx(record["wall_seconds"], abs=0.1)
    folder = tmp_path / "run" / "checkpoints"
    for step in folder.glob("[0-9]*"):
        info = dataset_info("digits", data_dir=data_dir)
        _, init = train_lib.make_parts(config, info)
        checkpoints = Checkpoints(folder, read_only=True)
        state, _ = checkpoints.restore(int(step.name), train_lib.abstract_state(init, make_mesh()))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_skipped_updates_change_nothing_but_the_step(data_dir):
    config = tiny(data_dir)
    info = dataset_info("digits", data_dir=data_dir)
    parts, init = train_lib.make_parts(config, info)
    step = jax.jit(functools.partial(train_lib.train_step, parts))
    state = jax.jit(init)()
    sick = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    batch = {
        "image": np.zeros((16, 8, 8, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "mask": np.ones(16, bool),
    }
    new, metrics = step(sick, batch)
    assert not metrics["finite"]
    assert int(new.step) == 1
    assert_same_bits(sick.opt_state, new.opt_state)
    healthy, metrics = step(state, batch)
    assert metrics["finite"]
    sick_optimizer = jax.tree.map(lambda x: x + np.nan if x.ndim else x, state.opt_state)
    assert not step(state._replace(opt_state=sick_optimizer), batch)[1]["finite"]
    moved = named_leaves(healthy.opt_state)
    assert any((np.asarray(x) != 0).any() for x in moved.values())
    assert metrics["learning_rate"] == 0  # the first step of the warmup
    # A skipped update does not turn the schedule, which counts the updates that were made.
    skipped, _ = step(healthy._replace(params=sick.params), batch)
    assert int(skipped.step) == 2
    _, metrics = step(skipped._replace(params=state.params), batch)
    assert metrics["learning_rate"] == pytest.approx(float(parts.schedule(1)))


@pytest.mark.slow
def test_as_many_skips_as_asked_for_are_survived(data_dir, tmp_path, monkeypatch):
    config = tiny(data_dir, total_steps=8, save_every=0, eval_every=0, train__max_skips=2)
    poisoned_step = train_lib.train_step

    def poisoned(parts, state, batch):
        new, metrics = poisoned_step(parts, state, batch)
        bad = (state.step == 2) | (state.step == 5)
        keep = jax.tree.map(lambda a, b: jax.numpy.where(bad, a, b), state, new)
        return keep._replace(step=new.step), metrics | {"finite": metrics["finite"] & ~bad}

    monkeypatch.setattr(train_lib, "train_step", poisoned)
    trainer, _ = run(config, tmp_path / "two")
    assert trainer.monitor.skipped == 2
    config.train.max_skips = 1
    with pytest.raises(FloatingPointError, match="step 6 is not finite"):
        run(config, tmp_path / "one")


def test_time_adds_up_to_the_wall_time(data_dir, tmp_path):
    run(short(data_dir, eval_every=2, save_every=2), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(record["seconds"]) == set(Stopwatch.NAMES)
    assert sum(record["seconds"].values()) == pytest.approx(record["wall_seconds"], abs=0.1)
    for name in ("start", "compile", "steps", "data_wait", "saving", "evaluation"):
        assert record["seconds"][name] > 0, name


def test_evaluate_checkpoint_gives_the_numbers_of_training(data_dir, finished):
    workdir, results = finished
    step, again = evaluation_lib.evaluate_checkpoint(short(data_dir), epath.Path(workdir))
    assert step == 6
    assert again == results


def test_a_finished_run_started_again_changes_nothing(data_dir, finished_copy):
    workdir, results = finished_copy
    files = ("metrics.jsonl", "run.json", "config.json")
    before = [(workdir / name).read_text() for name in files]
    trainer, again = run(short(data_dir), workdir)
    assert again == results
    assert trainer.finished
    assert before == [(workdir / name).read_text() for name in files]


@pytest.mark.parametrize(
    "leaves, words",
    [
        ({"batch_size": 20}, "batch_size=20 must be a multiple of the 8 devices; try 16"),
        ({"model__image_size": (9, 8)}, r"image_size=\(9, 8\) must be a multiple .* \(8, 8\)"),
        ({"model__variant": "Q/2"}, "variant='Q/2' is unknown.*Ti, S, M?"),
        ({"objective__name": "supervize"}, "unknown.*did you mean 'supervised'"),
        ({"augment__name": "flipp"}, "flip.*inception_crop_flip"),
        ({"optimizer__schedule": "cos"}, "schedule='cos' is unknown.*cosine"),
        ({"evals__test__name": "clasification"}, "did you mean 'classification'"),
        ({"data__split": "training"}, "train"),
        ({"data__num_workers": -2}, "num_workers=-2 must be -1 or more"),
        ({"model__dtype": "bf16"}, "dtype='bf16' is unknown; choose one of 'float32', 'bfloat16'"),
        (
            {
                "model__image_size": (16, 16),
                "augment__size": (16, 16),
                "evals__test__augment__size": (16, 16),
            },
            "no image can be used; .*augmentation 'none' wants images of 16 x 16 and this one is 8",
        ),
        ({"data__name": "nothing"}, "vit-jax prepare"),
        ({"mesh__data": 3}, "does not multiply to the 8 devices"),
        ({"objective__pool": "cls"}, "cls_token"),
        ({"augment__size": (6, 6)}, r"augment.size|\(6, 6\)"),
        ({"train__best_metric": "tset/top1"}, "best_metric.*test"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_compiles(
    data_dir, tmp_path, monkeypatch, leaves, words
):
    monkeypatch.setattr(trainer_lib.Trainer, "_compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run(tiny(data_dir, **leaves), tmp_path / "run")


def test_an_unknown_key_names_the_nearest(data_dir, tmp_path):
    config = tiny(data_dir)
    with config.unlocked():
        config.optimizer.learning_rat = 1.0
    with pytest.raises(ValueError, match=r"optimizer.*learning_rat.*did you mean 'learning_rate'"):
        run(config, tmp_path / "run")


def test_another_config_on_a_workdir_is_refused_but_cadences_may_change(data_dir, finished_copy):
    workdir, _ = finished_copy
    other = short(data_dir, optimizer__learning_rate=0.5, seed=1)
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.002 -> 0.5; seed: 0 -> 1"):
        run(other, workdir)
    run(short(data_dir, log_every=2, eval_every=1), workdir)


def test_another_dataset_under_the_same_name_is_refused(data_dir, finished_copy, monkeypatch):
    changed = lambda *a, **k: dataclasses.replace(  # noqa: E731
        dataset_info(*a, **k), fingerprint="0" * 64
    )
    monkeypatch.setattr(trainer_lib, "dataset_info", changed)
    with pytest.raises(ValueError, match="fingerprint of data: .* -> 000000000000"):
        run(short(data_dir), finished_copy[0])


@pytest.mark.parametrize(
    "leaves, scores, kept",
    [
        ({"eval_every": 1, "save_every": 1}, [0.1, 0.9, 0.3, 0.2, 0.4, 0.5], [2, 6]),
        ({"eval_every": 2, "save_every": 5}, [0.1, 0.9, 0.3], [4, 6]),  # they do not meet
    ],
)
def test_the_best_checkpoint_is_kept_beside_the_newest(
    data_dir, tmp_path, monkeypatch, leaves, scores, kept
):
    scores, real = iter(scores), trainer_lib.evaluate
    monkeypatch.setattr(trainer_lib, "evaluate", lambda *a: real(*a) | {"test/top1": next(scores)})
    run(short(data_dir, **leaves, train__keep=1), tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == kept


def test_a_workdir_is_not_bound_before_there_is_a_checkpoint(data_dir, tmp_path, monkeypatch):
    stop = StopSignal()
    stop.received = 15
    with pytest.raises(Preempted):  # before the first step
        run(short(data_dir, data__split="train[:50%]"), tmp_path / "run", stop)
    run(short(data_dir), tmp_path / "run")


def test_evaluation_data_of_other_classes_are_refused(data_dir, tmp_path, monkeypatch):
    def other(name, **where):
        info = dataset_info(name, **where)
        return dataclasses.replace(info, class_names=info.class_names[::-1])

    monkeypatch.setattr("vit_jax.evals.base.dataset_info", other)
    with pytest.raises(ValueError, match="dataset='digits' .*other classes than"):
        run(tiny(data_dir), tmp_path / "run")


def test_other_evaluation_data_are_noticed_on_resuming(data_dir, finished_copy, monkeypatch):
    config, (workdir, _) = short(data_dir), finished_copy

    def other(name, **where):
        return dataclasses.replace(dataset_info(name, **where), fingerprint="0" * 64)

    monkeypatch.setattr("vit_jax.evals.base.dataset_info", other)
    with pytest.raises(ValueError, match="fingerprint of evals.test: .* -> 000000000000"):
        run(config, workdir)
    with pytest.raises(ValueError, match="dataset of evals.test is not the one of the run"):
        evaluation_lib.evaluate_checkpoint(config, epath.Path(workdir))


def test_resuming_under_other_versions_is_said(data_dir, tmp_path, monkeypatch):
    config = short(data_dir, save_every=3)
    with pytest.raises(Preempted):
        run(config, tmp_path / "run", StopAfter(2, monkeypatch))
    now = workdir_lib.versions()
    monkeypatch.setattr(workdir_lib, "versions", lambda: now | {"jax": "99.0"})
    trainer, _ = run(config, tmp_path / "run")
    assert trainer.record.changes == [f"jax {now['jax']} -> 99.0"]


def test_checkpoints_without_their_config_are_not_taken_over(data_dir, finished_copy):
    workdir, _ = finished_copy
    (workdir / "config.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints but no config.json"):
        run(short(data_dir), workdir)


def test_a_score_that_is_not_finite_is_no_score(data_dir, tmp_path, monkeypatch):
    scores = iter([0.2, float("nan"), 0.1])
    real = trainer_lib.evaluate
    monkeypatch.setattr(trainer_lib, "evaluate", lambda *a: real(*a) | {"test/loss": next(scores)})
    leaves = {"eval_every": 2, "save_every": 2, "train__keep": 1}
    config = short(data_dir, **leaves, train__best_metric="test/loss")
    run(config, tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [2, 6]
    run(config, tmp_path / "run")  # the null of metrics.jsonl is read again


HEAD = "objective/head/.*"


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frozen_parameters_keep_every_bit(data_dir, tmp_path, scan):
    """Averaged, with weight decay and dropout, over a restart: only what is trained moves."""
    leaves = {"train__trainable": HEAD, "model__scan": scan, "save_every": 3}
    config = short(data_dir, **leaves)
    info = dataset_info("digits", data_dir=data_dir)
    _, init = train_lib.make_parts(config, info)
    before = jax.jit(init)()
    trainer, _ = run(config, tmp_path / "run")
    assert_same_bits(before.non_trainable, trainer.state.non_trainable)
    trained = set(named_leaves(trainer.state.params))
    assert trained == {"objective/head/fc/kernel", "objective/head/fc/bias"}
    assert trained == set(named_leaves(trainer.state.ema))
    for name, moved in named_leaves(trainer.state.params).items():
        assert (np.asarray(moved) != np.asarray(named_leaves(before.params)[name])).any()
    moments = {n for n in named_leaves(trainer.state.opt_state) if "kernel" in n or "bias" in n}
    assert len(moments) == 4  # mu and nu of the head, of nothing else
    assert trainer.num_trained == sum(x.size for x in jax.tree.leaves(before.params))
    assert trainer.num_params > 10 * trainer.num_trained
    wanted = trainer.parts.model(trainer.state).module()
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(load(tmp_path / "run")(pixels), wanted(pixels), atol=1e-6)


def test_frozen_parameters_outlive_skipped_steps(data_dir):
    config = tiny(data_dir, train__trainable=HEAD, train__ema_decay=0.5)
    parts, init = train_lib.make_parts(config, dataset_info("digits", data_dir=data_dir))
    state = jax.jit(init)()
    sick = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    batch = {
        "image": np.zeros((16, 8, 8, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "mask": np.ones(16, bool),
    }
    new, metrics = jax.jit(functools.partial(train_lib.train_step, parts))(sick, batch)
    assert not metrics["finite"]
    assert_same_bits(sick.non_trainable, new.non_trainable)
    assert_same_bits(sick.ema, new.ema)


@pytest.mark.parametrize("pattern", [".*", "(backbone|objective)/.*"])
def test_a_regex_that_takes_all_changes_nothing(data_dir, pattern):
    info = dataset_info("digits", data_dir=data_dir)
    states = []
    for value in ("", pattern):
        _, init = train_lib.make_parts(tiny(data_dir, train__trainable=value), info)
        states.append(jax.eval_shape(init))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.parametrize(
    "leaves, words",
    [
        ({"train__trainable": "head"}, "trainable='head' matches none of the .*'backbone/.*'"),
        ({"train__trainable": "(head"}, r"trainable='\(head' is no regex: "),
        (
            {"train__trainable": "backbone/blocks/1/.*", "model__scan": True},
            "takes 1 of the 2 layers of backbone/blocks/.*; use model.scan=False",
        ),
    ],
)
def test_what_cannot_be_frozen_is_said(data_dir, leaves, words):
    info = dataset_info("digits", data_dir=data_dir)
    with pytest.raises(ValueError, match=words):
        train_lib.make_parts(tiny(data_dir, **leaves), info)


@pytest.mark.parametrize("scan", [False, True])
def test_blocks_are_frozen_by_their_number(data_dir, scan):
    info = dataset_info("digits", data_dir=data_dir)
    leaves = {"train__trainable": r"backbone/blocks/\d+/mlp/.*", "model__scan": scan}
    if not scan:
        leaves["train__trainable"] = "backbone/blocks/1/mlp/.*"
    _, init = train_lib.make_parts(tiny(data_dir, **leaves), info)
    names = named_leaves(jax.eval_shape(init).params)
    layer = "" if scan else "/1"
    linears = [f"{fc}/{leaf}" for fc in ("fc1", "fc2") for leaf in ("kernel", "bias")]
    assert set(names) == {f"backbone/blocks{layer}/mlp/{name}" for name in linears}
