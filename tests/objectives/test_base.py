"""The seam: methods that the training step does not know."""

import functools
import itertools

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from tests.objectives.ema_teacher import EmaTeacher
from tests.objectives.weighted_sum import WeightedSum
from tests.recipes import tiny
from tests.runs import StopAfter, assert_same_bits, deterministic_rows, run
from vit_jax import train as train_lib
from vit_jax.data.sources import DatasetInfo
from vit_jax.objectives import OBJECTIVES, Objective
from vit_jax.runtime import Preempted
from vit_jax.tree import named_leaves

INFO = DatasetInfo(
    name="made-up",
    path=epath.Path("nowhere"),
    splits={"train": 16},
    class_names=tuple("abcdefghij"),
    fingerprint="",
    mean=(0.3, 0.3, 0.3),
    std=(0.4, 0.4, 0.4),
)
DECAY, CENTER_DECAY = 0.9, 0.5


@pytest.fixture(autouse=True)
def objectives(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "ema_teacher", EmaTeacher)
    monkeypatch.setitem(OBJECTIVES, "weighted_sum", WeightedSum)


def quiet(objective, data_dir="data", **leaves):
    """Nothing random, so that one can calculate along."""
    off = {"model__dropout": 0.0, "model__drop_path": 0.0, "preprocess__mixup": 0.0}
    config = tiny(data_dir, **off | leaves)
    config.model.depth = 1
    config.optimizer.update({"warmup_steps": 0, "learning_rate": 0.01})
    with config.unlocked():
        config.objective = objective
    return config


def batch(seed=0, size=16):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 3), np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "mask": np.arange(size) % 4 != 1,
    }


def start(config):
    """Parts, the initial state, and the step under jit."""
    parts, init = train_lib.make_parts(config, INFO)
    state = jax.jit(init)()
    return parts, state, jax.jit(functools.partial(train_lib.train_step, parts))


TEACHER = {"name": "ema_teacher", "decay": DECAY, "center_decay": CENTER_DECAY, "warmup_steps": 4}


@pytest.fixture(scope="module")
def distilled():
    """States and metrics of three steps with a teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBJECTIVES, "ema_teacher", EmaTeacher)
        parts, state, step = start(quiet(TEACHER))
    states, metrics = [state], []
    for seed in range(3):
        state, values = step(states[-1], batch(seed))
        states.append(state)
        metrics.append(values)
    return parts, step, states, metrics


def teacher(state):
    return named_leaves(state.non_trainable["objective"]["teacher"])


def answers(parts, weights, batch):
    """[batch, dim], the mean of a backbone's patch tokens."""
    backbone = nnx.merge(parts.graphdefs["backbone"], weights)
    return np.asarray(backbone(parts.preprocess(batch["image"])), np.float64).mean(axis=1)


def teacher_answers(parts, state, batch):
    return answers(parts, state.non_trainable["objective"]["teacher"], batch)


def test_a_teacher_is_the_moving_average_of_the_student(distilled):
    _, _, states, _ = distilled
    for old, new in itertools.pairwise(states):
        student = named_leaves(new.params["backbone"])
        assert teacher(new).keys() == student.keys()
        for name, value in teacher(new).items():
            wanted = DECAY * np.asarray(teacher(old)[name], np.float64)
            wanted += (1 - DECAY) * np.asarray(student[name], np.float64)
            np.testing.assert_allclose(value, wanted, atol=1e-6, err_msg=name)
        pairs = zip(teacher(old).values(), teacher(new).values(), strict=True)
        moved = [np.abs(x - y).max() for x, y in pairs]
        assert min(moved) > 0


def test_a_teacher_gets_neither_gradients_nor_optimiser_state(distilled):
    _, _, states, _ = distilled
    trained = named_leaves(states[0].params)
    assert not any("teacher" in name or "center" in name for name in trained)
    assert {"objective/proj/kernel", "objective/proj/bias"} < trained.keys()
    moments = named_leaves(states[0].opt_state)
    assert not any("teacher" in name or "center" in name for name in moments)
    assert sum(name.endswith("proj/kernel") for name in moments) >= 2
    assert set(states[0].non_trainable["objective"]) == {"teacher", "center"}


def test_a_center_follows_what_the_forward_pass_saw(distilled):
    parts, _, states, _ = distilled
    for seed, (old, new) in enumerate(itertools.pairwise(states)):
        seen = teacher_answers(parts, old, batch(seed))[batch(seed)["mask"]].mean(axis=0)
        wanted = np.asarray(old.non_trainable["objective"]["center"], np.float64)
        wanted = CENTER_DECAY * wanted + (1 - CENTER_DECAY) * seen
        np.testing.assert_allclose(new.non_trainable["objective"]["center"], wanted, atol=1e-5)


