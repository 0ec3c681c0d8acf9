import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recipes import tiny
from tests.runs import (
    assert_same_bits,
    rows,
    run,
    save_recipe,
    saved_state,
    short,
    steps_on_disk,
)
from vit_jax import train as train_lib
from vit_jax.checkpoint import Checkpoints, checksums, stack, unstack, unstack_abstract
from vit_jax.data.sources import dataset_info
from vit_jax.sharding import make_mesh
from vit_jax.tree import named_leaves

BLOCK = [
    *("attn/proj/bias", "attn/proj/kernel", "attn/qkv/bias", "attn/qkv/kernel"),
    *("mlp/fc1/bias", "mlp/fc1/kernel", "mlp/fc2/bias", "mlp/fc2/kernel"),
    *("norm1/bias", "norm1/scale", "norm2/bias", "norm2/scale"),
]
PARAMS = [
    *(f"backbone/blocks/{layer}/{name}" for layer in (0, 1) for name in BLOCK),
    *("backbone/norm/bias", "backbone/norm/scale"),
    *("backbone/patch_embed/bias", "backbone/patch_embed/kernel", "backbone/pos_embed"),
    *("objective/head/fc/bias", "objective/head/fc/kernel"),
]


@contextlib.contextmanager
def opened(workdir, **options):
    with contextlib.closing(Checkpoints(workdir / "checkpoints", **options)) as checkpoints:
        yield checkpoints


def parts_of(config):
    """(parts, a function that makes a state, its abstract form) of a config, on all devices."""
    info = dataset_info("digits", data_dir=config.data.data_dir)
    parts, init = train_lib.make_parts(config, info)
    abstract = train_lib.abstract_state(init, make_mesh())
    return (
        parts,
        jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract)),
        abstract,
    )


@settings(max_examples=6, deadline=None)
@given(
    depth=st.integers(1, 12),
    shape=st.lists(st.integers(1, 3), max_size=3),
    prefix=st.sampled_from(["blocks", "params/backbone/blocks", "opt_state/1/mu/backbone/blocks"]),
)
def test_stacking_is_the_inverse_of_unstacking(depth, shape, prefix):
    size = depth * math.prod(shape)
    leaf = jnp.arange(size, dtype=jnp.float32).reshape(depth, *shape)
    leaves = {f"{prefix}/norm1/scale": leaf, "head/bias": jnp.ones(3), "step": jnp.int32(4)}
    apart = unstack(leaves)
    names = [f"{prefix}/{layer}/norm1/scale" for layer in range(depth)]
    assert list(apart) == [*names, "head/bias", "step"]
    assert all(apart[name].shape == tuple(shape) for name in names)
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=None) for k, v in leaves.items()}
    assert {k: v.shape for k, v in unstack_abstract(abstract).items()} == {
        k: v.shape for k, v in apart.items()
    }
    assert_same_bits(stack(apart, leaves), leaves)
    assert unstack(apart) == apart  # looped blocks stay as they are


def test_names_on_disk_are_these(data_dir, tmp_path):
    _, init, _ = parts_of(tiny(data_dir, train__ema_decay=0.9))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, init(), {"step": 1})
    found = list(saved_state(tmp_path, 1))
    moments = [f"opt_state/1/0/{moment}/{name}" for moment in ("mu", "nu") for name in PARAMS]
    counts = ["opt_state/1/0/count", "opt_state/1/2/count", "step"]
    params = [f"{tree}/{name}" for tree in ("params", "ema") for name in PARAMS]
    assert sorted(found) == sorted(moments + counts + params)


@pytest.mark.slow
def test_scanned_and_looped_blocks_are_the_same_on_disk(data_dir, tmp_path):
    looped, _, looped_abstract = parts_of(tiny(data_dir))
    parts, init, scanned_abstract = parts_of(tiny(data_dir, model__scan=True))
    scanned = init()
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    wanted = parts.model(scanned).module()(images)
    with opened(tmp_path / "scanned") as checkpoints:
        checkpoints.save(1, scanned, {})
        checkpoints.wait()
        again, _ = checkpoints.restore(1, scanned_abstract)
        restored, _ = checkpoints.restore(1, looped_abstract)
    assert_same_bits(again, scanned)
    np.testing.assert_allclose(looped.model(restored).module()(images), wanted, atol=1e-6, rtol=0)
    with opened(tmp_path / "looped") as checkpoints:
        checkpoints.save(1, restored, {})
        checkpoints.wait()
        back, _ = checkpoints.restore(1, scanned_abstract)
    assert_same_bits(back, scanned)


