"""The training step on every mesh, by pmap and in parts: the same numbers, and nothing twice."""

import contextlib
import functools
import re

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType

from tests.recipes import tiny
from tests.runs import assert_same_bits, deterministic_rows, run, short
from vit_jax import evaluation as evaluation_lib
from vit_jax import hlo
from vit_jax import train as train_lib
from vit_jax import trainer as trainer_lib
from vit_jax.checkpoint import Checkpoints, unstack
from vit_jax.data.sources import dataset_info
from vit_jax.feeding import pad_batch, put_batch, put_parts
from vit_jax.sharding import AXES, layout, make_mesh
from vit_jax.tree import named_leaves

BATCH, STEPS = 32, 20
WHOLE = {"scan": True, "remat": "full"}


def parts_and_state(data_dir, mesh, **leaves):
    """What a run builds, its state on the mesh; dropout, drop path and mixup are on."""
    config = tiny(data_dir, batch_size=BATCH, model__num_heads=4, **leaves)
    parts, init = train_lib.make_parts(config, dataset_info("digits", data_dir=data_dir))
    offload = parts.options.offload_opt_state
    abstract = train_lib.abstract_state(init, mesh, offload=offload)
    places = jax.tree.map(lambda x: x.sharding, abstract)
    return parts, jax.jit(init, out_shardings=places)()