def test_a_schedule_on_the_step_runs(distilled):
    parts, _, states, metrics = distilled
    for index, (state, values) in enumerate(zip(states[:3], metrics, strict=True)):
        temperature = 1 - 0.5 * index / 4
        assert float(values["temperature"]) == pytest.approx(temperature)
        # And it is what the loss was made with.
        x, mask = batch(index), batch(index)["mask"]
        centered = teacher_answers(parts, state, x) - state.non_trainable["objective"]["center"]
        targets = np.exp(np.asarray(centered) / temperature)
        targets /= targets.sum(-1, keepdims=True)
        proj = jax.tree.map(np.asarray, state.params["objective"]["proj"])
        logits = answers(parts, state.params["backbone"], x) @ proj["kernel"] + proj["bias"]
        losses = np.log(np.exp(logits).sum(-1)) - (targets * logits).sum(-1)
        assert float(values["loss"]) == pytest.approx(losses[mask].mean(), abs=1e-4)


def test_a_skipped_step_leaves_teacher_and_center_alone(distilled):
    _, step, states, _ = distilled
    params = jax.tree.map(lambda x: x, states[1].params)
    params["objective"]["proj"]["kernel"] *= np.nan  # the loss is not finite; the aux is
    sick = states[1]._replace(params=params)
    new, metrics = step(sick, batch(1))
    assert not metrics["finite"] and int(new.step) == int(sick.step) + 1
    assert_same_bits(new.non_trainable, sick.non_trainable)
    assert_same_bits(new.opt_state, sick.opt_state)


def test_an_aux_that_is_not_finite_is_skipped_too(distilled):
    _, _, states, _ = distilled

    class Sick(EmaTeacher):
        def __call__(self, backbone, batch, **options):
            loss, output = super().__call__(backbone, batch, **options)
            return loss, output._replace(aux={"center": output.aux["center"] * np.inf})

    OBJECTIVES["ema_teacher"] = Sick
    _, _, step = start(quiet(TEACHER))
    new, metrics = step(states[1], batch(1))
    assert np.isfinite(metrics["loss"]) and not metrics["finite"]
    assert_same_bits(new._replace(step=0), states[1]._replace(step=0))


def test_the_seam_s_defaults():
    class Nothing(Objective):
        pass

    nothing = Nothing()
    assert nothing.trainable is nnx.Param and nothing.couples_examples is False
    assert nothing.after_update(None, (), 0) is None
    with pytest.raises(NotImplementedError, match="Nothing defines no loss"):
        nothing(None, {}, step=0, key=None, train=True)
    with pytest.raises(NotImplementedError, match="Nothing defines no model"):
        nothing.model(None)


# A sum.

SUM = {
    "name": "weighted_sum",
    "parts": {
        "labels": {"name": "supervised", "label_smoothing": 0.1, "weight": 0.75},
        "distil": TEACHER | {"weight": 2.0},
    },
}


def test_the_gradient_of_a_sum_is_the_sum_of_the_gradients():
    parts, state, step = start(quiet(SUM))
    # Away from the start, where the head is zero and passes no gradient on.
    state, _ = step(state, batch(0))
    trained = named_leaves(state.params["objective"])
    assert {name.split("/")[1] for name in trained} == {"labels", "distil"}
    assert not any("teacher" in name for name in trained)
    keys = train_lib.example_keys(0, state.step, 16)
    folded = (jax.vmap(jax.random.fold_in, (0, None))(keys, number) for number in (0, 1))
    key = dict(zip(("labels", "distil"), folded, strict=True))

    def loss_of(name):
        def loss(params):
            backbone, objective = parts.merge(params, state.non_trainable)
            part = objective.parts[name] if name else objective
            options = {"step": state.step, "key": key.get(name, keys), "train": True}
            return part(backbone, batch(1), **options)[0]

        return loss

    grads = {name: jax.jit(jax.grad(loss_of(name)))(state.params) for name in ("", *key)}
    grads = {name: named_leaves(values) for name, values in grads.items()}
    assert any(np.abs(grads["labels"][name]).max() > 1e-3 for name in grads[""])
    for name, grad in grads[""].items():
        wanted = 0.75 * grads["labels"][name] + 2.0 * grads["distil"][name]
        np.testing.assert_allclose(grad, wanted, atol=1e-5, err_msg=name)
    # The step takes the same gradient, and says the parts' metrics.
    _, metrics = step(state, batch(1))
    norm = np.sqrt(sum((np.asarray(grad, np.float64) ** 2).sum() for grad in grads[""].values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    total = 0.75 * metrics["labels_loss"] + 2.0 * metrics["distil_loss"]
    assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.slow
def test_a_run_with_a_teacher_in_a_sum_resumes_bit_for_bit(data_dir, tmp_path, monkeypatch):
    leaves = {"total_steps": 4, "eval_every": 2, "save_every": 2}
    config = quiet(SUM, data_dir, **leaves)
    config.model.update({"depth": 2, "scan": True})  # checkpoints hold the teacher's unstacked too
    whole, results = run(config, tmp_path / "whole")
    assert 0 <= results["test/top1"] <= 1 and results["test/count"] == 360
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        run(config, tmp_path / "parts", StopAfter(2, patch))
    again, same = run(config, tmp_path / "parts")
    assert_same_bits(whole.state, again.state)
    assert results == same
    assert deterministic_rows(tmp_path / "whole") == deterministic_rows(tmp_path / "parts")
    objective = again.state.non_trainable["objective"]["parts"]["distil"]
    assert set(objective) == {"teacher", "center"} and np.asarray(objective["center"]).all()