def save_all(workdir, scores: dict[int, float | None], **options):
    with opened(workdir, **options) as checkpoints:
        for step, score in scores.items():
            if score is not None:
                checkpoints.score(step, score)
            checkpoints.save(step, {"x": jnp.full(3, step)}, {"step": step})
        checkpoints.wait()
        return checkpoints.steps()


@pytest.mark.parametrize(
    "options, scores, kept",
    [
        ({"keep": 1}, {1: None, 2: None, 3: None}, [3]),
        ({"keep": 2}, {1: 0.9, 2: 0.1, 3: 0.2}, [2, 3]),
        ({"keep": 1, "keep_best": 1}, {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}, [2, 4]),
        ({"keep": 1, "keep_best": 1}, {1: 0.1, 2: 0.9}, [2]),
        ({"keep": 1, "keep_best": 1}, {1: 0.9, 2: None, 3: None}, [1, 3]),
        ({"keep": 1, "keep_best": 1}, {1: 0.5, 2: 0.5, 3: 0.1}, [2, 3]),  # of equals the newer
        ({"keep": 2, "keep_best": 2}, {1: 0.9, 2: 0.8, 3: 0.1, 4: 0.2, 5: 0.3}, [1, 2, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, options, scores, kept):
    assert save_all(tmp_path, scores, **options) == kept


def test_keeping_goes_on_after_a_restart(tmp_path):
    save_all(tmp_path, {1: 0.9, 2: 0.2}, keep=1, keep_best=1)
    with opened(tmp_path, keep=1, keep_best=1) as checkpoints:
        checkpoints.score(1, 0.9)  # as a run reads it from metrics.jsonl
        for step in (3, 4):
            checkpoints.save(step, {"x": jnp.zeros(3)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 4]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_best": -1}])
def test_nothing_to_keep_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"keep=.* must be at least 1, keep_best=.* at least 0\."):
        Checkpoints(tmp_path, **options)


def test_a_checkpoint_of_another_model_is_refused_by_name(data_dir, tmp_path):
    _, init, _ = parts_of(tiny(data_dir))
    _, _, wider = parts_of(tiny(data_dir, model__mlp_dim=96))
    _, _, deeper = parts_of(tiny(data_dir, model__depth=3))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, init(), {})
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"fc1/bias as \(64,\), the config makes it \(96,\)"):
            checkpoints.restore(1, wider)
        with pytest.raises(ValueError, match=r"blocks/2/.* as None, the config makes it") as caught:
            checkpoints.restore(1, deeper)
    assert "\n" not in str(caught.value)


def test_what_is_not_wanted_is_not_read_but_checked(tmp_path):
    state = {"params": {"w": jnp.arange(4.0)}, "opt_state": {"m": jnp.ones((2, 3))}}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, abstract, without=("opt_state",))
        assert restored["opt_state"] == abstract["opt_state"]
        assert_same_bits(restored["params"], state["params"])
        abstract["opt_state"] = {"m": jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=place)}
        with pytest.raises(ValueError, match=r"opt_state/m as \(2, 3\), the config makes it"):
            checkpoints.restore(1, abstract, without=("opt_state",))


def test_what_a_killed_save_left_is_cleaned_up_but_not_by_a_reader(tmp_path):
    save_all(tmp_path, {1: None})
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "d").write_bytes(b"x" * 1000)
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    assert half.exists()
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
    assert not half.exists()