def batches():
    """Random images; each time others are padding, and always all that the last device has."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {
            "image": rng.integers(0, 256, (BATCH, 8, 8, 3)).astype(np.uint8),
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
            "mask": (rng.random(BATCH) < 0.7) & (np.arange(BATCH) < BATCH - BATCH // 8),
        }


def losses_on(data_dir, mesh, **leaves):
    """{metric: [steps]} of the first steps."""
    parts, state = parts_and_state(data_dir, mesh, **leaves)
    put = put_parts if parts.options.spmd == "pmap" else put_batch
    step = train_lib.make_step(parts, state, mesh)
    rows = []
    for batch in batches():
        state, metrics = step(state, put(batch, mesh))
        rows.append({key: float(value) for key, value in metrics.items()})
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


@functools.cache
def losses_of_one_device(data_dir):
    return losses_on(data_dir, make_mesh(devices=jax.devices()[:1]))


def options(scan=False, remat="none", accumulate=1, **train):
    train = {f"train__{key}": value for key, value in train.items()}
    return {"model__scan": scan, "model__remat": remat, "train__accumulate": accumulate} | train


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, leaves",
    [
        ({"data": 1}, options(spmd="pmap")),
        ({"data": 1}, options(**WHOLE, accumulate=4)),
        ({}, options()),
        ({}, options(**WHOLE)),
        ({}, options(accumulate=2)),
        ({}, options(spmd="pmap")),
        ({}, options(spmd="pmap", **WHOLE, accumulate=2)),
        ({"fsdp": 2}, options()),
        ({"fsdp": 2}, options(scan=True, remat="dots")),
        ({"fsdp": 2}, options(**WHOLE, accumulate=2)),
        ({"fsdp": 2}, options(remat="offload", offload_opt_state=True)),
        ({"fsdp": 2, "tensor": 2}, options()),
        ({"fsdp": 2, "tensor": 2}, options(**WHOLE)),
        ({"fsdp": 2, "tensor": 2}, options(remat="full", accumulate=2)),
        ({"replica": 2, "data": 1, "fsdp": 4}, options(scan=True, accumulate=2)),
        ({"data": 1, "tensor": 8}, options()),  # more than there are heads
    ],
    ids=str,
)
def test_every_mesh_gives_the_losses_of_one_device(data_dir, sizes, leaves):
    wanted = losses_of_one_device(data_dir)
    devices = jax.devices()[:1] if sizes == {"data": 1} else None
    found = losses_on(data_dir, make_mesh(**sizes, devices=devices), **leaves)
    assert len(set(wanted["loss"])) > 15  # it moves
    assert found.keys() == wanted.keys()
    for key in wanted:
        tolerance = 1e-5 if key in ("loss", "accuracy") else 1e-4
        np.testing.assert_allclose(found[key], wanted[key], rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_fsdp_over_three_sides_of_a_torus_gives_the_same_losses(data_dir, scan):
    """Matrices are split both ways, and gathered and scattered one way after the other."""
    mesh = torus_mesh()
    _, state = parts_and_state(data_dir, mesh, model__scan=scan)
    kernel = state.params["backbone"]["blocks"]
    kernel = (kernel if scan else kernel[0])["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-2:] == (32 // 4, 64 // 2)
    found = losses_on(data_dir, mesh, model__scan=scan)
    wanted = losses_of_one_device(data_dir)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_cross_slices_in_parts_give_the_same_losses(
    data_dir, monkeypatch, accumulate
):
    monkeypatch.setattr(train_lib, "num_slices", lambda mesh: mesh.shape["replica"])
    mesh = make_mesh(replica=2, data=4)
    leaves = options(accumulate=accumulate)
    parts, state = parts_and_state(data_dir, mesh, **leaves)
    assert train_lib.sums_by_slices(parts, mesh)
    assert not train_lib.sums_by_slices(parts, make_mesh(replica=2, data=2, fsdp=2))
    found, wanted = losses_on(data_dir, mesh, **leaves), losses_of_one_device(data_dir)
    assert found.keys() == wanted.keys()
    for key in wanted:
        tolerance = 1e-5 if key in ("loss", "accuracy") else 1e-4
        np.testing.assert_allclose(found[key], wanted[key], rtol=0, atol=tolerance, err_msg=key)
    batch = put_batch(next(batches()), mesh)
    text = train_lib.make_step(parts, state, mesh).lower(state, batch).compile().as_text()
    across = [
        each for each in hlo.collectives(hlo.parse(text), 8) if hlo.crosses(each, [0] * 4 + [1] * 4)
    ]
    numbers = sum(each.total_bytes / 4 for each in across)
    bundle = -(-parts.num_params // (4 * 16 * 128)) * 16 * 128  # a quarter, in whole tiles
    assert bundle <= numbers < bundle + 100  # and scalars: of two slices a ring sends all once


def torus_mesh():
    """As `make_mesh` has it for fsdp=8 over 2 × 2 × 2 chips, with the plane twice as large."""
    devices = np.array(jax.devices()).reshape(1, 1, 4, 2, 1)
    return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.slow
def test_a_compiled_step_holds_the_state_once_and_updates_it_in_shares(data_dir):
    mesh = make_mesh(data=1, fsdp=8)
    parts, state = parts_and_state(data_dir, mesh)
    batch = put_batch(next(batches()), mesh)
    compiled = train_lib.make_step(parts, state, mesh).lower(state, batch).compile()
    rows = layout(state)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    size = sum(row.bytes_per_device for row in rows)
    assert size < sum(x.nbytes for x in jax.tree.leaves(state)) / 6  # an eighth, and biases whole
    # Every array of the new state takes the place of the old one's.
    assert memory.alias_size_in_bytes == size
    assert memory.output_size_in_bytes - size < 1000  # the metrics
    aliases = re.search(r"input_output_alias=\{(.*?) \}", text)[1]
    assert aliases.count("-alias") == len(rows)
    # Adam's square root is taken of an eighth of each large kernel, and nowhere of a whole one.
    roots = set(re.findall(r"f32\[([\d,]+)\]\S* sqrt\(", text))
    assert {"4,96", "4,32", "4,64", "8,32"} <= roots
    assert not roots & {"32,96", "32,32", "32,64", "64,32"}


@pytest.mark.slow
def test_heads_and_channels_are_split_over_tensor(data_dir):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    parts, state = parts_and_state(data_dir, mesh)
    batch = put_batch(next(batches()), mesh)
    text = train_lib.make_step(parts, state, mesh).lower(state, batch).compile().as_text()
    tokens = 8  # patches of 4 × 2 pixels
    found = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(r"f32\[([\d,]+)\]\S* exponential\(", text)
        if shape.endswith(f"{tokens},{tokens}")
    ]
    # A softmax is one of a quarter of the batch and two of the four heads.
    assert found and max(found) == BATCH // 4 * 2 * tokens * tokens


MESHES = ({}, {"fsdp": 4}, {"data": 1, "fsdp": 2, "tensor": 4}, {"replica": 2, "fsdp": 2})


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_read_on_any_other(data_dir, tmp_path):
    config = short(data_dir, model__scan=True, train__offload_opt_state=True)
    _, init = train_lib.make_parts(config, dataset_info("digits", data_dir=data_dir))
    abstract = train_lib.abstract_state(init, make_mesh(fsdp=2, tensor=2), offload=True)
    state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
    wanted = unstack(named_leaves(state))
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        for scan in (False, True):
            config.model.scan = scan
            _, init = train_lib.make_parts(config, dataset_info("digits", data_dir=data_dir))
            for sizes in MESHES:
                abstract = train_lib.abstract_state(init, make_mesh(**sizes), offload=scan)
                restored, _ = checkpoints.restore(1, abstract)
                assert_same_bits(unstack(named_leaves(restored)), wanted)
                for leaf, place in zip(*map(jax.tree.leaves, (restored, abstract)), strict=True):
                    assert leaf.sharding == place.sharding


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit_and_is_evaluated_alike_on_every_mesh(data_dir, tmp_path):
    leaves = {"mesh__fsdp": 4, "train__accumulate": 2, "batch_size": 32, "train__ema_decay": 0.5}
    straight, results = run(short(data_dir, **leaves, save_every=3), tmp_path / "straight")
    run(short(data_dir, **leaves, save_every=3), tmp_path / "resumed")
    for name in ("checkpoints/6", "metrics.jsonl"):
        path = epath.Path(tmp_path / "resumed") / name
        path.rmtree() if path.is_dir() else path.unlink()
    resumed, _ = run(short(data_dir, **leaves, save_every=3), tmp_path / "resumed")
    assert_same_bits(straight.state, resumed.state)
    whole, part = (deterministic_rows(tmp_path / name) for name in ("straight", "resumed"))
    assert part and part.items() <= whole.items()
    for sizes in MESHES:
        config = short(data_dir, **{f"mesh__{key}": value for key, value in sizes.items()})
        _, found = evaluation_lib.evaluate_checkpoint(config, epath.Path(tmp_path / "straight"))
        assert found["test/count"] == results["test/count"] == 360
        assert found == pytest.approx(results, abs=1e-5)


@pytest.mark.parametrize("sizes", MESHES)
def test_padding_counts_nothing_twice(sizes):
    mesh = make_mesh(**sizes)
    for size in (1, 8, 39):
        batch = {"label": np.arange(size), "mask": np.arange(size) % 3 > 0}
        padded = put_batch(pad_batch(batch, mesh), mesh)
        found, mask = (np.asarray(padded[key]) for key in ("label", "mask"))
        np.testing.assert_array_equal(found[mask], batch["label"][batch["mask"]])


@pytest.mark.parametrize(
    "leaves, words",
    [
        ({"train__spmd": "pjit"}, "spmd='pjit' is unknown; choose 'jit' or 'pmap'"),
        ({"train__spmd": "pmap", "mesh__fsdp": 2}, "spmd='pmap' splits the batch alone"),
        ({"train__spmd": "pmap", "batch_size": 24}, "multiple of the 8 devices × 2 .* try 32"),
        ({"train__spmd": "pmap", "train__offload_opt_state": True}, "needs spmd='jit'"),
        ({"train__accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"train__accumulate": 2}, "× 2 accumulated parts × 2 examples that are mixed; try 32"),
        ({"mesh__fsdp": 3}, "mesh .*fsdp=3.* does not multiply to the 8 devices"),
    ],
)
def test_what_cannot_be_split_is_said(data_dir, tmp_path, monkeypatch, leaves, words):
    monkeypatch.setattr(trainer_lib.Trainer, "_compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=words):
        run(tiny(data_dir, **leaves), tmp_path / "run")


@pytest.mark.parametrize("leaves", [{"train__spmd": "pmap"}, {"train__accumulate": 2}])
def test_a_loss_that_compares_examples_is_not_split(data_dir, monkeypatch, leaves):
    supervised = train_lib.OBJECTIVES["supervised"]
    monkeypatch.setattr(supervised, "couples_examples", True)
    info = dataset_info("digits", data_dir=data_dir)
    train_lib.make_parts(tiny(data_dir), info)
    with pytest.raises(ValueError, match="the loss of Supervised compares all its examples"):
        train_lib.make_parts(tiny(data_dir, **leaves), info)


@pytest.mark.parametrize(
    "leaves, words",
    [
        ({"train__offload_opt_state": True}, "train.offload_opt_state=True wants .* cpu backend"),
        ({"model__remat": "offload"}, "model.remat='offload' wants .* cannot .* turn it off"),
    ],
)
def test_host_memory_that_is_not_there_is_said(data_dir, tmp_path, monkeypatch, leaves, words):
    monkeypatch.setattr("vit_jax.sharding.HOST_MEMORY", "another")
    with pytest.raises(ValueError, match=words):
        run(tiny(data_dir, **leaves), tmp_path / "run")