def test_a_reader_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nothing; train first"):
        Checkpoints(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists()


def test_arrays_and_json_are_all_that_is_on_disk(finished):
    workdir, _ = finished
    arrays = 0
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_dir() or path.name == "commit_success.txt":
            continue
        data = path.read_bytes()
        assert not re.match(rb"\x80[\x02-\x05]", data), f"{path} looks like a pickle"
        if path.parent.name == "d" or path.name == "manifest.ocdbt":
            assert data[:4] in (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde") or path.parent.name == "d"
            arrays += 1
        else:
            json.loads(data)
    assert arrays
    for value in saved_state(workdir, 6).values():
        assert value.dtype.kind in "fi"


def test_a_save_does_not_poll_for_a_stop(tmp_path, monkeypatch):
    """With another number than the loop's polls: JAX would agree on one that never comes."""
    polls = []
    ask = lambda number: polls.append(number) or False  # noqa: E731
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", ask)
    with contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints:
        checkpoints.save(7, {"w": jnp.ones(3)}, {"step": 7})
        checkpoints.wait()
        assert checkpoints.steps() == [7] and not polls


def test_saving_goes_on_in_the_background_with_the_state_of_the_call(tmp_path):
    """Each step is given the buffers of the one before; what was saved must not follow."""

    @jax.jit
    def init():
        return {f"w{i}": jnp.full((1 << 20,), i, jnp.float32) for i in range(12)}

    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state, during = init(), []
    with opened(tmp_path, keep=3) as checkpoints:
        for number in range(1, 4):
            wanted = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(number, state, {})
            during.append(number in steps_on_disk(tmp_path))
            for _ in range(5):
                old, state = state, step(state)
            assert all(leaf.is_deleted() for leaf in old.values())
            checkpoints.wait()
            assert number in steps_on_disk(tmp_path)
            saved = saved_state(tmp_path, number)
            assert_same_bits(saved, wanted)
    assert not any(during), "save waited for the disk"


FULL_DISK = """
import resource
from vit_jax import checkpoint
save = checkpoint.Checkpoints.save

def full(self, step, *rest):
    if step == {step}:
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    save(self, step, *rest)

checkpoint.Checkpoints.save = full
import sys, vit_jax.cli
sys.exit(vit_jax.cli.main())
"""


# A later save finds it out, or the end of the run.
@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(data_dir, tmp_path, step, capsys):
    config = short(data_dir, save_every=2, train__best_metric="")
    config.evals = {}  # nothing that compiles late: the compilation cache's disk is full too
    flags = (
        f"--config={save_recipe(config, tmp_path / 'recipe.py')}",
        f"--workdir={tmp_path / 'run'}",
    )
    code = FULL_DISK.format(step=step)
    failed = subprocess.run(
        [sys.executable, "-c", code, "train", *flags], capture_output=True, text=True, timeout=240
    )
    # TensorStore's threads may add words of their own while the process ends.
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("vit-jax:")]
    assert failed.returncode == 1
    assert re.fullmatch(
        rf"vit-jax: saving to \S+ failed \(.+\); checkpoint {step - 2} is whole: "
        r"free the disk and start again\.",
        line,
    )
    assert steps_on_disk(tmp_path / "run")[-1] == step - 2
    if step == 6:
        return
    run(config, tmp_path / "run")  # there is room again
    assert f"step {step - 1}/6" in capsys.readouterr().out.splitlines()[2]
    assert [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row] == [*range(1, 7)]


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "int32", "uint8"]),
    bit=st.integers(0, 7),
    place=st.integers(0, 6 * 5 - 1),
)
def test_a_checksum_sees_every_bit_and_every_exchange(dtype, bit, place):
    x = np.asarray(jnp.arange(1, 31, dtype=dtype).reshape(6, 5))
    flipped = np.frombuffer(x.tobytes(), np.uint8).copy()
    flipped[place * x.itemsize + bit % x.itemsize] ^= 1 << bit
    flipped = np.frombuffer(flipped.tobytes(), x.dtype).reshape(x.shape)
    exchanged = x[[*range(1, 6), 0]]
    values = checksums(
        {"x": jnp.asarray(x), "f": jnp.asarray(flipped), "e": jnp.asarray(exchanged)}
    )
    assert len(set(values.values())) == 3


def test_a_checksum_is_the_same_on_any_mesh():
    x = jnp.arange(64.0).reshape(8, 8)
    mesh = make_mesh()
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "data")))
    assert checksums({"x": x}) == checksums({"x": spread})


def test_a_checksum_of_bools():
    one = checksums({"x": jnp.array([True, False])})
    assert one != checksums({"x": jnp.array([False, True])})


def flip_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_byte_in_the_data_is_noticed(tmp_path, place):
    state = {"w": jax.random.normal(jax.random.key(0), (64, 64)), "b": jnp.zeros(8)}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with opened(tmp_path) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
    files = (tmp_path / "checkpoints" / "4" / "state").rglob("d/*")
    largest = max(files, key=lambda path: path.stat().st_size)
    flip_byte(largest, int(place * largest.stat().st_size))
    with opened(tmp_path) as checkpoints:
        with pytest.raises(
            OSError, match=r"4 is damaged \(.*\); move it away to go on from 3"
        ) as e:
            checkpoints.restore(4, abstract)
        assert "\n" not in str(e.value)
        assert_same_bits(checkpoints.restore(3, abstract)[0], state)


def test_a_data_file_that_was_cut_is_told_in_one_line(tmp_path):
    place = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec())  # as runs have it
    state = jax.device_put({"w": jax.random.normal(jax.random.key(0), (64, 64))}, place)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(4, state, {})
        checkpoints.wait()
    files = (tmp_path / "checkpoints" / "4" / "state").rglob("d/*")
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    wanted = pytest.raises(OSError, match="4 is damaged")
    with opened(tmp_path) as checkpoints, wanted as caught:
        checkpoints.restore(4, abstract)
    assert "\n" not in str(caught.value)


def test_other_numbers_than_were_saved_are_noticed(tmp_path, monkeypatch):
    state = {"w": jnp.ones((4, 4))}
    with opened(tmp_path) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr("vit_jax.checkpoint.checksums", lambda leaves: {"w": 1})
            checkpoints.save(1, state, {})
        checkpoints.wait()
        with pytest.raises(OSError, match="damaged .w is not what was saved.; there is no older"):
            place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            checkpoints.restore(1, {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=place)})


@pytest.mark.parametrize(
    ("meta", "error", "words"),
    [
        ({}, OSError, "1 is damaged .its meta data holds no checksums.; there is no older one"),
        ({"checksums": {"v": 1}}, OSError, "1 is damaged .w is not what was saved."),
        ({"format": 99}, ValueError, "1 was written by a newer vit_jax .format 99, .* pip install"),
    ],
)
def test_other_meta_data_are_told_in_one_line(tmp_path, meta, error, words):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones((4, 4))}, {})
        checkpoints.wait()
        assert checkpoints.meta(1).keys() == {"format", "checksums"}
    (path,) = (tmp_path / "checkpoints" / "1" / "meta").glob("*metadata*")
    path.write_text(json.dumps(meta))
    wanted = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=place)}
    with opened(tmp_path) as checkpoints, pytest.raises(error, match=words) as raised:
        checkpoints.restore(1, wanted)
    assert "\n" not in str(raised.value)


def test_a_lost_file_is_told_in_one_line(data_dir, tmp_path):
    config = short(data_dir, save_every=3)
    run(config, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "6" / "state").rglob("manifest.ocdbt"):
        path.unlink()
    with pytest.raises(
        OSError, match=r"6 is damaged \(.*\); move it away to go on from 3"
    ) as error:
        run(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_leaf_keeps_its_name_and_type(tmp_path):
    state = {"a": {"b": jnp.ones((2, 3), jnp.bfloat16)}, "n": jnp.uint8(7)}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"step": 3, "time": time.time(), "mean": (0.5, 0.5)})
        checkpoints.wait()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        restored, meta = checkpoints.restore(3, abstract)
    assert_same_bits(restored, state)
    assert named_leaves(restored).keys() == {"a/b", "n"}
    assert meta["step"] == 3 and meta["mean"] == [0.5, 0.5]
